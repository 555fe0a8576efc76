"""ILVRGrid, the one maker of grids, in training and for sample.py."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchvision.utils import make_grid

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.data.images import Pixels, from_tensor
from ilvr_lightning.data.references import Reference, masks_of
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import DEFAULT_PRESET, SamplingPlan
from ilvr_lightning.training.ema import ema_weights, is_optimizer_step, sampling_batch_size
from ilvr_lightning.training.events import Events
from ilvr_lightning.visual.grids import Column, draw_grid, reference_columns


class ILVRGrid(Callback):
    """The one maker of grids: reference, its low-pass image, samples a factor, unconditional samples.

    Works on any LightningModule that offers a `denoiser` and a `schedule`. In fitting it samples with the average of
    the weights, with the same noise each time, the work shared over the ranks; in predicting it lays out what a data
    module with `grids()` says was made.

    Args:
        references: fitted pictures; empty in predicting.
        plan: how to sample.
        factors: a group of columns each.
        samples: of each reference and factor.
        folder: where the PNGs go.
        seed: of the noise.
        every_n_epochs: 0 draws none at epochs.
        every_n_steps: 0 draws none at steps.
        batch_size: the global batch of training, which says how many pictures fit at once.
    """

    def __init__(
        self,
        references: Sequence[Reference] = (),
        plan: SamplingPlan | None = None,
        *,
        factors: Sequence[int] = (),
        samples: int = 2,
        folder: Path = Path("grids"),
        seed: int = 0,
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        batch_size: int = 32,
    ) -> None:
        self.references = list(references)
        self.plan = plan or SamplingPlan.preset(DEFAULT_PRESET)
        self.factors = list(factors)
        self.samples = samples
        self.folder = folder
        self.seed = seed
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self._drawn_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_step": self._drawn_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn_step = state_dict["drawn_step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the grid that the run was stopped at."""
        n, step = self.every_n_steps, trainer.global_step
        if n and step and step % n == 0:
            self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n = self.every_n_steps
        if n and trainer.global_step % n == 0 and is_optimizer_step(trainer, batch_idx):
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        grids = list(trainer.datamodule.grids())  # type: ignore[attr-defined]
        for grid in grids[trainer.global_rank :: trainer.world_size]:
            grid.draw()

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.references or trainer.global_step == self._drawn_step:
            return
        with ema_weights(trainer, pl_module) as averaged:
            tiles = self._sample(trainer, pl_module)
        if trainer.is_global_zero:
            self._write(trainer, tiles, "EMA" if averaged else "raw weights")
        self._drawn_step = trainer.global_step

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.png"

    def _jobs(self) -> list[tuple[int, int | None, int]]:
        """(reference, factor or None for unconditional, sample), in the order of the grid."""
        jobs: list[tuple[int, int | None, int]] = []
        for row in range(len(self.references)):
            for factor in (*self.factors, None):
                jobs += [(row, factor, sample) for sample in range(self.samples)]
        return jobs

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[tuple[int, int | None, int], Pixels]:
        jobs = self._jobs()
        mine = jobs[trainer.global_rank :: trainer.world_size]
        shape = tuple(self.references[0].tensor.shape)
        count = -(-len(jobs) // trainer.world_size)
        pixels = torch.zeros((count, *shape), dtype=torch.uint8, device=pl_module.device)
        at_once = sampling_batch_size(trainer, self.batch_size, 32)
        done = 0
        for conditioned in (True, False):
            group = [job for job in mine if (job[1] is not None) == conditioned]
            for start in range(0, len(group), at_once):
                images = self._generate(pl_module, group[start : start + at_once], shape)
                pixels[done : done + len(images)] = torch.from_numpy(np.moveaxis(from_tensor(images), -1, -3)).to(
                    pixels
                )
                done += len(images)
        gathered = pixels
        if trainer.world_size > 1:
            stacked = pl_module.all_gather(pixels)
            assert isinstance(stacked, Tensor)
            gathered = stacked.flatten(0, 1)
        tiles: dict[tuple[int, int | None, int], Pixels] = {}
        for rank in range(trainer.world_size):
            theirs = jobs[rank :: trainer.world_size]
            ordered = [j for j in theirs if j[1] is not None] + [j for j in theirs if j[1] is None]
            for place, job in enumerate(ordered):
                tiles[job] = np.moveaxis(gathered[rank * count + place].cpu().numpy(), 0, -1)
        return tiles

    def _generate(
        self, pl_module: pl.LightningModule, jobs: list[tuple[int, int | None, int]], shape: tuple[int, ...]
    ) -> Tensor:
        factors = tuple(f for _, f, _ in jobs if f is not None)
        references = [self.references[row] for row, *_ in jobs]
        reference = torch.stack([r.tensor for r in references]) if factors else None
        seeds = [
            image_seed(self.seed, self.references[row].sha256, k)
            if factor is not None
            else image_seed(self.seed, None, row * self.samples + k)
            for row, factor, k in jobs
        ]
        return generate(
            pl_module.denoiser,  # type: ignore[arg-type]
            pl_module.schedule,  # type: ignore[arg-type]
            replace(self.plan, factor=factors) if factors else self.plan,
            seeds=seeds,
            shape=(shape[0], shape[1], shape[2]),
            reference=reference,
            mask=masks_of(references) if factors else None,
            device=pl_module.device,
        )

    def _write(self, trainer: pl.Trainer, tiles: dict[tuple[int, int | None, int], Pixels], weights: str) -> None:
        rows, ks = range(len(self.references)), range(self.samples)
        columns = reference_columns(
            self.references, self.factors, self.plan, lambda row, factor: [tiles[row, factor, k] for k in ks]
        )
        unconditional = [[tiles[r, None, k] for k in ks] for r in rows]
        columns.append(Column(label="unconditional", rows=unconditional))
        title = f"step {trainer.global_step}, {weights}, {self.plan.sampler} {self.plan.num_steps} steps"
        sheet = draw_grid(columns, title)
        file, logger = self._file(trainer.global_step), trainer.logger
        with logger.surviving(file.name) if isinstance(logger, Events) else nullcontext():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, functools.partial(sheet.save, format="PNG"), durable=True)
        if isinstance(trainer.logger, Events):
            step = trainer.global_step
            free = [torch.from_numpy(np.moveaxis(tile, -1, 0)) for row in unconditional for tile in row]
            trainer.logger.write(
                lambda writer: writer.add_image("ilvr/grid", np.asarray(sheet), step, dataformats="HWC")
            )
            trainer.logger.write(
                lambda writer: writer.add_image("samples/unconditional", make_grid(free, nrow=8), step)
            )
            trainer.logger.save()
