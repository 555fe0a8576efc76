"""Samplers against the exact conditional of Gaussian images: the tables of docs/research.md.

    python -m benchmarks.exact [--quick]

What is measured, and how, is in tests/support/gaussian.py. Rows whose figures are known are compared.
"""

import argparse
import sys
from collections.abc import Callable, Mapping

from ilvr_lightning.diffusion.plan import SamplingPlan
from tests.support.gaussian import (
    TABLE,
    TABLE_2D,
    Figures,
    Gaussian,
    agrees,
    errors,
    modulated_ar1,
    nonstationary_2d,
    solver,
    spectrum_1d,
    spectrum_2d,
    with_factor,
)

CORRECTED = {
    f"2M {n} log-SNR, eta 1, correction {c:g}": solver(n, eta=1.0, high_band_correction=c)
    for n in (10, 20)
    for c in (0.0, 1.0)
}
NOISY = {
    f"2M {n} log-SNR, eta 1, gain 2, reference_sigma {sigma:g}": solver(
        n, eta=1.0, low_band_gain=2.0, low_band_decay=0.0, eps_extrapolation=0.75, reference_sigma=sigma
    )
    for n in (10, 20)
    for sigma in (0.0, 0.05, 0.2, 0.5)
}
STOCHASTIC = {f"2M {n} log-SNR, eta {eta}": solver(n, eta=eta) for n in (10, 20) for eta in (0.3, 1.0)}


DATA: dict[str, Callable[[], Gaussian]] = {
    "1-d": spectrum_1d,
    "2-d": spectrum_2d,
    "AR(1)": modulated_ar1,
    "field": nonstationary_2d,
}


def print_table(title: str, data: Gaussian, rows: Mapping[str, tuple[SamplingPlan, Figures]]) -> bool:
    """A line per row, each figure with the one that it should be; returns whether all agree."""
    columns = ["sampler, evaluations, spacing", "W2 N=4", "W2 N=8", "Frechet N=4", "Frechet N=8", "agrees"]
    print(f"\n{title}\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    good = True
    for name, (plan, printed) in rows.items():
        (w4, f4), (w8, f8) = (errors(data, with_factor(plan, factor)) for factor in (4, 8))
        figures = (w4, w8, f4, f8)
        off = [p for figure, p in zip(figures, printed, strict=False) if p is not None and not agrees(figure, p)]
        good &= not off
        verdict = ("yes" if not off else f"NO: {off}") if printed else ""
        print(f"| {name} | {w4:.4f} | {w8:.4f} | {f4:.1e} | {f8:.1e} | {verdict} |", flush=True)
    return good


def main() -> int:
    """Print the tables; returns 1 where a figure is not the known one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the rows of 100 steps and more out")
    quick = parser.parse_args().quick
    table = {name: row for name, row in TABLE.items() if not quick or row[0].resolved(1000).evaluations < 100}
    good = print_table("1-d, 64 samples, eigenvalues 1/(1+k)^2 in the DCT", spectrum_1d(), table)
    good &= print_table("2-d, 16x16, eigenvalues 1/(1+|k|)^2 in the DCT", spectrum_2d(), TABLE_2D)
    print_table("1-d, stochastic", spectrum_1d(), {name: (plan, ()) for name, plan in STOCHASTIC.items()})
    best = {n: (plan, ()) for n, (plan, _) in TABLE.items() if n.startswith(("2M 10", "2M 20 log", "DDPM 20"))}
    print_table("amplitude-modulated AR(1), 64 samples, which no filter diagonalises", modulated_ar1(), best)
    print_table("non-stationary 16x16 field, which no filter diagonalises", nonstationary_2d(), best)
    for name, data in DATA.items():
        print_table(f"{name}, the high band corrected", data(), {row: (plan, ()) for row, plan in CORRECTED.items()})
    for name in ("1-d", "AR(1)"):
        print_table(f"{name}, noisy references", DATA[name](), {row: (plan, ()) for row, plan in NOISY.items()})
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
