"""sample.py --reproduce: make an image again from its recipe; checkpoint and reference are found by their hashes."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ilvr_lightning.atomic import check_writable, write_atomically
from ilvr_lightning.checkpoints import find
from ilvr_lightning.checkpoints.load import LoadedDenoiser, file_sha256, identify, load_denoiser
from ilvr_lightning.data.images import Pixels, from_tensor, read_image, to_image, to_pixels
from ilvr_lightning.data.references import Reference, find_references
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.hardware import choose_device
from ilvr_lightning.sampling.arguments import Arguments, flags_in_errors
from ilvr_lightning.sampling.module import ILVRSampler
from ilvr_lightning.sampling.recipe import Recipe, read_recipe
from ilvr_lightning.sampling.requests import SampleRequest, check_image_size, check_plan

MAX_THREADS = 256
"""At most this many threads are started for a PNG that asks for more: OpenMP ends the process where it cannot."""
MAX_BATCH = 4096
"""A batch size that a PNG asks for is lowered to this."""
MAX_BATCH_PIXELS = 2**20
"""It is also lowered to this many pixels, which are 16 images of 256 by 256."""
MAX_ENLARGEMENT = 64
"""An image may have at most this many times the pixels of those that its network was trained on."""
EFFECTS = {
    "device": "which draws other noise",
    "precision": "which rounds differently",
    "compiled": "which rounds differently",
    "batch_size": "which may round differently",
}
"""What it does to an image if a field of its environment is not as it was."""


def reproduce(args: Arguments) -> int:
    """Make args.reproduce again in args.out and say how far apart the two are; returns the exit status.

    What is sampled comes from the recipe. Where it is computed is as it was then, unless a flag says otherwise.

    Raises:
        UserError: the file holds no recipe, or its reference or checkpoint is not found.
    """
    source = Path(args.reproduce)
    if not source.is_file():
        raise UserError(f"--reproduce: there is no file {source}")
    try:
        recipe = read_recipe(source)
    except UserError as error:
        raise UserError(f"--reproduce: {error}") from None
    old = to_pixels(read_image(source))
    checkpoint = _find_checkpoint(recipe, source, args.ckpt)
    denoiser = load_denoiser(checkpoint, recipe.weights, recipe.overrides or None, say=None)
    trained = denoiser.image_shape[1:]
    if old.shape[0] * old.shape[1] > MAX_ENLARGEMENT * trained[0] * trained[1]:
        raise UserError(
            f"--reproduce: {source} has {old.shape[0]}x{old.shape[1]} pixels, far more than the {trained[0]}x"
            f"{trained[1]} of its network; give a PNG that sample.py wrote"
        )
    shape = check_image_size(denoiser, (old.shape[0], old.shape[1]))
    plan = check_plan(recipe.plan, denoiser, shape, follows=recipe.reference_sha256 is not None)
    reference = _find_reference(recipe, source, args, denoiser, shape)
    target = _target(source, Path(args.out), args.overwrite)

    request = SampleRequest(recipe=replace(recipe, plan=plan), reference=reference)
    made, new = _sample(request, denoiser, shape, args)
    write_atomically(target, lambda path: to_image(new).save(path, "PNG", pnginfo=made.png_info()))
    difference = int(np.abs(to_pixels(read_image(target)).astype(int) - old).max())
    print(f"{target}: {'identical' if difference == 0 else f'at most {difference} of 255 apart'}")
    for name, effect in EFFECTS.items():
        then, now = getattr(recipe, name), getattr(made, name)
        if then != now:
            print(f"note         {name} was {then} and is {now} now, {effect}")
    return 0


def _sample(
    request: SampleRequest, denoiser: LoadedDenoiser, shape: tuple[int, int, int], args: Arguments
) -> tuple[Recipe, Pixels]:
    """The image (H, W, C), and its recipe with the environment in which it was made."""
    recipe = request.recipe
    device = torch.device(choose_device(args.device, (recipe.device,)))
    precision = recipe.precision if args.precision == "auto" else args.precision
    compiled = recipe.compiled if args.compile == "auto" else args.compile
    # Convolutions may round differently in a batch of another size.
    most = max(1, MAX_BATCH_PIXELS // (shape[1] * shape[2]))
    batch_size = args.batch_size or min(recipe.batch_size, most, MAX_BATCH)
    torch.backends.cudnn.allow_tf32 = False  # as make_predictor has it
    if recipe.threads:
        torch.set_num_threads(min(recipe.threads, MAX_THREADS))
    sampler = ILVRSampler(denoiser, shape, precision, compiled, device).to(device)
    with flags_in_errors():
        x = sampler.predict_step([request] * batch_size)
    return replace(recipe, **sampler.environment(batch_size)), from_tensor(x)[0]


def _target(source: Path, folder: Path, overwrite: bool) -> Path:
    """The file to write: the image's own name, or another where that is taken."""
    check_writable(folder, "--out")
    target = folder / source.name
    if (target.exists() and not overwrite) or target.resolve() == source.resolve():
        target = folder / f"{source.stem}_reproduced.png"
    if target.exists() and not overwrite:
        raise UserError(f"--out: {target} exists already; give another folder, or --overwrite")
    return target


def _find_checkpoint(recipe: Recipe, source: Path, given: str | None) -> Path:
    def candidates() -> Iterator[Path]:
        for pattern in ("*.ckpt", "*.safetensors", "*.pt"):
            yield from source.parent.glob(pattern)
        yield from Path("runs").rglob("*.ckpt")
        yield from find.BUNDLED.glob("*/model.safetensors")

    if given is not None:
        found = find.find_checkpoint(given)
        if identify(found, overrides=recipe.overrides or None).sha256 == recipe.checkpoint_sha256:
            return found
    for path in candidates():
        if path.is_file() and file_sha256(path) == recipe.checkpoint_sha256:
            return path
    raise UserError(
        f"--reproduce: the checkpoint with SHA-256 {recipe.checkpoint_sha256[:16]}... is neither beside the image nor "
        "under runs/ nor a bundled model; give it with --ckpt"
    )


def _find_reference(
    recipe: Recipe, source: Path, args: Arguments, denoiser: LoadedDenoiser, shape: tuple[int, int, int]
) -> Reference | None:
    """The reference with its mask: the copies that sample.py kept beside the image, or what --ref and --mask give."""
    if recipe.reference_sha256 is None:
        return None
    # An image may lie in a subfolder of the run's folder.
    folders = [folder / "references" for folder in source.absolute().parents[:2]]
    kept = [path for folder in folders if (path := folder / f"{recipe.reference_sha256}.png").is_file()]
    masks = [path for folder in folders if (path := folder / f"{recipe.mask_sha256}.png").is_file()]
    candidates = list(find_references([str(path) for path in kept], shape, "crop"))
    if args.ref:
        candidates += find_references(args.ref, shape, args.fit, args.mask, value_range=denoiser.value_range)
    candidates = [r for r in candidates if r.sha256 == recipe.reference_sha256]
    masked = [replace(r, mask=to_pixels(read_image(mask, 1))) for r in candidates for mask in masks]
    for reference in [*candidates, *masked]:
        fits = reference.mask is None or reference.mask.shape[:2] == shape[1:]
        if fits and reference.mask_sha256 == recipe.mask_sha256:
            return reference
    what = f"reference {recipe.reference!r} (SHA-256 {recipe.reference_sha256[:16]}...)"
    flags = "--ref (and --fit as it was)"
    if candidates:
        what, flags = f"mask of the reference (SHA-256 {str(recipe.mask_sha256)[:16]}...)", "--ref and --mask"
    raise UserError(f"--reproduce: the {what} is not in {source.parent / 'references'}; give it with {flags}")
