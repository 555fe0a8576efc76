"""The forward process q(x_t | x_0) and the spacings of the timesteps that a sampler visits."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MIN_LOG_SNR_HALF = -5.5
"""Log-SNR spacings start no lower: half of a cosine schedule's points would otherwise crowd at T."""


class NoiseSchedule:
    """Variance-preserving noise schedule with tables in float64 on the CPU; index t=0 is data, t=T is noise.

    Args:
        betas: (T,) variances of the forward steps 1..T, each in (0, 1).

    Raises:
        ValueError: betas are not a vector of numbers in (0, 1).
    """

    def __init__(self, betas: Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("diffusion.betas must be a list of numbers, each above 0 and below 1")
        self.betas = betas
        self.alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        """(T+1,) with alphas_cumprod[0] = 1."""
        self.log_snr_half = 0.5 * (torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod))
        """(T+1,) lambda_t = log(sqrt(alphas_cumprod) / sqrt(1 - alphas_cumprod)), infinite at t=0."""
        a, before = self.alphas_cumprod[1:], self.alphas_cumprod[:-1]
        variance = betas * (1 - before) / (1 - a)
        # At t=1 the posterior's variance is 0; that of t=2 stands in (Nichol and Dhariwal 2021).
        variance[0] = variance[1] if len(betas) > 1 else betas[0]
        self._tables = {
            "signal": self.alphas_cumprod.sqrt(),
            "noise": (1 - self.alphas_cumprod).sqrt(),
            "log_beta": _from_one(betas.log()),
            "log_posterior_variance": _from_one(variance.log()),
            "posterior_x0": _from_one(betas * before.sqrt() / (1 - a)),
            "posterior_xt": _from_one((1 - betas).sqrt() * (1 - before) / (1 - a)),
        }
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def linear(cls, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Ho et al. 2020: betas from 1e-4 to 0.02 for T=1000, scaled by 1000/T (Nichol and Dhariwal 2021)."""
        if num_timesteps <= 20:  # The last beta would be 1 or more.
            raise ValueError(f"a linear schedule needs diffusion.num_timesteps above 20: got {num_timesteps}")
        scale = 1000 / num_timesteps
        return cls(torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Nichol and Dhariwal 2021, equation 17, with betas of at most 0.999."""
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=0.999))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    def level_of_noise(self, sigma: float) -> int:
        """The lowest timestep at which x_t / sqrt(alphas_cumprod_t) has noise of at least the deviation sigma.

        It is 0 for sigma = 0, and at most T.
        """
        if sigma == 0:
            return 0
        return min(self.num_timesteps, max(1, int((self.log_snr_half > -math.log(sigma)).sum())))

    def at(self, table: str, t: Tensor | int, like: Tensor) -> Tensor:
        """A table's entries, shaped to multiply images; moved to a device once, so that no step waits for it.

        Args:
            table: "signal" sqrt(alphas_cumprod) and "noise" sqrt(1 - alphas_cumprod), from t=0; of the step t -> t-1,
                from t=1: "log_beta", "log_posterior_variance", and the posterior mean's coefficients "posterior_x0"
                and "posterior_xt" (Ho et al. 2020, equation 7).
            t: (B,) timesteps, or one for all.
            like: (B, C, H, W) gives device and dtype.
        """
        key = (table, like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = self._tables[table].to(like.dtype).to(like.device)
        entries = self._moved[key][t]
        return entries.reshape((-1,) + (1,) * (like.ndim - 1))

    def signal_and_noise(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alphas_cumprod_t) and sqrt(1 - alphas_cumprod_t), shaped to multiply images."""
        return self.at("signal", t, like), self.at("noise", t, like)

    def q_sample(self, x0: Tensor, t: Tensor | int, noise: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) (Ho et al. 2020, equation 4).

        Args:
            x0: (B, C, H, W) images.
            t: (B,) timesteps in [0, T], or one for all.
            noise: (B, C, H, W) standard normal.
        """
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * x0 + sigma * noise


def make_schedule(name: str, num_timesteps: int, betas: Sequence[float] | None = None) -> NoiseSchedule:
    """The schedule "linear" or "cosine" of T steps, or that of explicit betas."""
    if betas is not None:
        return NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    return {"linear": NoiseSchedule.linear, "cosine": NoiseSchedule.cosine}[name](num_timesteps)


def _from_one(values: Tensor) -> Tensor:
    """Values for t=1..T as a table that is indexed by t."""
    return torch.cat([torch.full((1,), float("nan"), dtype=torch.float64), values])


def spaced_timesteps(
    schedule: NoiseSchedule, num_steps: int, spacing: str = "uniform", start: int | None = None
) -> list[int]:
    """Distinct timesteps, descending from at most start to at least 1; the step after the last goes to 0.

    Args:
        schedule: gives T and the log-SNR.
        num_steps: how many, in [1, start].
        spacing: a key of SPACINGS.
        start: the first timestep; T unless given.

    Raises:
        ValueError: num_steps is outside [1, start], or spacing unknown.
    """
    start = schedule.num_timesteps if start is None else start
    if not 1 <= num_steps <= start:
        raise ValueError(f"sampling.num_steps must be in [1, {start}]: got {num_steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"sampling.spacing must be one of {', '.join(SPACINGS)}: got {spacing!r}")
    return _distinct(SPACINGS[spacing](schedule, num_steps, start), start)


def respaced_timesteps(num_timesteps: int, respacing: str) -> tuple[int, ...]:
    """The timesteps that ADM's timestep_respacing means, for SamplingPlan.timesteps (Nichol and Dhariwal 2021).

    Args:
        num_timesteps: T.
        respacing: "ddimN": every k-th timestep, with the least k that gives N of them; or numbers separated by
            commas: [1, T] in as many equal sections, each with so many evenly spaced timesteps; or "": all.

    Returns:
        1-based timesteps, descending.

    Raises:
        ValueError: respacing cannot be read, or asks for more steps than there are.
    """
    T, asked = num_timesteps, respacing.strip() or str(num_timesteps)
    if asked.startswith("ddim") and asked[4:].isdigit():
        for stride in range(1, T + 1):
            taken = range(1, T + 1, stride)
            if len(taken) == int(asked[4:]):
                return tuple(reversed(taken))
        raise ValueError(f"no whole stride gives {asked[4:]} of {T} timesteps: got respacing={respacing!r}")
    counts = asked.split(",")
    if not all(count.strip().isdigit() for count in counts) or not any(map(int, counts)):
        raise ValueError(f"respacing must read 100, ddim50 or 10,20,30: got {respacing!r}")
    timesteps: list[int] = []
    first, (size, longer) = 1, divmod(T, len(counts))
    for section, count in enumerate(map(int, counts)):
        length = size + (section < longer)
        if count > length:
            raise ValueError(
                f"respacing={respacing!r} asks for {count} of the {length} timesteps in a section of T={T}"
            )
        gap = (length - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):  # summed up as ADM does: where the sum falls on a half, its rounding decides
            timesteps.append(first + round(place))
            place += gap
        first += length
    return tuple(reversed(timesteps))


def uniform_spacing(schedule: NoiseSchedule, num_steps: int, start: int) -> list[int]:
    """Equal steps in t, as ADM respaces (Nichol and Dhariwal 2021); a single one is at the start."""
    if num_steps == 1:
        return [start]
    return [1 + round(i * (start - 1) / (num_steps - 1)) for i in reversed(range(num_steps))]


def quadratic_spacing(schedule: NoiseSchedule, num_steps: int, start: int) -> list[int]:
    """Steps that shrink linearly towards t=0 (Song et al. 2021, appendix D.2)."""
    return [max(1, round(start * (1 - i / num_steps) ** 2)) for i in range(num_steps)]


def logsnr_spacing(schedule: NoiseSchedule, num_steps: int, start: int) -> list[int]:
    """Equal steps in log-SNR from the start to 1 (Lu et al. 2022), each to the nearest timestep."""
    lam = schedule.log_snr_half[1 : start + 1]
    low, high = max(float(lam[-1]), MIN_LOG_SNR_HALF), float(lam[0])
    points = torch.linspace(low, high, num_steps, dtype=torch.float64)
    return [int((lam - point).abs().argmin()) + 1 for point in points]


SPACINGS: dict[str, Callable[[NoiseSchedule, int, int], list[int]]] = {
    "uniform": uniform_spacing,
    "quadratic": quadratic_spacing,
    "logsnr": logsnr_spacing,
}


def _distinct(descending: list[int], T: int) -> list[int]:
    """Where two fall on one time, the later (from the small end) moves to the next free one, downwards if past T."""
    taken: set[int] = set()
    for t in reversed(descending):
        free = t
        while free in taken:
            free += 1
        if free > T:
            free = next(s for s in range(T, 0, -1) if s not in taken)
        taken.add(free)
    return sorted(taken, reverse=True)
