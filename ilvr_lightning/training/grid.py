"""ILVRGrid: grids of reference-conditioned samples, during training and over what sample.py has sampled."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ilvr_lightning.atomic import write_atomically
from ilvr_lightning.config.schema import Config
from ilvr_lightning.data.images import Pixels, from_tensor, to_tensor
from ilvr_lightning.data.references import Reference, masks_of
from ilvr_lightning.diffusion.denoiser import Denoise
from ilvr_lightning.diffusion.generate import generate
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.signals import is_optimizer_step, last_step
from ilvr_lightning.training.ema import ema_weights, sampling_batch_size
from ilvr_lightning.training.loggers import log_picture
from ilvr_lightning.training.tint import ColourMeans, Tint
from ilvr_lightning.visual.grids import Column, GridSource, draw_grid, reference_columns
from ilvr_lightning.visual.pages import write_grid_page

MAX_BATCH = 32
"""The most images that a rank samples at once for a grid."""

ABOUT, UNLIMITED = 30, 1000
"""every_n_steps="auto" draws about so many grids in a run, or one per so many steps where the run has no limit."""


@runtime_checkable
class Steerable(Protocol):
    """What ILVRGrid needs of a LightningModule."""

    @property
    def denoiser(self) -> Denoise:
        """A callable (x, t) -> Prediction, x (B, C, H, W) and t (B,) in 1..T, on the module's device."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule that the denoiser was trained with."""


@dataclass(frozen=True)
class Tile:
    """One sample of a grid."""

    row: int
    factor: int | None
    """N, or None for an unconditional sample."""
    sample: int


class ILVRGrid(Callback):
    """Draws references, their low-pass images, samples at several factors, and unconditional samples.

    It works in any Trainer with any LightningModule that has a `denoiser` and a `schedule` (see Steerable). It samples
    with the average of the weights where EMA is among the callbacks, with the same noise each time, and shares the work
    over the ranks. A grid goes into a PNG, and index.html beside the PNGs shows them all. Loggers that show pictures
    get a part of it per factor: grids/N4, grids/N8, grids/unconditional. The tint of the unconditional samples is
    logged, and a line warns where it grows.

    Args:
        references: References, or images (B, C, H, W) in [-1, 1]; without any, no grid is drawn.
        plan: the sampling settings; by default those of the preset "fast".
        factors: low-pass factors N; each has a group of columns.
        samples: samples per reference and factor.
        folder: where the PNGs and index.html go.
        seed: of the noise.
        every_n_epochs: epochs between grids; 0 draws none at the end of epochs.
        every_n_steps: steps between grids; 0 draws none within epochs, and "auto" about 30 in the whole run, the last
            one at its end (in a run without a limit, one every 1000 steps).
        batch_size: the global batch of training, which tells how many images fit into memory.

    Raises:
        TypeError: at setup, the LightningModule is not Steerable.
    """

    def __init__(
        self,
        references: Sequence[Reference] | Tensor = (),
        plan: SamplingPlan | None = None,
        *,
        factors: Sequence[int] = (4, 8, 16),
        samples: int = 2,
        folder: str | Path = "grids",
        seed: int = 0,
        every_n_epochs: int = 1,
        every_n_steps: int | Literal["auto"] = 0,
        batch_size: int = 32,
    ) -> None:
        self.references = _as_references(references)
        self.plan = plan or SamplingPlan()
        self.factors = list(factors)
        self.samples = samples
        self.folder = Path(folder)
        self.seed = seed
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self._source: GridSource | None = None
        self._drawn_step = -1
        self._colours, self._tint, self._has_warned = ColourMeans(), math.inf, False

    @classmethod
    def of_config(cls, config: Config, references: Sequence[Reference], folder: Path) -> "ILVRGrid":
        """The callback for train.py, by the settings grid.* and sampling.*."""
        return cls(
            references,
            config.grid_plan,
            factors=config.grid.factors,
            samples=config.grid.samples,
            folder=folder,
            seed=config.seed,
            every_n_epochs=config.grid.every_n_epochs,
            every_n_steps=config.grid.every_n_steps,
            batch_size=config.data.batch_size,
        )

    @classmethod
    def of_samples(cls, source: GridSource) -> "ILVRGrid":
        """The callback for Trainer.predict: at its end it draws the grids of the samples, shared over the ranks."""
        grid = cls()
        grid._source = source
        return grid

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.references and not isinstance(pl_module, Steerable):
            raise TypeError(
                f"ILVRGrid needs a LightningModule with a denoiser and a schedule; {type(pl_module).__name__} does not "
                "have both"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_step": self._drawn_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning calls the end of an epoch again when a run by steps resumes from it.
        self._drawn_step = state_dict.get("drawn_step", -1)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._source is not None:
            for grid in list(self._source.grids())[trainer.global_rank :: trainer.world_size]:
                grid.draw()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._colours.add(batch)
        due = is_due(trainer.global_step, self.every_n_steps, last_step(trainer))
        if due and is_optimizer_step(trainer, batch_idx):
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.references or trainer.global_step == self._drawn_step:
            return
        with ema_weights(trainer, pl_module) as averaged:
            pixels = self._sample(trainer, pl_module)
        if trainer.is_global_zero:
            self._write(trainer, pixels, "EMA weights" if averaged else "raw weights")
        self._drawn_step = trainer.global_step

    def _tiles(self) -> list[Tile]:
        """Every sample, those that follow a reference first."""
        rows, samples = range(len(self.references)), range(self.samples)
        tiles = [Tile(row, factor, sample) for row in rows for factor in self.factors for sample in samples]
        return tiles + [Tile(row, None, sample) for row in rows for sample in samples]

    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[Tile, Pixels]:
        """Sample this rank's share of the tiles and gather the others'."""
        tiles = self._tiles()
        own = tiles[trainer.global_rank :: trainer.world_size]
        share = -(-len(tiles) // trainer.world_size)
        shape = tuple(self.references[0].tensor.shape)
        pixels = torch.zeros((share, *shape), dtype=torch.uint8, device=pl_module.device)
        at_once = sampling_batch_size(trainer, self.batch_size, MAX_BATCH)
        done = 0
        for batch in _batches(own, at_once):
            images = from_tensor(self._generate(pl_module, batch, shape))
            pixels[done : done + len(batch)] = torch.from_numpy(np.moveaxis(images, -1, -3)).to(pixels)
            done += len(batch)
        gathered = pl_module.all_gather(pixels) if trainer.world_size > 1 else pixels[None]
        assert isinstance(gathered, Tensor)
        arrays = np.moveaxis(gathered.cpu().numpy(), -3, -1)
        return {
            tile: arrays[rank, place]
            for rank in range(trainer.world_size)
            for place, tile in enumerate(tiles[rank :: trainer.world_size])
        }

    def _generate(self, pl_module: pl.LightningModule, tiles: Sequence[Tile], shape: tuple[int, ...]) -> Tensor:
        """(B, C, H, W) samples of tiles that all follow a reference, or all follow none."""
        assert isinstance(pl_module, Steerable)
        factors = tuple(tile.factor for tile in tiles if tile.factor is not None)
        references = [self.references[tile.row] for tile in tiles] if factors else []
        seeds = [
            image_seed(self.seed, self.references[tile.row].sha256, tile.sample)
            if factors
            else image_seed(self.seed, None, tile.row * self.samples + tile.sample)
            for tile in tiles
        ]
        return generate(
            pl_module.denoiser,
            pl_module.schedule,
            replace(self.plan, factor=factors) if factors else self.plan,
            seeds=seeds,
            shape=(shape[0], shape[1], shape[2]),
            reference=torch.stack([r.tensor for r in references]) if references else None,
            mask=masks_of(references) if references else None,
            device=pl_module.device,
        )

    def _write(self, trainer: pl.Trainer, pixels: dict[Tile, Pixels], weights: str) -> None:
        step, rows, samples = trainer.global_step, range(len(self.references)), range(self.samples)

        def conditioned(factors: Sequence[int]) -> list[Column]:
            return reference_columns(
                self.references, factors, self.plan, lambda row, n: [pixels[Tile(row, n, k)] for k in samples]
            )

        free = Column(label="unconditional", rows=[[pixels[Tile(row, None, k)] for k in samples] for row in rows])
        tint = self._colours.tint(torch.stack([to_tensor(tile) for row in free.rows for tile in row]))
        if tint is not None:
            self._note_tint(trainer, tint)
        title = f"step {step}, {weights}, {self.plan.sampler}, {self.plan.num_steps} steps"
        image = draw_grid([*conditioned(self.factors), free], title)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:07d}.png"
        write_atomically(path, functools.partial(image.save, format="PNG"), durable=True)
        write_grid_page(self.folder)
        # A logger shows small cards: each factor has its own, of few columns.
        cards = {f"grids/N{n}": draw_grid(conditioned([n]), "") for n in self.factors}
        cards["grids/unconditional"] = draw_grid([free], "")
        for logger in trainer.loggers:
            for tag, card in cards.items():
                log_picture(logger, tag, card, step)
            logger.save()

    def _note_tint(self, trainer: pl.Trainer, tint: Tint) -> None:
        """Log a tint; warn once where it is more than chance and has grown since the grid before."""
        for logger in trainer.loggers:
            logger.log_metrics(tint.metrics(), trainer.global_step)
        if tint.is_certain and tint.size > self._tint and not self._has_warned:
            self._has_warned = True
            say(
                f"\ntint         unconditional samples drift in colour: {tint} levels of 255 from the training images; "
                "if later grids keep it, lower optim.lr or raise ema.decay"
            )
        self._tint = tint.size


def is_due(step: int, every_n_steps: int | Literal["auto"], last: float) -> bool:
    """Whether a grid is drawn after this step of a run that ends at the step `last`, which may be infinite."""
    if every_n_steps != "auto":
        return every_n_steps > 0 and step % every_n_steps == 0
    if math.isinf(last):
        return step % UNLIMITED == 0
    return (last - step) % math.ceil(last / ABOUT) == 0


def _batches(tiles: Sequence[Tile], size: int) -> Iterable[Sequence[Tile]]:
    """Tiles in batches, those that follow a reference apart from the others."""
    for conditioned in (True, False):
        group = [tile for tile in tiles if (tile.factor is not None) == conditioned]
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _as_references(references: Sequence[Reference] | Tensor) -> list[Reference]:
    if not isinstance(references, Tensor):
        return list(references)
    return [Reference(name=f"reference_{i}", pixels=pixels) for i, pixels in enumerate(from_tensor(references))]
