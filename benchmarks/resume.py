"""Seconds from a resume to its first batch, at 1% and at 90% of an epoch: map-style data and streamed shards.

    python -m benchmarks.resume [--images 4000] [--side 256] [--batch 32]

Images of noise as JPEG in Parquet shards of unequal sizes; nothing is cached (data.cache_mb=0), one worker or thread
decodes. Measured is what a resumed run waits for once the data set is open: the loader's start and its first batch.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.datamodule import ImageDataModule

REPEATS = 3


def write_shards(folder: Path, images: int, side: int) -> int:
    """Nine shards with row groups of 100; their bytes."""
    random = np.random.default_rng(0)
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    ends = np.linspace(0, 1, 10) ** 1.5 * images
    for number, (first, end) in enumerate(zip(ends[:-1].astype(int), ends[1:].astype(int), strict=True)):
        rows = []
        for _ in range(end - first):
            file = io.BytesIO()
            small = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
            small.resize((side, side)).save(file, "JPEG", quality=90)
            rows.append({"bytes": file.getvalue(), "path": None})
        table = pa.Table.from_pydict({"image": rows}, schema)
        pq.write_table(table, folder / f"train-{number:05}-of-00009.parquet", row_group_size=100)
    return sum(path.stat().st_size for path in folder.iterdir())


def first_batch(data: ImageDataModule, step: int) -> float:
    """Seconds to the first batch of a run that resumes at a step."""
    trainer: Any = SimpleNamespace(
        world_size=1, accumulate_grad_batches=1, global_rank=0, num_devices=1, training=True, global_step=step
    )
    data.trainer = trainer
    began = time.perf_counter()
    iterator = iter(data.train_dataloader())
    batch = next(iterator)
    seconds = time.perf_counter() - began
    assert len(batch["image"]) == data.config.batch_size
    return seconds


def main() -> None:
    """Make the shards, resume REPEATS times each, print a line a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        size = write_shards(Path(folder), args.images, args.side)
        print(f"{args.images:,} images of {args.side} px, {size / 2**20:.0f} MiB; median of {REPEATS}\n")
        print(f"{'data':28}{'open, s':>9}{'at 0%, s':>10}{'at 1%, s':>10}{'at 90%, s':>11}")
        for name, settings in (
            ("map-style", {}),
            ("streamed, window 4096", {"streaming": True}),
            ("streamed, window 512", {"streaming": True, "shuffle_window": 512}),
        ):
            config = DataConfig(
                path=folder, image_size=args.side, batch_size=args.batch, cache_mb=0, num_workers=1, **settings
            )
            began = time.perf_counter()
            data = ImageDataModule(config)
            data.setup()
            opened = time.perf_counter() - began
            assert data.train is not None
            steps = len(data.train) // args.batch
            times = [
                statistics.median(first_batch(data, int(part * steps)) for _ in range(REPEATS))
                for part in (0.0, 0.01, 0.9)
            ]
            print(f"{name:28}{opened:9.2f}{times[0]:10.2f}{times[1]:10.2f}{times[2]:11.2f}", flush=True)


if __name__ == "__main__":
    main()
