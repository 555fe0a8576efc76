"""Serves the page to this machine alone, with limits; all that is written goes into one temporary folder."""

import os
import signal
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ilvr_lightning.errors import UserError

MAX_UPLOAD = 30 * 2**20
"""An upload has at most this many bytes."""
MAX_REQUEST = 2**20
"""Any other request has at most this many bytes: it is held in memory."""
MAX_FOLDER = 2**30
"""No upload is taken while the temporary folder holds this many bytes. What is an hour old is removed."""
MAX_WAITING = 64
"""So many requests may wait; more get a message."""
MAX_SESSIONS = 100
"""What is shown is kept for so many visitors."""
COLOURS = {
    "body_background_fill": "back", "background_fill_primary": "card", "background_fill_secondary": "back",
    "block_background_fill": "card", "block_border_color": "line", "block_label_background_fill": "card",
    "block_label_text_color": "quiet", "block_title_text_color": "text", "block_info_text_color": "quiet",
    "body_text_color": "text", "body_text_color_subdued": "quiet", "border_color_primary": "line",
    "border_color_accent": "accent", "color_accent": "accent", "color_accent_soft": "back",
    "input_background_fill": "card", "input_border_color": "line", "panel_background_fill": "back",
    "button_primary_background_fill": "accent", "button_primary_background_fill_hover": "accent",
    "button_secondary_background_fill": "card", "button_secondary_background_fill_hover": "back",
    "button_secondary_border_color": "line", "button_secondary_text_color": "text", "slider_color": "accent",
}  # fmt: skip
"""gradio's colours by their names in page.css."""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for uploads and drawings, which is removed at the end; gradio must not be imported before."""
    with tempfile.TemporaryDirectory(prefix="ilvr_app_") as name:
        os.environ.update(
            GRADIO_TEMP_DIR=name, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", MPLCONFIGDIR=name
        )
        yield Path(name)


def serve(args: Namespace, folder: Path, **others: Any) -> Any:
    """Load the models, draw what is there before one clicks, and serve the page until Control-C.

    Args:
        args: as `parse_arguments` gives them.
        folder: of `temporary_folder`.
        others: passed on to gradio's `launch`.

    Returns:
        The page, a gradio.Blocks that is still served where `others` has prevent_thread_lock.

    Raises:
        UserError: gradio is missing, a checkpoint does not load, or the port is taken.
    """
    try:
        import gradio as gr
    except ImportError:
        raise UserError("app.py needs gradio; run pip install -e '.[app]', or make app") from None
    from starlette.middleware import Middleware

    from ilvr_lightning.app.models import Models
    from ilvr_lightning.app.page import HERE, REFERENCES, Page
    from ilvr_lightning.app.studio import Studio
    from ilvr_lightning.visual import pages

    page = Page(Studio(Models(args.ckpt, args.device)), folder).build()
    page.queue(max_size=MAX_WAITING)
    # The rest of page.css is for pages without gradio.
    colours = Path(pages.__file__).with_name("page.css").read_text("utf-8").partition("\n* {")[0]
    base = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    names = {name: colour for each, colour in COLOURS.items() for name in (each, f"{each}_dark")}
    try:
        page.launch(
            share=args.share,
            server_name=args.server_name,
            allowed_paths=[str(REFERENCES)],
            max_file_size=MAX_UPLOAD,
            state_session_capacity=MAX_SESSIONS,
            app_kwargs={"middleware": [Middleware(Limits, folder=folder)]},
            head=f"<style>{colours}</style>",  # gradio's `css` would lose the dark colours
            css=(HERE / "app.css").read_text("utf-8"),
            theme=base.set(
                **{name: f"var(--{colour})" for name, colour in names.items() if hasattr(base, name)},
                input_border_width="1px",
                input_border_width_dark="1px",
            ),
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            **others,
        )
        return page
    except OSError as error:
        raise UserError(
            f"{error}; set GRADIO_SERVER_PORT to another port, or --server-name to another address"
        ) from None


def end_by_signal() -> None:
    """Let SIGTERM end the program as Control-C does, so that the temporary folder is removed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Limits:
    """Refuses requests that are too large, and uploads while the folder is full, before any of it is read.

    Args:
        app: the application.
        folder: where uploads go.
    """

    def __init__(self, app: Any, folder: Path) -> None:
        self.app, self.folder, self.arriving = app, folder, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        given = dict(scope["headers"]).get(b"content-length", b"")
        size = int(given) if given.isdigit() else None
        if size is None or size > (MAX_UPLOAD if is_upload else MAX_REQUEST):
            await answer(send, 413, f"This is too large: a picture may have {MAX_UPLOAD // 2**20} MB.")
        elif is_upload and self._used() + self.arriving + size > MAX_FOLDER:
            await answer(send, 507, "There is no room for more pictures here; try again later.")
        else:
            self.arriving += size
            try:
                await self.app(scope, receive, send)
            finally:
                self.arriving -= size

    def _used(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


async def answer(send: Any, status: int, text: str) -> None:
    """Answer a request with a line of text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
