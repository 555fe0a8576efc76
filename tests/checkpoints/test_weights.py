"""Weights that do not load: of another kind, of impossible shapes, too many, too few, or not finite."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ilvr_lightning.checkpoints.load import identify
from ilvr_lightning.errors import UserError
from tests.support import golden
from tests.support.checkpoints import own_checkpoint, refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to_sparse(), "sparse_coo"),
        (lambda v: v.to(torch.int32), "int32"),
        (lambda v: v.to(torch.complex64), "complex64"),
        (lambda v: v.to("meta"), "on no device"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "qint8"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weights_of_another_kind(change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    state["out.0.weight"] = change(state["out.0.weight"])
    torch.save(state, tmp_path / "x.pt")
    assert message in refused(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("time_embed.0.weight", ()),
        ("time_embed.0.weight", (4,)),
        ("time_embed.0.weight", (4, 0)),
        ("input_blocks.0.0.weight", (3,)),
        ("out.2.weight", ()),
        ("output_blocks.x.0", (1,)),
        ("output_blocks.999999999.0.w", (1,)),
    ],
)
def test_state_dicts_of_impossible_shapes(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.save(golden.filled_state("plain") | {name: torch.zeros(shape)}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt")


def test_weights_that_the_file_does_not_hold(tmp_path: Path) -> None:
    """A kilobyte may claim terabytes: by strides of 0, or by weights that share their numbers."""
    state = {name: value.new_zeros(()).expand(value.shape) for name, value in golden.filled_state("plain").items()}
    torch.save(state, tmp_path / "x.pt")
    claims = r"x\.pt: the weights claim [\d,]+ bytes, but the file holds \d+"
    assert re.search(claims, refused(tmp_path / "x.pt"))
    storage = torch.zeros(max(value.numel() for value in state.values()))
    torch.save({name: storage[: value.numel()].view(value.shape) for name, value in state.items()}, tmp_path / "x.pt")
    assert "the weights claim" in refused(tmp_path / "x.pt")


def test_what_is_found_is_said(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, tmp_path / "other.pt")
    message = refused(tmp_path / "other.pt")
    assert "2 weights of an unknown network (fc.weight, fc.bias" in message and "what loads: " in message
    torch.save({"lr": 0.1, "epoch": 3}, tmp_path / "none.pt")
    assert "no checkpoint that loads: found the keys lr, epoch" in refused(tmp_path / "none.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "found Tensor" in refused(tmp_path / "tensor.pt")
    torch.save([], tmp_path / "list.pt")
    assert "found list" in refused(tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    assert "holds nothing" in refused(tmp_path / "folder")
    (tmp_path / "folder" / "a.txt").write_text("x")
    assert "holds a.txt" in refused(tmp_path / "folder")


def test_faults_are_counted_and_named(tmp_path: Path) -> None:
    overrides = golden.overrides("plain")
    state = golden.filled_state("plain")
    for name in list(state):
        if name.startswith("middle_block.0."):
            del state[name]
    state["extra"] = torch.zeros(1)
    state["out.0.weight"] = torch.zeros(7)
    torch.save(state, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt", overrides=overrides)
    assert "(12 faults)" in message
    assert message.count(";") == 5 and message.endswith("...")
    assert message.count("is missing") >= 4
    state = golden.filled_state("plain") | {"extra": torch.zeros(1), "out.0.weight": torch.zeros(7)}
    torch.save(state, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt", overrides=overrides)
    assert "extra is unexpected" in message and "out.0.weight is (7,), not (32,)" in message


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    state["out.0.weight"][3] = torch.nan
    torch.save(state, tmp_path / "x.pt")
    assert "not finite" in refused(tmp_path / "x.pt", overrides=golden.overrides("plain"))


def test_a_network_is_not_built_for_more_blocks_than_there_are_weights(tmp_path: Path) -> None:
    """A description of a kilobyte may call for millions of layers, which take minutes to make even without memory."""
    info = identify(own_checkpoint(tmp_path))
    model = replace(info.description.model, num_res_blocks=64)
    with pytest.raises(UserError, match=r"last\.ckpt: it describes 128 residual blocks, but holds \d+ weights"):
        replace(info, description=replace(info.description, model=model)).empty_network()
