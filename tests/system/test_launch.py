"""Runs of several processes, by torchrun, as SLURM starts them, by Lightning: stopped, killed, resumed. Slow."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT

TrainRun = Callable[..., Path]
LONG = ("trainer.max_epochs=100000", "checkpoint.every_n_steps=1")
PAIR = ("trainer.devices=2", "trainer.strategy=ddp")


def start(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=ROOT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def root(tiny_config: Path, tmp_path: Path) -> Iterator[str]:
    """A folder of runs; whatever runs in it is killed at the end."""
    yield f"trainer.default_root_dir={tmp_path}"
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)], check=False)


def wait_for(path: Path, seconds: float = 120) -> Path:
    """The one file that matches, once it is there."""
    deadline = time.monotonic() + seconds
    while not (found := list(path.parent.parent.parent.glob("/".join(path.parts[-3:])))):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return found[0]


def step_of(folder: Path) -> int:
    step: int = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return step


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = (torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (a, b))
    assert one["global_step"] == two["global_step"]
    for key in ("state_dict", "current_model_state"):
        for name, value in one[key].items():
            torch.testing.assert_close(value, two[key][name], rtol=1e-3, atol=5e-4, msg=f"{key}: {name}")


@pytest.fixture(scope="module")
def alone(train_run: TrainRun) -> Path:
    return train_run("alone_for_launch", "trainer.max_epochs=2", "grid.every_n_epochs=1")


def test_torchrun(tiny_config: Path, root: str, tmp_path: Path, alone: Path) -> None:
    """Without run.name: the first rank's choice is the one that counts."""
    process = start(
        "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", "train.py", tiny_config, *PAIR,
        root, "trainer.max_epochs=2", "grid.every_n_epochs=1",
    )  # fmt: skip
    said, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert said.count("devices      2 (cpu), global batch 4") == 1
    (folder,) = (tmp_path / "tiny").iterdir()
    assert_same_weights(folder, alone)


SRUN = """\
#!{python}
import os, signal, subprocess, sys
tasks = []
for rank in ("0", "1"):
    task = {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}}
    command = [word for word in sys.argv[1:] if not word.startswith("--")]
    tasks.append(subprocess.Popen(command, env={{**os.environ, **task}}))
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
"""Two tasks, and the notice passed on to them."""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks, with stand-ins for srun and scontrol."""
    scontrol = f'#!/bin/sh\necho "$@" >> {tmp_path}/queue'
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", scontrol)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1",
        "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29621", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_slurm_stops_at_its_notice_and_goes_on_when_requeued(
    tiny_config: Path, root: str, tmp_path: Path, train_run: TrainRun, slurm: dict[str, str]
) -> None:
    """SIGUSR1 saves and requeues; the same command, started again, ends as a run that was left alone."""
    folder = tmp_path / "tiny" / "slurm_4711"
    command = ["bash", "configs/slurm.sh", str(tiny_config), root, *LONG, "trainer.strategy=ddp"]
    job = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **slurm}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(folder / "checkpoints" / "last.ckpt")
    subprocess.run(["pkill", "-USR1", "-P", str(job.pid)], check=True)  # to the step, as sbatch --signal does
    said, error = job.communicate(timeout=120)
    assert job.returncode == 75, error
    assert (tmp_path / "queue").read_text() == "requeue 4711\n"
    assert error.count("SIGUSR1: saving a checkpoint after this step") == 1
    step = step_of(folder)
    assert said.count(f"stopped at step {step}; a checkpoint is saved") == 1
    command.append(f"trainer.max_steps={step + 5}")
    again = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **slurm, "MASTER_PORT": "29622"}, text=True, capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["slurm_4711"]
    assert_same_weights(folder, train_run(f"alone_{step}", LONG[0], f"trainer.max_steps={step + 5}"))


def test_notice_to_the_whole_group_with_workers(tiny_config: Path, root: str, tmp_path: Path) -> None:
    """As torchrun and SLURM send it: the workers that decode are not to end by it."""
    process = start("train.py", tiny_config, root, *LONG, "run.name=run", "data.cache_mb=0", "data.num_workers=1")
    folder = wait_for(tmp_path / "tiny" / "run" / "checkpoints" / "last.ckpt").parents[1]
    os.killpg(process.pid, signal.SIGTERM)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert error.strip() == (
        "SIGTERM: saving a checkpoint after this step, then exiting (Ctrl-C again exits without saving)"
    )
    assert f"stopped at step {step_of(folder)}; a checkpoint is saved" in said


def test_control_c_on_two_processes(tiny_config: Path, root: str, tmp_path: Path, train_run: TrainRun) -> None:
    """As a terminal sends it: to both. One process continues."""
    process = start("train.py", tiny_config, *PAIR, root, *LONG, "run.name=run")
    folder = wait_for(tmp_path / "tiny" / "run" / "checkpoints" / "last.ckpt").parents[1]
    os.killpg(process.pid, signal.SIGINT)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    step = step_of(folder)
    assert f"stopped at step {step}; a checkpoint is saved" in said
    ended = start(
        "train.py", tiny_config, root, LONG[0], "run.name=run", "resume=auto", f"trainer.max_steps={step + 5}"
    )
    assert ended.wait(timeout=120) == 0
    assert_same_weights(folder, train_run(f"alone_{step}_ints", LONG[0], f"trainer.max_steps={step + 5}"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_takes_the_others_along(
    victim: int, tiny_config: Path, root: str, tmp_path: Path
) -> None:
    process = start("train.py", tiny_config, *PAIR, root, *LONG, "run.name=run")
    folder = wait_for(tmp_path / "tiny" / "run" / "checkpoints" / "last.ckpt").parents[1]
    listed = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "train.py"], text=True)
    (child,) = map(int, listed.split())
    os.kill(child if victim else process.pid, signal.SIGKILL)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)  # its pipes close when both have ended
    assert time.monotonic() - began < 30
    if victim:  # the first rank meets the broken connection, or Lightning ends it and says why
        assert process.returncode in (1, -signal.SIGKILL)
        lost = r"another process of this run has ended|Child process with PID \d+ terminated with code -9"
        assert re.search(lost, error)
    else:
        assert "rank 1: another process of this run has ended" in error
    assert step_of(folder) > 0
