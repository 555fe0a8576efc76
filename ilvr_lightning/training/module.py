"""DDPM, the LightningModule that trains the unconditional model: thin."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ilvr_lightning.config.load import config_from_dict
from ilvr_lightning.config.schema import Config, OptimConfig
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.loss import training_losses
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.hardware import Compiled, restore_memory_format

Batch = dict[str, Tensor]


class DDPM(pl.LightningModule):
    """Trains a denoiser on batch["image"] (B, C, H, W) in [-1, 1] (Ho et al. 2020, algorithm 1).

    Timesteps, noise and flips come from (seed, global step, place in the global batch), so neither the number of
    devices nor a resumed run changes them.

    Args:
        config: a Config, or what `Config.plain` made of one.
    """

    def __init__(self, config: Config | dict[str, Any]) -> None:
        super().__init__()
        self.config = config if isinstance(config, Config) else config_from_dict(config)
        self.save_hyperparameters({"config": self.config.without_local_paths()})
        diffusion = self.config.diffusion
        self.schedule = make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas)
        self.network = UNet(self.config.model, self.config.data.size, self.config.data.channels)
        self._compiled: Compiled | None = None
        # Sums of (loss, count) since the last log: over all timesteps of this step, then a quartile of t each.
        self._step_sums = torch.zeros(2)
        self._quartile_sums = torch.zeros(4, 2)
        self._validation_sums = torch.zeros(2, dtype=torch.float64)
        self._first_nonfinite = torch.tensor([-1, -1])
        """Step of the first loss that was not finite, and its place in the global batch."""
        self.grad_norm = torch.tensor(0.0)

    @property
    def denoiser(self) -> Denoiser:
        """The network as a callable (x, t) -> Prediction."""
        network = self._compiled if self.training and self._compiled is not None else self.network
        return Denoiser(network, self.schedule, self.config.diffusion.prediction)

    def compile_training(self) -> None:
        """Compile the network for the shape of a training batch; validation and grids run it as it is."""
        self._compiled = Compiled(self.network)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.config.data.channels, *self.config.data.size)

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            restore_memory_format(optimizer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of this rank's share of a micro-batch."""
        x0 = batch["image"]
        parts = self.trainer.accumulate_grad_batches
        first = (batch_idx % parts * self.trainer.world_size + self.trainer.global_rank) * len(x0)
        seeds = [
            derive_seed(self.config.seed, "train", self.trainer.global_step, first + place) for place in range(len(x0))
        ]
        if self.config.data.flip:
            flip = torch.tensor([derive_seed(seed, "flip") % 2 == 1 for seed in seeds], device=x0.device)
            x0 = torch.where(flip[:, None, None, None], x0.flip(-1), x0)
        t, noise = self._draw(seeds, x0)
        if self.config.model.dropout:  # resumed or not, a step drops the same
            torch.manual_seed(derive_seed(self.config.seed, "dropout", self.trainer.global_step, first))
        losses = training_losses(self.denoiser, x0, t, noise, self.config.diffusion.loss)
        self._record(losses.detach(), t, first)
        return losses.mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum losses on noise and timesteps that are each image's own, so that two epochs are comparable."""
        index = batch["index"].tolist()
        t, noise = self._draw([derive_seed(self.config.seed, "validation", i) for i in index], batch["image"])
        losses = training_losses(self.denoiser, batch["image"], t, noise, self.config.diffusion.loss)
        weight = (batch["index"] >= 0).to(losses.dtype)
        self._validation_sums += torch.stack([(losses * weight).sum(), weight.sum()]).cpu()

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(2, dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        total, count = self._summed(self._validation_sums.to(self.device, torch.float32)).tolist()
        self.log("val/loss", total / max(count, 1), prog_bar=True, logger=False, sync_dist=True)

    def _draw(self, seeds: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) ~ U{1..T} and noise like the images, each from its own seed."""
        T = self.schedule.num_timesteps
        t = torch.tensor([1 + derive_seed(seed, "t") % T for seed in seeds], device=like.device)
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        generator = torch.Generator(like.device)
        for place, seed in enumerate(seeds):
            noise[place].normal_(generator=generator.manual_seed(seed))
        return t, noise

    def _record(self, losses: Tensor, t: Tensor, first: int) -> None:
        """Keep sums on the device; nothing here waits for it. The batch begins at place `first` of the global one."""
        device = losses.device
        losses = losses.float()
        if self._step_sums.device != device:
            self._step_sums, self._quartile_sums = self._step_sums.to(device), self._quartile_sums.to(device)
            self._first_nonfinite = self._first_nonfinite.to(device)
        both = torch.stack([losses, torch.ones_like(losses)], dim=1)
        self._step_sums += both.sum(0)
        quartile = (t - 1) * 4 // self.schedule.num_timesteps
        self._quartile_sums.index_add_(0, quartile, both)
        bad = ~losses.isfinite()
        here = torch.stack([torch.full_like(t[0], self.trainer.global_step), first + bad.long().argmax()])
        self._first_nonfinite = torch.where((self._first_nonfinite[0] < 0) & bad.any(), here, self._first_nonfinite)

    def assert_finite_losses(self) -> None:
        """Stop the run if a loss since the start was not finite; called before anything is saved.

        Raises:
            FloatingPointError: names the first such step, its row, and what was saved before.
            UserError: it was not from the first step on, with the weights that init_from gave.
        """
        found = [self._first_nonfinite.tolist()]
        if self.trainer.world_size > 1:
            found = _gathered(self, self._first_nonfinite).tolist()
        step, place = min(((step, place) for step, place in found if step >= 0), default=(-1, -1))
        if step < 0:
            return
        if step == 0 and self.config.init_from is not None:
            raise UserError(
                f"init_from={self.config.init_from}: with its weights the loss is not finite before any training; the "
                f"file is damaged, or its weights are too large for trainer.precision={self.trainer.precision}"
            )
        rows = self.trainer.datamodule.rows_of(step)  # type: ignore[attr-defined]
        raise FloatingPointError(
            f"the loss was not finite at step {step}, first at row {rows[place]} of the training split (of the batch's "
            f"rows {', '.join(map(str, rows[:64]))}{' ...' if len(rows) > 64 else ''}). Lower optim.lr "
            f"({self.config.optim.lr:g}), set optim.grad_clip, or train in trainer.precision=32-true; resume=auto goes "
            f"on from the last good checkpoint: {getattr(self.trainer.checkpoint_callback, 'saved', 'there is none')}"
        )

    def assert_finite_weights(self) -> None:
        """Stop the run if a weight is not finite, whose losses were; called before anything is saved.

        Raises:
            FloatingPointError: says what was saved before.
        """
        if not bool(torch.stack([p.isfinite().all() for p in self.parameters()]).all()):
            raise FloatingPointError(
                f"the weights are not finite at step {self.trainer.global_step}, though the losses were: a gradient "
                f"overflowed. Lower optim.lr ({self.config.optim.lr:g}), set optim.grad_clip, or train in "
                "trainer.precision=32-true; resume=auto goes on from the last good checkpoint: "
                f"{getattr(self.trainer.checkpoint_callback, 'saved', 'there is none')}"
            )

    def pop_losses(self) -> dict[str, float]:
        """Mean losses over all ranks since the last call: of the last step, and by quartile of t."""
        sums = self._summed(torch.cat([self._step_sums[None], self._quartile_sums])).tolist()
        self._step_sums.zero_()
        self._quartile_sums.zero_()
        names = ("train/loss", *(f"train/loss_q{i}" for i in (1, 2, 3, 4)))
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}

    def reset_step_loss(self) -> None:
        """Begin the mean of a new step."""
        self._step_sums.zero_()

    def _summed(self, sums: Tensor) -> Tensor:
        """Summed over the ranks."""
        return _gathered(self, sums).sum(0) if self.trainer.world_size > 1 else sums

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by optim.grad_clip and keep the norm from before."""
        limit = self.config.optim.grad_clip
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), math.inf if limit is None else limit)

    def configure_optimizers(self) -> Any:
        optim = self.config.optim
        # With a gradient scaler Lightning leaves a fused optimizer's gradients scaled, and clipping would see those.
        fused = self.trainer.precision != "16-mixed"
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.name]
        optimizer = kind(
            self.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=fused
        )
        schedule = LambdaLR(optimizer, lambda step: lr_factor(step, optim))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _gathered(module: pl.LightningModule, value: Tensor) -> Tensor:
    """(world, ...) a value from every rank."""
    gathered = module.all_gather(value)
    assert isinstance(gathered, Tensor)
    return gathered


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Share of optim.lr after so many steps: linear warm-up, then constant or a cosine to 0 at decay_steps."""
    warm = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    if optim.decay_steps is None:
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / optim.decay_steps)))
