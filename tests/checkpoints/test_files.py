"""Reading files: recognised by their content, opened once, nothing executed, and every bad file refused in one line."""

import ctypes
import gc
import multiprocessing
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ilvr_lightning.checkpoints.files import is_intact, read_weights
from ilvr_lightning.checkpoints.load import describe_weights, identify, load_denoiser
from ilvr_lightning.errors import UserError
from tests.support import golden
from tests.support.checkpoints import adm_file, own_content, refused


@pytest.mark.parametrize("wrapper", ["model", "ema", "state_dict", "module", "bare", "ddim", "half", "safetensors"])
def test_wrappings_of_a_state_dict(wrapper: str, tmp_path: Path) -> None:
    state, other = golden.filled_state("plain"), {k: v + 1 for k, v in golden.filled_state("plain").items()}
    path = tmp_path / "x.bin"
    contents: dict[str, Any] = {
        "model": {"model": state, "step": 3},
        "ema": {"ema": state, "model": other},
        "state_dict": {"state_dict": {f"model.{k}": v for k, v in state.items()}},
        "module": {f"module.{k}": v for k, v in state.items()},
        "bare": state,
        "ddim": [other, {"state": {}}, 3, 4, state],
        "half": {k: v.half() for k, v in state.items()},
    }
    if wrapper == "safetensors":
        save_file(state, path)
    else:
        torch.save(contents[wrapper], path, _use_new_zipfile_serialization=wrapper != "bare")
    loaded = load_denoiser(path, overrides=golden.overrides("plain"), say=None)
    x, t = golden.array("unet/plain/x"), golden.array("unet/plain/t")
    with torch.no_grad():
        out = loaded.network(x, t)
    assert out.dtype == torch.float32 and not loaded.network.training
    # Weights rounded to half precision move the output by more than float32's own rounding.
    atol = 2e-2 if wrapper == "half" else 2e-5
    torch.testing.assert_close(out, golden.array("unet/plain/out"), rtol=0, atol=atol)
    if wrapper in ("ema", "ddim"):
        raw = load_denoiser(path, "raw", golden.overrides("plain"), say=None)
        assert torch.equal(raw.network.norm.weight, other["out.0.weight"])


def test_half_precision_is_loaded_as_float32(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in golden.filled_state("plain").items()}
    torch.save(state, tmp_path / "half.pt")
    loaded = load_denoiser(tmp_path / "half.pt", overrides=golden.overrides("plain"), say=None)
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    assert torch.equal(loaded.network.norm.weight, state["out.0.weight"].float())


def test_an_average_that_does_not_load_is_not_replaced_by_raw_weights(tmp_path: Path) -> None:
    state = golden.filled_state("plain")
    torch.save({"ema": {"shadow": 3}, "model": state}, tmp_path / "x.pt")
    message = refused(tmp_path / "x.pt")
    assert "holds no ema weights that can be loaded: found the keys ema, model; give --weights raw" in message
    assert load_denoiser(tmp_path / "x.pt", "raw", golden.overrides("plain"), say=None).image_shape == (3, 32, 32)


# --- opened once, mapped, and let go


@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_weights_are_mapped_and_read_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    if kind == "zip":
        adm_file(tmp_path, "plain", "x.pt")
    else:
        save_file(golden.filled_state("plain"), path)
    readers: dict[str, Callable[..., Any]] = {"zip": torch.load, "safetensors": load_file}
    opened: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        def read(*arguments: Any, **options: Any) -> Any:
            opened.append(name)
            return readers[name](*arguments, **options)

        return read

    monkeypatch.setattr(torch, "load", counting("zip"))
    monkeypatch.setattr("ilvr_lightning.checkpoints.files.load_file", counting("safetensors"))
    loaded = load_denoiser(path, overrides=golden.overrides("plain"), say=None)
    assert opened == [kind]
    assert not any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    state = read_weights(path)
    assert any(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert torch.equal(state.tensors["out.0.weight"], loaded.network.norm.weight)
    with path.open("r+b") as file:  # what is loaded is a copy: nothing that happens to the file can harm it
        file.truncate(0)
    assert bool(loaded.network.norm.weight.isfinite().all())


def kilobytes(name: str) -> int:
    """VmRSS or VmHWM, the largest VmRSS, of this process."""
    found = re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def peaks_of_loading(path: Path) -> tuple[list[int], int]:
    """kB that loading a file takes at most, in each of three attempts, and kB of the weights."""
    loaded, peaks = load_denoiser(path, say=None), []  # what a first load imports does not count
    for _ in range(3):
        del loaded
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory would be used again, and not count
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = kilobytes("VmRSS")
        loaded = load_denoiser(path, say=None)
        peaks.append(kilobytes("VmHWM") - before)
    return peaks, sum(4 * p.numel() for p in loaded.network.parameters()) // 1024


def test_memory_holds_weights_twice_at_most(tmp_path: Path) -> None:
    """Once in the network and once as pages of the mapped file, which the kernel may drop; never three times."""
    path = tmp_path / "last.ckpt"
    torch.save(own_content(channels=128, num_head_channels=64), path)  # with as many raw weights, which stay on disk
    with multiprocessing.get_context("spawn").Pool(1) as process:  # where no other test has left threads or memory
        peaks, weights = process.apply(peaks_of_loading, (path,))
    assert weights > 40_000
    assert min(peaks) < 2.4 * weights


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run in progress does with last.ckpt: never a mixture of two, nor the hash of one for weights of another."""
    path = adm_file(tmp_path, "plain")
    info = identify(path, overrides=golden.overrides("plain"))
    before = info.sha256
    torch.save({name: value + 1 for name, value in golden.filled_state("plain").items()}, tmp_path / "new.pt")
    os.replace(tmp_path / "new.pt", path)
    with pytest.raises(UserError, match="changed while it was read"):
        _ = info.sha256
    # What was mapped is the old file still.
    assert torch.equal(info.state.tensors["out.0.weight"], golden.filled_state("plain")["out.0.weight"])
    assert identify(path, overrides=golden.overrides("plain")).sha256 != before

    def describe_late(*args: Any) -> Any:
        os.utime(path, ns=(1, 1))
        return describe_weights(*args)

    monkeypatch.setattr("ilvr_lightning.checkpoints.load.describe_weights", describe_late)
    assert "changed while it was read" in refused(path, overrides=golden.overrides("plain"))


# --- nothing is executed


class Evil:
    """Unpickles by running a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(zipped: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "executed"
    content = golden.filled_state("plain") | {"extra": Evil(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert "other things than tensors" in message and "system" in message
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # so the plant would have worked


# --- what a file is, whatever its name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_named_safetensors_is_recognised_by_its_content(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save(golden.filled_state("plain"), path, _use_new_zipfile_serialization=zipped)
    loaded = load_denoiser(path, overrides=golden.overrides("plain"), say=None)
    assert torch.equal(loaded.network.norm.weight, golden.filled_state("plain")["out.0.weight"])


def test_a_header_whose_length_reads_like_a_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = golden.filled_state("plain")
    save_file(state, path, {"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    target = 0x4B50 if length < 0x4B50 else 0x14B50  # whose low bytes are "PK"
    save_file(state, path, {"note": "x" * (target - length)})
    start = path.read_bytes()[:2]
    assert start == b"PK"
    assert load_denoiser(path, overrides=golden.overrides("plain"), say=None).image_shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("page.safetensors", b"<!doctype html><title>not found</title>", "no checkpoint"),
        ("empty.safetensors", b"", "no checkpoint"),
        ("plain.pt", b"\x80\x02}q\x00.", "neither torch's nor safetensors'"),
        ("header.safetensors", struct.pack("<Q", 2**40) + b"{", "or it is damaged"),
    ],
)
def test_files_that_are_no_checkpoints(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refused(tmp_path / "missing.pt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert "there is no checkpoint" in refused(tmp_path / "pipe.ckpt")
    (tmp_path / "zeros.ckpt").symlink_to("/dev/zero")
    assert "there is no checkpoint" in refused(tmp_path / "zeros.ckpt")


# --- damage


def test_truncated_files(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    assert "its end is missing" in refused(path)
    path.write_bytes(b"not a checkpoint at all")
    assert "no checkpoint" in refused(path)
    path.write_bytes(b"")
    assert "no checkpoint" in refused(path)
    torch.save(golden.filled_state("plain"), path, _use_new_zipfile_serialization=False)
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    assert "no checkpoint" in refused(path)
    save_file(golden.filled_state("plain"), path)
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    assert "or it is damaged" in refused(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    assert is_intact(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not is_intact(path)
    assert "checksum is wrong" in refused(path)


def test_a_compressed_archive_is_not_mapped(tmp_path: Path) -> None:
    """Its checksums are right, but its bytes are not the weights'."""
    path = adm_file(tmp_path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert not is_intact(tmp_path / "new.pt")
    assert "or it is damaged" in refused(tmp_path / "new.pt")


def test_what_is_not_intact(tmp_path: Path) -> None:
    path = adm_file(tmp_path)
    complete = path.read_bytes()
    for size in (0, 10, len(complete) // 2, len(complete) - 1):
        path.write_bytes(complete[:size])
        assert not is_intact(path)
    assert not is_intact(tmp_path / "missing")
    assert not is_intact(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert not is_intact(tmp_path / "pipe")
