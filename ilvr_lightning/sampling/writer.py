"""What sample.py runs: sampling as a LightningModule, what is to be made as a data module, files as a callback."""

import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import from_tensor, to_image
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.errors import StopRequested
from ilvr_lightning.runtime.command import report_errors_on_every_rank
from ilvr_lightning.sampling.manifest import Entry, Growth, RankManifest, merge, rank_path
from ilvr_lightning.sampling.module import ILVRSampler, SampleLoader, _duration
from ilvr_lightning.sampling.outputs import Output
from ilvr_lightning.sampling.pictures import remove_partials
from ilvr_lightning.sampling.requests import trajectory_files
from ilvr_lightning.sampling.trajectory import IN_ANIMATION, Frame, draw_trajectory, spread

LONG_RUN_SECONDS = 60


class SampleWriter(Callback):
    """PNGs with their recipe, the manifest, fitted references, steps; the progress bar and the estimate of time.

    Args:
        jobs: what is made.
        folder: where it goes.
    """

    def __init__(self, jobs: SampleLoader, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self.missing = 0
        """Pictures that should be there at the end and are not."""
        self._frames: list[Frame] = []
        self._made = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ILVRSampler)
        report_errors_on_every_rank()
        rank, world = trainer.global_rank, trainer.world_size
        if rank == 0:
            remove_partials(self.folder)
        others = Growth([rank_path(self.folder, other) for other in range(world) if other != rank])
        trainer.strategy.barrier("nothing is written yet")
        self._manifest = RankManifest(self.folder, rank)
        evaluations = pl_module.plan.evaluations
        mine = len(self.jobs.share(rank, world))
        total = evaluations * -(-mine // self.jobs.batch_size)
        self._bar = bar = tqdm(
            total=len(self.jobs.todo), desc="sampling", unit="picture", disable=rank > 0 or None,
            bar_format="{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        )  # fmt: skip
        kept = set(spread(range(evaluations), IN_ANIMATION))
        started, done, said = time.perf_counter(), 0, False

        def on_step(t: int, state: SamplerState) -> None:
            nonlocal done, started, said
            if self.jobs.trajectory and done % evaluations in kept:
                self._frames.append(Frame(t, from_tensor(state.x0 if state.t else state.x)))
            done += 1
            if not bar.disable:
                under_way = len(state.x) * ((done - 1) % evaluations + 1) / evaluations
                bar.update(max(0.0, self._made + under_way + others.lines() - bar.n))
            seconds = time.perf_counter() - started
            if done == 1:
                started = time.perf_counter()  # the first one warms up
            elif not said and (done >= 20 or seconds > 3):
                said = True
                if (whole := seconds / (done - 1) * total) > LONG_RUN_SECONDS and trainer.is_global_zero:
                    bar.write(estimate(whole, evaluations))

        pl_module.on_step = on_step

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, StopRequested | KeyboardInterrupt) and trainer.is_global_zero:
            print("\nstopped; the same command goes on with it", file=sys.stderr, flush=True)
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            process.kill()

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert isinstance(pl_module, ILVRSampler)
        pictures = self.jobs.output.pictures
        conditions = pl_module.conditions(len(batch))
        entries: list[Entry] = []
        for place, (job, pixels) in enumerate(zip(batch, from_tensor(outputs), strict=True)):
            if job.reference is not None and self.jobs.jobs.references.all_validated:
                keep_reference(job.reference, self.folder)
            recipe = replace(job.recipe, **conditions)
            path = pictures.write(job, pixels, recipe)
            if self.jobs.trajectory:
                draw_trajectory(self._frames, place, job, path)
            else:
                for old in trajectory_files(path):
                    old.unlink(missing_ok=True)  # of another picture of this name
            entries.append({"file": path.relative_to(self.folder).as_posix(), **vars(recipe)})
        self._manifest.add(entries)
        self._made += len(batch)
        self._frames.clear()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        output = self.jobs.output
        trainer.strategy.barrier("samples are written")
        self._bar.update(len(self.jobs.todo) - self._bar.n)
        self._bar.close()
        output.pack(trainer.global_rank, trainer.world_size)
        trainer.strategy.barrier("samples are packed")
        if trainer.is_global_zero:
            self.missing = 0
            merge(self.folder, self._present(output))
            output.finish(self.missing == 0)

    def _present(self, output: Output) -> Iterator[Entry]:
        for entry in output.entries():
            if entry is None:
                self.missing += 1
            else:
                yield entry


def estimate(seconds: float, evaluations: int) -> str:
    """How long a run will take, and which preset would be quicker."""
    text = f"this will take about {_duration(seconds)}"
    quicker = {name: n for name in PRESETS if (n := SamplingPlan.preset(name).num_steps) != "all" and n < evaluations}
    if quicker:
        name = min(quicker, key=lambda n: quicker[n])
        text += f"; --preset {name} would take about {_duration(seconds * quicker[name] / evaluations)}"
    return text


def keep_reference(reference: Reference, folder: Path) -> None:
    """Keep a fitted reference and its mask beside the samples, named by their hash."""
    target = folder / "references"
    for pixels, sha256 in ((reference.pixels, reference.sha256), (reference.mask, reference.mask_sha256)):
        path = target / f"{sha256}.png"
        if pixels is not None and not path.exists():
            target.mkdir(exist_ok=True)
            write_atomically(path, functools.partial(to_image(pixels).save, format="PNG"))
