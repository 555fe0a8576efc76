"""SampleWriter: the callback that writes what is sampled, with the progress bar and the estimate of time."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from ilvr_lightning.data.images import from_tensor
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.errors import StopRequested
from ilvr_lightning.runtime.command import report_errors_on_every_rank, say
from ilvr_lightning.sampling.folder import SampleFolder
from ilvr_lightning.sampling.module import ILVRSampler, SampleLoader
from ilvr_lightning.sampling.trajectory import FRAMES_IN_ANIMATION, Frame, draw_trajectory, evenly_chosen

LONG_RUN_SECONDS = 60
"""A run that will take longer than this says so, and which preset would be quicker."""
LOG_SECONDS = 60
"""The progress bar writes one line per so many seconds where it does not go to a terminal."""


class SampleWriter(Callback):
    """Writes each batch as soon as it is sampled: PNGs with their recipes, references, drawn steps.

    Args:
        folder: where the images go.
        loader: what is still to be made.
    """

    def __init__(self, folder: SampleFolder, loader: SampleLoader) -> None:
        self.folder, self.loader = folder, loader
        self._frames: list[Frame] = []
        self._evidence: list[float] | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ILVRSampler)
        report_errors_on_every_rank()
        if trainer.is_global_zero:
            self.folder.remove_partials()
        trainer.strategy.barrier("every rank knows what is missing")
        evaluations = self.folder.requests.plans[0].evaluations
        self._progress = Progress(
            evaluations, len(self.loader.todo), self.loader.batch_size, trainer.world_size, trainer.is_global_zero
        )
        drawn = set(evenly_chosen(range(evaluations), FRAMES_IN_ANIMATION)) if self.folder.trajectory else set()

        def on_step(t: int, state: SamplerState) -> None:
            if self._progress.steps % evaluations in drawn:
                self._frames.append(Frame(t, from_tensor(state.x0 if state.t else state.x)))
            self._progress.step(len(state.x))
            if state.t == 0:
                self._evidence = None if state.evidence is None else state.evidence.tolist()

        pl_module.on_step = on_step

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert isinstance(pl_module, ILVRSampler)
        environment = pl_module.environment(len(batch))
        for i, (request, pixels) in enumerate(zip(batch, from_tensor(outputs), strict=True)):
            evidence = None if self._evidence is None else round(self._evidence[i], 2)
            path = self.folder.write(request, pixels, {**environment, "evidence": evidence})
            if self.folder.trajectory:
                draw_trajectory(self._frames, i, request, path)
        self._frames.clear()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress.close()
        trainer.strategy.barrier("every image is written")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.strategy.barrier("every grid is drawn")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, StopRequested | KeyboardInterrupt):
            say("\nstopped; run the same command again to continue", sys.stderr)
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            process.kill()  # another rank, which the signal may not have reached


class Progress:
    """The progress of the run as rank 0 sees it: the other ranks are taken to be as far as it is.

    Args:
        evaluations: evaluations of the network per image.
        images: the images to make on all ranks.
        batch_size: images sampled at once per rank.
        world_size: the number of ranks.
        visible: whether this rank shows anything.
    """

    def __init__(self, evaluations: int, images: int, batch_size: int, world_size: int, visible: bool) -> None:
        self.steps = 0
        """The sampling steps of this rank so far."""
        self._evaluations, self._world_size, self._visible = evaluations, world_size, visible
        self._total = evaluations * -(-images // (batch_size * world_size))
        self._images, self._done = images, 0.0
        self._started = time.perf_counter()
        self._is_estimated = False
        interval = 0.1 if sys.stderr.isatty() else LOG_SECONDS
        self._bar = tqdm(
            total=images, desc="sampling", unit="image", disable=not visible, mininterval=interval,
            maxinterval=max(10, interval), delay=interval,
            bar_format="{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        )  # fmt: skip

    def step(self, batch_size: int) -> None:
        """Count a sampling step of a batch."""
        self.steps += 1
        self._done = min(self._images, self._done + batch_size * self._world_size / self._evaluations)
        self._bar.update(self._done - self._bar.n)
        seconds = time.perf_counter() - self._started
        if self.steps == 1:
            self._started = time.perf_counter()  # the first step warms up
        elif self._visible and not self._is_estimated and (self.steps >= 20 or seconds > 3):
            self._is_estimated = True
            if (whole := seconds / (self.steps - 1) * self._total) > LONG_RUN_SECONDS:
                self._bar.write(time_estimate(whole, self._evaluations))

    def close(self) -> None:
        """End the bar, full."""
        self._bar.update(self._images - self._bar.n)
        self._bar.close()


def time_estimate(seconds: float, evaluations: int) -> str:
    """How long a run will take, and which preset would be quicker."""
    text = f"this will take about {_duration(seconds)}"
    steps = {name: SamplingPlan.preset(name).num_steps for name in PRESETS}
    quicker = {name: count for name, count in steps.items() if count != "all" and count < evaluations}
    if quicker:
        name = min(quicker, key=lambda n: quicker[n])
        text += f"; --preset {name} would take about {_duration(seconds * quicker[name] / evaluations)}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
