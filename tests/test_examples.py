"""The examples of the documents, run as they stand there."""

import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.paths import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text()
SCRIPTS = sorted(path for path in (ROOT / "docs" / "examples").glob("*.py") if not path.name.startswith("plot_"))
"""Those of lightning.md; make docs runs the others, plot_*.py."""


def examples() -> dict[str, str]:
    """Code under each heading of the library's part."""
    library = GUIDE.split("## As a library", 1)[1]
    found = {}
    for part in library.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        code = re.search(r"((?:    .*\n|\n)+)", body[body.index("\n    ") + 1 :])
        assert code is not None, title
        found[title] = textwrap.dedent(code[1]).strip()
    return found


def test_there_are_three_of_ten_lines_or_so() -> None:
    assert len(examples()) == 3
    for title, code in examples().items():
        statements = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        assert len(statements) <= 12, title


@pytest.mark.parametrize("title", examples())
def test_example(title: str) -> None:
    y = 2 * torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) - 1
    scope: dict[str, Any] = {"y": y}
    if "diffusers" in title:
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        scope["unet"] = UNet2DModel(
            sample_size=32, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
    exec(compile(examples()[title], title, "exec"), scope)
    x = scope["x"]
    assert x.shape[1:] == y.shape[1:]
    assert bool(torch.isfinite(x).all())
    from ilvr_lightning import LowPassFilter

    phi = LowPassFilter((32, 32), 8, orthogonal=True)
    torch.testing.assert_close(phi(x), phi(y).expand_as(x), rtol=0, atol=1e-4)
    assert float((x - y).std()) > 0.05


def test_scripts_are_in_the_document_and_short() -> None:
    document = (ROOT / "docs" / "lightning.md").read_text()
    for script in SCRIPTS:
        text = script.read_text()
        code = text.partition('"""\n\n')[2]
        assert textwrap.indent(code, "    ", lambda line: bool(line.strip())) in document, script.name
        assert len(code.splitlines()) < 25, script.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With forty small images and two steps."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(40):
        pixels = random.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    code = re.sub(r"max_steps=[\d_]+", "max_steps=2, accelerator='cpu', enable_progress_bar=False", script.read_text())
    code = code.replace("block_out_channels=(32, 32, 64, 64)", "block_out_channels=(32, 32, 32, 32)")
    exec(compile(code, script.name, "exec"), {"__name__": "__main__"})
    if "ILVRGrid" in code:
        (grid,) = (tmp_path / "grids").glob("*.png")
        assert grid.name == "step_0000002.png"
    if "TrainingLog" in code:
        (log,) = (tmp_path / "logs").glob("lightning_logs/*/events.out.tfevents.*")
        assert "train/loss" in EventAccumulator(str(log)).Reload().Tags()["scalars"]
