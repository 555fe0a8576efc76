"""How far each low-pass filter is from a projection, and from nesting (property 2 of Choi et al. 2021).

    python -m benchmarks.filters [--side 64]

Spectral norms: of P P - P over that of P, at N=4; of (I - P_N) P_M, which is 0 where all that the coarser filter lets
through passes the finer one.
"""

import argparse

from ilvr_lightning.diffusion.low_pass import KERNELS
from tests.support.oracles import nesting_error, projection_error

PAIRS = ((2, 4), (4, 8), (8, 16), (16, 32))


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
