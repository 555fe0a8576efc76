"""Sample pictures that follow a reference: python sample.py --ref PATH... [--ckpt PATH] [--out DIR]."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ilvr_lightning.arguments import parse
from ilvr_lightning.cli import announce, command
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError


@command
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args, plan = parse(argv)
    print("loading ...", flush=True)
    if args.reproduce is not None:
        from ilvr_lightning.reproduce import reproduce

        return reproduce(args)
    return sample(args, plan)


def sample(args: argparse.Namespace, plan: SamplingPlan) -> int:
    """Load -> jobs -> Trainer.predict -> PNGs and grids."""
    from ilvr_lightning.grid import ILVRGrid
    from ilvr_lightning.hardware import sampling_seconds, should_compile
    from ilvr_lightning.jobs import SampleJobs, make_jobs
    from ilvr_lightning.pretrained.load import load_denoiser
    from ilvr_lightning.runs import make_writable
    from ilvr_lightning.sampling import ILVRSampler, SampleWriter, write_references
    from ilvr_lightning.session import find_checkpoint, find_references, fitting_settings, make_trainer, use_bf16

    folder = Path(args.out)
    checkpoint = find_checkpoint(args.ckpt)
    loaded = load_denoiser(checkpoint, args.weights, dict(args.override) or None, say=announce)
    if args.clip is None:
        plan = replace(plan, clip=loaded.clip)
    shape, plan, settings = fitting_settings(loaded, args, plan)
    references = find_references(args.ref, shape, args.fit, args.mask)
    if plan.start_from is not None and any(reference.mask is not None for reference in references):
        raise UserError("--start-from begins from the whole reference; one of these has a mask of its own")
    make_writable(folder, "--out")
    write_references(references, folder)
    jobs = SampleJobs(
        make_jobs(
            references,
            settings,
            args.num_samples,
            plan,
            seed=args.seed,
            weights=args.weights,
            checkpoint_sha256=loaded.found.sha256,
            overrides=dict(args.override),
            folder=folder,
            overwrite=args.overwrite,
        ),
        folder,
        args.batch_size,
        args.overwrite,
        args.trajectory,
    )
    trainer = make_trainer(args.device, args.devices, [SampleWriter(jobs), ILVRGrid()])
    device = trainer.strategy.root_device
    module = ILVRSampler(loaded, shape, plan, use_bf16(args.precision, device))
    mine = -(-len(jobs.todo) // trainer.world_size)
    batch = min(args.batch_size, mine)
    evaluations = module.plan.num_steps * -(-mine // batch) if mine else 0
    if should_compile(args.compile, device, lambda: sampling_seconds(module.network, (batch, *shape), evaluations)):
        module.compile_sampling()
    if trainer.is_global_zero:
        done = len(jobs.jobs) - len(jobs.todo)
        print(
            f"weights      {args.weights}\nsamples      {len(jobs.todo)} to make"
            + (f", {done} already there" if done else ""),
            flush=True,
        )
    trainer.predict(module, datamodule=jobs, return_predictions=False)
    if trainer.is_global_zero:
        *_, last = jobs.grids()
        print(f"pictures     in {folder}; grid {last.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
