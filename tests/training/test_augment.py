"""Images that are mirrored and turned at random, each by its own seed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_lightning.config.load import from_dict
from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.augment import augment
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.errors import UserError

SEEDS = [derive_seed(0, "train", step, index) for step in range(40) for index in range(8)]
X = torch.arange(16.0).reshape(1, 1, 4, 4)
"""One image, of which no two views are the same."""


def views(**settings: Any) -> list[int]:
    """Which of the eight views of X each seed draws: 0 to 3 turned, 4 to 7 mirrored and turned."""
    every = [x.rot90(quarters, (-2, -1)) for x in (X, X.flip(-1)) for quarters in range(4)]
    drawn = augment(X.expand(len(SEEDS), -1, -1, -1), SEEDS, DataConfig(**settings))
    return [next(i for i, view in enumerate(every) if torch.equal(x[None], view)) for x in drawn]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"flip": "none"}, {0}),
        ({"flip": "horizontal"}, {0, 4}),
        ({"flip": "both"}, {0, 2, 4, 6}),
        ({"flip": "none", "rotate90": True}, {0, 1, 2, 3}),
        ({"flip": "horizontal", "rotate90": True}, set(range(8))),
        ({"flip": "both", "rotate90": True}, set(range(8))),
    ],
)
def test_views_are_equally_frequent(settings: dict[str, Any], expected: set[int]) -> None:
    drawn = views(**settings)
    assert set(drawn) == expected
    for view in expected:
        assert drawn.count(view) == pytest.approx(len(SEEDS) / len(expected), rel=0.45)


def former(x0: Tensor, seeds: list[int]) -> Tensor:
    """What flip=true did before there was anything else."""
    flip = torch.tensor([derive_seed(seed, "flip") % 2 == 1 for seed in seeds], device=x0.device)
    return torch.where(flip[:, None, None, None], x0.flip(-1), x0)


def test_flips_are_those_of_earlier_versions() -> None:
    x = torch.rand((len(SEEDS), 3, 4, 6), generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment(x, SEEDS, DataConfig(flip=True)), former(x, SEEDS))
    assert augment(x, SEEDS, DataConfig(flip=False)) is x


def test_an_image_depends_on_its_own_seed_alone() -> None:
    x = torch.rand((len(SEEDS), 3, 4, 4), generator=torch.Generator().manual_seed(0))
    config = DataConfig(flip="both", rotate90=True)
    parts = [augment(x[i : i + 7], SEEDS[i : i + 7], config) for i in range(0, len(SEEDS), 7)]
    assert torch.equal(torch.cat(parts), augment(x, SEEDS, config))


def test_settings() -> None:
    for old, new in ((True, "horizontal"), (False, "none"), ("both", "both")):
        assert from_dict(DataConfig, {"flip": old}).mirrors == new
    with pytest.raises(UserError, match=r"data\.rotate90=true needs square images: got data\.image_size=\(4, 6\)"):
        from_dict(DataConfig, {"rotate90": True, "image_size": (4, 6)})
