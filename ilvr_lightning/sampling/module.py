"""Sampling as a LightningModule, and the images that are still to be made as a data module."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.data.references import masks_of
from ilvr_lightning.diffusion.denoiser import Denoiser
from ilvr_lightning.diffusion.generate import evaluated_timesteps, generate_steps
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.hardware import (
    Compile,
    CompiledForward,
    cast_for_sampling,
    sampling_in_bf16,
    should_compile,
)
from ilvr_lightning.sampling.folder import Indices
from ilvr_lightning.sampling.requests import SampleRequest, SampleRequests

PER_IMAGE = ("factor", "condition_from", "condition_to", "octave_gains", "reference_sigma")
"""The fields of a plan that may differ between the images of a batch."""


class ILVRSampler(pl.LightningModule):
    """Samples in Trainer.predict. Like every module that ILVRGrid works on, it has a `denoiser` and a `schedule`.

    Args:
        denoiser: the loaded checkpoint; its network is cast here and now.
        shape: (C, H, W) of the images.
        precision: auto, 32 or bf16, of the network alone: the reverse process always runs in float32.
        compile: whether to compile the network for the shape of the first batch.
        passes: of the network in the whole run, which decide whether auto compiles it.
        device: where it will run, which decides what auto means.
    """

    def __init__(
        self,
        denoiser: LoadedDenoiser,
        shape: tuple[int, int, int],
        precision: str,
        compile: Compile,
        device: torch.device,
        passes: int = 0,
    ) -> None:
        super().__init__()
        self.network = denoiser.network
        self.shape = shape
        self.bf16 = sampling_in_bf16(precision, device)
        cast_for_sampling(self.network, self.bf16)
        self._dtype = torch.bfloat16 if self.bf16 else torch.float32
        self._compiled: CompiledForward | None = None
        if should_compile(compile, device, passes):
            self._compiled = CompiledForward(self.network, cuda_graphs=device.type == "cuda")
        self.denoiser = Denoiser(self._forward, denoiser.schedule, denoiser.prediction_type)
        """The network as a callable (x, t) -> Prediction, x (B, C, H, W) and t (B,) in 1..T."""
        self.denoiser.spectrum, self.denoiser.components = denoiser.spectrum, denoiser.components
        self.denoiser.fit_scores = denoiser.fit_scores
        self.on_step: Callable[[int, SamplerState], None] = lambda t, state: None
        """Is called after each step with the timestep that it came from."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the checkpoint."""
        return self.denoiser.schedule

    def _forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = (self._compiled or self.network)(x.to(self._dtype), t)
        return output

    def predict_step(self, batch: list[SampleRequest], batch_idx: int = 0) -> Tensor:
        """Sample a batch: (B, C, H, W) in [-1, 1]."""
        x = torch.empty(0, *self.shape)
        for t, state in self.steps(batch) if batch else ():
            x = state.x
            self.on_step(t, state)
        return x

    def steps(self, batch: Sequence[SampleRequest]) -> Iterator[tuple[int, SamplerState]]:
        """Sample a batch of at least one image: after each step the timestep that it came from, and where it leads."""
        recipes = [request.recipe for request in batch]
        references = [request.reference for request in batch if request.reference is not None]
        plan = _plan_of_batch([recipe.plan for recipe in recipes])
        t = evaluated_timesteps(self.schedule, plan)[0]
        for state in generate_steps(
            self.denoiser,
            self.schedule,
            plan,
            seeds=[image_seed(recipe.seed, recipe.reference_sha256, recipe.sample) for recipe in recipes],
            shape=self.shape,
            reference=torch.stack([r.tensor for r in references]) if references else None,
            mask=masks_of(references) if references else None,
            device=self.device,
        ):
            yield t, state
            t = state.t

    def environment(self, batch_size: int) -> dict[str, Any]:
        """Where and how a batch is computed, which changes the last digits of its images: fields of a Recipe."""
        return {
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if self.bf16 else "32",
            "compiled": bool(self._compiled and self._compiled.runs_compiled((batch_size, *self.shape))),
            "device": self.device.type,
        }


def _plan_of_batch(plans: Sequence[SamplingPlan]) -> SamplingPlan:
    """One plan for a batch, with one value per image where its images' plans may differ."""
    values: dict[str, Any] = {name: tuple(getattr(plan, name) for plan in plans) for name in PER_IMAGE}
    return replace(plans[0], **values)


class SampleLoader(pl.LightningDataModule):
    """The images that are still to be made, dealt out to the ranks one by one.

    Args:
        requests: all images of the run.
        todo: the positions of those to make.
        batch_size: images sampled at once per device.
    """

    def __init__(self, requests: SampleRequests, todo: Indices, batch_size: int) -> None:
        super().__init__()
        self.requests, self.todo, self.batch_size = requests, todo, batch_size

    @property
    def passes(self) -> int:
        """How often the whole run evaluates the network for a batch, whether or not a part is there already."""
        batches = -(-len(self.requests) // self.batch_size)
        return batches * max((plan.evaluations for plan in self.requests.plans), default=0)

    def share(self, rank: int, world_size: int) -> Indices:
        """The positions of what a rank makes."""
        return self.todo[rank::world_size]

    def predict_dataloader(self) -> Iterator[list[SampleRequest]]:
        """This rank's batches; an empty one where it has nothing to do, so that it takes part to the end."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = self.share(rank, world_size)
        for start in range(0, max(1, len(share)), self.batch_size):
            yield self._batch(share[start : start + self.batch_size])

    def transfer_batch_to_device(
        self, batch: list[SampleRequest], device: torch.device, dataloader_idx: int
    ) -> list[SampleRequest]:
        """Return the batch as it is: the references move to the device when they are sampled."""
        return batch

    def _batch(self, indices: Indices) -> list[SampleRequest]:
        """The requests whose references can be used; each reference that cannot is reported once."""
        known, batch = set(self.requests.unusable), []
        for index in indices.tolist():
            with contextlib.suppress(UserError):
                batch.append(self.requests[index])
        for number, error in self.requests.unusable.items():
            if number not in known:
                print(f"skipped      {error}", file=sys.stderr, flush=True)
        return batch
