"""Where a run logs to: TensorBoard, Weights & Biases, CSV files."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from PIL import Image
from torch.utils.tensorboard.summary import hparams

from ilvr_lightning.config.load import flatten, to_yaml
from ilvr_lightning.config.schema import Config
from ilvr_lightning.errors import UserError, first_line

LAYOUT = {
    "loss": {
        "training and validation": ["Multiline", ["train/loss$", "val/loss"]],
        "by quartile of t, from the image (q1) to noise (q4)": ["Multiline", [r"train/loss_q\d"]],
    },
    "optimizer": {
        "learning rate": ["Multiline", ["train/lr"]],
        "norm of the gradient": ["Multiline", ["train/grad_norm"]],
    },
}
"""The charts of TensorBoard's page CUSTOM SCALARS; tags are regular expressions."""
COMPARED = (
    "data.batch_size", "data.image_size", "data.path", "diffusion.loss", "diffusion.prediction", "diffusion.schedule",
    "ema.decay", "model.channels", "model.num_res_blocks", "optim.lr", "optim.weight_decay", "seed",
    "trainer.max_epochs", "trainer.max_steps", "trainer.precision",
)  # fmt: skip
"""The settings on TensorBoard's page HPARAMS, which shows few columns at once."""


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard in the run's own folder; config.yaml, which lies there, takes the place of Lightning's hparams.yaml.

    Args:
        folder: the run's.
        resumed_step: the step that the run resumes from, or None. What was logged after it is purged, since it is
            logged again.
    """

    NAME_HPARAMS_FILE = "config.yaml"

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        # TensorBoard drops what was logged at the step given and after it.
        purge_step = 0 if resumed_step is None else resumed_step + 1
        has_events = any(folder.glob("events.out.tfevents.*"))
        super().__init__(
            folder, name="", version="", default_hp_metric=False, purge_step=purge_step if has_events else None
        )


class RunCSV(CSVLogger):
    """csv/metrics.csv in the run's folder, a row per logged step; a resumed run keeps the rows up to its step."""

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        super().__init__(folder, name="", version="csv")
        self._kept: list[dict[str, Any]] = []
        if resumed_step is not None and (file := folder / "csv" / "metrics.csv").is_file():
            with file.open(newline="") as rows:
                self._kept = [row for row in csv.DictReader(rows) if int(row["step"]) <= resumed_step]

    @property
    def experiment(self) -> Any:
        """Lightning's writer. It begins the file anew, and so the rows that are kept are written at once."""
        writer = super().experiment
        if self._kept and isinstance(writer, ExperimentWriter):  # on other ranks it is a dummy
            writer.metrics, self._kept = list(self._kept), []
            writer.save()
        return writer


class RunWandb(WandbLogger):
    """A run of Weights & Biases: the project is the config's name, the files lie in wandb/ in the run's folder.

    A resumed run goes on under the same id; what was logged after its step is logged again, and shown twice.

    Raises:
        UserError: the package is not installed; or, when the run starts, nobody is logged in.
    """

    def __init__(self, folder: Path, project: str, resumed_step: int | None = None) -> None:
        before = [path.name.rpartition("-")[2] for path in sorted(folder.glob("wandb/*run-*-*"))]
        try:
            super().__init__(
                folder.name, folder, project=project, id=before[-1] if before and resumed_step is not None else None
            )
        except ModuleNotFoundError:
            raise UserError("logger=wandb needs the package of Weights & Biases: pip install -e '.[wandb]'") from None

    @property
    def experiment(self) -> Any:
        """The run, started when it is first asked for."""
        import wandb

        try:
            return super().experiment
        except wandb.Error as error:
            raise UserError(
                f"logger=wandb: {first_line(error)}; log in by `wandb login`, or set WANDB_MODE=offline"
            ) from None


def make_loggers(config: Config, folder: Path, resumed_step: int | None) -> list[Logger]:
    """The loggers that the setting `logger` names.

    Raises:
        UserError: one of them is not installed.
    """
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: RunTensorBoard(folder, resumed_step),
        "wandb": lambda: RunWandb(folder, config.name, resumed_step),
        "csv": lambda: RunCSV(folder, resumed_step),
    }
    return [makers[name]() for name in config.loggers]


def log_picture(logger: Logger, tag: str, picture: Image.Image, step: int) -> None:
    """Show a picture in a logger that can (TensorBoard, Weights & Biases, and others with a method log_image)."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(tag, np.asarray(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        logger.log_image(tag, [picture], step)


def log_config(logger: Logger, config: Config, step: int) -> None:
    """Show the settings in a logger, without paths of this machine."""
    plain = config.without_local_paths()
    settings = {key: value for key, value in flatten(plain) if isinstance(value, bool | int | float | str)}
    if not isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(settings)
        return
    text = "\n".join("    " + line for line in to_yaml(plain).splitlines())
    logger.experiment.add_text("config", text, step)
    logger.experiment.add_custom_scalars(LAYOUT)
    # The metric of the page HPARAMS, val/loss, is logged as a scalar; Lightning would log a value of its own here.
    compared = {key: settings[key] for key in COMPARED if key in settings}
    for summary in hparams(compared, {"val/loss": 0.0}):  # type: ignore[no-untyped-call]
        logger.experiment.file_writer.add_summary(summary)
