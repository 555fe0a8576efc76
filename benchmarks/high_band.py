"""High-band energy of ILVR samples against their references' own: below 1 is blur, above 1 grain.

    python -m benchmarks.high_band --ref 'data/toon:test[0:128]' [--factor 4 8] [--ckpt PATH] [plan flags of sample.py]

References are held-out images of the training domain, one sample each, so that samples and references should have
one distribution. Also prints the RMS difference of the two low bands, the largest difference of the 8-bit pictures
downsampled by N, and the seconds a picture takes.
"""

import sys
import time
from collections.abc import Sequence

from ilvr_lightning.runtime.command import command
from ilvr_lightning.sampling.arguments import parse


@command
def main(argv: Sequence[str]) -> int:
    """Sample, measure, print a line a factor."""
    args, plan = parse(argv)
    import torch

    from ilvr_lightning.checkpoints.find import find_checkpoint
    from ilvr_lightning.checkpoints.load import load_denoiser
    from ilvr_lightning.data.images import from_tensor, to_tensor
    from ilvr_lightning.data.references import find_references
    from ilvr_lightning.diffusion.low_pass import LowPassFilter, low_pass_factors
    from ilvr_lightning.sampling.module import ILVRSampler
    from ilvr_lightning.sampling.requests import make_jobs
    from ilvr_lightning.sampling.sweep import expand_sweep

    loaded = load_denoiser(find_checkpoint(args.ckpt), args.weights, dict(args.override) or None)
    shape, plan, settings = expand_sweep(loaded, args, plan)
    references = find_references(args.ref, shape, args.fit)
    module = ILVRSampler(loaded, shape, plan, args.precision == "bf16")
    y = torch.stack([r.tensor for r in references])
    print(f"high band of {len(references)} samples, {plan.sampler}, {module.plan.num_steps} evaluations:")
    for setting in settings:
        factor = setting.factor
        jobs = make_jobs(references, [setting], 1, plan, seed=args.seed, weights="ema", checkpoint_sha256="")
        start = time.perf_counter()
        batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
        with torch.no_grad():
            x = torch.cat([module.predict_step(batch) for batch in batches]).clamp(-1, 1)
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
