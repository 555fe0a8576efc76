"""The short form of `python -m tests.system.kill`: two kills of a training, one of them while a file is written."""

from pathlib import Path

from tests.system.kill.runs import difference, finish, kill_training, make_config


def test_a_training_that_is_killed_ends_as_one_left_alone(tmp_path: Path) -> None:
    killed, alone = (make_config(tmp_path, name, epochs=30) for name in ("killed", "alone"))
    kill_training(killed, kills=2, seed=0)
    finish("train.py", alone)
    folders = [tmp_path / "runs" / name / "run" for name in ("killed", "alone")]
    assert difference(folders[0], folders[1]) is None
    (folders[0] / "grids" / "step_0000008.png").write_bytes(b"")
    assert difference(folders[0], folders[1]) == "the files of the grids"
