"""push, against a server on this machine that answers as the Hub does."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ilvr_lightning.checkpoints.__main__ import main
from ilvr_lightning.checkpoints.load import load_denoiser
from tests.support import cli
from tests.support.checkpoints import assert_same_weights, own_checkpoint


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory; their files are uploaded within the commit, as small ones are."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.asked.append((path, self.headers["authorization"]))
        if self.headers["authorization"] != "Bearer hf_writes":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":  # of the card
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.asked[-1] = (path, asked)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            known = name in self.repositories
            self.repositories.setdefault(name, {})
            return self._answer(409 if known else 200, {"url": f"{self.server_url}/{name}", "name": name})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer(200, {"commitUrl": f"{self.server_url}/{name}/commit/1", "commitOid": "1", "pullRequestUrl": None})

    def do_HEAD(self) -> None:
        name, _, file = self.path.strip("/").partition("/resolve/main/")
        if file in self.repositories.get(name, {}):
            self.send_response(200)
            self.send_header("X-Repo-Commit", "1")
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "1")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        self._answer(200, {"id": "someone/faces", "modelId": "someone/faces", "siblings": [], "sha": "1"})

    def _body(self) -> bytes:
        if length := self.headers["content-length"]:
            return self.rfile.read(int(length))
        parts = []
        while size := int(self.rfile.readline(), 16):  # in chunks
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def server_url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]

    def _answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.repositories, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_push(hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_checkpoint(tmp_path)
    assert main(["push", str(path), "someone/faces", "--private"]) == 0
    assert "uploaded     http://127.0.0.1" in capsys.readouterr().out
    assert "private" in str(dict(hub.asked)["/api/repos/create"])
    files = hub.repositories["someone/faces"]
    assert sorted(set(files) - {".gitattributes"}) == ["README.md", "model.safetensors"]
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    assert_same_weights(load_denoiser(path, say=None), load_denoiser(tmp_path / "model.safetensors", say=None))
    card = files["README.md"].decode()
    assert "16x16 px, 3 channels" in card and "| step | 1234 |" in card and "licence" in card
    assert str(tmp_path) not in card


def test_a_second_push_keeps_the_card(hub: type[Hub], tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path)
    assert main(["push", str(path), "someone/faces"]) == 0
    files = hub.repositories["someone/faces"]
    whole = len(files["model.safetensors"])
    files["README.md"] = b"edited"
    assert main(["push", str(path), "someone/faces", "--half"]) == 0
    assert files["README.md"] == b"edited"
    assert len(files["model.safetensors"]) < whole


def test_what_the_hub_refuses_is_one_line(
    hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_checkpoint(tmp_path)
    assert "log in by `hf auth login`" in cli.refused(main, capsys, "push", path, "not a name")
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    assert "push to someone/faces: " in cli.refused(main, capsys, "push", path, "someone/faces")
    assert hub.repositories == {}
