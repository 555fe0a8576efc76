"""What sample.py runs: jobs as a data module, sampling as a LightningModule, files as a callback."""

import functools
import hashlib
import json
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ilvr_lightning.callbacks import reference_columns
from ilvr_lightning.diffusion.denoiser import Prediction
from ilvr_lightning.diffusion.generate import generate_steps
from ilvr_lightning.diffusion.noise import image_seed
from ilvr_lightning.diffusion.plan import PRESETS, SamplingPlan
from ilvr_lightning.diffusion.schedule import NoiseSchedule
from ilvr_lightning.errors import UserError
from ilvr_lightning.images import (
    BrokenImageError,
    Column,
    Pixels,
    Reference,
    draw_grid,
    from_tensor,
    read_image,
    to_image,
    to_pixels,
)
from ilvr_lightning.pretrained.load import LoadedDenoiser
from ilvr_lightning.recipe import Recipe, read_recipe, read_text, recipe_info

LONG_RUN_SECONDS = 60
MAX_ROWS = 24
"""More references than these are not drawn in one grid."""
GRID_KEY = "ilvr_lightning_grid"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to make."""

    reference: Reference | None
    factor: int | None
    sample: int
    recipe: Recipe
    """What determines the picture; batch size, precision and device are filled in when it is made."""
    file: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid to draw once its samples are written."""

    path: Path
    columns: Callable[[], list[Column]]
    title: str
    digest: str
    """Equal for equal samples; kept in the file, so that a grid of others is not overwritten."""

    def draw(self) -> None:
        """Draw it and write it."""
        info = PngInfo()
        info.add_text(GRID_KEY, self.digest)
        write_whole(
            self.path, functools.partial(draw_grid(self.columns(), self.title).save, format="PNG", pnginfo=info)
        )


class SampleJobs(pl.LightningDataModule):
    """Pictures that are still to be made, shared out over the ranks; later, the grids that they form.

    Args:
        jobs: all of them, in the grids' order.
        folder: where they go.
        batch_size: pictures sampled at once on a device.
        overwrite: make again what is done.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, batch_size: int, overwrite: bool = False) -> None:
        super().__init__()
        self.jobs = list(jobs)
        self.folder = folder
        self.batch_size = batch_size
        self.overwrite = overwrite
        self.todo = [job for job in self.jobs if overwrite or not _is_made(folder / job.file, job.recipe)]

    def predict_dataloader(self) -> DataLoader[list[Job]]:
        """This rank's share in batches; an empty one where there is nothing to do, so that no rank ends early."""
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        mine = self.todo[rank::world]
        batches = [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)] or [[]]
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]  # a list is enough

    def transfer_batch_to_device(self, batch: list[Job], device: torch.device, dataloader_idx: int) -> list[Job]:
        """Jobs are no tensors; their references go to the device when they are sampled."""
        return batch

    def grids(self) -> Iterator[Grid]:
        """One grid a reference, or one of all unconditional samples; then all references in one, if they are few."""
        groups: dict[tuple[str, str] | None, list[Job]] = {}
        for job in self.jobs:
            groups.setdefault((job.reference.name, job.reference.sha256) if job.reference else None, []).append(job)
        names: set[str] = set()
        for key, jobs in groups.items():
            name = key[0] if key else "unconditional"
            name = f"{name}_{key[1][:6]}" if key and name in names else name
            names.add(name)
            yield self._grid(f"{name}_grid", [jobs], name)
        if 1 < len(groups) <= MAX_ROWS:
            yield self._grid("grid", list(groups.values()), f"{len(groups)} references")

    def _grid(self, stem: str, groups: list[list[Job]], what: str) -> Grid:
        recipe = groups[0][0].recipe
        title = f"{what}: {recipe.plan['sampler']}, {recipe.plan['num_steps']} steps, {recipe.weights} weights"
        digest = hashlib.sha256("".join(job.recipe.digest for jobs in groups for job in jobs).encode()).hexdigest()
        path = self.folder / f"{stem}.png"
        if path.exists() and not self.overwrite and read_text(path, GRID_KEY) != digest:
            path = self.folder / f"{stem}_{digest[:8]}.png"
        return Grid(path=path, columns=functools.partial(self._columns, groups), title=title, digest=digest)

    def _columns(self, groups: list[list[Job]]) -> list[Column]:
        def tiles(jobs: list[Job], factor: int | None) -> list[Pixels]:
            return [to_pixels(read_image(self.folder / job.file)) for job in jobs if job.factor == factor]

        references = [jobs[0].reference for jobs in groups if jobs[0].reference is not None]
        if not references:
            made = tiles(groups[0], None)
            across = min(8, len(made))
            return [Column(label="unconditional", rows=[made[i : i + across] for i in range(0, len(made), across)])]
        factors = [f for f in dict.fromkeys(job.factor for job in groups[0]) if f is not None]
        return reference_columns(
            references, factors, plan_of(groups[0][0].recipe), lambda row, factor: tiles(groups[row], factor)
        )


def _as_it_is(batch: list[Job]) -> list[Job]:
    return batch


def make_jobs(
    references: Sequence[Reference],
    factors: Sequence[int],
    num_samples: int,
    plan: SamplingPlan,
    *,
    seed: int,
    weights: str,
    checkpoint_sha256: str,
    folder: Path,
    overwrite: bool = False,
) -> list[Job]:
    """Every picture of a run, with its recipe and its file name; without references, unconditional ones.

    A name that another recipe has taken, in this run or (unless it may be overwritten) in the folder, gets a short hash
    of its recipe.
    """
    jobs: list[Job] = []
    taken: set[str] = set()
    choices: list[Reference | None] = [*references] or [None]
    for reference in choices:
        for factor in factors if reference is not None else [None]:
            for sample in range(num_samples):
                recipe = Recipe(
                    plan=plan_settings(plan, factor),
                    seed=seed,
                    sample=sample,
                    weights=weights,
                    checkpoint_sha256=checkpoint_sha256,
                    reference=reference.name if reference else None,
                    reference_sha256=reference.sha256 if reference else None,
                )
                stem = f"{reference.name}_N{factor}_{sample}" if reference else f"unconditional_{sample}"
                file = f"{stem}.png"
                if file in taken or not (overwrite or _free(folder / file, recipe)):
                    file = f"{stem}_{recipe.digest[:8]}.png"
                taken.add(file)
                jobs.append(Job(reference=reference, factor=factor, sample=sample, recipe=recipe, file=file))
    return jobs


def plan_settings(plan: SamplingPlan, factor: int | None) -> dict[str, Any]:
    """A plan as a recipe holds it: plain values, one factor."""
    settings = asdict(plan) if factor is None else asdict(replace(plan, factor=factor))
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def plan_of(recipe: Recipe) -> SamplingPlan:
    """The plan that a recipe holds."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.plan.items()}
    try:
        if set(values) != {f.name for f in fields(SamplingPlan)}:
            raise ValueError(f"it sets {', '.join(values) or 'nothing'}")
        plan = SamplingPlan(**values)
        for f in fields(SamplingPlan):
            hint = typing.get_type_hints(SamplingPlan)[f.name]
            if hint in (bool, int) and type(getattr(plan, f.name)) is not hint:
                raise ValueError(f"{f.name} is of another type: got {getattr(plan, f.name)!r}")
        return plan
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"the recipe's plan is not of this version: {error}") from None


def _is_made(path: Path, recipe: Recipe) -> bool:
    """Whether a file holds this very picture, whole."""
    found = read_recipe(path) if path.exists() else None
    return found is not None and found.digest == recipe.digest


def _free(path: Path, recipe: Recipe) -> bool:
    """Whether a file may be written: it is not there, is this very picture, or is the broken half of one of ours."""
    return not path.exists() or _is_made(path, recipe) or _is_broken(path)


def _is_broken(path: Path) -> bool:
    try:
        read_image(path)
    except BrokenImageError:
        return True
    return False


class ILVRSampler(pl.LightningModule):
    """Makes pictures in Trainer.predict; offers `denoiser` and `schedule` as every module that ILVRGrid works on.

    Args:
        loaded: the denoiser.
        shape: (C, H, W) of the pictures.
        plan: how to sample.
        bf16: run the network in bfloat16; the reverse process stays in float32.
    """

    def __init__(self, loaded: LoadedDenoiser, shape: tuple[int, int, int], plan: SamplingPlan, bf16: bool) -> None:
        super().__init__()
        self.network = loaded.network
        self.loaded = loaded
        self.shape = shape
        self.plan = plan.resolved(loaded.schedule.num_timesteps)
        self.bf16 = bf16
        self.on_evaluation: Callable[[], None] = lambda: None

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's."""
        return self.loaded.schedule

    def denoiser(self, x: Tensor, t: Tensor) -> Prediction:
        """The network as a callable (x, t) -> Prediction."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.loaded.raw(x, t)
        return self.loaded.read(output.to(x.dtype), x, t)

    def predict_step(self, batch: list[Job], batch_idx: int = 0) -> Tensor:
        """(B, C, H, W) in [-1, 1]."""
        references = [job.reference.tensor for job in batch if job.reference is not None]
        factors = tuple(job.factor for job in batch if job.factor is not None)
        x = torch.empty(0, *self.shape)
        if not batch:
            return x
        for state in generate_steps(
            self.denoiser,
            self.schedule,
            replace(self.plan, factor=factors) if factors else self.plan,
            seeds=[image_seed(j.recipe.seed, j.recipe.reference_sha256, j.sample) for j in batch],
            shape=self.shape,
            reference=torch.stack(references) if references else None,
            device=self.device,
        ):
            x = state.x
            self.on_evaluation()
        return x

    @property
    def conditions(self) -> dict[str, str]:
        """Where and how exactly: what a picture depends on to the last digit."""
        return {"precision": "bf16" if self.bf16 else "32", "device": self.device.type}


class SampleWriter(Callback):
    """PNGs with their recipe, the manifest, fitted references; the progress bar and the estimate of time.

    Args:
        jobs: what is made.
    """

    def __init__(self, jobs: SampleJobs) -> None:
        self.jobs = jobs

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ILVRSampler)
        evaluations = len(pl_module.plan.timesteps or ()) or pl_module.plan.num_steps
        mine = len(self.jobs.todo[trainer.global_rank :: trainer.world_size])
        total = evaluations * -(-mine // self.jobs.batch_size)
        bar = tqdm(total=total, desc="sampling", unit="evaluation", disable=not trainer.is_global_zero or None)
        started, done, said = time.perf_counter(), 0, False

        def on_evaluation() -> None:
            nonlocal done, started, said
            bar.update()
            done += 1
            seconds = time.perf_counter() - started
            if done == 1:
                started = time.perf_counter()  # the first one warms up
            elif not said and (done >= 20 or seconds > 3):
                said = True
                if (whole := seconds / (done - 1) * total) > LONG_RUN_SECONDS and trainer.is_global_zero:
                    bar.write(estimate(whole, evaluations))

        pl_module.on_evaluation = on_evaluation
        self._bar = bar

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        assert isinstance(pl_module, ILVRSampler)
        for job, pixels in zip(batch, from_tensor(outputs), strict=True):
            recipe = replace(job.recipe, batch_size=len(batch), threads=torch.get_num_threads(), **pl_module.conditions)
            save = functools.partial(to_image(pixels).save, format="PNG", pnginfo=recipe_info(recipe))
            write_whole(self.jobs.folder / job.file, save)
            with open(self.jobs.folder / "manifest.jsonl", "a") as manifest:
                manifest.write(json.dumps({"file": job.file, **asdict(recipe)}) + "\n")

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
    """Keep the fitted references beside the samples, named by their hash."""
    target = folder / "references"
    target.mkdir(parents=True, exist_ok=True)
    for reference in references:
        path = target / f"{reference.sha256}.png"
        if not path.exists():
            write_whole(path, functools.partial(to_image(reference.pixels).save, format="PNG"))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file and rename it, so that no reader ever sees half of one."""
    partial = path.with_name(f".{path.name[:200]}.partial")
    write(partial)
    partial.replace(path)


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_names(references: Sequence[Reference]) -> None:
    """Raise a UserError for a reference whose name cannot be a file name of ours."""
    for reference in references:
        if len(reference.name.encode(errors="replace")) > 200 or not reference.name.isprintable():
            raise UserError(
                f"--ref: the file name {reference.name[:40]!r} is too long, or has characters that cannot be printed; "
                "rename it"
            )
