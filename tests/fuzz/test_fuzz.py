"""100 bad inputs of the 10,000 that python -m tests.fuzz runs; tests/system has a handful by the real command line."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.fuzz import inputs
from tests.fuzz.inputs import KINDS, SAMPLE, Case, case
from tests.fuzz.run import Sandbox

COUNT, SEED = 100, 0


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_let_in(kind: str, sandbox: Sandbox) -> None:
    """Status 2 and one line, a reported skip, or sound work; bounded memory and time; nothing executed or let out."""
    faults = {}
    for index in range(list(KINDS).index(kind), COUNT, len(KINDS)):
        made = case(sandbox.valid, SEED, index)
        if found := sandbox.run(made).faults:
            faults[f"{index} {made.what}"] = found
    assert not faults


def test_cases_are_replayed_by_their_index(sandbox: Sandbox) -> None:
    for index in (0, 5, 117, 5003, 9998):
        first, again = (case(sandbox.valid, 1, index) for _ in range(2))
        assert replace(first, files={}) == replace(again, files={})
        plain = [{k: v for k, v in made.files.items() if isinstance(v, bytes)} for made in (first, again)]
        assert plain[0] == plain[1]


def faults(sandbox: Sandbox, made: Case) -> str:
    return "; ".join(sandbox.run(made).faults)


def test_the_judge_sees_what_breaks_a_rule(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rule, with the code that keeps it taken away."""
    bad = inputs._picture_cases("--ref", "text.png", b"no picture", False)
    assert faults(sandbox, bad) == ""
    assert "it was accepted" in faults(sandbox, Case(what="valid", argv=SAMPLE, valid=False))
    assert "names none of --nothing" in faults(sandbox, replace(bad, names=("--nothing",)))

    def run(what: str, *words: str) -> None:
        found = faults(sandbox, bad)
        assert all(word in found for word in words), f"{what}: {found}"

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: pickle.loads(pickle.dumps(inputs.Harm("os.mkdir"))))
        run("executes", "unpickled", "changed outside the output folder", "it was executed")
    shutil.rmtree(sandbox.work / inputs.EXECUTED, ignore_errors=True)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: Path("../canary").write_text("gone"))
        run("writes elsewhere", "written elsewhere", "changed outside the output folder")
    (sandbox.root / "canary").write_text("canary")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *_, **__: torch.ones(200_000_000) and None)
        run("takes memory", "MB")
    with monkeypatch.context() as patch:
        patch.setattr(
            "ilvr_lightning.runtime.command._fail", lambda message, status: print(message, message, sep="\n") or status
        )
        run("says nothing", "0 lines on stderr")


def test_a_checkpoint_that_executes_is_seen(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    content = inputs.torch_zip(inputs.PICKLES["GLOBAL"])
    made = inputs._uses("pickle", "in/x.ckpt", {"in/x.ckpt": content}, False, 2)
    assert faults(sandbox, made) == ""
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: load(*args, **{**options, "weights_only": False}))
    assert "executed: os.system" in faults(sandbox, made)
