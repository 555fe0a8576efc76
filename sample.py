"""Sample images that follow a reference: python sample.py --ref PATH... [--ckpt PATH] [--out DIR]."""

import sys
from collections.abc import Sequence

from ilvr_lightning.runtime.command import command, say
from ilvr_lightning.sampling.arguments import Arguments, parse_arguments
from ilvr_lightning.sampling.formats import FORMATS


@command  # a mistake is one line and status 2; nothing up to here imports torch
def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    args = parse_arguments(argv)
    say("loading ...")
    if args.reproduce is not None or args.check:
        from ilvr_lightning.sampling import check, reproduce

        return check.check(args) if args.check else reproduce.reproduce(args)
    return sample(args)


def sample(args: Arguments) -> int:
    """Checkpoint -> plans, references -> requests -> Trainer.predict -> images, grids, index."""
    from ilvr_lightning.checkpoints.find import find_checkpoint
    from ilvr_lightning.checkpoints.load import load_denoiser
    from ilvr_lightning.data.references import find_references
    from ilvr_lightning.runtime.signals import StopOnSignal
    from ilvr_lightning.runtime.trainer import make_predictor
    from ilvr_lightning.sampling.folder import SampleFolder
    from ilvr_lightning.sampling.grids import SampleGrids
    from ilvr_lightning.sampling.module import ILVRSampler, SampleLoader
    from ilvr_lightning.sampling.requests import SampleRequests, check_image_size, expand_sweep
    from ilvr_lightning.sampling.writer import SampleWriter
    from ilvr_lightning.training import ILVRGrid

    denoiser = load_denoiser(find_checkpoint(args.ckpt), args.weights, dict(args.override), say)
    shape = check_image_size(denoiser, args.image_size)
    references = find_references(args.ref, shape, args.fit, args.mask, value_range=denoiser.value_range)
    plans = expand_sweep(args, denoiser, shape, references)  # every factor with every range
    requests = SampleRequests.of_arguments(args, references, plans, denoiser.found.sha256)
    folder = SampleFolder(args.out, requests, overwrite=args.overwrite, trajectory=args.trajectory)
    loader = SampleLoader(requests, folder.missing(), args.batch_size)  # a second start continues the first
    stop, grids, writer = StopOnSignal(), SampleGrids(folder), SampleWriter(folder, loader)
    trainer = make_predictor(args.device, args.devices, [stop, ILVRGrid.of_samples(grids), writer])
    sampler = ILVRSampler(denoiser, shape, args.precision, args.compile, trainer.strategy.root_device, loader.passes)
    say(f"samples      {len(loader.todo)} to make, {len(requests) - len(loader.todo)} already there")
    with stop.listening():
        trainer.predict(sampler, datamodule=loader, return_predictions=False)
        if not trainer.is_global_zero:
            return 0
        missing = folder.write_index()  # metadata.jsonl makes the folder a data set of Hugging Face
        say(f"gallery      {folder.gallery}")
        if skipped := len(requests.unusable):
            say(f"skipped      {skipped * requests.per_reference} images of {skipped} unusable references", sys.stderr)
        if missing:
            say(f"sample.py: {missing} images are missing; run the same command again", sys.stderr)
            return 1
        where = FORMATS[args.format](folder)  # the images as they are, or packed
    say(f"images       in {where}" + (f"; grid {grids.drawn[-1].path}" if grids.drawn else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
