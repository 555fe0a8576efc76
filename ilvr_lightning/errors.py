"""The errors that end a command, its exit statuses, and hints for words that are not known."""

import difflib
from collections.abc import Sequence

EXIT_REQUEUE = 75
"""Exit status of a run that a signal ended (EX_TEMPFAIL of sysexits.h): the same command resumes it."""
EXIT_INTERRUPTED = 130
"""Exit status after Control-C, as shells have it."""


class UserError(ValueError):
    """A mistake that the user can correct: one line that says what happened and what to do. The exit status is 2."""


class StopRequested(BaseException):
    """A signal asked the run to stop. A run saves a checkpoint and ends with this status.

    Args:
        status: the exit status.
        all_ranks: every rank has agreed to stop here.
    """

    def __init__(self, status: int, all_ranks: bool = False) -> None:
        super().__init__(status)
        self.status = status
        self.all_ranks = all_ranks


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of an error's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0][:length] or type(error).__name__


OTHER_NAMES = {
    "trainer.gpus": "trainer.devices",
    "gpus": "trainer.devices",
    "devices": "trainer.devices",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "max_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "steps": "trainer.max_steps",
    "train_num_steps": "trainer.max_steps",
    "trainer.gradient_clip_val": "optim.grad_clip",
    "precision": "trainer.precision",
    "lr": "optim.lr",
    "learning_rate": "optim.lr",
    "optim.learning_rate": "optim.lr",
    "batch_size": "data.batch_size",
    "image_size": "data.image_size",
    "resolution": "data.image_size",
    "num_channels": "model.channels",
    "diffusion_steps": "diffusion.num_timesteps",
    "sampling.factor": "grid.factors",
    "ckpt": "resume",
    "checkpoint": "resume",
    "--down-N": "--factor",
    "--down_N": "--factor",
    "--N": "--factor",
    "--input": "--ref",
    "--reference": "--ref",
    "--image": "--ref",
    "--model": "--ckpt",
    "--model_path": "--ckpt",
    "--output": "--out",
    "--save_dir": "--out",
    "--n": "--num-samples",
    "--samples": "--num-samples",
    "--sampling-steps": "--steps",
    "--gpus": "--devices",
    "--config": "a config is the first argument of train.py, without a flag: python train.py configs/NAME.yaml",
    "--cfg": "a config is the first argument of train.py, without a flag: python train.py configs/NAME.yaml",
    "trainer.logger": "logger",
    "trainer.callbacks": "callbacks are set in Python: see docs/lightning.md",
}
"""What other programs call a key or a flag of ours. A value that is no key or flag is the whole hint."""


def did_you_mean(given: str, known: Sequence[str], listing: str = "--help") -> str:
    """A hint for an unknown key or flag: its name here, else the nearest known one, else all of them if they are few.

    Args:
        given: the word as it was typed.
        known: every word that would have been right.
        listing: the flag that lists them.
    """
    plain = given.lstrip("-")
    for name in (given, plain):
        meant = OTHER_NAMES.get(name)
        if meant is not None and " " in meant:
            return meant
        if meant in known:
            return f"did you mean {meant}?"
    # "--data.path" is data.path with dashes, "size" the end of data.size, "--uncond" the beginning of --unconditional.
    same = [word for word in known if word in (given, plain) or word.rpartition(".")[2] == plain]
    longer = [word for word in known if len(plain) > 3 and word.startswith(given)]
    nearest = same or (longer if len(longer) == 1 else difflib.get_close_matches(given, known, n=1, cutoff=0.75))
    meant = nearest[0] if len(nearest) == 1 else None
    if meant is not None:
        return f"did you mean {meant}?"
    return f"the known ones are {', '.join(known)}" if len(known) < 12 else f"{listing} lists what is known"
