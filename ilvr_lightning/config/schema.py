"""Every setting of a training run, as frozen dataclasses. Standard library only."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ilvr_lightning.config.trainer_keys import check_trainer
from ilvr_lightning.diffusion.plan import DEFAULT_PRESET, PRESETS, SamplingPlan, check_factor
from ilvr_lightning.models.config import UNetConfig


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _check(value is None or (math.isfinite(value) and value > 0), f"{section}.{name} must be above 0: got {value}")


def _at_least_zero(section: str, settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _check(
            value is None or (math.isfinite(value) and value >= 0), f"{section}.{name} must be at least 0: got {value}"
        )


MAX_SIDE = 8192
"""Pixels of the longest side that a configuration may ask for."""


MAX_TIMESTEPS = 100_000
"""T, a hundred times the usual one."""


MAX_WORKERS = 512
"""Processes that may decode."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run's files go: <trainer.default_root_dir>/<config name>/<run.name>."""

    name: str | None = None
    """Folder of this run; the time it started unless given."""

    def __post_init__(self) -> None:
        if self.name is not None:
            plain = self.name.strip() and self.name not in (".", "..") and not set("/\\") & set(self.name)
            _check(
                bool(plain) and self.name.isprintable() and len(self.name.encode()) <= 200,
                f"run.name must be one plain folder name: got {self.name!r}",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training images."""

    path: str = "data/toon"
    """A data set's name on the Hub, a folder of images, a local data set folder, or Parquet files (a glob)."""
    name: str | None = None
    """Configuration of a Hub data set that has several."""
    split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to validate on; unless given, the data set's own (validation, valid, val, test), else a held-out part."""
    validation_fraction: float = 0.05
    """Share that is held out, by the seed, where the data set has no validation split."""
    image_column: str | None = None
    """Column of the images; found where there is one."""
    label: str | None = None
    """Keep this class alone, by its name."""
    batch_size: int | Literal["auto"] = 32
    """Global batch: over devices, nodes and accumulation; auto: the largest power of two that fits, 256 at most."""
    image_size: int | tuple[int, int] = 32
    """Pixels: one number, or height and width."""
    channels: int = 3
    """3 for colour, 1 for greyscale."""
    flip: bool = True
    """Mirror half of the images, at random."""
    on_broken: Literal["skip", "stop"] = "skip"
    """What an unreadable image does: it is skipped and counted, or stops the run."""
    cache_mb: int = 1024
    """A data set that needs less than this is decoded once, into a file under <trainer.default_root_dir>/.decoded."""
    num_workers: int | None = None
    """Processes that decode (threads where streaming); unless given, by the number of processors, and none for cached
    images."""
    epoch_images: int | None = None
    """Images of an epoch, after which come validation, grids and checkpoints, rounded down to whole batches; unless
    given, all of them. The order goes on where the epoch before ended."""
    streaming: bool = False
    """Read Parquet shards, local or on the Hub, while training, and keep nothing on the disk."""
    shuffle_window: int = 4096
    """Rows that streaming shuffles among one another, over all ranks: about one and a half times as many encoded images
    are in memory, and a resumed run reads at most so many again."""

    def __post_init__(self) -> None:
        if self.batch_size != "auto":
            _positive("data", self, "batch_size")
        _positive("data", self, "epoch_images", "shuffle_window")
        _at_least_zero("data", self, "num_workers", "cache_mb")
        _check(
            (self.num_workers or 0) <= MAX_WORKERS,
            f"data.num_workers must be at most {MAX_WORKERS}: got {self.num_workers}",
        )
        _check(self.channels in (1, 3), f"data.channels must be 3 or 1: got {self.channels}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        _check(
            len(sides) <= 2 and all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides),
            f"data.image_size must be one whole number from 1 to {MAX_SIDE}, or two: got {self.image_size}",
        )
        _check(self.path.strip() != "", "data.path is empty; give a folder, files, or a Hub name")
        _check(
            self.validation_split != self.split,
            f"data.validation_split must be another split than data.split: got {self.split!r} for both",
        )
        _check(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction must be between 0 and 1: got {self.validation_fraction}",
        )
        _check(
            not self.streaming or self.label is None,
            f"data.streaming=true reads every row, whatever its class: leave out data.label (got {self.label!r}), or "
            "data.streaming",
        )

    @property
    def global_batch(self) -> int:
        """batch_size, once it is a number.

        Raises:
            ValueError: it is still to be found.
        """
        if self.batch_size == "auto":
            raise ValueError("data.batch_size is auto still; give a number")
        return self.batch_size

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps of an epoch, where so many images are there to train on."""
        return max(1, (images if self.epoch_images is None else self.epoch_images) // self.global_batch)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and what the network learns."""

    schedule: Literal["linear", "cosine"] = "linear"
    """linear: Ho et al. 2020; cosine: Nichol and Dhariwal 2021."""
    num_timesteps: int = 1000
    """T."""
    betas: tuple[float, ...] | None = None
    """An explicit schedule; overrides schedule and num_timesteps."""
    prediction: Literal["eps", "v", "x0"] = "eps"
    """What the network's output means."""
    loss: Literal["simple", "min_snr"] = "simple"
    """Weighting of the timesteps: simple (Ho et al. 2020), min_snr (Hang et al. 2023)."""

    def __post_init__(self) -> None:
        _positive("diffusion", self, "num_timesteps")
        _check(self.T <= MAX_TIMESTEPS, f"diffusion.num_timesteps must be at most {MAX_TIMESTEPS}: got {self.T}")
        if self.betas is not None:
            _check(
                len(self.betas) > 0 and all(0 < beta < 1 for beta in self.betas),
                "diffusion.betas must be a list of numbers, each above 0 and below 1",
            )
        elif self.schedule == "linear":
            _check(
                self.num_timesteps > 20,
                f"diffusion.num_timesteps must be above 20 for the linear schedule: got {self.num_timesteps}",
            )

    @property
    def T(self) -> int:  # noqa: N802 - the field's name
        """Number of timesteps."""
        return len(self.betas) if self.betas is not None else self.num_timesteps


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer."""

    name: Literal["adamw", "adam"] = "adamw"
    """Optimizer."""
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of Adam."""
    weight_decay: float = 0.0
    """Of the weights."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Step at which the learning rate has fallen to 0, along a cosine; none keeps it constant."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; none clips nothing."""

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "decay_steps", "grad_clip")
        _at_least_zero("optim", self, "weight_decay", "warmup_steps")
        _check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1): got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The exponential moving average of the weights, which validation, grids and sampling use."""

    decay: float = 0.9999
    """Approached over a warm-up: min(decay, (1 + n) / (10 + n)) after n steps."""

    def __post_init__(self) -> None:
        _check(0 <= self.decay < 1, f"ema.decay must be in [0, 1): got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The grids of reference-conditioned samples that are drawn while training."""

    references: tuple[str, ...] = ()
    """Pictures, folders or globs; none: the first four validation images."""
    factors: tuple[int, ...] = (4, 8, 16)
    """Low-pass factors N, a group of columns each."""
    samples: int = 2
    """Samples of each reference and factor, and unconditional ones a row."""
    every_n_epochs: int = 1
    """Epochs between grids; 0 draws none at epochs."""
    every_n_steps: int = 0
    """Steps between grids; 0 draws none at steps."""
    preset: str = DEFAULT_PRESET
    """Sampling preset; sampling.* changes it."""

    def __post_init__(self) -> None:
        _at_least_zero("grid", self, "every_n_epochs", "every_n_steps")
        _positive("grid", self, "samples")
        _check(self.samples <= 64, f"grid.samples must be at most 64: got {self.samples}")
        _check(
            len(set(self.factors)) == len(self.factors) > 0,
            f"grid.factors must list factors, each once: got {list(self.factors)}",
        )
        _check(all(r.strip() for r in self.references), "grid.references holds an empty name; give pictures or folders")
        _check(self.preset in PRESETS, f"grid.preset must be one of {', '.join(PRESETS)}: got {self.preset!r}")


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What the presets fast and draft are set by at the end of training."""

    images: int = 64
    """Held-out images that are references, so that samples have the energy of real images above the filter's
    frequencies (octave_gains of each preset and factor, kept in the checkpoint); 0 sets nothing."""

    def __post_init__(self) -> None:
        _at_least_zero("calibration", self, "images")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved: checkpoints/last.ckpt, and best.ckpt by validation loss."""

    every_n_steps: int = 1000
    """Steps between saves of last.ckpt, which is also saved at each epoch's end."""
    on_full_disk: Literal["stop", "continue"] = "stop"
    """What a checkpoint or a log that cannot be written does: end the run, or a warning and another try later."""

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every_n_steps")


def _trainer_defaults() -> dict[str, Any]:
    return {"max_epochs": 100, "log_every_n_steps": 25, "default_root_dir": "runs"}


if TYPE_CHECKING:
    SamplingChanges = SamplingPlan
else:
    SamplingChanges = dataclasses.make_dataclass(
        "SamplingChanges",
        [(name, hint | None, None) for name, hint in get_type_hints(SamplingPlan).items()],
        frozen=True,
        kw_only=True,
    )
"""SamplingPlan's fields, each none where the preset's value stands."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    seed: int = 0
    """Of initial weights, data order, training noise and samples."""
    resume: str | None = None
    """Checkpoint to go on from, or auto: this recipe's newest."""
    init_from: str | None = None
    """Checkpoint to fine-tune from, whoever wrote it: its weights alone."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the network's training; auto: on a GPU."""
    init_remake_head: bool = False
    """Where learn_sigma differs from that checkpoint's, keep its output layer's part for the mean."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    """What changes the preset of the grids."""
    grid: GridConfig = field(default_factory=GridConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: dict[str, Any] = field(default_factory=_trainer_defaults)
    """The Lightning Trainer's own arguments: devices, num_nodes, strategy, precision, max_epochs, max_steps ..."""

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**32, f"seed must be from 0 to {2**32 - 1}: got {self.seed}")
        for name in ("resume", "init_from"):
            _check(getattr(self, name) != "", f"{name} is empty; give a checkpoint, or leave it out")
        root = self.trainer.get("default_root_dir", "runs")
        _check(isinstance(root, str) and root.strip() != "", "trainer.default_root_dir must be a folder's name")
        _check(not (self.resume and self.init_from), "give resume or init_from, not both")
        self.model.check_size(*self.data.size)
        for factor in self.grid.factors:
            check_factor(factor, self.data.size, "grid.factors")
        self.model.check_attention(self.data.size[0])
        plan = self.grid_plan.resolved(self.diffusion.T)
        for name in ("condition_from", "condition_to"):
            _check(isinstance(getattr(plan, name), int), f"sampling.{name} must be one number for grids")
        _check(
            plan.variance != "learned" or self.model.learn_sigma,
            "sampling.variance=learned needs model.learn_sigma=true; give small, large or auto",
        )
        check_trainer(self.trainer)

    @property
    def grid_plan(self) -> SamplingPlan:
        """The preset of the grids, with what sampling.* changes."""
        given = {f.name: getattr(self.sampling, f.name) for f in dataclasses.fields(SamplingPlan)}
        changes = {name: value for name, value in given.items() if value is not None}
        return SamplingPlan.preset(self.grid.preset, **changes)

    def plain(self) -> dict[str, Any]:
        """Nested dicts, tuples, numbers and strings."""
        return dataclasses.asdict(self)

    def without_local_paths(self) -> dict[str, Any]:
        """The same without this machine's paths: what a checkpoint holds and a log shows."""
        return without_local_paths(self.plain())


def without_local_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration without paths of the machine that it was used on."""
    return {
        **plain,
        "resume": None,
        "init_from": None,
        "data": {**plain["data"], "path": public_dataset_name(plain["data"]["path"])},
        "grid": {**plain["grid"], "references": ()},
        "trainer": {key: value for key, value in plain["trainer"].items() if key != "default_root_dir"},
    }


def public_dataset_name(path: str) -> str:
    """A data set's path as it may be told: the last part alone of one that only this machine has."""
    elsewhere = path.startswith(("/", "~", ".", "file:")) or "\\" in path or path[1:2] == ":"
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if elsewhere else path
