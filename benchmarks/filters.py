"""How far each low-pass filter is from a projection, and from nesting (property 2 of Choi et al. 2021).

    python -m benchmarks.filters [--side 64]

Spectral norms: of P P - P over that of P, at N=4; of (I - P_N) P_M, which is 0 where all that the coarser filter lets
through passes the finer one.
"""

import argparse

import torch

from ilvr_lightning.diffusion.low_pass import KERNELS, low_pass_matrix

PAIRS = ((2, 4), (4, 8), (8, 16), (16, 32))


def projection_error(side: int, factor: int, kernel: str, orthogonal: bool) -> float:
    """||P P - P|| / ||P||."""
    P = low_pass_matrix(side, factor, kernel, orthogonal)
    return float(torch.linalg.matrix_norm(P @ P - P, 2) / torch.linalg.matrix_norm(P, 2))


def nesting_error(side: int, finer: int, coarser: int, kernel: str, orthogonal: bool) -> float:
    """||(I - P_N) P_M|| for N = finer, M = coarser."""
    fine, coarse = (low_pass_matrix(side, n, kernel, orthogonal) for n in (finer, coarser))
    return float(torch.linalg.matrix_norm(coarse - fine @ coarse, 2))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64)
    side = parser.parse_args().side
    print(f"| filter | PP - P | {' | '.join(f'N={n}, M={m}' for n, m in PAIRS)} |\n|{'---|' * (2 + len(PAIRS))}")
    for kernel in (*KERNELS, "ideal"):
        for orthogonal in (False, True):
            figures = [projection_error(side, 4, kernel, orthogonal)]
            figures += [nesting_error(side, n, m, kernel, orthogonal) for n, m in PAIRS]
            cells = ["0" if figure < 1e-12 else f"{figure:.3f}" for figure in figures]
            print(f"| {kernel}{', orthogonal' if orthogonal else ''} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
