"""Which low-pass factors fit an image size. Standard library only, so that a command line can check at once."""

import math


def check_factor(factor: int, size: tuple[int, int], setting: str = "sampling.factor") -> None:
    """Raise a ValueError that names the nearest factors unless factor divides every side longer than 1."""
    sides = [side for side in size if side > 1]
    if factor >= 1 and all(side % factor == 0 for side in sides):
        return
    common = math.gcd(*sides) if sides else 1
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    nearest = [n for n in divisors if n < factor][-1:] + [n for n in divisors if n > factor][:1]
    pixels = f"{size[0]} px" if size[0] == size[1] else f"{size[0]}x{size[1]} px"
    verb = "the nearest that do are" if len(nearest) > 1 else "the nearest that does is"
    raise ValueError(
        f"{setting} must divide the image size: got factor={factor} for {pixels}; "
        f"{verb} {' and '.join(map(str, nearest))}"
    )
