"""python -m benchmarks.devices: how far the losses of several processes are from those of one."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
Settings = tuple[str, ...]
"""key=value of each start, in order; a second start resumes the first."""
TWO, FOUR = "trainer.devices=2 trainer.strategy=ddp", "trainer.devices=4 trainer.strategy=ddp"
VARIANTS: dict[str, Settings] = {
    "1 process": ("trainer.devices=1",),
    "2 processes": (TWO,),
    "4 processes": (FOUR,),
    "1 process, 4 micro-batches a step": ("trainer.devices=1 trainer.accumulate_grad_batches=4",),
    "2 processes, 2 micro-batches a step": (TWO + " trainer.accumulate_grad_batches=2",),
    "2 processes, 4 from step 20": (TWO + " trainer.max_steps=20", FOUR),
}


def losses(config: str, starts: Settings, precision: str, steps: int, root: Path) -> list[float]:
    """train/loss of each step."""
    shared = (
        f"trainer.precision={precision} trainer.accelerator=cpu trainer.log_every_n_steps=1 run.name=run resume=auto"
    )
    quiet = "trainer.enable_progress_bar=false trainer.enable_model_summary=false calibration.images=0"
    for settings in starts:
        command = [sys.executable, "train.py", config, f"trainer.default_root_dir={root}", f"trainer.max_steps={steps}"]
        command += [
            *shared.split(),
            *quiet.split(),
            "grid.every_n_epochs=0",
            "optim.decay_steps=null",
            *settings.split(),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    folder = root / Path(config).stem / "run"
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in log.Scalars("train/loss")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/toon32.yaml")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    print("| | precision | steps 1 to 10 | all |\n|---|---|---|---|")
    for precision in ("64-true", "32-true"):
        one: list[float] = []
        for name, starts in VARIANTS.items():
            with tempfile.TemporaryDirectory() as root:
                found = losses(args.config, starts, precision, args.steps, Path(root))
            one = one or found
            apart = [abs(a - b) / abs(b) for a, b in zip(found, one, strict=True)]
            print(f"| {name} | {precision} | {max(apart[:10]):.1e} | {max(apart):.1e} |", flush=True)


if __name__ == "__main__":
    main()
