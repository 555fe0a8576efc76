"""Training: the LightningModule, its callbacks, and the folder of a run."""

from ilvr_lightning.training.calibration import Calibration as Calibration
from ilvr_lightning.training.checkpointing import AtomicCheckpointIO as AtomicCheckpointIO
from ilvr_lightning.training.checkpointing import SaveCheckpoints as SaveCheckpoints
from ilvr_lightning.training.ema import EMA as EMA
from ilvr_lightning.training.grid import ILVRGrid as ILVRGrid
from ilvr_lightning.training.log import TrainingLog as TrainingLog
from ilvr_lightning.training.module import DDPM as DDPM
from ilvr_lightning.training.run_folder import RunFolder as RunFolder
