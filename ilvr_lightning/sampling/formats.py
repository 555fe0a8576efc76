"""What the PNGs of a finished run are packed into. To add a format, write a function and enter it in FORMATS.

Imports nothing heavy, because the command line reads the names of the formats.
"""

import zipfile
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Protocol

from ilvr_lightning.atomic import write_atomically

PARQUET_ADVICE = (
    "sample.py writes no Parquet; sample PNGs, then run in Python: datasets.load_dataset_builder('imagefolder', "
    "data_files={'train': 'OUT/metadata.jsonl'}).download_and_prepare('PARQUET_FOLDER', file_format='parquet')"
)
"""How a folder of samples becomes Parquet files that hold the images and their settings."""


class FinishedRun(Protocol):
    """What a format sees of a SampleFolder."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def written(self) -> Sized:
        """The images that were written, by number."""

    def images(self) -> Iterator[Path]:
        """The files of these images, in order."""


def keep_png(folder: FinishedRun) -> Path:
    """Nothing to pack: the PNGs and their index are the data set."""
    return folder.path


def pack_npz(folder: FinishedRun) -> Path:
    """Pack the images into samples_NxHxWx3.npz: arr_0 (N, H, W, 3), 8 bits, as ADM's evaluator reads it.

    Grey images get three equal channels. The PNGs stay.
    """
    import numpy as np

    from ilvr_lightning.data.images import read_image

    count = len(folder.written)
    if not count:
        return folder.path
    width, height = read_image(next(folder.images())).size
    shape = (count, height, width, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for path in folder.images():
                file.write(np.asarray(read_image(path), dtype=np.uint8).tobytes())

    packed = folder.path / f"samples_{'x'.join(map(str, shape))}.npz"
    write_atomically(packed, write)
    return packed


FORMATS: dict[str, Callable[[FinishedRun], Path]] = {"png": keep_png, "npz": pack_npz}
"""The formats of --format, each with the function that packs a finished run and returns where it is."""
