"""The average of the weights."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from ilvr_lightning.checkpoints.load import load_denoiser
from ilvr_lightning.training.ema import EMA
from ilvr_lightning.training.module import DDPM
from tests.support.runs import TrainRun, equal, last


class Scalar(pl.LightningModule):
    """One weight, which a test sets by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))


def test_ema_by_hand() -> None:
    module, trainer = Scalar(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    ema = EMA(decay=0.3)
    ema.setup(trainer, module, "fit")
    average, steps = 1.0, [5.0, -2.0, 7.0, 11.0]
    for n, value in enumerate(steps, start=1):
        module.weight.data.fill_(value)
        assert ema._average_model is not None
        ema._average_model.update_parameters(module)
        if n == 1:
            average = value  # torch copies the first weights
        else:
            decay = min(0.3, n / (9 + n))  # warm-up: 2/11, 3/12, then 0.3
            average = decay * average + (1 - decay) * value
        with ema.averaged(module):
            assert module.weight.item() == pytest.approx(average, rel=1e-6)
        assert module.weight.item() == value


def test_raw_weights_come_back_after_an_error() -> None:
    module, trainer = Scalar(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    ema = EMA()
    ema.setup(trainer, module, "fit")
    module.weight.data.fill_(3.0)
    with pytest.raises(ZeroDivisionError), ema.averaged(module):
        assert module.weight.item() == 1.0
        raise ZeroDivisionError
    assert module.weight.item() == 3.0


def test_checkpoint_holds_average_and_raw_weights(trained: Path) -> None:
    content = last(trained)
    ema, raw = content["state_dict"], content["current_model_state"]
    assert ema.keys() == raw.keys()
    assert not equal(ema, raw)
    assert content["global_step"] == 8
    assert type(content["hyper_parameters"]["config"]) is dict
    for name in ("last", "best"):
        loaded = load_denoiser(trained / "checkpoints" / f"{name}.ckpt")
        expected = last(trained, name)["state_dict"]
        assert equal({f"network.{k}": v for k, v in loaded.network.state_dict().items()}, expected)


def test_average_follows_the_raw_weights(train_run: TrainRun, monkeypatch: pytest.MonkeyPatch) -> None:
    raw: list[dict[str, Tensor]] = []
    original = DDPM.on_train_batch_end

    def record(self: DDPM, *args: Any) -> None:
        raw.append({k: v.detach().double() for k, v in self.state_dict().items()})
        original(self, *args)

    monkeypatch.setattr(DDPM, "on_train_batch_end", record)
    folder = train_run("recorded", "trainer.max_epochs=2", "ema.decay=0.25")
    average = raw[0]
    for n, weights in enumerate(raw[1:], start=1):
        decay = min(0.25, (1 + n) / (10 + n))
        average = {k: decay * v + (1 - decay) * weights[k] for k, v in average.items()}
    stored = last(folder)["state_dict"]
    assert len(raw) == 8
    assert max(float((stored[k] - v).abs().max()) for k, v in average.items()) < 1e-7
