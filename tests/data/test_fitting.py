"""References: fitted to a size, with the mask that says where they are followed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ilvr_lightning.data import fitting
from ilvr_lightning.data.fitting import fit_reference, masks_of, to_mask, with_mask
from ilvr_lightning.data.images import to_image
from ilvr_lightning.data.references import find_references
from ilvr_lightning.errors import UserError


@pytest.mark.parametrize(("colour", "grey"), [((255, 255, 255), 255), ((0, 0, 0), 0), ((255, 0, 0), 76)])
def test_one_channel(colour: tuple[int, int, int], grey: int) -> None:
    reference = fit_reference("x", Image.new("RGB", (5, 7), colour), (4, 4), 1)
    assert reference.pixels.shape == (4, 4, 1)
    assert reference.tensor.shape == (1, 4, 4)
    assert (reference.pixels == grey).all()
    assert to_image(reference.pixels).mode == "L"


def cut_out() -> Image.Image:
    """A red disc of 40 px on nothing, whose hidden colour is green."""
    rows, columns = np.ogrid[:64, :64]
    inside = (rows - 31.5) ** 2 + (columns - 31.5) ** 2 < 400
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[inside] = (200, 30, 30, 255)
    return Image.fromarray(pixels)


def test_transparency_is_the_mask_and_lends_no_colour() -> None:
    reference = fit_reference("disc", cut_out(), (32, 32), 3)
    assert reference.mask is not None
    assert reference.mask[16, 16, 0] == 255
    assert reference.mask[0, 0, 0] == 0
    assert 0.25 < reference.mask.mean() / 255 < 0.35  # of the area: 400 pi / 64^2 is 0.31
    # Red goes on beyond the edge: neither the hidden green nor a white ground reaches the low band.
    spread = np.abs(reference.pixels.astype(int) - [200, 30, 30]).max()
    assert spread <= 4
    assert np.abs(reference.preview()[0, 0].astype(int) - 170).max() <= 20  # the checkerboard
    assert (reference.preview()[16, 16] == reference.pixels[16, 16]).all()


@pytest.mark.parametrize("side", [2, 20, 200])
def test_colours_reach_far_from_small_parts(side: int) -> None:
    pixels = np.zeros((400, 400, 4), np.uint8)
    pixels[90 : 90 + side, 300 - side // 2 : 300 + side // 2] = (255, 128, 0, 255)
    reference = fit_reference("patch", Image.fromarray(pixels), (16, 16), 3)
    assert np.abs(reference.pixels.astype(int) - [255, 128, 0]).max() <= 2


def test_two_colours_share_the_rest() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :6] = (255, 0, 0, 255)
    pixels[:, 26:] = (0, 0, 255, 255)
    reference = fit_reference("ends", Image.fromarray(pixels), (32, 32), 3)
    across = reference.pixels[16, :, 0].astype(int)
    assert across[8] > 150 > 100 > across[23]


def test_mask_that_is_cut_off() -> None:
    pixels = np.zeros((16, 160, 4), np.uint8)
    pixels[:, :20, 3] = 255
    with pytest.raises(UserError, match="the reference wide is transparent in all of the part that is used; crop it"):
        fit_reference("wide", Image.fromarray(pixels), (8, 8), 3)
    assert fit_reference("wide", Image.fromarray(pixels), (8, 8), 3, "pad").mask is not None


def test_sixteen_bits_with_a_transparent_level() -> None:
    image = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    image.info["transparency"] = 0
    reference = fit_reference("deep", image, (8, 8), 3)
    assert abs(int(reference.pixels.mean()) - 127) <= 1


def test_opaque_pictures_have_no_mask() -> None:
    for image in (Image.new("RGBA", (8, 8), (1, 2, 3, 255)), Image.new("RGB", (8, 8)), Image.new("L", (8, 8))):
        reference = fit_reference("x", image, (8, 8), 3)
        assert reference.mask is None
        assert reference.mask_sha256 is None
        assert reference.preview() is reference.pixels


def test_transparent_all_over() -> None:
    with pytest.raises(UserError, match="the reference ghost is transparent all over"):
        fit_reference("ghost", Image.new("RGBA", (8, 8), (1, 2, 3, 0)), (8, 8), 3)


def test_mask_is_fitted_as_its_reference_is() -> None:
    wide = Image.new("RGB", (40, 20), "blue")
    left = Image.new("L", (80, 40))
    left.paste(255, (0, 0, 40, 40))
    reference = with_mask(fit_reference("wide", wide, (10, 10), 3), "left.png", left)
    assert reference.mask is not None
    assert reference.mask[:, :4].min() == 255
    assert reference.mask[:, 6:].max() == 0
    padded = with_mask(
        fit_reference("wide", wide, (10, 10), 3, "pad"), "left.png", Image.new("L", (40, 20), 255), "pad"
    )
    assert padded.mask is not None
    assert padded.mask[0].max() == 0  # the margin is not the picture's
    assert padded.mask[5].min() == 255


def test_transparent_parts_of_a_mask_are_not_followed() -> None:
    """White strokes on nothing, as editors write them."""
    strokes = np.full((8, 8, 4), 255, np.uint8)
    strokes[:, 4:, 3] = 0
    mask = np.asarray(to_mask(Image.fromarray(strokes)))
    assert mask[:, :4].min() == 255
    assert mask[:, 4:].max() == 0


def test_mask_times_alpha() -> None:
    both = with_mask(fit_reference("disc", cut_out(), (32, 32), 3), "grey.png", Image.new("L", (64, 64), 128))
    assert both.mask is not None
    assert both.mask[16, 16, 0] == 128
    assert both.mask[0, 0, 0] == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (10, 40), 255), "--mask: m.png is 10x40 px, its reference wide 40x20; give a mask of the same"),
        (Image.new("L", (40, 20)), "--mask: m.png is black all over; wide is followed where it is white"),
    ],
)
def test_mask_that_does_not_fit(mask: Image.Image, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_mask(fit_reference("wide", Image.new("RGB", (40, 20)), (10, 10), 3), "m.png", mask)


def test_masks_of_a_batch(tmp_path: Path) -> None:
    cut_out().save(tmp_path / "a.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "b.png")
    references = find_references([str(tmp_path / name) for name in ("a.png", "b.png")], (3, 16, 16))
    masks = masks_of(references)
    assert masks is not None
    assert masks.shape == (2, 1, 16, 16)
    assert float(masks[1].min()) == 1
    assert float(masks[0].min()) == 0
    assert masks_of(references[1:]) is None


def test_large_transparent_images_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling the transparent parts takes much memory; the reference is nearly the same."""
    reference = fit_reference("disc", cut_out().resize((640, 640), Image.Resampling.NEAREST), (32, 32), 3)
    monkeypatch.setattr(fitting, "INPAINT_LIMIT", 160_000)
    reduced = fit_reference("disc", cut_out().resize((640, 640), Image.Resampling.NEAREST), (32, 32), 3)
    assert (reference.size, reduced.size) == ((640, 640), (160, 160))
    assert reduced.mask is not None and reference.mask is not None
    assert np.abs(reduced.pixels.astype(int) - reference.pixels).max() <= 4
    assert np.abs(reduced.mask.astype(int) - reference.mask).max() <= 12
