"""The encoded images of a split, which every kind of source gives."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.crops import Part, Size, reduce, reduced_size
from ilvr_lightning.data.images import BrokenImageError, Pixels, image_size, read_image, to_pixels
from ilvr_lightning.data.values import Encoded, Page
from ilvr_lightning.errors import UserError


class ImageSource:
    """The encoded images of a split, or of some of its rows.

    Args:
        name: what messages call the split.
        read: gives the encoded image of a row of the split, or the file that holds it.
        split_rows: the rows of the split that belong to the source, in order.
        fingerprint: equal for equal images, so that they are decoded once and kept in a file; None where that cannot be
            known.
        pages: the page of each row's image; None takes the first of all.
        part: what of each picture is used.
    """

    def __init__(
        self,
        name: str,
        read: Callable[[int], bytes | Path],
        split_rows: Sequence[int],
        fingerprint: str | None = None,
        pages: Sequence[int] | None = None,
        part: Part = "whole",
    ) -> None:
        self.name, self.read, self.split_rows, self.fingerprint = name, read, split_rows, fingerprint
        self.pages, self.part = pages, part

    def __len__(self) -> int:
        return len(self.split_rows)

    def image_bytes(self, row: int) -> Encoded:
        """The encoded image of a row of the source, the file that holds it, or its page."""
        content = self.read(self.split_rows[row])
        return Page(content, self.pages[row]) if self.pages is not None and self.pages[row] else content

    def select(self, rows: Sequence[int]) -> "ImageSource":
        """Some of the source's rows, in the order given."""
        return self.select_pages(rows, None if self.pages is None else [self.pages[row] for row in rows])

    def select_pages(self, rows: Sequence[int], pages: Sequence[int] | None) -> "ImageSource":
        """Some of the source's rows, and a page of each."""
        chosen = [self.split_rows[row] for row in rows]
        what = (self.fingerprint, chosen) if pages is None else (self.fingerprint, chosen, pages)
        fingerprint = self.fingerprint and hashlib.sha256(repr(what).encode()).hexdigest()
        return ImageSource(self.name, self.read, chosen, fingerprint, pages, self.part)

    def with_part(self, part: Part, validation_fraction: float) -> "ImageSource":
        """A part of each picture; the fraction says where it is divided."""
        fingerprint = self.fingerprint and f"{self.fingerprint}, {part} {validation_fraction}"
        return ImageSource(self.name, self.read, self.split_rows, fingerprint, self.pages, part)

    def size(self, row: int, config: DataConfig) -> Size:
        """Height and width of the reduced picture that `decode` gives of a row; no pixel is decoded.

        Raises:
            BrokenImageError: the image cannot be read, as far as its beginning says it, or it is too small.
        """
        with self._naming(row):
            return reduced_size(self.picture_size(row, config), config, self.part)

    def picture_size(self, row: int, config: DataConfig) -> Size:
        """Height and width of a row's picture before it is divided and reduced; no pixel is decoded.

        Raises:
            BrokenImageError: the image cannot be read, as far as its beginning says it.
        """
        width, height = image_size(self.image_bytes(row), draft=config.scale == "fit")
        return height, width

    def decode(self, row: int, content: Encoded, config: DataConfig) -> Pixels:
        """The image of a row, or the reduced picture that images are cropped from: (H, W, C) 8-bit.

        Args:
            row: counted as the source counts; messages name it as the split counts.
            content: what image_bytes(row) gave.
            config: size, channels, value range, scale and crop.

        Raises:
            BrokenImageError: the image cannot be read, or it is too small.
        """
        with self._naming(row):
            image = read_image(content, config.channels, config.known_range, draft=config.scale == "fit")
            return to_pixels(reduce(image, config, self.part))

    @contextmanager
    def _naming(self, row: int) -> Iterator[None]:
        """Have an error name the row."""
        try:
            yield
        except BrokenImageError as error:
            raise BrokenImageError(f"row {self.split_rows[row]} of {self.name} is skipped: {error}") from None

    def decode_first(self, candidates: Iterable[tuple[int, Encoded]], config: DataConfig) -> tuple[Pixels, int]:
        """The first of some images that can be read, as `decode` gives it, and its row; a warning names each other.

        Raises:
            UserError: none can be read.
        """
        reason = "it is empty"
        for row, content in candidates:
            try:
                return self.decode(row, content, config), row
            except BrokenImageError as error:
                reason = str(error)
                warnings.warn(reason, stacklevel=2)
        raise UserError(f"data.path={config.path}: no image in it can be read: {reason}")
