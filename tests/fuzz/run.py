"""Runs a case and judges it: status, one line, memory, time, nothing executed, nothing written elsewhere."""

import ctypes
import gc
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sample
import train
from ilvr_lightning.checkpoints import __main__ as checkpoints
from ilvr_lightning.checkpoints.families import adm
from ilvr_lightning.data.images import silence_decoders
from ilvr_lightning.models.config import UNetConfig
from ilvr_lightning.models.unet import UNet
from tests.fuzz.inputs import EXECUTED, OUT, SAMPLE, SECRET, TRAIN, Case, Valid, saved
from tests.support.paths import ROOT
from tests.support.runs import TINY_CONFIG

MOST_MB, MOST_SECONDS, LONGEST = 500, 10, 1700
SKIPS = ("skip", "damaged", "stay in memory", "add the following callbacks", "was not created with")
"""Words of a report, one of which a command that goes on says; the last two are Lightning's of a checkpoint."""
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "sample": sample.main, "train": train.main, "checkpoints": checkpoints.main
}  # fmt: skip
COMMANDS = {
    "sample": (str(ROOT / "sample.py"),), "train": (str(ROOT / "train.py"),),
    "checkpoints": ("-m", "ilvr_lightning.checkpoints"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended."""

    verdict: str
    """refused, skipped (with a report), accepted, or FAULT."""
    faults: tuple[str, ...] = ()
    status: int | None = None
    error: str = field(default="", repr=False)
    seconds: float = 0.0
    megabytes: float = 0.0
    """The most above what the process had before."""


class TookTooLong(BaseException):
    """Ends a case that hangs."""


class Watch:
    """Hears what Python executes, connects to and writes while it is on; a hook stays for the process's life."""

    RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "subprocess.Popen",
            "socket.connect", "socket.getaddrinfo", "webbrowser.open")  # fmt: skip
    WRITES = ("os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "os.chmod")
    PICKLED = ("os", "posix", "builtins", "subprocess", "shutil", "pathlib")

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.heard: list[str] = []
        self.made: list[str] = []
        """Folders elsewhere that it was tried to make."""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in self.RUNS:
            self.heard.append(f"executed: {event} {arguments!r:.200}")
        elif event == "pickle.find_class" and arguments[0] in self.PICKLED:
            self.heard.append(f"unpickled: {arguments!r:.200}")
        elif event in ("os.rename", "os.link"):
            for path, within in zip(arguments[:2], arguments[2:], strict=True):
                self._written(event, path, within)
        elif event in self.WRITES:
            self._written(event, arguments[event == "os.symlink"], arguments[-1] if event != "os.truncate" else -1)
        elif event == "open" and (
            arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(str(arguments[1])) & set("wax+")
        ):
            self._written(event, arguments[0])

    def _written(self, event: str, path: Any, within: Any = -1) -> None:
        if isinstance(path, str | bytes | os.PathLike) and self.allowed is not None:
            # The folder's real path: what is written is the name in it, a link though it may be.
            opened = f"/proc/self/fd/{within}" if isinstance(within, int) and within >= 0 else ""
            folder, name = os.path.split(os.path.abspath(os.path.join(opened, os.fsdecode(path))))
            place = os.path.join(os.path.realpath(folder), name)
            if not any(place == root or place.startswith(root + "/") for root in self.allowed):
                if event != "os.mkdir":
                    self.heard.append(f"written elsewhere: {event} {place[:200]}")
                elif not os.path.lexists(place):
                    self.made.append(place)


_watch: Watch | None = None


class Sandbox:
    """A folder with work/ (the working folder: valid files and canaries), out/, home/ and cache/.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        global _watch
        self.root = root.resolve()
        self.work, self.out, self.cache = self.root / "cwd", self.root / "out", self.root / "cache"
        for folder in (self.work / "images", self.root / "home", self.cache):
            folder.mkdir(parents=True)
        _watch = _watch or Watch()
        (self.work / "canary").write_text("canary")
        (self.root / "canary").write_text("canary")
        Image.new("RGB", (8, 8)).save(self.work / "canary.png")
        with self.surroundings():
            self.valid = self._make_valid()
        self.before = self._snapshot()
        # What a first run loads is no case's.
        self.run(Case(what="valid", argv=SAMPLE, valid=True))
        self.run(Case(what="valid", program="train", argv=TRAIN, valid=True))
        gc.freeze()  # what is here now is not looked through after each case

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """The working folder, and an environment without the user's own home, caches or network."""
        changes = {
            "HOME": str(self.root / "home"), "HF_HOME": str(self.cache), "SECRET": SECRET, "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(self.cache / "datasets"), "TMPDIR": str(self.cache),
        }  # fmt: skip
        import datasets.config
        import huggingface_hub.constants

        constants = {
            (datasets.config, "HF_DATASETS_CACHE"): self.cache / "datasets", (datasets.config, "HF_HUB_OFFLINE"): True,
            (datasets.config, "HF_CACHE_HOME"): str(self.cache), (huggingface_hub.constants, "HF_HUB_OFFLINE"): True,
            (sys, "dont_write_bytecode"): True, (sys, "argv"): ["fuzz"],
        }  # fmt: skip
        environment, here = dict(os.environ), os.getcwd()
        old = {(module, name): getattr(module, name) for module, name in constants}
        os.environ.update(changes)
        for (module, name), value in constants.items():
            setattr(module, name, value)
        os.chdir(self.work)
        try:
            yield
        finally:
            os.chdir(here)
            for (module, name), value in old.items():
                setattr(module, name, value)
            os.environ.clear()
            os.environ.update(environment)

    def _make_valid(self) -> Valid:
        """A finished run of the tiny config, exported, and an image of it."""
        random = np.random.default_rng(0)
        for number in range(8):
            pixels = random.integers(0, 256, (9, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"images/{number:02}.png")
        config = TINY_CONFIG.format(data="images", root=OUT).replace(
            "num_res_blocks: 1", "num_res_blocks: 1, norm_num_groups: 8"
        )
        Path("tiny.yaml").write_text(config)
        with _captured():
            assert train.main(["tiny.yaml", "run.name=tiny"]) == 0
            checkpoint = f"{OUT}/tiny/tiny/checkpoints/last.ckpt"
            for kind, place in (("safetensors", "tiny.safetensors"), ("diffusers", f"{OUT}/diffusers")):
                assert checkpoints.main(["export", checkpoint, "--to", kind, place]) == 0
            assert sample.main([*SAMPLE]) == 0
        network = UNetConfig(channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
        ours = UNet(network, (16, 16), 3).state_dict()
        state = {theirs: ours[name].half() for name, (theirs,) in adm.FAMILY.names(ours, network).items()}
        diffusers = Path(OUT, "diffusers")
        made = Valid(
            config=config,
            checkpoint=Path(checkpoint).read_bytes(),
            safetensors=Path("tiny.safetensors").read_bytes(),
            adm=saved(state),
            diffusers={str(p.relative_to(diffusers)): p.read_bytes() for p in diffusers.rglob("*") if p.is_file()},
            picture=Path(OUT, "00_N2_0.png").read_bytes(),
            metadata=Path(OUT, "metadata.jsonl").read_bytes(),
            references={p.name: p.read_bytes() for p in Path(OUT, "references").iterdir()},
        )
        shutil.rmtree(self.out)
        return made

    def run(self, case: Case, by_command: bool = False) -> Outcome:
        """Run a case in this process, or by the command line in another."""
        self._place(case)
        try:
            with self.surroundings():
                outcome = self._commanded(case) if by_command else self._called(case)
            faults = [*outcome.faults, *self._elsewhere()]
            verdict = "FAULT" if faults else outcome.verdict
            return Outcome(**{**vars(outcome), "faults": tuple(faults), "verdict": verdict})
        finally:
            for folder in (self.work / "in", self.out):
                shutil.rmtree(folder, ignore_errors=True)

    def _place(self, case: Case) -> None:
        self.out.mkdir()
        (self.work / "in").mkdir()
        for name, content in case.files.items():
            path = Path(os.path.normpath(self.work / name))
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
        self.inputs = self._snapshot()

    def _snapshot(self) -> dict[str, tuple[int, ...]]:
        """Everything beside out/ and the cache of data sets, with what changes when it is written."""
        found: dict[str, tuple[int, ...]] = {}
        for folder, folders, files in os.walk(self.root):
            if folder == str(self.root):
                folders[:] = [f for f in folders if f not in ("out", "cache")]
            for name in (*folders, *files):
                stat = os.lstat(path := os.path.join(folder, name))
                is_folder = os.path.isdir(path) and not os.path.islink(path)
                found[path] = (stat.st_ino, stat.st_mode) if is_folder else (
                    stat.st_ino, stat.st_mode, stat.st_size, stat.st_mtime_ns)  # fmt: skip
        return found

    def _elsewhere(self) -> list[str]:
        after = self._snapshot()
        changed = {p for p in after.keys() | self.inputs.keys() if after.get(p) != self.inputs.get(p)}
        return [f"changed outside the output folder: {path}" for path in sorted(changed)][:5]

    def _called(self, case: Case) -> Outcome:
        assert _watch is not None
        threads, seed = torch.get_num_threads(), torch.random.get_rng_state()
        crash, status = "", None
        _watch.heard, _watch.made = [], []
        with _captured() as said, warnings.catch_warnings():
            _as_a_command_warns()
            before, started = _reset_peak(), time.perf_counter()
            _watch.allowed = (str(self.out), str(self.cache), "/dev/null")
            try:
                with _at_most(2 * MOST_SECONDS):
                    status = MAINS[case.program](list(case.argv))
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            except TookTooLong:
                crash = "did not end"
            except BaseException:
                crash = traceback.format_exc()[-1500:]
            _watch.allowed = None
            seconds = time.perf_counter() - started
            peak = _memory("VmHWM") - before
        torch.set_num_threads(threads)
        torch.random.set_rng_state(seed)
        out, error = said
        faults = [f"raised: {crash}"] if crash else []
        made = [f"written elsewhere: {place}" for place in _watch.made if os.path.lexists(place)]
        return self._judged(case, status, out, error, seconds, peak, [*faults, *_watch.heard, *made])

    def _commanded(self, case: Case) -> Outcome:
        started = time.perf_counter()
        said, error = self.cache / "out", self.cache / "err"
        with said.open("wb") as out, error.open("wb") as err:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
            child = subprocess.Popen([sys.executable, *COMMANDS[case.program], *case.argv], stdin=subprocess.DEVNULL,
                                     stdout=out, stderr=err, env=environment)  # fmt: skip
            try:
                with _at_most(6 * MOST_SECONDS):
                    _, status, usage = os.wait4(child.pid, 0)
            except TookTooLong:
                child.kill()
                child.wait()
                return Outcome(verdict="FAULT", faults=("did not end",))
            child.returncode = os.waitstatus_to_exitcode(status)
        megabytes = usage.ru_maxrss / 1024 - self.idle[1]
        seconds = time.perf_counter() - started - self.idle[0]
        texts = [path.read_text(errors="replace") for path in (said, error)]
        return self._judged(case, child.returncode, texts[0], texts[1], seconds, megabytes, [])

    def measure_idle(self) -> None:
        """What a command takes that does what it is asked: import, load, sample."""
        self.idle = (0.0, 0.0)
        outcome = self.run(Case(what="idle", argv=SAMPLE, valid=True), by_command=True)
        self.idle = (outcome.seconds, outcome.megabytes)

    idle = (0.0, 0.0)

    def _judged(
        self, case: Case, status: int | None, out: str, error: str, seconds: float, megabytes: float, faults: list[str]
    ) -> Outcome:
        lines = [line for line in error.splitlines() if line.strip()]
        verdict = {0: "accepted", 2: "refused"}.get(status if status is not None else -1, "FAULT")
        if status == 0 and lines:
            verdict = "skipped"
            if not any(word in error for word in SKIPS):
                faults.append(f"said on stderr: {error[:500]}")
        if status not in (0, 2) and not faults:
            faults.append(f"status {status}: {error[:500]}")
        if status == 2:
            faults += [] if len(lines) == 1 else [f"{len(lines)} lines on stderr: {error[:800]}"]
            faults += [] if len(error) <= LONGEST else [f"a message of {len(error)} characters: {error[:200]}"]
            faults += [] if error.strip().isprintable() else [f"control characters in {error[:300]!r}"]
            words = error.partition(": ")[2].strip()
            faults += [] if len(words) > 15 else [f"a message that says nothing: {error!r}"]
            if case.names and not any(" ".join(name.split()) in error for name in case.names):
                faults.append(f"names none of {', '.join(case.names)}: {error[:300]}")
        if "Traceback" in error + out:
            faults.append(f"a traceback: {error[-500:]}")
        if case.valid is True and status != 0:
            faults.append(f"it is valid: {error[:300]}")
        if case.valid is False and verdict == "accepted":
            faults.append("it was accepted")
        if status == 0 and (wrong := self._unsound(case, out)):
            faults.append(wrong)
        if SECRET in out + error or any(SECRET in p.name or _holds_secret(p) for p in self.out.rglob("*")):
            faults.append("the environment leaked")
        if (self.work / EXECUTED).exists() or (self.out / EXECUTED).exists():
            faults.append("it was executed")
        faults += [] if megabytes < MOST_MB else [f"{megabytes:.0f} MB"]
        faults += [] if seconds < MOST_SECONDS else [f"{seconds:.1f} s"]
        return Outcome(
            verdict="FAULT" if faults else verdict, faults=tuple(faults), status=status, error=error, seconds=seconds,
            megabytes=megabytes,
        )  # fmt: skip

    def _unsound(self, case: Case, out: str) -> str:
        """What is wrong with the work of a command that ended with 0."""
        if not out.strip():
            return "it said nothing"
        if {"--print-config", "--help", "-h"} & set(case.argv) or "resume" in case.kind:
            return ""  # a run may be over
        if case.program == "train":
            return "" if any(self.out.rglob("last.ckpt")) else "no checkpoint was written"
        if case.program == "sample":
            ours = {os.path.normpath(self.work / name) for name in case.files}
            pictures = [p for p in self.out.rglob("*") if p.suffix in (".png", ".npz")]
            # Copies of the references lie beside the index, in a folder of that name.
            copies = {p.parent / "references" for p in self.out.rglob("metadata.jsonl")}
            pictures = [p for p in pictures if p.is_file() and p.parent not in copies and str(p) not in ours]
            for path in [p for p in pictures if p.suffix == ".png"][:4]:
                with Image.open(path) as image:
                    image.load()
            return "" if pictures or ours else "no picture was written"
        return ""


def _holds_secret(path: Path) -> bool:
    return path.suffix in (".yaml", ".jsonl", ".png") and path.is_file() and SECRET.encode() in path.read_bytes()


@contextmanager
def _captured() -> Iterator[list[str]]:
    """What goes to the two streams and their descriptors; filled in at the end."""
    said: list[str] = []
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    files = [os.memfd_create(name) for name in ("out", "err")]
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    ours = [io.TextIOWrapper(os.fdopen(os.dup(f), "wb"), "utf-8", errors, write_through=True)
            for f, errors in zip(files, ("strict", "backslashreplace"), strict=True)]  # fmt: skip
    handlers = [h for log in _loggers() for h in log.handlers if "stream" in vars(h)]
    theirs = [vars(handler)["stream"] for handler in handlers]
    try:
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(file, descriptor)
        sys.stdout, sys.stderr = ours
        for handler in handlers:
            vars(handler)["stream"] = sys.stderr
        yield said
    finally:
        sys.stdout, sys.stderr = streams
        for handler, stream in zip(handlers, theirs, strict=True):
            vars(handler)["stream"] = stream
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)
        for file, stream in zip(files, ours, strict=True):
            if stream.closed:
                os.write(file, b"\nTraceback: it closed a stream")
            else:
                stream.close()
            said.append(_all_of(file))
            os.close(file)


def _all_of(file: int) -> str:
    os.lseek(file, 0, os.SEEK_SET)
    with os.fdopen(os.dup(file), "rb") as opened:
        return opened.read().decode(errors="replace")


def _loggers() -> list[logging.Logger]:
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    return [log for log in loggers if isinstance(log, logging.Logger)]


def _as_a_command_warns() -> None:
    """Python's own filters, and every warning each time, not once a place."""
    warnings.resetwarnings()
    warnings.simplefilter("always")
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    silence_decoders()  # as the import of ilvr_lightning.data.images did in the filters that are gone
    # A recorder of warnings, as pytest's, would keep them.
    warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: print(
        warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr
    )


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TookTooLong after so long."""

    def stop(*_: object) -> None:
        raise TookTooLong

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def _memory(name: str) -> float:
    """VmRSS or VmHWM in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def _reset_peak() -> float:
    """VmHWM from here on; gives what there is now, in MB, once freed memory is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")
