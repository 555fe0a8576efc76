"""The served page, asked as gradio's client asks it, by well-meaning visitors and by others."""

import http.client
import io
import json
import os
import resource
import struct
import urllib.error
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ilvr_lightning.app import server
from tests.support.paths import ROOT

CONTROLS = {"preset": "draft", "factor": 4, "let_go_at": 0, "seed": 0, "num_samples": 2, "further": "--steps 3"}


class Visitor:
    """A session with the page."""

    def __init__(self, served: Any) -> None:
        gradio_client = pytest.importorskip("gradio_client")
        self.client = gradio_client.Client(served.local_url, verbose=False)
        self.model = served.names[0]

    def take(self, path: Path) -> tuple[Any, ...]:
        from gradio_client import handle_file

        found: tuple[Any, ...] = self.client.predict(
            handle_file(str(path)), self.model, *CONTROLS.values(), api_name="/take"
        )
        return found

    def draw(self, **changes: Any) -> list[Any]:
        """What is shown after each step."""
        job = self.client.submit(self.model, *{**CONTROLS, **changes}.values(), api_name="/draw")
        job.result(timeout=120)
        return [each[0] for each in job.outputs()]


def answered(url: str, content: bytes | None = None, kind: str = "application/json", length: int = -1) -> int:
    """The status of an answer; with a length, to a request that only claims to have a body of it."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=120)
    headers = {"Content-Type": kind, **({"Content-Length": str(length)} if length >= 0 else {})}
    connection.request("GET" if content is None else "POST", parts.path, content, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def called(served: Any, name: str, first: object) -> str:
    """What the server answers to a call that no client has checked."""
    url, data = f"{served.local_url}gradio_api/call/{name}", [first, served.names[0], *CONTROLS.values()]
    asked = urllib.request.Request(url, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=120) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{url}/{event}", timeout=120) as answer:
            text: str = answer.read().decode()
            return text
    except urllib.error.HTTPError as error:
        return error.read().decode()


def uploaded(served: Any, content: bytes) -> dict[str, Any]:
    """A file that the server has taken."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    url, kind = f"{served.local_url}gradio_api/upload", "multipart/form-data; boundary=x"
    with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind}), timeout=120) as answer:
        return {"path": json.load(answer)[0], "meta": {"_type": "gradio.FileData"}}


def png(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says that it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = zlib.compress(bytes(10**7))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Files that are no pictures, or more than that."""
    contents = {
        "bomb.png": png(50_000, 50_000), "limit.png": png(9_000, 9_000), "text.png": b"hello", "empty.png": b"",
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "script.pdf": b"%PDF-1.4\n", "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "recipe.png": with_recipe({"plan": {"sampler": "rm -rf"}}), "deep.png": with_recipe([[]]),
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in contents]


def with_recipe(recipe: object) -> bytes:
    """A PNG of one pixel with a text under our key."""
    info, file = PngInfo(), io.BytesIO()
    info.add_text("ilvr_lightning", json.dumps(recipe))
    Image.new("RGB", (1, 1)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def test_something_is_there_before_one_clicks(served: Any) -> None:
    with urllib.request.urlopen(f"{served.local_url}config", timeout=30) as answer:
        components = json.load(answer)["components"]
    values = {each["props"].get("elem_id"): each["props"].get("value") for each in components}
    assert values["result"].count("download=") == 4
    assert values["result"].count("<img") == 6
    assert len(values["compare"]) == 2 and values["picture"]["path"].endswith(".png")
    assert values["examples"].count("<button") == len(list((ROOT / "data" / "references").glob("*.png")))


def test_a_picture_is_taken_and_drawn_while_one_looks_on(served: Any, images: Path) -> None:
    visitor = Visitor(served)
    picture, said, *_ = visitor.take(images / "00.png")
    assert Path(picture["path"] if isinstance(picture, dict) else picture).suffix == ".png"
    assert "10x9 pixels" in said
    frames = visitor.draw()
    assert frames[-1].count("download=&quot;") == 0 and frames[-1].count('download="00_N4_') == 2
    assert len(frames) > 1


def test_a_mistake_is_a_message(served: Any) -> None:
    visitor = Visitor(served)
    for changes, words in (({"further": "--ckpt x"}, "does not take --ckpt"), ({"factor": 3}, "--factor must divide")):
        with pytest.raises(Exception, match=words):
            visitor.draw(**changes)


def test_hostile_files_get_a_message(served: Any, hostile: list[Path], images: Path) -> None:
    visitor = Visitor(served)
    visitor.take(images / "00.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in hostile:
        picture, said, *_ = visitor.take(path)
        assert ("cannot be read" in said or "cannot be used" in said) == (path.name != "deep.png"), (path.name, said)
        assert str(served.folder) not in said
        if path.name != "deep.png":
            assert "00.png" in str(picture)  # the picture that was there
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB
    assert len(visitor.draw()) > 0


def test_a_hundred_hostile_visitors_at_once(served: Any, hostile: list[Path]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bombs = [path.read_bytes() for path in hostile[:2]]

    def attack(number: int) -> str:
        return called(served, "take", uploaded(served, bombs[number % 2] + b"%d" % number))

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(attack, range(100)))
    for answer in answers:
        assert "pixels" in answer or "queue" in answer.lower(), answer
    assert sum("pixels" in answer for answer in answers) >= server.MAX_WAITING / 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # kB
    assert len(Visitor(served).draw()) > 0


def test_requests_that_are_too_large(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, kind = f"{served.local_url}gradio_api/", "multipart/form-data; boundary=x"
    assert answered(f"{url}queue/join", b"", length=server.MAX_REQUEST + 1) == 413
    assert answered(f"{url}upload", b"", kind, length=server.MAX_UPLOAD + 1) == 413
    monkeypatch.setattr(server, "MAX_FOLDER", 0)
    assert answered(f"{url}upload", b"--x--", kind) == 507


def test_files_of_the_machine_are_not_served(served: Any, trained: Path) -> None:
    for path in ("/etc/passwd", ROOT / "README.md", trained / "checkpoints" / "last.ckpt", os.path.expanduser("~")):
        assert answered(f"{served.local_url}gradio_api/file={path}") in (403, 404)
    example = next((ROOT / "data" / "references").glob("*.png"))
    assert answered(f"{served.local_url}gradio_api/file={example}") == 200


@pytest.mark.parametrize("path", ["/etc/passwd", str(ROOT / "README.md"), "http://example.com/x.png"])
def test_a_path_that_was_not_uploaded_is_refused(path: str, served: Any) -> None:
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for first in (given, {"path": path}, {**given, "url": "http://example.com/x.png"}):
        answer = called(served, "take", first)
        assert "event: error" in answer, answer
    answer = called(served, "take_drawing", {"background": given, "layers": [], "composite": None})
    assert "event: error" in answer, answer


def test_an_editor_keeps_nothing_in_memory(served: Any) -> None:
    for component in served.config["components"]:
        if component["type"] == "imageeditor":
            body = json.dumps({"component_id": component["id"], "fn_name": "accept_blobs", "session_hash": "x",
                               "data": {"type": "layer", "index": 10**9, "id": "x"}})  # fmt: skip
            assert answered(f"{served.local_url}gradio_api/component_server", body.encode()) == 404


def test_nothing_but_this_machine_is_listened_to(served: Any) -> None:
    assert served.local_url.startswith("http://127.0.0.1:")
    assert served.share_url is None
