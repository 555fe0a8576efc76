"""Sample pictures that follow a reference: python sample.py --ref PATH... [--ckpt PATH] [--out DIR]."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import command, say
from ilvr_lightning.sampling.arguments import parse

if TYPE_CHECKING:
    from ilvr_lightning.sampling.writer import SampleWriter


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args, plan = parse(argv)
    print("loading ...", flush=True)
    if args.reproduce is not None:
        from ilvr_lightning.sampling.reproduce import reproduce

        return reproduce(args)
    return sample(args, plan)


def sample(args: argparse.Namespace, plan: SamplingPlan) -> int:
    """Load -> jobs -> Trainer.predict -> pictures and grids; returns the exit status."""
    from ilvr_lightning.atomic import check_writable
    from ilvr_lightning.checkpoints.find import find_checkpoint
    from ilvr_lightning.checkpoints.load import load_denoiser
    from ilvr_lightning.data.references import find_references
    from ilvr_lightning.runtime.hardware import sampling_in_bf16, should_compile
    from ilvr_lightning.runtime.signals import StopOnSignal
    from ilvr_lightning.runtime.trainer import make_predictor
    from ilvr_lightning.sampling.module import ILVRSampler, SampleLoader
    from ilvr_lightning.sampling.outputs import make_output
    from ilvr_lightning.sampling.requests import make_jobs
    from ilvr_lightning.sampling.sweep import expand_sweep
    from ilvr_lightning.sampling.writer import SampleWriter
    from ilvr_lightning.training.grid import ILVRGrid

    folder = Path(args.out)
    checkpoint = find_checkpoint(args.ckpt)
    loaded = load_denoiser(checkpoint, args.weights, dict(args.override) or None, say=say)
    if args.clip is None:
        plan = replace(plan, clip=loaded.clip)
    shape, plan, settings = expand_sweep(loaded, args, plan)
    references = find_references(args.ref, shape, args.fit, args.mask)
    if (
        plan.start_from is not None
        and references.all_validated
        and any(reference.mask is not None for reference in references)
    ):
        raise UserError("--start-from begins from the whole reference; one of these has a mask of its own")
    check_writable(folder, "--out")
    jobs = make_jobs(
        references,
        settings,
        args.num_samples,
        plan,
        seed=args.seed,
        weights=args.weights,
        checkpoint_sha256=loaded.found.sha256,
        overrides=dict(args.override),
    )
    output = make_output(args.format, jobs, folder, shape, args.overwrite, args.trajectory)
    data = SampleLoader(jobs, output, args.batch_size, args.trajectory)
    writer = SampleWriter(data, folder)
    stop = StopOnSignal()
    trainer = make_predictor(args.device, args.devices, [stop, writer, ILVRGrid.of_samples(data)])
    device = trainer.strategy.root_device
    module = ILVRSampler(loaded, shape, plan, sampling_in_bf16(args.precision, device))
    if should_compile(args.compile, device):
        module.compile_sampling()
    if trainer.is_global_zero:
        done = len(jobs) - len(data.todo)
        print(
            f"weights      {args.weights}\nsamples      {len(data.todo)} to make"
            + (f", {done} already there" if done else ""),
            flush=True,
        )
    with stop.listening():
        trainer.predict(module, datamodule=data, return_predictions=False)
    if trainer.is_global_zero:
        return report(writer)
    return 0


def report(writer: "SampleWriter") -> int:
    """Say where the pictures are, and which are not; returns the exit status."""
    left_out, each = len(writer.jobs.jobs.unusable), writer.jobs.jobs.each
    if left_out:
        print(f"left out     {left_out * each} pictures of {left_out} references that cannot be used", file=sys.stderr)
    if writer.missing:
        print(f"sample.py: {writer.missing} pictures are missing; run the same command again", file=sys.stderr)
        return 1
    *_, grid = None, *writer.jobs.grids()
    print(f"pictures     in {writer.jobs.output.where}" + (f"; grid {grid.path}" if grid else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
