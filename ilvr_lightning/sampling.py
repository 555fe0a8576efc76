"""What sample.py runs: sampling as a LightningModule, what is to be made as a data module, files as a callback."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ilvr_lightning.cli import speak_for_yourself
from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction
from ilvr_lightning.diffusion.generate import evaluated_timesteps, generate_steps
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import Stopped, UserError
from ilvr_lightning.hardware import Compiled, for_sampling
from ilvr_lightning.images import from_tensor, to_image
from ilvr_lightning.jobs import Job, Jobs, trajectory_files
from ilvr_lightning.manifest import Entry, Growth, RankManifest, merge, rank_path
from ilvr_lightning.outputs import Output
from ilvr_lightning.pictures import Indices, Pictures, remove_partials
from ilvr_lightning.pretrained.load import LoadedDenoiser
from ilvr_lightning.references import Reference, masks_of
from ilvr_lightning.sheets import Grid, grids_of
from ilvr_lightning.trajectory import IN_ANIMATION, Frame, draw_trajectory, spread
from ilvr_lightning.whole import write_whole

LONG_RUN_SECONDS = 60


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
        for_sampling(self.network, bf16)
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self._compiled: Compiled | None = None
        self._denoiser = Denoiser(loaded.network, loaded.schedule, loaded.prediction_type)
        self.on_step: Callable[[int, SamplerState], None] = lambda t, state: None
        """Called after each step with the level that it came from."""

    def compile_sampling(self) -> None:
        """Compile the network for the first batch's shape."""
        self._compiled = Compiled(self.network)
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
            "compiled": self._compiled is not None and self._compiled.runs((batch_size, *self.shape)),
            "device": self.device.type,
        }


class SampleJobs(pl.LightningDataModule):
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

    def __init__(self, jobs: SampleJobs, indices: Indices) -> None:
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


class SampleWriter(Callback):
    """PNGs with their recipe, the manifest, fitted references, steps; the progress bar and the estimate of time.

    Args:
        jobs: what is made.
        folder: where it goes.
    """

    def __init__(self, jobs: SampleJobs, folder: Path) -> None:
        self.jobs, self.folder = jobs, folder
        self.missing = 0
        """Pictures that should be there at the end and are not."""
        self._frames: list[Frame] = []
        self._made = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ILVRSampler)
        speak_for_yourself()
        rank, world = trainer.global_rank, trainer.world_size
        if rank == 0:
            remove_partials(self.folder)
        others = Growth([rank_path(self.folder, other) for other in range(world) if other != rank])
        trainer.strategy.barrier("nothing is written yet")
        self._manifest = RankManifest(self.folder, rank)
        evaluations = len(pl_module.plan.timesteps or ()) or pl_module.plan.num_steps
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
        if isinstance(exception, Stopped | KeyboardInterrupt) and trainer.is_global_zero:
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
            if job.reference is not None and self.jobs.jobs.references.few:
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
    quicker = {name: p["num_steps"] for name, p in PRESETS.items() if p["num_steps"] < evaluations}
    if quicker:
        name = min(quicker, key=lambda n: quicker[n])
        text += f"; --preset {name} would take about {_duration(seconds * quicker[name] / evaluations)}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def keep_reference(reference: Reference, folder: Path) -> None:
    """Keep a fitted reference and its mask beside the samples, named by their hash."""
    target = folder / "references"
    for pixels, sha256 in ((reference.pixels, reference.sha256), (reference.mask, reference.mask_sha256)):
        path = target / f"{sha256}.png"
        if pixels is not None and not path.exists():
            target.mkdir(exist_ok=True)
            write_whole(path, functools.partial(to_image(pixels).save, format="PNG"))
