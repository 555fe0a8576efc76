"""High-band energy of ILVR samples against their references' own: below 1 is blur, above 1 grain.

    python -m benchmarks.high_band --ref 'data/toon:test[0:128]' [--factor 4 8] [--ckpt PATH] [flags of sample.py]

References are held-out images of the training domain, one sample each, so that samples and references should have
one distribution. Also prints the RMS difference of the two low bands, the largest difference of the 8-bit images
downsampled by N, and the seconds per image.
"""

import sys
import time
from collections.abc import Sequence

from ilvr_lightning.runtime.command import command
from ilvr_lightning.sampling.arguments import parse_arguments


@command
def main(argv: Sequence[str]) -> int:
    """Sample, measure, print a line per factor and range."""
    args = parse_arguments(argv)
    import torch

    from ilvr_lightning.checkpoints.find import find_checkpoint
    from ilvr_lightning.checkpoints.load import load_denoiser
    from ilvr_lightning.data.images import from_tensor, to_tensor
    from ilvr_lightning.data.references import find_references
    from ilvr_lightning.diffusion.low_pass import LowPassFilter, low_pass_factors
    from ilvr_lightning.diffusion.plan import as_tuple
    from ilvr_lightning.sampling.module import ILVRSampler
    from ilvr_lightning.sampling.requests import SampleRequests, check_image_size, expand_sweep

    denoiser = load_denoiser(find_checkpoint(args.ckpt), args.weights, dict(args.override))
    shape = check_image_size(denoiser, args.image_size)
    plans = expand_sweep(args, denoiser, shape)
    references = find_references(args.ref, shape, args.fit)
    sampler = ILVRSampler(denoiser, shape, args.precision, False, torch.device("cpu"))
    y = torch.stack([r.tensor for r in references])
    print(f"high band of {len(references)} samples, {plans[0].sampler}, {plans[0].num_steps} steps:")
    for plan in plans:
        (factor,) = as_tuple(plan.factor)
        requests = SampleRequests(references, [plan], 1, seed=args.seed, weights=args.weights,
                                  checkpoint_sha256=denoiser.found.sha256, overrides=dict(args.override))  # fmt: skip
        start = time.perf_counter()
        batches = [requests[i : i + args.batch_size] for i in range(0, len(requests), args.batch_size)]
        x = torch.cat([sampler.predict_step(batch) for batch in batches]).clamp(-1, 1)
        seconds = (time.perf_counter() - start) / len(x)
        low_pass = LowPassFilter((shape[1], shape[2]), factor, orthogonal=True)
        energy = (x - low_pass(x)).square().mean() / (y - low_pass(y)).square().mean()
        low = (low_pass(x) - low_pass(y)).square().mean().sqrt()
        down_h, down_w = (low_pass_factors(side, factor)[1] for side in shape[1:])
        written = to_tensor(from_tensor(x))
        off = 127.5 * float((down_h @ (written - y).double() @ down_w.mT).abs().max())
        print(
            f"  N={factor:<3} energy {energy:.3f} of the references'   low band off by {low:.4f}, in 8 bits at most "
            f"{off:.2f} of 255   {seconds:.2f} s each"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
