"""What sample.py runs: sampling as a LightningModule, what is to be made as a data module, files as a callback."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.data.references import masks_of
from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction
from ilvr_lightning.diffusion.generate import evaluated_timesteps, generate_steps
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.hardware import CompiledForward, cast_for_sampling
from ilvr_lightning.sampling.grids import grids_of
from ilvr_lightning.sampling.outputs import Output
from ilvr_lightning.sampling.pictures import Indices, Pictures
from ilvr_lightning.sampling.requests import Job, Jobs
from ilvr_lightning.visual.grids import Grid


class ILVRSampler(pl.LightningModule):
    """Makes pictures in Trainer.predict; offers `denoiser` and `schedule` as every module that ILVRGrid works on.

    Args:
        loaded: the denoiser.
        shape: (C, H, W) of the pictures.
        plan: how to sample.
        bf16: run the network in bfloat16, its weights cast here and now; the reverse process stays in float32.
    """

    def __init__(self, loaded: LoadedDenoiser, shape: tuple[int, int, int], plan: SamplingPlan, bf16: bool) -> None:
        super().__init__()
        self.network = loaded.network
        self.shape = shape
        self.plan = plan.resolved(loaded.schedule.num_timesteps)
        self.bf16 = bf16
        cast_for_sampling(self.network, bf16)
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self._compiled: CompiledForward | None = None
        self._denoiser = Denoiser(loaded.network, loaded.schedule, loaded.prediction_type)
        self.on_step: Callable[[int, SamplerState], None] = lambda t, state: None
        """Called after each step with the level that it came from."""

    def compile_sampling(self) -> None:
        """Compile the network for the first batch's shape."""
        self._compiled = CompiledForward(self.network, cuda_graphs=self.device.type == "cuda")
        self._denoiser = Denoiser(self._compiled, self.schedule, self._denoiser.prediction_type)

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's."""
        return self._denoiser.schedule

    def denoiser(self, x: Tensor, t: Tensor) -> Prediction:
        """The network as a callable (x, t) -> Prediction."""
        output = self._denoiser.raw(x.to(self._dtype), t)
        return self._denoiser.read(output.to(x.dtype), x, t)

    def predict_step(self, batch: list[Job], batch_idx: int = 0) -> Tensor:
        """(B, C, H, W) in [-1, 1]."""
        references = [job.reference for job in batch if job.reference is not None]
        settings = [asdict(job.setting) for job in batch if job.setting is not None]
        an_image: dict[str, Any] = {name: tuple(s[name] for s in settings) for name in settings[0]} if settings else {}
        x, plan = torch.empty(0, *self.shape), self.plan
        t = evaluated_timesteps(self.schedule, plan)[0]
        if not batch:
            return x
        for state in generate_steps(
            self.denoiser,
            self.schedule,
            replace(plan, **an_image),
            seeds=[image_seed(j.recipe.seed, j.recipe.reference_sha256, j.sample) for j in batch],
            shape=self.shape,
            reference=torch.stack([r.tensor for r in references]) if references else None,
            mask=masks_of(references) if references else None,
            device=self.device,
        ):
            x = state.x
            self.on_step(t, state)
            t = state.t
        return x

    def conditions(self, batch_size: int) -> dict[str, Any]:
        """Where and how exactly a batch is computed: what a picture depends on to the last digit."""
        return {
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if self.bf16 else "32",
            "compiled": self._compiled is not None and self._compiled.runs_compiled((batch_size, *self.shape)),
            "device": self.device.type,
        }


class SampleLoader(pl.LightningDataModule):
    """Pictures that are still to be made, shared out over the ranks one by one; later, the grids that they form.

    Args:
        jobs: all of them.
        output: where they go.
        batch_size: pictures sampled at once on a device.
        trajectory: each one's steps are drawn, too.
    """

    def __init__(self, jobs: Jobs, output: Output, batch_size: int, trajectory: bool = False) -> None:
        super().__init__()
        self.jobs, self.output = jobs, output
        self.batch_size = batch_size
        self.trajectory = trajectory
        self.todo = output.todo()

    def share(self, rank: int, world: int) -> Indices:
        """What a rank makes."""
        return self.todo[rank::world]

    def predict_dataloader(self) -> DataLoader[list[Job]]:
        """This rank's share in batches; an empty one where there is nothing to do, so that no rank ends early."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        batches = _Batches(self, self.share(rank, world))
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)

    def transfer_batch_to_device(self, batch: list[Job], device: torch.device, dataloader_idx: int) -> list[Job]:
        """Jobs are no tensors; their references go to the device when they are sampled."""
        return batch

    def grids(self) -> Iterator[Grid]:
        """To draw at the end, of PNGs that are not too many."""
        return grids_of(self.output) if isinstance(self.output, Pictures) else iter(())


class _Batches(Dataset[list[Job]]):
    """A rank's share, made up batch by batch, without those whose reference cannot be used."""

    def __init__(self, jobs: SampleLoader, indices: Indices) -> None:
        self._jobs, self._indices = jobs, indices

    def __len__(self) -> int:
        return max(1, -(-len(self._indices) // self._jobs.batch_size))

    def __getitem__(self, batch: int) -> list[Job]:
        size, known = self._jobs.batch_size, set(self._jobs.jobs.unusable)
        made: list[Job] = []
        for index in self._indices[batch * size : (batch + 1) * size].tolist():
            try:
                made.append(self._jobs.output.pictures.job(index))
            except UserError:
                continue
        for number, error in self._jobs.jobs.unusable.items():
            if number not in known:
                print(f"note         left out: {error}", file=sys.stderr, flush=True)
        return made


def _as_it_is(batch: list[Job]) -> list[Job]:
    return batch


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
