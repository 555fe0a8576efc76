"""Formats: what the PNGs of a finished run are packed into."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import sample
from ilvr_lightning.errors import EXIT_REQUEUE
from ilvr_lightning.sampling import formats
from ilvr_lightning.sampling.folder import SampleFolder
from tests.support import cli
from tests.support.samples import flags, images, leftovers, listed, pixels, recipe_text

Run = Callable[..., Path]


def test_npz_holds_the_images_in_order(run: Run, references: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--ref", references / "b.png", references / "a.png", "--factor", 4, 2, "--num-samples", 2)
    out = run(*asked, "--format", "npz")
    packed = out / "samples_8x8x8x3.npz"
    assert f"images       in {packed}" in capsys.readouterr().out
    with np.load(packed) as archive:
        assert archive.files == ["arr_0"]
        found = archive["arr_0"]
    assert (found.shape, found.dtype) == ((8, 8, 8, 3), np.uint8)
    assert (found == np.stack([pixels(out / name) for name in listed(out)])).all()
    assert listed(out)[0] == "b_N4_0.png"
    assert not leftovers(out)
    packed.unlink()  # a run that was killed before it packed
    run(*asked, "--format", "npz")
    assert "0 to make, 8 already there" in capsys.readouterr().out
    with np.load(packed) as archive:
        assert (archive["arr_0"] == found).all()


def test_grey_images_have_three_channels_in_npz(train_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = train_run("grey_npz", "data.channels=1")
    asked = flags(folder / "checkpoints" / "last.ckpt", tmp_path, "--unconditional", "--num-samples", 2)
    assert sample.main([*asked, "--format", "npz"]) == 0
    with np.load(tmp_path / "samples_2x8x8x3.npz") as archive:
        found = archive["arr_0"]
    assert (found.shape, found.dtype) == ((2, 8, 8, 3), np.uint8)
    assert (found == pixels(tmp_path / "unconditional_0.png")[..., None])[0].all()


def test_a_format_is_one_entry(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    def pack_text(folder: SampleFolder) -> Path:
        packed = folder.path / "samples.txt"
        packed.write_text("".join(f"{path.name}\n" for path in folder.images()))
        return packed

    monkeypatch.setitem(formats.FORMATS, "text", pack_text)
    out = run("--unconditional", "--num-samples", 3, "--format", "text")
    assert (out / "samples.txt").read_text().split() == listed(out)
    assert f"images       in {out / 'samples.txt'}" in capsys.readouterr().out
    error = cli.refused(sample.main, capsys, *flags(checkpoint, tmp_path, "--unconditional", "--format", "other"))
    assert "'png', 'npz', 'text'" in error or "png, npz, text" in error


def test_a_signal_while_packing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status says that the same command continues, and it does."""
    asked = ("--unconditional", "--num-samples", 2, "--format", "npz")
    save = np.lib.format.write_array_header_1_0

    def stopped(*args: Any) -> None:
        save(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", stopped)
        out = run(*asked, status=EXIT_REQUEUE)
    assert not list(out.glob("*.npz")) and not leftovers(out)
    run(*asked)
    with np.load(out / "samples_2x8x8x3.npz") as archive:
        assert (archive["arr_0"] == np.stack(list(images(out).values()))).all()


def test_the_line_that_makes_parquet(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line that a refusal of --format parquet gives, carried out as it stands; the PNGs are not needed after it."""
    run("--ref", "data/toon:test[0:1]", "--factor", 2, "--num-samples", 3, out="OUT")
    out = run("--unconditional", "--num-samples", 1, out="OUT")
    wanted = [(image, recipe_text(out / name)) for name, image in zip(listed(out), images(out).values(), strict=True)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    line = formats.PARQUET_ADVICE.partition("run in Python: ")[2]
    exec(line, {"datasets": datasets})
    for name in listed(out):
        (out / name).unlink()
    data = datasets.load_dataset("PARQUET_FOLDER", cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(data.features["image"], datasets.Image)
    for row, (image, recipe) in zip(data, wanted, strict=True):
        assert (np.asarray(row["image"]) == image).all()
        assert (row["sample"], row["reference"]) == (recipe["sample"], recipe["reference"] or "")
