"""The page: its controls, and what they start."""

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from ilvr_lightning.app import pictures
from ilvr_lightning.app.drawings import LAYERS, save_drawing
from ilvr_lightning.app.models import Model
from ilvr_lightning.app.settings import MAX_CHARS, MAX_SAMPLES, Settings, read_reference, restore
from ilvr_lightning.app.studio import Drawn, Studio, remarks
from ilvr_lightning.data.images import to_image
from ilvr_lightning.diffusion.plan import PRESETS
from ilvr_lightning.errors import UserError

HERE = Path(__file__).parent
REFERENCES = HERE.parents[1] / "data" / "references"
"""The examples, in a clone of the repository."""
FIRST_EXAMPLE = "field_copper_on_blue.png"
"""The reference that is there at the start."""
FIRST_FACTOR = 16
"""The N that is there at the start, or the nearest one that the model allows."""
MAX_KNOWN = 12
"""So many references of a visitor are known; a PNG that was drawn of one of them gets it back."""
RUNNING = 8
"""So many requests of one kind run at a time and take turns; others wait."""
STOPS_IN_RANGE = 20
"""The slider of the range has so many stops."""
PALETTE = ["#1d1d1b", "#ffffff", "#8a5a3b", "#f0c8a0", "#d9a521", "#c0392b", "#3157d5", "#3b8f4d"]
"""The colours of the brush."""
STOPS_HTML, STOPS_JS, SELECT_JS = ((HERE / name).read_text("utf-8") for name in ("stops.html", "stops.js", "select.js"))
PLAIN: dict[str, Any] = {"apply_default_css": False}


class Page:
    """Builds the page and answers its events.

    Args:
        studio: draws.
        folder: drawings are written there.
    """

    def __init__(self, studio: Studio, folder: Path) -> None:
        self.studio, self.models, self.folder = studio, studio.models, folder
        self.examples = sorted(
            map(str, REFERENCES.glob("*.png")), key=lambda path: (not path.endswith(FIRST_EXAMPLE), path)
        )

    def build(self) -> gr.Blocks:
        """The page, with samples on it that are drawn here and now."""
        name, start, drawn = self.models.names[0], self.examples[0] if self.examples else "", Drawn()
        model = self.models.load(name)
        settings = Settings(factor=nearest(model, FIRST_FACTOR))
        if start:
            *_, drawn = self.studio.draw("start", name, start, settings)
        with gr.Blocks(title="ILVR", analytics_enabled=False, delete_cache=(600, 3600)) as page:
            gr.HTML((HERE / "header.html").read_text("utf-8"), **PLAIN)
            self.known = gr.State((start,) if start else (), time_to_live=3600)
            self.shown = gr.State(drawn, time_to_live=3600)
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=1, min_width=280, elem_id="reference"):
                    self._build_reference(start, model)
                    with gr.Accordion("Settings", open=False):
                        self._build_settings(name, settings)
                with gr.Column(scale=3, min_width=300):
                    with gr.Column(elem_id="sliders"):
                        self.factor = stops("N", "close to the reference", "free", **factors(model, settings.factor))
                        self.let_go_at = stops(
                            "Let go at", "follow to the end", "let go early", **ranges(model, settings.let_go_at)
                        )
                    with gr.Row(elem_id="drawn"):
                        with gr.Column(scale=5, min_width=300):
                            self.result = gr.HTML(drawn.html, js_on_load=SELECT_JS, elem_id="result", **PLAIN)
                        with gr.Column(scale=4, min_width=280):
                            self.compare = gr.ImageSlider(
                                pair(drawn, 0), show_label=False, interactive=False, format="png", buttons=[],
                                elem_id="compare",
                            )  # fmt: skip
                    self.sweep = gr.Button("Draw a sheet of every N with every range", size="sm", elem_id="sweep")
                    self.sheet = gr.HTML(elem_id="sheet", **PLAIN)
            self._connect()
        return page

    def _build_reference(self, start: str, model: Model) -> None:
        with gr.Tabs():
            with gr.Tab("Picture"):
                self.picture = gr.Image(
                    start or None, type="filepath", sources=["upload", "clipboard"], show_label=False, height=300,
                    buttons=[], elem_id="picture",
                )  # fmt: skip
                # Files are read by data.images with its limits, never by gradio.
                self.picture.preprocess = self._file
            with gr.Tab("Draw"):
                self.editor = gr.ImageEditor(
                    sources=["upload", "clipboard"], show_label=False, transforms=(), canvas_size=(512, 512),
                    fixed_canvas=True, height=380, buttons=[], elem_id="editor",
                    layers=gr.LayerOptions(allow_additional_layers=False, layers=list(LAYERS)),
                    brush=gr.Brush(default_size=32, colors=PALETTE, default_color=PALETTE[0]),
                )  # fmt: skip
                # An editor that is an input of an event sends its layers again at every step of every later event.
                # This one is never shown: it only holds what is drawn for the event.
                self.drawing = gr.ImageEditor(visible=False)
                self.drawing.preprocess = self._layers
                for editor in (self.editor, self.drawing):
                    editor.accept_blobs = None  # it would keep in memory whatever it is sent
                gr.HTML("Cover on the layer Mask what the model may change freely.", elem_classes="quiet", **PLAIN)
                self.use = gr.Button("Use this drawing", size="sm", variant="primary")
        self.remarks = gr.HTML(self._remarks(start, model) if start else "", elem_id="remarks", **PLAIN)
        self.gallery = gr.HTML(pictures.thumbnails(self.examples), js_on_load=SELECT_JS, elem_id="examples", **PLAIN)

    def _build_settings(self, name: str, settings: Settings) -> None:
        self.model = gr.Dropdown(self.models.names, value=name, label="Model")
        self.preset = gr.Dropdown(
            list(PRESETS),
            value=settings.preset,
            label="Preset",
            info="draft is the quickest; best takes 5 times as long.",
        )
        self.num_samples = gr.Slider(1, MAX_SAMPLES, value=settings.num_samples, step=1, label="Samples")
        self.seed = gr.Number(settings.seed, label="Seed", precision=0, minimum=0, maximum=2**32 - 1)
        self.further = gr.Textbox(
            "", label="Further settings", placeholder="--exact-low-band --steps 15", max_length=MAX_CHARS,
            info="Flags of sample.py, as python sample.py --help explains them.",
        )  # fmt: skip

    def _connect(self) -> None:
        """What the controls start."""
        controls = [self.preset, self.factor, self.let_go_at, self.seed, self.num_samples, self.further]
        asked = [self.model, self.known, *controls]
        common: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": RUNNING}
        drawing = {
            **common, "fn": self.draw, "inputs": asked, "outputs": [self.result, self.compare, self.shown],
            "trigger_mode": "multiple",  # a newer request stops the older one
        }  # fmt: skip
        taking = {**common, "outputs": [self.picture, self.known, self.remarks, self.model, *controls]}
        gr.on(
            [self.factor.input, self.let_go_at.input, self.seed.submit, self.seed.blur, self.num_samples.release,
             self.preset.input, self.further.submit],
            **drawing, api_name="draw",
        )  # fmt: skip
        again = {**drawing, "api_visibility": "private"}
        self.picture.upload(self.take, [self.picture, *asked], **taking, api_name="take").then(**again)
        drawn = self.use.click(None, self.editor, self.drawing, js="drawn => drawn", api_visibility="private")
        drawn.then(self.take_drawing, [self.drawing, *asked], **taking, api_name="take_drawing").then(**again)
        self.gallery.select(self.take_example, asked, **taking, api_visibility="private").then(**again)
        self.model.input(
            self.choose_model, [self.model, self.known, self.factor], [self.factor, self.let_go_at, self.remarks],
            **common, api_name="choose_model",
        ).then(**again)  # fmt: skip
        self.result.select(self.choose_sample, self.shown, self.compare, **common, api_visibility="private")
        self.sweep.click(self.draw_sheet, asked, self.sheet, **common, trigger_mode="multiple", api_name="sheet")

    def draw(self, request: gr.Request, name: str, known: tuple[str, ...], *controls: Any) -> Iterator[tuple[Any, ...]]:
        """The samples while they are drawn: what the page shows, the pair to compare, and what it is."""
        with told():
            settings, reference = Settings.of_controls(*controls), known[0] if known else ""
            for drawn in self.studio.draw(visitor_of(request), name, reference, settings):
                yield drawn.html, *((pair(drawn, 0), drawn) if drawn.samples else (gr.skip(), gr.skip()))

    def draw_sheet(self, request: gr.Request, name: str, known: tuple[str, ...], *controls: Any) -> Iterator[str]:
        """The sheet of every N with every range, as far as it is drawn."""
        with told():
            settings, reference = Settings.of_controls(*controls), known[0] if known else ""
            yield from self.studio.sheet(visitor_of(request), name, reference, settings)

    def choose_sample(self, event: gr.EventData, shown: Drawn) -> Any:
        """Compare another sample with the reference."""
        return pair(shown, int(event.index)) if shown.samples else gr.skip()

    def choose_model(self, name: str, known: tuple[str, ...], factor: int) -> tuple[Any, ...]:
        """The sliders and the remarks for another model."""
        with told():
            model = self.models.load(name)
            said = self._remarks(known[0], model) if known else ""
            return gr.update(**factors(model, nearest(model, int(factor)))), gr.update(**ranges(model, 0)), said

    def take_example(self, event: gr.EventData, name: str, known: tuple[str, ...], *controls: Any) -> tuple[Any, ...]:
        """Take one of the examples as the reference."""
        return self.take(self.examples[int(event.index) % len(self.examples)], name, known, *controls)

    def take_drawing(self, layers: Any, name: str, known: tuple[str, ...], *controls: Any) -> tuple[Any, ...]:
        """Take what is drawn as the reference."""
        try:
            return self.take(str(save_drawing(layers[0], layers[1], self.folder)), name, known, *controls)
        except UserError as error:
            return self._refused(error, known)

    def take(self, path: str | None, name: str, known: tuple[str, ...], *controls: Any) -> tuple[Any, ...]:
        """Take a picture as the reference, or the settings of a PNG of this project.

        Returns:
            The picture, the known references with the present one first, what is said of it, the model and the
            controls.
        """
        try:
            restored = restore(path or "", self.models, name, [*known, *self.examples])
            if restored is None:
                said = self._remarks(path or "", self.models.load(name))
                return path, known_with(path, known), said, *[gr.skip()] * (1 + len(controls))
            reference = restored.reference or (known[0] if known else None)
            s, name = restored.settings, restored.model or name
            model = self.models.load(name)
            sliders = gr.update(**factors(model, s.factor)), gr.update(**ranges(model, s.let_go_at))
            chosen = (name, s.preset, *sliders, s.seed, s.num_samples, s.further)
            return reference, known_with(reference, known), pictures.sentences(restored.notes), *chosen
        except UserError as error:
            return self._refused(error, known)

    def _refused(self, error: UserError, known: tuple[str, ...]) -> tuple[Any, ...]:
        """The outputs of `take` for what cannot be taken: the picture that was there, and why."""
        return known[0] if known else None, gr.skip(), pictures.sentences([message(error)]), *[gr.skip()] * 7

    def _file(self, payload: Any) -> str | None:
        """The file of an upload, a drawing or an example; gradio does not check every path that it is sent."""
        if payload is None:
            return None
        path = Path(payload.path).resolve()
        if not any(path.is_relative_to(folder.resolve()) for folder in (self.folder, REFERENCES)):
            raise gr.Error("This picture was not uploaded here.", print_exception=False)
        return str(path)

    def _layers(self, payload: Any) -> tuple[str | None, list[str | None]]:
        """The files of a drawing's background and layers."""
        if payload is None:
            return None, []
        return self._file(payload.background), [self._file(layer) for layer in payload.layers]

    def _remarks(self, reference: str, model: Model) -> str:
        return pictures.sentences(remarks(read_reference(reference, model)[0], model))


def stops(label: str, low: str, high: str, **chosen: Any) -> gr.HTML:
    """A slider over a few numbers, with what its ends mean."""
    return gr.HTML(html_template=STOPS_HTML, js_on_load=STOPS_JS, label=label, low=low, high=high, **chosen, **PLAIN)


def factors(model: Model, factor: int) -> dict[str, Any]:
    """The stops of the slider of N for a model, and the one that is chosen."""
    return {"stops": model.factors, "text": list(map(str, model.factors)), "value": factor}


def ranges(model: Model, let_go_at: int) -> dict[str, Any]:
    """The stops of the slider of the range for a model, and the one that is chosen."""
    every = sorted({let_go_at, *(round(model.timesteps * i / STOPS_IN_RANGE) for i in range(STOPS_IN_RANGE))})
    return {"stops": every, "text": [f"t = {t}" if t else "the end" for t in every], "value": let_go_at}


def nearest(model: Model, factor: int) -> int:
    """The value of N that a model allows and that is nearest to another."""
    return min(model.factors, key=lambda n: abs(n - factor))


def known_with(reference: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The known references, with one of them first."""
    return (reference, *(each for each in known if each != reference))[:MAX_KNOWN] if reference else known


def pair(drawn: Drawn, number: int) -> tuple[Any, Any] | None:
    """The reference and a sample, to be compared."""
    if not drawn.samples or drawn.reference is None:
        return None
    return to_image(drawn.reference), to_image(drawn.samples[number % len(drawn.samples)])


def visitor_of(request: gr.Request) -> str:
    """What tells the visitors apart."""
    return request.session_hash or uuid.uuid4().hex


def message(error: UserError) -> str:
    """What an error says, without the folders of this machine."""
    return re.sub(r"/[^\s:]*/", "", str(error))[:500]


@contextmanager
def told() -> Iterator[None]:
    """Show a mistake on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(message(error), print_exception=False) from None
