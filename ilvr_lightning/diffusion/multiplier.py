"""Matched noise with a gain: the method of multipliers for E[z(x_0) | x_t] = z(y)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ilvr_lightning.diffusion.low_band import LowBand, natural_spectrum
from ilvr_lightning.diffusion.low_pass import LowPassFilter, cast_like


class Multiplier:
    """The noise e of the reference's low band, in coordinates z of phi_N's space.

    As a function of x_t's low band, sqrt(a) z(y) + sqrt(1 - a) e, p(x_0 | x_t) is an exponential family whose natural
    parameter is q = sqrt(snr) e. The network's own eps is q after one step of the method of multipliers for
    E[z(x_0) | x_t] = z(y), with the penalty snr. Where the images' variance C along a coordinate is less than 1 / snr,
    that step is too short; Newton's has the gain snr + 1/C:

        e <- z(eps) + sqrt(snr) g z(y - x_0),   g = min(g_max, 1 / (snr C))

    A reference with noise of its own, of deviation sigma, asks for less: q = (z(y) - E[z(x_0) | x_t]) / sigma^2. Then
    `difference` is that of y - sigma^2 q from x_0, and g = min(g_max, 1 / (snr (C + sigma^2))).

    From a level to the next, h further in half-log-SNR, e decays by exp(-h rho), rho = min(1, (1 + delta g) J) with
    J = snr (C + sigma^2) / (1 + snr C): with rho = 1, q stays what it is, as it does for Gaussian images.

    Args:
        low_pass: phi_N.
        reference: y (B, C, H, W) in [-1, 1].
        spectrum: variance of the images' DCT coefficients by radius; if empty, a natural one at y's variance.
        gain: g_max.
        decay: delta.
        sigma: deviation of the reference's own noise, as (B, 1, 1, 1) or a number.
    """

    def __init__(
        self,
        low_pass: LowPassFilter,
        reference: Tensor,
        spectrum: Sequence[float],
        *,
        gain: float,
        decay: float,
        sigma: Tensor | float = 0.0,
    ) -> None:
        self.band = LowBand(low_pass.size, low_pass.factor, low_pass.kernel)
        self._gain, self._decay, self._sigma = gain, decay, sigma
        if spectrum:
            self._variances = cast_like(self.band.variances(spectrum), reference)
        else:
            of_a_pixel = reference.var((1, 2, 3), correction=0, keepdim=True).clamp(min=MIN_PIXEL_VARIANCE)
            self._variances = of_a_pixel * cast_like(self.band.variances(natural_spectrum(low_pass.size)), reference)

    def __call__(self, eps: Tensor, difference: Tensor, lam: float, h: float) -> tuple[Tensor, Tensor]:
        """The multiplier of the next level.

        Args:
            eps: (B, C, H, W) the network's.
            difference: (B, C, H, W) the low band of y - sigma^2 sqrt(snr) eps - x_0, where the reference is followed.
            lam: half-log-SNR of the level that eps is of.
            h: how much further the next level is; infinite if that is the image.

        Returns:
            e (B, C, n_h, n_w), and 1 - rho, the part of it that does not decay.
        """
        snr, total = math.exp(2 * lam), self._variances + self._sigma**2
        g = (1 / (snr * total)).clamp(max=self._gain)
        e = self.band.coordinates(eps) + math.exp(lam) * g * self.band.coordinates(difference)
        rho = ((1 + self._decay * g) * snr * total / (1 + snr * self._variances)).clamp(max=1)
        if math.isfinite(h):
            e = e * torch.exp(-h * rho)
        return e, 1 - rho


MIN_PIXEL_VARIANCE = 1e-3
"""A reference of one colour is taken to vary by this much (in [-1, 1])."""
