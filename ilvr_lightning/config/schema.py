"""Every setting of a training run, as frozen dataclasses; the string under a field is its line in --help."""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from ilvr_lightning.diffusion.plan import DEFAULT_PRESET, PRESETS, SamplingPlan, check_factor
from ilvr_lightning.errors import UserError
from ilvr_lightning.models.config import UNetConfig


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(section: str, settings: object, *names: str) -> None:
    for name, value in _numbers(settings, names):
        _check(math.isfinite(value) and value > 0, f"{section}.{name} must be above 0: got {value}")


def _at_least_zero(section: str, settings: object, *names: str) -> None:
    for name, value in _numbers(settings, names):
        _check(math.isfinite(value) and value >= 0, f"{section}.{name} must be at least 0: got {value}")


def _numbers(settings: object, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """(name, value) of the settings that are numbers, neither null nor auto."""
    values = ((name, getattr(settings, name)) for name in names)
    return ((name, value) for name, value in values if value not in (None, "auto"))


LoggerName = Literal["tensorboard", "wandb", "csv"]

MAX_SIDE = 8192
"""The longest side of an image, in pixels."""
MAX_TIMESTEPS = 100_000
"""The largest T, a hundred times the usual one."""
MAX_WORKERS = 512
"""The largest number of processes that decode images."""


def is_folder_name(name: str) -> bool:
    """Whether a folder may be called so."""
    plain = name.strip() and name not in (".", "..") and not set("/\\") & set(name)
    return bool(plain) and name.isprintable() and len(name.encode()) <= 200


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the files of a run are written: <trainer.default_root_dir>/<name>/<run.name>."""

    name: str | None = None
    """Folder of this run. Default: the time at which it starts."""

    def __post_init__(self) -> None:
        if self.name is not None:
            _check(is_folder_name(self.name), f"run.name must be the name of one folder: got {self.name!r:.100}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training images."""

    path: str = ""
    """A folder of images, a local data set, Parquet files (a glob), or a data set's name on the Hugging Face Hub. It
    has no default."""
    name: str | None = None
    """Configuration of the data set, where a data set on the Hub has several."""
    split: str = "train"
    """The split to train on."""
    validation_split: str | None = None
    """The split to validate on. Default: validation, valid, val or test if there is one, else a held-out part."""
    validation_fraction: float = 0.05
    """Share of the images that is held out where the data set has no validation split; the seed chooses them."""
    image_column: str | None = None
    """The column that holds the images. Default: the only image column."""
    label: str | None = None
    """Use only the images of this class, given by its name."""
    batch_size: int = 32
    """Images per optimizer step, over all devices, nodes and accumulated batches together."""
    image_size: int | tuple[int, int] = 32
    """Size of the images in pixels: one number, or height and width."""
    channels: int = 3
    """3 for colour, 1 for greyscale."""
    value_range: Literal["auto", "percentile"] | tuple[float | int, float | int] = "auto"
    """The values that are black and white in files of more than 8 bits: [low, high]. auto looks at a sample of the
    images to find whether they have 8, 10, 12, 14 or 16 bits, or which range floats have; percentile takes the 0.1 and
    99.9 percentiles of the sample. 8-bit images are always 0 to 255."""
    pages: Literal["first", "all"] = "first"
    """The pages of a TIFF that are images."""
    scale: Literal["fit"] | float | int = "fit"
    """How far pictures are shrunk before they are cropped: fit makes the shorter side that of the image; 2 halves the
    height and the width, 1 leaves them."""
    crop: Literal["center", "random", "tiles"] = "center"
    """The part of the shrunk picture that is an image: its centre; another part each time, at random; or tiles, all
    squares that it is cut into."""
    flip: Literal["none", "horizontal", "both"] | bool = "horizontal"
    """Mirror each image left to right with probability 1/2 (horizontal, or true), also top to bottom (both), or never
    (none, or false)."""
    rotate90: bool = False
    """Turn each image by 0, 90, 180 or 270 degrees, with equal probability."""
    cache_mb: int = 1024
    """A data set that needs less than this (in MiB) is decoded once, into <trainer.default_root_dir>/.decoded."""
    num_workers: int | None = None
    """Processes that decode images (threads when streaming). Default: by the number of CPUs; none for cached images."""
    epoch_images: int | None = None
    """Images per epoch, after which validation, grids and checkpoints follow, rounded down to full batches. Default:
    all images. The next epoch continues in the order where this one ended."""
    streaming: bool = False
    """Read Parquet shards, local or on the Hub, while training, and store nothing on the disk."""
    shuffle_window: int = 4096
    """Size of the shuffle buffer when streaming, in images over all ranks. About 1.5 times as many encoded images are
    in memory, and a resumed run reads at most this many again."""

    def __post_init__(self) -> None:
        _positive("data", self, "batch_size", "epoch_images", "shuffle_window")
        _at_least_zero("data", self, "num_workers", "cache_mb")
        _check(
            (self.num_workers or 0) <= MAX_WORKERS,
            f"data.num_workers must be at most {MAX_WORKERS}: got {self.num_workers}",
        )
        _check(self.channels in (1, 3), f"data.channels must be 3 or 1: got {self.channels}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        _check(
            len(sides) <= 2 and all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides),
            f"data.image_size must be one integer from 1 to {MAX_SIDE}, or two: got {self.image_size}",
        )
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
        _check(
            not self.streaming or self.pages == "first",
            "data.streaming=true reads the first page of each image: leave out data.pages=all, or data.streaming",
        )
        _check(
            not self.streaming or self.crop != "tiles",
            "data.streaming=true has an image per row: give data.crop=random or center, or leave out data.streaming",
        )
        _check(
            self.scale == "fit" or (math.isfinite(self.scale) and self.scale >= 1),
            f"data.scale must be fit or a number from 1: got {self.scale}",
        )
        if (known := self.known_range) is not None:
            _check(
                all(map(math.isfinite, known)) and known[0] < known[1],
                f"data.value_range must be two numbers, the lower one first: got {list(known)}",
            )
        _check(
            not self.rotate90 or self.size[0] == self.size[1],
            f"data.rotate90=true needs square images: got data.image_size={self.image_size}",
        )

    def check_path(self) -> None:
        """Raise a UserError unless data.path is given; called before anything is opened."""
        if not self.path.strip():
            raise UserError(
                "data.path is not set; give data.path=PATH/TO/IMAGES (a folder of images, Parquet files, or the name "
                "of a data set on the Hub), or a config that sets it, such as configs/toon32.yaml"
            )

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps per epoch for this number of training images."""
        return max(1, (images if self.epoch_images is None else self.epoch_images) // self.batch_size)

    @property
    def known_range(self) -> tuple[float, float] | None:
        """data.value_range where it is two numbers."""
        return None if isinstance(self.value_range, str) else self.value_range

    @property
    def mirrors(self) -> str:
        """data.flip by its name: none, horizontal or both."""
        return self.flip if isinstance(self.flip, str) else "horizontal" if self.flip else "none"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and what the network learns."""

    schedule: Literal["linear", "cosine"] = "cosine"
    """Noise schedule: linear (Ho et al. 2020) or cosine (Nichol and Dhariwal 2021)."""
    num_timesteps: int = 1000
    """The number of timesteps, T."""
    betas: tuple[float, ...] | None = None
    """An explicit list of betas, which replaces schedule and num_timesteps."""
    prediction: Literal["eps", "v", "x0"] = "v"
    """What the network predicts: the noise eps, v (Salimans and Ho 2022), or x_0."""
    loss: Literal["simple", "min_snr"] = "simple"
    """Weighting of the timesteps in the loss: simple (Ho et al. 2020) or min_snr (Hang et al. 2023)."""

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
    """The optimizer."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay (adamw), or the L2 penalty (adam)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    decay_steps: int | Literal["auto"] | None = None
    """Step at which the learning rate has fallen to 0 along a cosine; auto is the last step of the run, by
    trainer.max_steps or trainer.max_epochs. Default: it stays constant."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; null does not clip."""

    def __post_init__(self) -> None:
        _positive("optim", self, "lr", "decay_steps", "grad_clip")
        _at_least_zero("optim", self, "weight_decay", "warmup_steps")
        _check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1): got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The exponential moving average of the weights, which validation, grids and sampling use."""

    decay: float = 0.999
    """Decay of the average per step; after n steps min(decay, (1 + n) / (10 + n)) is used."""

    def __post_init__(self) -> None:
        _check(0 <= self.decay < 1, f"ema.decay must be in [0, 1): got {self.decay}")


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The grids of ILVR samples that are drawn during training."""

    references: tuple[str, ...] = ()
    """Reference images, as for sample.py --ref. Default: the first four validation images."""
    factors: tuple[int, ...] = (4, 8, 16)
    """Low-pass factors N; each has a group of columns."""
    samples: int = 2
    """Samples per reference and factor, and unconditional samples per row."""
    every_n_epochs: int = 1
    """Epochs between grids; 0 draws none at the end of epochs."""
    every_n_steps: int | Literal["auto"] = 0
    """Steps between grids; 0 draws none within epochs, and auto about 30 in the whole run, the last one at its end."""
    preset: str = DEFAULT_PRESET
    """Sampling preset of the grids; sampling.* changes single settings of it."""

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
    """The calibration of the presets fast and draft at the end of training."""

    images: int = 64
    """Number of held-out images that the calibration follows as references. It chooses the gain of matched noise for
    each preset, and octave_gains for each factor, so that samples have as much fine detail as real images; the
    checkpoint keeps them. 0 skips it."""

    def __post_init__(self) -> None:
        _at_least_zero("calibration", self, "images")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints/last.ckpt is saved; best.ckpt holds the lowest validation loss."""

    every_n_steps: int = 1000
    """Steps between saves of last.ckpt, which is also saved at the end of each epoch."""

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every_n_steps")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Arguments of the Lightning Trainer; null stands for Lightning's own default."""

    accelerator: str = "auto"
    """Kind of device: auto, cpu, gpu, mps."""
    devices: int | str = "auto"
    """Number of devices; auto uses all that there are (one process on a CPU)."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: str = "auto"
    """How several devices work together: auto, ddp."""
    precision: str | None = None
    """bf16-mixed, 32-true, 16-mixed or 64-true. Default: bf16-mixed where the hardware is fast in it, else 32-true."""
    max_epochs: int | None = None
    """Epochs to train; -1 has no limit. Default: 100, or no limit where max_steps is given."""
    max_steps: int = -1
    """Optimizer steps to train; -1 has no limit. Where the command line gives only one of max_steps and max_epochs, it
    replaces both in the config file."""
    max_time: str | None = None
    """Longest training time, as DD:HH:MM:SS."""
    accumulate_grad_batches: int = 1
    """Parts in which each batch is computed, one after another: the same training with less memory."""
    check_val_every_n_epoch: int = 1
    """Epochs between validations."""
    limit_train_batches: int | float | None = None
    """Batches of an epoch to train on, as a number or a share: for a quick trial."""
    limit_val_batches: int | float | None = None
    """Batches to validate on, as a number or a share; 0 does not validate."""
    num_sanity_val_steps: int = 2
    """Validation batches that are tried before the training; -1 tries all."""
    log_every_n_steps: int = 25
    """Steps between entries in the log."""
    default_root_dir: str = "runs"
    """Folder of all runs."""
    enable_progress_bar: bool = True
    """Show a progress bar."""
    enable_model_summary: bool = True
    """Print a summary of the network."""
    deterministic: bool | None = None
    """Use only deterministic algorithms."""
    benchmark: bool | None = None
    """Let cuDNN choose the fastest algorithms by trying them."""
    profiler: str | None = None
    """Profile the run: simple, advanced or pytorch."""
    detect_anomaly: bool = False
    """Find the operation that produced a NaN; slow."""
    fast_dev_run: bool | int = False
    """Run one batch, or this many, of training and validation, to see that everything works."""

    def __post_init__(self) -> None:
        for name, lowest in MINIMA.items():
            value = getattr(self, name)
            _check(value is None or value >= lowest, f"trainer.{name} must be at least {lowest}: got {value}")
        _check(self.default_root_dir.strip() != "", "trainer.default_root_dir is empty; give a folder")
        for name in ("limit_train_batches", "limit_val_batches"):
            value = getattr(self, name)
            _check(
                value is None or (math.isfinite(value) and value >= 0 and (isinstance(value, int) or value <= 1)),
                f"trainer.{name} must be a number of batches, or a share from 0.0 to 1.0: got {value}",
            )

    def arguments(self) -> dict[str, Any]:
        """What the Lightning Trainer is given."""
        epochs = self.max_epochs
        if epochs is None:
            epochs = -1 if self.max_steps >= 0 else 100
        return {**dataclasses.asdict(self), "max_epochs": epochs}


MINIMA = {
    "num_nodes": 1,
    "max_epochs": -1,
    "max_steps": -1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
    "log_every_n_steps": 1,
}
"""The least value of each of these settings: Lightning would find out late, or never."""


if TYPE_CHECKING:
    SamplingChanges = SamplingPlan
else:
    SamplingChanges = dataclasses.make_dataclass(
        "SamplingChanges",
        [(name, hint | None, None) for name, hint in get_type_hints(SamplingPlan).items() if name != "factor"],
        frozen=True,
        kw_only=True,
    )
"""The fields of SamplingPlan but `factor`, which is grid.factors; null keeps the value of the preset."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    name: str = "default"
    """Name of the config, which is the folder of its runs. Default: the name of the YAML file."""
    seed: int = 0
    """Random seed for the initial weights, the order of the images, the training noise and the samples."""
    resume: str | None = None
    """Checkpoint to resume; auto takes the newest one of this config."""
    init_from: str | None = None
    """Checkpoint whose weights a new run starts from (fine-tuning): the name of a bundled model, such as toon64, or
    a file in any format that sample.py --ckpt loads."""
    init_remake_head: bool = False
    """If model.learn_sigma differs from that checkpoint's, keep the part of its output layer that predicts the mean."""
    logger: LoggerName | tuple[LoggerName, ...] = "tensorboard"
    """Where losses, grids and settings are logged: tensorboard, wandb (Weights & Biases), csv, or a list of these."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the network for training with torch.compile; auto does so on a GPU, in runs of 5000 steps or more."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    sampling: SamplingChanges = field(default_factory=SamplingChanges)
    """Changes to grid.preset, for the grids that are drawn during training; sample.py has flags of its own."""
    grid: GridConfig = field(default_factory=GridConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**32, f"seed must be from 0 to {2**32 - 1}: got {self.seed}")
        for name in ("resume", "init_from"):
            _check(getattr(self, name) != "", f"{name} is empty; give a checkpoint, or leave it out")
        both = self.resume not in (None, "auto") and self.init_from
        _check(not both, "give resume or init_from, not both (resume=auto may be with init_from, which begins the run)")
        _check(len(set(self.loggers)) == len(self.loggers), f"logger must list each once: got {list(self.loggers)}")
        _check(
            is_folder_name(self.name),
            f"the name of a config is the folder of its runs, a plain name: got {self.name!r:.100}",
        )
        _check(
            self.optim.decay_steps != "auto" or (self.trainer.max_steps, self.trainer.max_epochs) != (-1, -1),
            "optim.decay_steps=auto needs a last step: give trainer.max_steps or trainer.max_epochs",
        )
        self.model.check_size(*self.data.size)
        for factor in self.grid.factors:
            check_factor(factor, self.data.size, "grid.factors")
        self.model.check_attention(self.data.size[0])
        plan = dataclasses.replace(self.grid_plan.resolved(self.diffusion.T), factor=tuple(self.grid.factors))
        for name in ("condition_from", "condition_to"):
            _check(isinstance(getattr(plan, name), int), f"sampling.{name} must be one number for grids")
        _check(not isinstance(plan.reference_sigma, tuple), "sampling.reference_sigma must be one number for grids")
        _check(
            plan.variance != "learned" or self.model.learn_sigma,
            "sampling.variance=learned needs model.learn_sigma=true; give small, large or auto",
        )

    @property
    def loggers(self) -> tuple[LoggerName, ...]:
        """The setting `logger` as a list."""
        return self.logger if isinstance(self.logger, tuple) else (self.logger,)

    @property
    def grid_plan(self) -> SamplingPlan:
        """The sampling plan of the grids: grid.preset with the changes of sampling.*."""
        names = [f.name for f in dataclasses.fields(self.sampling)]
        changes = {name: value for name in names if (value := getattr(self.sampling, name)) is not None}
        return SamplingPlan.preset(self.grid.preset, **changes)

    def plain(self) -> dict[str, Any]:
        """The config as nested dicts, tuples, numbers and strings."""
        return dataclasses.asdict(self)

    def without_local_paths(self) -> dict[str, Any]:
        """The same without paths of this machine: what a checkpoint holds and a log shows."""
        return without_local_paths(self.plain())


def without_local_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """A config as `Config.plain` gives it, without paths of the machine that it was used on."""
    return {
        **plain,
        "resume": None,
        "init_from": None,
        "data": {**plain["data"], "path": public_dataset_name(plain["data"]["path"])},
        "grid": {**plain["grid"], "references": ()},
        "trainer": {key: value for key, value in plain["trainer"].items() if key != "default_root_dir"},
    }


def public_dataset_name(path: str) -> str:
    """A data set's name for others: of a path on this machine its last part alone."""
    elsewhere = path.startswith(("/", "~", ".", "file:")) or "\\" in path or path[1:2] == ":"
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if elsewhere else path
