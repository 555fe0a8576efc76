"""python -m tests.fuzz [--count 10000] [--seed 0] [--only KIND] [--first 0] [--case INDEX] [--commands 50]"""

import argparse
import faulthandler
import os
import resource
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.fuzz.inputs import KINDS, Case, case
from tests.fuzz.run import MOST_MB, Outcome, Sandbox, _memory


def main() -> int:
    """Run them all, print the table; 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--first", type=int, default=0, metavar="INDEX", help="begin there")
    parser.add_argument("--case", type=int, metavar="INDEX", help="this one alone, and what it said")
    parser.add_argument("--commands", type=int, default=50, help="so many of them by the real command line, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stderr = os.fdopen(os.dup(2), "w")
    with TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder))
        # A case that wants more is to fail, not to bring the machine down.
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * 2**30, resource.RLIM_INFINITY))
        indices = [args.case] if args.case is not None else range(args.first, args.first + args.count)
        chosen = [i for i in indices if args.only is None or list(KINDS)[i % len(KINDS)] == args.only]
        for index in range(len(KINDS)):
            case(sandbox.valid, args.seed, index)  # all that are by hand are made now
        started, idle = time.perf_counter(), _memory("VmRSS")
        outcomes: list[tuple[str, Outcome]] = []
        for done, index in enumerate(chosen):
            made = case(sandbox.valid, args.seed, index)
            # What hangs in C hears no alarm.
            faulthandler.dump_traceback_later(90, exit=True, file=stderr)
            outcome = sandbox.run(made)
            faulthandler.cancel_dump_traceback_later()
            outcomes.append((made.kind, replace(outcome, error="")))
            if outcome.faults:
                print(f"\n{index} {made.kind}: {made.what}\n  argv {str(made.argv)[:300]}\n  files "
                      f"{', '.join(made.files)[:300]}\n  " + "\n  ".join(outcome.faults), flush=True)  # fmt: skip
            elif args.case is not None:
                print(made.what, made.argv, outcome, outcome.error, sep="\n")
            if done % 500 == 499:
                print(f"{done + 1} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        grown = _memory("VmRSS") - idle
        print(table(outcomes))
        print(f"{len(outcomes)} in {time.perf_counter() - started:.0f} s; the process grew by {grown:.0f} MB")
        bad = sum(bool(outcome.faults) for _, outcome in outcomes)
        if args.commands and args.case is None:
            step = max(1, len(chosen) // args.commands) | 1  # odd, so that all kinds come
            bad += by_command(sandbox, [case(sandbox.valid, args.seed, i) for i in chosen[::step]])
    return int(bad > 0 or grown > MOST_MB)


def by_command(sandbox: Sandbox, cases: list[Case]) -> int:
    """Each in a process of its own; gives the number of faults."""
    sandbox.measure_idle()
    bad, verdicts = 0, Counter[str]()
    for made in cases:
        if any("\0" in word or len(word) > 10**5 for word in made.argv):
            continue  # no command line can hold it
        outcome = sandbox.run(made, by_command=True)
        verdicts[outcome.verdict] += 1
        if outcome.faults:
            bad += 1
            print(f"\nby command, {made.index} {made.kind}: {made.what}\n  " + "\n  ".join(outcome.faults), flush=True)
    print(f"by the command line: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.items())}")
    return bad


def table(outcomes: list[tuple[str, Outcome]]) -> str:
    """A row a kind."""
    rows = [f"{'kind':12}{'inputs':>8}{'refused':>9}{'skipped':>9}{'accepted':>10}{'faults':>8}{'MB':>7}{'s':>7}"]
    for kind in (*KINDS, "all"):
        of = [outcome for its_kind, outcome in outcomes if kind in (its_kind, "all")]
        if of:
            counts = Counter(outcome.verdict for outcome in of)
            numbers = "".join(
                f"{counts[v]:>{w}}"
                for v, w in zip(("refused", "skipped", "accepted", "FAULT"), (9, 9, 10, 8), strict=True)
            )
            worst = f"{max(o.megabytes for o in of):>7.0f}{max(o.seconds for o in of):>7.2f}"
            rows.append(f"{kind:12}{len(of):>8}{numbers}{worst}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
