"""What is looked at before images are decoded: the range of their values in a sample, and the pages of TIFFs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.images import BrokenImageError, explaining, read_deep
from ilvr_lightning.data.values import Range, Values, is_tiff, pages
from ilvr_lightning.errors import UserError

SAMPLE = 64
"""So many images are looked at, spread evenly over the data set."""

FILES = 2000
"""In so many files pages are counted that are left out."""

VALUES_PER_IMAGE = 20_000
"""About so many values of each are used for percentiles."""

PERCENTILES = (0.1, 99.9)

DEPTHS = (8, 10, 12, 14, 16)
"""The depths in bits that cameras and files have."""

CONVENTIONS = ((0, 1), (-1, 1), (0, 255), (0, 65535))
"""The ranges that are usual for floats."""


def find_range(sources: Sequence[ImageSource], config: DataConfig) -> tuple[Range, str] | None:
    """The range of values of files of more than 8 bits, and what it follows from, in words; None if there are none.

    Raises:
        UserError: some are integers and others floats, so that one range cannot be meant for both.
    """
    lowest, highest, kinds, parts = np.inf, -np.inf, set(), []
    total = sum(map(len, sources))
    for source, row in ((s, row) for s in sources for row in _spread(len(s), -(-SAMPLE * len(s) // max(1, total)))):
        try:
            colours = _colours(source, row)
        except BrokenImageError:  # which is named where it is used
            continue
        if colours is None or not (finite := colours[np.isfinite(colours)]).size:
            continue
        kinds.add("floats" if colours.dtype.kind == "f" else "integers")
        lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
        parts.append(finite[:: max(1, finite.size // VALUES_PER_IMAGE)].astype(np.float64))
    if not parts:
        return None
    if len(kinds) > 1:
        raise UserError(
            f"data.path={config.path} holds files of integers and files of floats; give data.value_range=[LOW,HIGH]"
        )
    if config.value_range == "percentile":
        low, high = (float(value) for value in np.percentile(np.concatenate(parts), PERCENTILES))
        reason = f"the {PERCENTILES[0]} and {PERCENTILES[1]} percentiles"
    else:
        (low, high), reason = (
            _integer_range(lowest, highest) if kinds == {"integers"} else _float_range(lowest, highest)
        )
    high = high if high > low else low + 1
    of = f"in the sample of {len(parts)} file{'s' * (len(parts) != 1)} of more than 8 bits"
    found = f"{low:g} to {high:g}, {reason}: the values {of} are {lowest:g} to {highest:g}"
    return (low, high), found


def _colours(source: ImageSource, row: int) -> Values | None:
    content = source.image_bytes(row)
    with explaining(content):
        deep = read_deep(content)
    return None if deep is None or deep.colours.dtype.kind == "b" or deep.colours.dtype == np.uint8 else deep.colours


def _integer_range(lowest: float, highest: float) -> tuple[Range, str]:
    depth = next((bits for bits in DEPTHS if lowest >= 0 and highest < 2**bits), None)
    return ((lowest, highest), "smallest to largest") if depth is None else ((0, 2**depth - 1), f"{depth}-bit")


def _float_range(lowest: float, highest: float) -> tuple[Range, str]:
    """The first usual range that holds all values and of which they fill a quarter, else their own."""
    for low, high in CONVENTIONS:
        if low <= lowest and highest <= high and highest - lowest >= (high - low) / 4:
            return (low, high), "floats"
    return (lowest, highest), "floats, smallest to largest"


def with_pages(source: ImageSource, config: DataConfig) -> ImageSource:
    """The source with a row for each page of each TIFF, if data.pages asks for them."""
    if config.pages == "first":
        return source
    found = [(row, page) for row in range(len(source)) for page in _pages(source, row)]
    if len(found) == len(source):
        return source
    return source.select_pages([row for row, _ in found], [page for _, page in found])


def count_further_pages(source: ImageSource) -> int:
    """How many pages of TIFFs there are behind the first ones; among FILES files, or SAMPLE rows of a table."""
    in_files = len(source) > 0 and isinstance(source.image_bytes(0), Path)
    return sum(len(_pages(source, row)) - 1 for row in _spread(len(source), FILES if in_files else SAMPLE))


def _pages(source: ImageSource, row: int) -> list[int]:
    """The pages of a row; a broken one has one."""
    content = source.read(source.split_rows[row])
    try:
        with explaining(content):
            return pages(content) if is_tiff(content) else [0]
    except BrokenImageError:
        return [0]


def _spread(length: int, count: int) -> list[int]:
    """Up to so many numbers below a length, spread evenly."""
    return [index * length // min(count, length) for index in range(min(count, length))]
