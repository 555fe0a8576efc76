"""A reference image: fitted to the model's size, with the mask that says where it is followed."""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ilvr_lightning.data.images import (
    Fit,
    Pixels,
    convert,
    fit_image,
    fit_mask,
    from_tensor,
    place_over,
    to_image,
    to_pixels,
    to_tensor,
)
from ilvr_lightning.data.noise import estimate_noise
from ilvr_lightning.errors import UserError

INPAINT_LIMIT = 4_000_000
"""Images with transparent parts and more pixels are first reduced to a quarter of this number: filling the parts takes
a hundred bytes per pixel."""


NO_NOISE = 0.01
"""Below this deviation (in [-1, 1]) a reference is taken to have no noise: clean drawings are estimated so."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference image, fitted to the model's size."""

    name: str
    """Base name of the file without its ending."""
    pixels: Pixels
    """The fitted image, (H, W, C) 8-bit."""
    mask: Pixels | None = None
    """(H, W, 1): 255 where the reference is followed, 0 where it is not; None follows it everywhere."""
    size: tuple[int, int] | None = None
    """Height and width before the image was fitted."""
    noise: float = 0.0
    """Estimated standard deviation of its noise and compression, for pixels in [-1, 1], after it was fitted."""

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the fitted 8-bit pixels, on which the noise of a sample depends."""
        return _sha256(self.pixels)

    @functools.cached_property
    def mask_sha256(self) -> str | None:
        """The hash of the fitted mask."""
        return None if self.mask is None else _sha256(self.mask)

    @property
    def key(self) -> tuple[str, str, str | None]:
        """Equal for references that give equal samples under equal names."""
        return self.name, self.sha256, self.mask_sha256

    @property
    def tensor(self) -> Tensor:
        """The fitted image (C, H, W) in [-1, 1]."""
        return to_tensor(self.pixels)

    def preview(self, pixels: Pixels | None = None) -> Pixels:
        """The image (or another in its place), with a checkerboard where the mask does not follow it."""
        pixels = self.pixels if pixels is None else pixels
        if self.mask is None:
            return pixels
        height, width, _ = pixels.shape
        cell = max(2, min(height, width) // 8)
        rows, columns = np.ogrid[:height, :width]
        board = np.where((rows // cell + columns // cell) % 2, 150, 190)[:, :, None]
        weight = self.mask / 255.0
        return np.rint(weight * pixels + (1 - weight) * board).astype(np.uint8)


def _sha256(pixels: Pixels) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def masks_of(references: Sequence[Reference]) -> Tensor | None:
    """The masks (B, 1, H, W) in [0, 1] of a batch, or None where no reference has one."""
    if all(reference.mask is None for reference in references):
        return None
    everywhere = np.full_like(references[0].pixels[:, :, :1], 255)
    stacked = np.stack([everywhere if r.mask is None else r.mask for r in references])
    return torch.from_numpy(np.moveaxis(stacked, -1, -3).copy()).float() / 255


def fit_reference(name: str, image: Image.Image, size: tuple[int, int], channels: int, fit: Fit = "crop") -> Reference:
    """Make an upright image of any mode and size a reference; its alpha channel, if it says anything, is the mask.

    Args:
        name: of the reference.
        image: as `open_image` gives it.
        size: height and width to fit the image to.
        channels: 3 or 1.
        fit: crop to the centre, or pad with white margins.

    Raises:
        UserError: the image is transparent all over.
    """
    mask = None
    if image.has_transparency_data and not image.mode.startswith("I"):  # 16 bits would be clipped to 8
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        lowest, highest = image.getchannel("A").getextrema()
        if highest == 0:
            raise UserError(f"the reference {name} is transparent all over; give one that shows something")
        if lowest != 255:
            if (pixels := image.width * image.height) > INPAINT_LIMIT:
                image = image.reduce(math.ceil(math.sqrt(4 * pixels / INPAINT_LIMIT)))
            mask, image = to_pixels(fit_mask(image.getchannel("A"), size, fit)), _inpaint_transparent(image)
            if not mask.any():
                raise UserError(
                    f"the reference {name} is transparent in all of the part that is used; crop it, or give --fit pad"
                )
    fitted = to_pixels(fit_image(convert(image, channels), size, fit))
    reduction = (max if fit == "pad" else min)(image.height / size[0], image.width / size[1])
    noise = round(estimate_noise(image) / reduction, 4)
    return Reference(
        name=name, pixels=fitted, mask=mask, size=(image.height, image.width), noise=noise if noise > NO_NOISE else 0.0
    )


def _inpaint_transparent(image: Image.Image) -> Image.Image:
    """Convert RGBA to RGB; transparent parts take the nearest colours, so that phi meets no edge there.

    Pull-push (Gortler et al. 1996): what a level lacks comes from the next coarser one.
    """
    rgba = to_tensor(to_pixels(image))[None] / 2 + 0.5
    levels = [(rgba[:, :3] * rgba[:, 3:], rgba[:, 3:])]
    while max(levels[-1][0].shape[2:]) > 1:
        size = [-(-side // 2) for side in levels[-1][0].shape[2:]]
        colour, alpha = (F.interpolate(part, size, mode="area") for part in levels[-1])
        levels.append((colour, alpha))
    filled = torch.zeros(1, 3, 1, 1)
    for colour, alpha in reversed(levels):
        coarser = F.interpolate(filled, colour.shape[2:], mode="bilinear")
        weight = alpha if colour.shape == rgba[:, :3].shape else (alpha > 0).float()
        filled = torch.where(alpha > 0, weight * (colour / alpha.clamp(min=1e-9)) + (1 - weight) * coarser, coarser)
    return to_image(from_tensor(2 * filled[0] - 1))


def to_mask(image: Image.Image) -> Image.Image:
    """Convert an upright image of any mode to a greyscale mask; its transparent parts are not followed."""
    return convert(place_over(image, "black") if image.has_transparency_data else image, 1)


def with_mask(reference: Reference, name: str, mask: Image.Image, fit: Fit = "crop") -> Reference:
    """The reference, followed only where a mask is bright, and less where it is grey; its own mask still holds.

    Args:
        reference: fitted.
        name: of the mask, for messages.
        mask: greyscale.
        fit: as the reference was fitted.

    Raises:
        UserError: the mask has other proportions than the reference, or follows it nowhere.
    """
    if reference.size is not None:
        height, width = reference.size
        if abs(mask.height * width - mask.width * height) > max(mask.height * width, mask.width * height) * 0.02:
            raise UserError(
                f"--mask: {name} is {mask.width}x{mask.height} px, its reference {reference.name} {width}x{height}; "
                "give a mask of the same proportions"
            )
    height, width, _ = reference.pixels.shape
    pixels = to_pixels(fit_mask(mask, (height, width), fit))
    if reference.mask is not None:
        pixels = np.rint(pixels * (reference.mask / 255.0)).astype(np.uint8)
    if not pixels.any():
        raise UserError(f"--mask: {name} is black all over; {reference.name} is followed where it is white")
    return replace(reference, mask=pixels)
