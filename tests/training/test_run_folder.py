"""Where a run lies, and in which precision it resumes."""

import pytest

from ilvr_lightning.config.schema import Config, TrainerConfig
from ilvr_lightning.training import run_folder


def test_precision_stays_what_the_run_began_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "training_precision", lambda accelerator: "bf16-mixed")

    def precision(given: str | None, before: Config | None) -> str | None:
        config = Config(trainer=TrainerConfig(precision=given))
        return run_folder._with_precision(config, before).trainer.precision

    assert precision(None, None) == "bf16-mixed"
    assert precision("64-true", None) == "64-true"
    assert precision(None, Config(trainer=TrainerConfig(precision="64-true"))) == "64-true"
    assert precision(None, Config()) == "32-true"  # of a version that knew no other default
    assert precision("bf16-mixed", Config(trainer=TrainerConfig(precision="64-true"))) == "bf16-mixed"
