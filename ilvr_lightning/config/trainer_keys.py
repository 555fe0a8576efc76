"""The Lightning Trainer's arguments that a run may set. Standard library only."""

from typing import Any

from ilvr_lightning.errors import did_you_mean

TRAINER_KEYS = (
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "fast_dev_run",
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "enable_progress_bar",
    "enable_model_summary",
    "accumulate_grad_batches",
    "deterministic",
    "benchmark",
    "profiler",
    "detect_anomaly",
    "barebones",
    "sync_batchnorm",
    "default_root_dir",
)
"""The Trainer's arguments that a run may set; callbacks, logger and sampler are the project's own."""


WHOLE_TRAINER_KEYS = {
    "max_epochs": -1,
    "min_epochs": 0,
    "max_steps": -1,
    "min_steps": 0,
    "num_nodes": 1,
    "log_every_n_steps": 1,
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1,
}
"""Of these the Trainer finds out late, or never; each with its least value."""


SWITCHES = ("detect_anomaly", "sync_batchnorm", "barebones")


SWITCHES_WITH_DEFAULT = ("enable_progress_bar", "enable_model_summary", "benchmark")
"""Of these the Trainer takes any value for true; the latter may be null, which stands for its own choice."""


def check_trainer(settings: dict[str, Any]) -> None:
    """Raise a ValueError for a key that is none, or a value that the Trainer would find out late or never."""
    for key in settings:
        if key not in TRAINER_KEYS:
            hint = did_you_mean(f"trainer.{key}", [f"trainer.{k}" for k in TRAINER_KEYS])
            raise ValueError(f"unknown key trainer.{key}: {hint}")
    for key, lowest in WHOLE_TRAINER_KEYS.items():
        value = settings.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= lowest
        if value is not None and not whole:
            raise ValueError(f"trainer.{key} must be a whole number, at least {lowest}: got {value!r}")
    for key in (*SWITCHES, *SWITCHES_WITH_DEFAULT):
        value = settings.get(key, False)
        if not isinstance(value, bool) and (value is not None or key in SWITCHES):
            raise ValueError(f"trainer.{key} must be true or false: got {value!r}")
