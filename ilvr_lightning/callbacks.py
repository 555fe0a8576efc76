"""What hooks into the Trainer: EMA, checkpoints, logs and ILVR grids."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torchvision.utils import make_grid

from ilvr_lightning.config import Config
from ilvr_lightning.configure import flatten, to_yaml
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.low_pass import LowPassFilter
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.images import Column, Pixels, Reference, draw_grid, from_tensor


class EMA(WeightAveraging):
    """Exponential moving average of the weights, min(decay, (1 + n) / (10 + n)) after n steps.

    A checkpoint holds the average under `state_dict` and the raw weights under `current_model_state`.

    Args:
        decay: the limit of the warm-up, in [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # Compared with 0 at every step: on the GPU that would wait for it.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def _average(self, averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(list(averages), list(weights), 1 - min(self.decay, (1 + n) / (10 + n)))

    @contextmanager
    def averaged(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """The module with the average for weights; the raw ones come back whatever happens."""
        if self._average_model is None or self._swapped:
            yield
            return
        self._swap_models(pl_module)
        try:
            yield
        finally:
            self._swap_models(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._swapped = self._average_model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._swapped = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._swapped:
            self._swap_models(pl_module)
            self._swapped = False


def _step_done(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this micro-batch is the last of its step."""
    last: bool = trainer.is_last_batch
    return last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class Checkpoints(Checkpoint):
    """last.ckpt every so many steps and at each epoch's end, best.ckpt by val/loss; saved whole or not at all.

    Args:
        folder: where they go.
        every_n_steps: optimizer steps between saves.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.best: float | None = None
        self._saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A step that was stopped amid its accumulation begins anew."""
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if lost := batches["processed"] % trainer.accumulate_grad_batches:
            batches.update(dict.fromkeys(batches, batches["processed"] - lost))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved_step
        if due and _step_done(trainer, batch_idx):
            self._save(trainer, "last.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        better = loss is not None and bool(torch.isfinite(loss)) and (self.best is None or float(loss) < self.best)
        if better:
            self.best = float(loss)  # type: ignore[arg-type]  # not None where better
        self._save(trainer, "last.ckpt")
        if better:
            self._save(trainer, "best.ckpt")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if isinstance(exception, KeyboardInterrupt) and fitting and trainer.global_step > 0:
            self._save(trainer, "last.ckpt")
            if trainer.is_global_zero:
                print(
                    f"\nstopped at step {trainer.global_step} and saved; go on with: "
                    f"python train.py {self.folder.parent / 'config.yaml'} resume={self.folder / 'last.ckpt'}"
                )

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        module = trainer.lightning_module
        if hasattr(module, "check_finite"):
            module.check_finite()  # type: ignore[operator]  # of DDPM
        partial = self.folder / f".{name}.partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.folder / name)
        self._saved_step = trainer.global_step


class TrainingLog(Callback):
    """train/* in TensorBoard, the loss in the progress bar."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._since_step = 0
        self._logged_step = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            text = "\n".join("    " + line for line in _config_text(pl_module).splitlines())
            trainer.logger.experiment.add_text("config", text, trainer.global_step)
            _add_hyper_parameters(trainer.logger.experiment, pl_module.config)  # type: ignore[arg-type]  # of DDPM

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since, self._since_step = time.perf_counter(), trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            pl_module.reset_step_loss()  # type: ignore[operator]  # of DDPM

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % trainer.log_every_n_steps == 0 or trainer.is_last_batch  # type: ignore[attr-defined]
        if not due or step == self._logged_step or not _step_done(trainer, batch_idx):
            return
        self._logged_step = step
        pl_module.check_finite()  # type: ignore[operator]
        metrics: dict[str, float] = pl_module.pop_losses()  # type: ignore[operator]
        pl_module.log("loss", metrics.get("train/loss", float("nan")), prog_bar=True, logger=False)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        images = (step - self._since_step) * pl_module.config.data.batch_size  # type: ignore[union-attr, operator]
        metrics |= {
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/grad_norm": float(pl_module.grad_norm),  # type: ignore[arg-type]
            "train/images_per_second": float(images) / seconds,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        self._since, self._since_step = time.perf_counter(), step


def _add_hyper_parameters(writer: Any, config: Config) -> None:
    """The settings as TensorBoard's hyper-parameters, judged by val/loss, without a value that was never measured."""
    settings = {key: value for key, value in flatten(config.plain()) if isinstance(value, bool | int | float | str)}
    for summary in hparams(settings, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
        writer.file_writer.add_summary(summary)


def _config_text(pl_module: pl.LightningModule) -> str:
    return to_yaml(pl_module.config)  # type: ignore[arg-type]  # of DDPM


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
        folder: Path | None = None,
        seed: int = 0,
        every_n_epochs: int = 1,
        every_n_steps: int = 0,
        batch_size: int = 32,
    ) -> None:
        self.references = list(references)
        self.plan = plan or SamplingPlan.preset("draft")
        self.factors = list(factors)
        self.samples = samples
        self.folder = folder
        self.seed = seed
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self._drawn_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n = self.every_n_steps
        if n and trainer.global_step % n == 0 and _step_done(trainer, batch_idx):
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        grids = list(trainer.datamodule.grids())  # type: ignore[attr-defined]
        for grid in grids[trainer.global_rank :: trainer.world_size]:
            grid.draw()

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
        if not self.references or trainer.global_step == self._drawn_step:
            return
        self._drawn_step = trainer.global_step
        training = pl_module.training
        pl_module.eval()
        try:
            with ema.averaged(pl_module) if ema else _nothing():
                tiles = self._sample(trainer, pl_module)
        finally:
            pl_module.train(training)
        if trainer.is_global_zero:
            self._write(trainer, tiles, "EMA" if ema else "raw weights")

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
        # Without gradients several times a rank's share of a training batch fits, and no more than that is known to.
        at_once = min(32, max(1, 4 * self.batch_size // trainer.world_size // trainer.accumulate_grad_batches))
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
        from dataclasses import replace

        factors = tuple(f for _, f, _ in jobs if f is not None)
        reference = torch.stack([self.references[row].tensor for row, *_ in jobs]) if factors else None
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
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self.folder / f"step_{trainer.global_step:07d}.png")
        if isinstance(trainer.logger, TensorBoardLogger):
            writer = trainer.logger.experiment
            writer.add_image("ilvr/grid", np.asarray(sheet), trainer.global_step, dataformats="HWC")
            free = [torch.from_numpy(np.moveaxis(tile, -1, 0)) for row in unconditional for tile in row]
            writer.add_image("samples/unconditional", make_grid(free, nrow=8), trainer.global_step)
            writer.flush()


def reference_columns(
    references: Sequence[Reference],
    factors: Sequence[int],
    plan: SamplingPlan,
    tiles: Callable[[int, int], list[Pixels]],
) -> list[Column]:
    """A row a reference: itself, then for each factor its low-pass image and its samples.

    Args:
        references: the rows.
        factors: the groups of columns.
        plan: gives the filter.
        tiles: the samples of (row, factor).
    """
    columns = [Column(label="reference", rows=[[r.pixels] for r in references])]
    for factor in factors:
        low = low_pass_pixels(references, factor, plan)
        rows = [[low[row], *tiles(row, factor)] for row in range(len(references))]
        columns.append(Column(label=f"N={factor}: low-pass, samples", rows=rows))
    return columns


def low_pass_pixels(references: Sequence[Reference], factor: int, plan: SamplingPlan) -> list[Pixels]:
    """phi_N of each reference, as pictures."""
    y = torch.stack([r.tensor for r in references])
    low_pass = LowPassFilter((y.shape[-2], y.shape[-1]), factor, plan.kernel, plan.orthogonal)
    return list(from_tensor(low_pass(y)))


@contextmanager
def _nothing() -> Iterator[None]:
    yield
