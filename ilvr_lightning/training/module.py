"""DDPM: the LightningModule that trains the unconditional diffusion model."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ilvr_lightning.config.load import config_from_dict, from_dict
from ilvr_lightning.config.schema import Config, DataConfig, OptimConfig
from ilvr_lightning.data.augment import augment, training_seeds
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.loss import training_losses
from ilvr_lightning.diffusion.noise import derive_seed
from ilvr_lightning.diffusion.schedule import make_schedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.unet import UNet
from ilvr_lightning.runtime.command import say
from ilvr_lightning.runtime.hardware import CompiledForward, restore_memory_format, should_compile, use_channels_last
from ilvr_lightning.runtime.signals import last_step

Batch = dict[str, Tensor]


class DDPM(pl.LightningModule):
    """Trains a denoiser on batch["image"] (B, C, H, W) in [-1, 1] (Ho et al. 2020, algorithm 1).

    Timesteps, noise, flips and turns are derived from (seed, step, index in the global batch), so that neither the
    number of devices nor a resumed run changes them.

    Args:
        config: a Config, or the dict that `Config.plain` made of one, as a checkpoint holds it.
        sections: in place of a config, sections of one as keyword arguments:
            DDPM(data={"image_size": 64}, model={"channels": 32}, optim={"lr": 1e-3}).

    Raises:
        UserError: a setting is unknown or out of its range.
    """

    def __init__(self, config: Config | Mapping[str, Any] | None = None, **sections: Any) -> None:
        super().__init__()
        if config is None:
            config = from_dict(Config, sections)
        self.config = config if isinstance(config, Config) else config_from_dict(config)
        self.save_hyperparameters({"config": self.config.without_local_paths()}, logger=False)
        diffusion = self.config.diffusion
        self.schedule = make_schedule(diffusion.schedule, diffusion.num_timesteps, diffusion.betas)
        with torch.random.fork_rng(devices=[]):  # the initial weights follow from the seed
            torch.manual_seed(self.config.seed)
            self.network = UNet(self.config.model, self.config.data.size, self.config.data.channels)
        self.grad_norm = torch.tensor(0.0)
        self._decay_steps: int | None = None
        self._resumed: tuple[int, int | None] | None = None
        """The step that the run resumes from, and the decay_steps that it had until then."""
        self._compiled: CompiledForward | None = None
        # Sums of (loss, number of images): over the present step, then since the last log per quartile of t. These are
        # no buffers, which DDP would copy from the first rank to the others.
        self._loss_sums = torch.zeros(5, 2)
        self._validation_sums = torch.zeros(2, dtype=torch.float64)
        self._first_nonfinite = torch.tensor([-1, -1])
        """Step and index in the global batch of the first loss that was not finite."""

    @property
    def denoiser(self) -> Denoiser:
        """The network as a callable (x, t) -> Prediction; compiled only in training, for the shape of its batches."""
        network = self._compiled if self.training and self._compiled is not None else self.network
        return Denoiser(network, self.schedule, self.config.diffusion.prediction)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.config.data.channels, *self.config.data.size)

    def prepare(self, trainer: pl.Trainer) -> None:
        """Choose precision and memory format for the Trainer's device, before weights are loaded."""
        trainer.precision_plugin.convert_module(self)
        use_channels_last(self.network, trainer.strategy.root_device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the range of values that the data module found, with which references are read, and decay_steps."""
        checkpoint["decay_steps"] = self._decay_steps
        data = getattr(getattr(self.trainer, "datamodule", None), "config", None)
        if isinstance(data, DataConfig):
            config = checkpoint["hyper_parameters"]["config"]
            found = {**config, "data": {**config["data"], "value_range": data.value_range}}
            checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "config": found}

    def on_train_start(self) -> None:
        if should_compile(self.config.compile, self.device, last_step(self.trainer)):
            self._compiled = CompiledForward(self.network)
        for optimizer in self.trainer.optimizers:
            restore_memory_format(optimizer)
        self._loss_sums = torch.zeros(5, 2, device=self.device)
        self._first_nonfinite = torch.tensor([-1, -1], device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of this rank's share of a micro-batch."""
        x0 = batch["image"]
        micro_batches = self.trainer.accumulate_grad_batches
        offset = (batch_idx % micro_batches * self.trainer.world_size + self.trainer.global_rank) * len(x0)
        step, seed = self.trainer.global_step, self.config.seed
        seeds = training_seeds(seed, step, range(offset, offset + len(x0)))
        x0 = augment(x0, seeds, self.config.data)
        t, noise = self._draw(seeds, x0)
        if self.config.model.dropout:  # a resumed run drops the same features in a step
            torch.manual_seed(derive_seed(seed, "dropout", step, offset))
        losses = training_losses(self.denoiser, x0, t, noise, self.config.diffusion.loss)
        self._record(losses.detach(), t, offset)
        return losses.mean()

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Sum the losses. Each image always gets the same noise and timestep, so that epochs are comparable.

        batch["index"] (B,) numbers the images; -1 stands for one that does not count. Without it they are numbered by
        their order.
        """
        x0 = batch["image"]
        index = batch.get("index", batch_idx * len(x0) + torch.arange(len(x0), device=x0.device))
        t, noise = self._draw([derive_seed(self.config.seed, "validation", i) for i in index.tolist()], x0)
        losses = training_losses(self.denoiser, x0, t, noise, self.config.diffusion.loss)
        weight = (index >= 0).to(losses.dtype)
        self._validation_sums += torch.stack([(losses * weight).sum(), weight.sum()]).cpu()

    def on_validation_epoch_end(self) -> None:
        total, count = self._over_ranks(self._validation_sums.to(self.device, torch.float32)).sum(0).tolist()
        self.log("val/loss", total / max(count, 1), prog_bar=True, logger=False, sync_dist=True)

    def _draw(self, seeds: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) ~ U{1..T} and noise (B, C, H, W), for each image from its own seed."""
        T = self.schedule.num_timesteps
        t = torch.tensor([1 + derive_seed(seed, "t") % T for seed in seeds], device=like.device)
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        generator = torch.Generator(like.device)
        for index, seed in enumerate(seeds):
            noise[index].normal_(generator=generator.manual_seed(seed))
        return t, noise

    def _record(self, losses: Tensor, t: Tensor, offset: int) -> None:
        """Add losses (B,) to the sums on the device, for which nothing here waits."""
        losses = losses.float()
        sums = torch.stack([losses, torch.ones_like(losses)], dim=1)
        quartile = (t - 1) * 4 // self.schedule.num_timesteps
        self._loss_sums[0] += sums.sum(0)
        self._loss_sums[1:].index_add_(0, quartile, sums)
        bad = ~losses.isfinite()
        here = torch.stack([torch.full_like(t[0], self.trainer.global_step), offset + bad.long().argmax()])
        self._first_nonfinite = torch.where((self._first_nonfinite[0] < 0) & bad.any(), here, self._first_nonfinite)

    def reset_step_loss(self) -> None:
        """Start the mean loss of a new step."""
        self._loss_sums[0].zero_()

    def pop_losses(self) -> dict[str, float]:
        """Mean losses over all ranks: of the last step, and by quartile of t since the last call."""
        sums = self._over_ranks(self._loss_sums).sum(0).tolist()
        self._loss_sums.zero_()
        names = ("train/loss", *(f"train/loss_q{i}" for i in (1, 2, 3, 4)))
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}

    def _over_ranks(self, value: Tensor) -> Tensor:
        """(world size, ...) the value of every rank."""
        gathered = self.all_gather(value) if self.trainer.world_size > 1 else value[None]
        assert isinstance(gathered, Tensor)
        return gathered

    def assert_finite_losses(self) -> None:
        """Stop the run if a loss since its start was not finite; called before anything is saved.

        Raises:
            FloatingPointError: names the first such step and image, and what was saved before.
            UserError: the loss of the very first step was not finite, with the weights that init_from gave.
        """
        found = self._over_ranks(self._first_nonfinite).tolist()
        step, index = min(((step, index) for step, index in found if step >= 0), default=(-1, -1))
        if step < 0:
            return
        if step == 0 and self.config.init_from is not None:
            raise UserError(
                f"init_from={self.config.init_from}: the loss is not finite with its weights, before any training; the "
                f"file is damaged, or its weights are too large for trainer.precision={self.trainer.precision}"
            )
        where = ""
        rows_of = getattr(getattr(self.trainer, "datamodule", None), "rows_of", None)
        if rows_of is not None:
            rows = rows_of(step)
            some = ", ".join(map(str, rows[:64])) + (" ..." if len(rows) > 64 else "")
            where = f", first at row {rows[index]} of the training split (the batch holds the rows {some})"
        raise FloatingPointError(f"the loss was not finite at step {step}{where}. {self._remedy()}")

    def assert_finite_weights(self) -> None:
        """Stop the run if a weight is not finite although the losses were; called before anything is saved.

        Raises:
            FloatingPointError: says what was saved before.
        """
        if not bool(torch.stack([p.isfinite().all() for p in self.parameters()]).all()):
            raise FloatingPointError(
                f"the weights are not finite at step {self.trainer.global_step}, although the losses were: a gradient "
                f"overflowed. {self._remedy()}"
            )

    def _remedy(self) -> str:
        saved = getattr(self.trainer.checkpoint_callback, "saved", "nothing has been saved")
        return (
            f"Lower optim.lr ({self.config.optim.lr:g}), set optim.grad_clip, or train in trainer.precision=32-true; "
            f"resume=auto resumes from the last good checkpoint: {saved}"
        )

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by optim.grad_clip, and keep the norm before clipping."""
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
        last = last_step(self.trainer)
        asked = last if optim.decay_steps == "auto" else optim.decay_steps
        self._decay_steps = decay = None if asked is None or math.isinf(asked) else int(asked)
        if self._resumed is not None and self._resumed[1] != decay:
            step, before = self._resumed
            say(f"note         optim.decay_steps is now {decay or 'null'} and was {before or 'null'} up to step {step}:"
                " the learning rate follows the new value from here on")  # fmt: skip
        if decay is not None and decay < last < math.inf:
            say(f"note         optim.decay_steps={decay}: the learning rate is 0 from step {decay} on, and the run has "
                f"{last} steps; optim.decay_steps=auto follows it")  # fmt: skip
        resolved = replace(optim, decay_steps=decay)
        schedule = LambdaLR(optimizer, lambda step: lr_factor(step, resolved))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        config = checkpoint["hyper_parameters"]["config"]  # of the run as it was
        before = checkpoint.get("decay_steps", config.get("optim", {}).get("decay_steps"))
        self._resumed = checkpoint["global_step"], before


def lr_factor(step: int, optim: OptimConfig) -> float:
    """Share of optim.lr after this many steps: a linear warm-up, then constant, or a cosine to 0 at decay_steps."""
    warm = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    if not isinstance(optim.decay_steps, int):
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / optim.decay_steps)))
