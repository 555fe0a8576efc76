"""What sample.py runs: sampling as a LightningModule, files as a callback."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from ilvr_lightning.diffusion.denoiser import Denoiser, Prediction
from ilvr_lightning.diffusion.generate import evaluated_timesteps, generate_steps
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.hardware import Compiled, for_sampling
from ilvr_lightning.images import from_tensor, to_image
from ilvr_lightning.jobs import Job, SampleJobs, trajectory_files, write_whole
from ilvr_lightning.pretrained.load import LoadedDenoiser
from ilvr_lightning.recipe import read_recipe, recipe_info
from ilvr_lightning.references import Reference, masks_of
from ilvr_lightning.trajectory import IN_ANIMATION, Frame, draw_trajectory, spread

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


class SampleWriter(Callback):
    """PNGs with their recipe, the manifest, fitted references, steps; the progress bar and the estimate of time.

    Args:
        jobs: what is made.
    """

    def __init__(self, jobs: SampleJobs) -> None:
        self.jobs = jobs
        self._frames: list[Frame] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ILVRSampler)
        evaluations = len(pl_module.plan.timesteps or ()) or pl_module.plan.num_steps
        mine = len(self.jobs.todo[trainer.global_rank :: trainer.world_size])
        total = evaluations * -(-mine // self.jobs.batch_size)
        bar = tqdm(total=total, desc="sampling", unit="evaluation", disable=not trainer.is_global_zero or None)
        kept = set(spread(range(evaluations), IN_ANIMATION))
        started, done, said = time.perf_counter(), 0, False

        def on_step(t: int, state: SamplerState) -> None:
            nonlocal done, started, said
            if self.jobs.trajectory and done % evaluations in kept:
                self._frames.append(Frame(t, from_tensor(state.x0 if state.t else state.x)))
            bar.update()
            done += 1
            seconds = time.perf_counter() - started
            if done == 1:
                started = time.perf_counter()  # the first one warms up
            elif not said and (done >= 20 or seconds > 3):
                said = True
                if (whole := seconds / (done - 1) * total) > LONG_RUN_SECONDS and trainer.is_global_zero:
                    bar.write(estimate(whole, evaluations))

        pl_module.on_step = on_step
        self._bar = bar

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert isinstance(pl_module, ILVRSampler)
        for place, (job, pixels) in enumerate(zip(batch, from_tensor(outputs), strict=True)):
            recipe = replace(job.recipe, **pl_module.conditions(len(batch)))
            save = functools.partial(to_image(pixels).save, format="PNG", pnginfo=recipe_info(recipe))
            write_whole(self.jobs.folder / job.file, save)
            if self.jobs.trajectory:
                draw_trajectory(self._frames, place, job, self.jobs.folder / job.file)
            else:
                for old in trajectory_files(self.jobs.folder / job.file):
                    old.unlink(missing_ok=True)  # of another picture of this name
            with open(self.jobs.folder / "manifest.jsonl", "a") as manifest:
                manifest.write(json.dumps({"file": job.file, **asdict(recipe)}) + "\n")
        self._frames.clear()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.close()
        trainer.strategy.barrier("samples are written")
        if trainer.is_global_zero:
            self._tidy_manifest()

    def _tidy_manifest(self) -> None:
        """One line a sample, whatever was overwritten or interrupted: this run's lines anew, from the PNGs."""
        path = self.jobs.folder / "manifest.jsonl"
        ours = {job.file for job in self.jobs.jobs}
        lines = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["file"] not in ours:
                    lines.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # half a line, of a run that was killed
        for job in self.jobs.jobs:
            recipe = read_recipe(self.jobs.folder / job.file)
            if recipe is not None:
                lines.append(json.dumps({"file": job.file, **asdict(recipe)}))
        write_whole(path, lambda partial: partial.write_text("".join(line + "\n" for line in lines)))


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


def write_references(references: Sequence[Reference], folder: Path) -> None:
    """Keep the fitted references and masks beside the samples, named by their hash."""
    target = folder / "references"
    target.mkdir(parents=True, exist_ok=True)
    for reference in references:
        for pixels, sha256 in ((reference.pixels, reference.sha256), (reference.mask, reference.mask_sha256)):
            if pixels is None:
                continue
            path = target / f"{sha256}.png"
            if not path.exists():
                write_whole(path, functools.partial(to_image(pixels).save, format="PNG"))


def check_names(references: Sequence[Reference]) -> None:
    """Raise a UserError for a reference whose name cannot be a file name of ours."""
    for reference in references:
        if len(reference.name.encode(errors="replace")) > 200 or not reference.name.isprintable():
            raise UserError(
                f"--ref: the file name {reference.name[:40]!r} is too long, or has characters that cannot be printed; "
                "rename it"
            )
