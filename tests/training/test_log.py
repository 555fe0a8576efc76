"""What a run logs."""

from pathlib import Path

import pytest

from tests.support.runs import events, last, scalars


def test_tags(trained: Path) -> None:
    log = events(trained)[0]
    tags = log.Tags()
    assert {
        "train/loss", "train/loss_q1", "train/loss_q2", "train/loss_q3", "train/loss_q4", "train/lr", "train/grad_norm",
        "train/images_per_second", "val/loss",
    } <= set(tags["scalars"])  # fmt: skip
    assert set(tags["images"]) == {"ilvr/grid", "samples/unconditional"}
    text = log.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "batch_size: 4" in text
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(log.summary_metadata)


def test_logged_steps_and_values(trained: Path) -> None:
    assert [step for step, _ in scalars(trained, "train/loss")] == list(range(1, 9))
    assert [step for step, _ in scalars(trained, "val/loss")] == [4, 8]
    lr = [value for _, value in scalars(trained, "train/lr")]
    assert lr[0] == pytest.approx(1e-3 * 2 / 3)  # of the step to come: a warm-up of two steps
    assert lr[1:] == pytest.approx([1e-3] * 7)
    best, final = last(trained, "best"), last(trained)
    losses = dict(scalars(trained, "val/loss"))
    assert losses[best["global_step"]] == min(losses.values())
    assert final["global_step"] == 8
