"""Whether a long run of sample.py keeps its memory: python benchmarks/bulk.py [--num-samples N] -- FLAGS OF SAMPLE.PY.

Runs sample.py once per format in a folder of its own, and looks at the process from outside (Linux).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str]) -> None:
    """Print a line per format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=5000)
    parser.add_argument("--formats", nargs="+", default=["png", "npz"])
    parser.add_argument("--every", type=float, default=0.25, help="seconds between looks (%(default)s)")
    parser.add_argument("flags", nargs="*", help="flags of sample.py, behind --")
    args = parser.parse_args(argv)
    print("| format | RSS after 10% | RSS at the last image | peak, packing included | images/s | a second start |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in args.formats:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                str(ROOT / "sample.py"),
                "--unconditional",
                "--num-samples",
                str(args.num_samples),
            ]
            command += ["--out", folder, "--format", name, *args.flags]
            early, late, peak, speed = watch(command, Path(folder), args.num_samples, args.every)
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            again = time.perf_counter() - start
        print(f"| {name} | {early:.0f} MB | {late:.0f} MB | {peak:.0f} MB | {speed:.0f} | {again:.1f} s |", flush=True)


def watch(command: list[str], folder: Path, total: int, every: float) -> tuple[float, float, float, float]:
    """Resident MB after a tenth of the images, before the last, and at the peak; images per second between."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    early = late = peak = began = ended = 0.0
    first = last = 0
    while process.poll() is None:
        done = sum(1 for _ in folder.rglob("unconditional_*.png"))
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        now, most = (float(status.get(key, "0 kB").split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))
        peak = max(peak, most)
        if now and 0.1 * total <= done < total:
            late, ended = now, time.perf_counter()
            if not early:
                early, began, first = late, ended, done
            last = done
        time.sleep(every)
    if process.returncode:
        raise SystemExit(f"sample.py ended with status {process.returncode}")
    return early, late, peak, (last - first) / max(ended - began, 1e-9)


if __name__ == "__main__":
    main(sys.argv[1:])
