"""sample.py --reproduce: make a picture again from the recipe in it, whose parts are found by their hashes."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ilvr_lightning.atomic import check_writable, write_atomically
from ilvr_lightning.checkpoints.find import BUNDLED, find_checkpoint
from ilvr_lightning.checkpoints.load import file_sha256, identify, load_denoiser
from ilvr_lightning.data.images import from_tensor, read_image, to_image, to_pixels
from ilvr_lightning.data.references import Reference, find_references
from ilvr_lightning.diffusion.plan import as_tuple
from ilvr_lightning.errors import UserError
from ilvr_lightning.sampling.module import ILVRSampler
from ilvr_lightning.sampling.pictures import SUBFOLDER
from ilvr_lightning.sampling.recipe import Recipe, plan_of, read_recipe, recipe_info
from ilvr_lightning.sampling.requests import Job, settings_of
from ilvr_lightning.sampling.sweep import check_image_size


def reproduce(args: argparse.Namespace) -> int:
    """Make args.reproduce again in args.out and say how far apart the two are; returns the exit status.

    Raises:
        UserError: the file holds no recipe, or its reference or checkpoint is not found.
    """
    source, folder = Path(args.reproduce), Path(args.out)
    if not source.is_file():
        raise UserError(f"--reproduce: there is no file {source}")
    recipe = read_recipe(source)
    if recipe is None:
        raise UserError(f"--reproduce: {source} holds no recipe of ours; give a PNG that sample.py wrote")
    old = to_pixels(read_image(source))
    checkpoint = _find_checkpoint(recipe, source, args.ckpt)
    loaded = load_denoiser(checkpoint, "raw" if recipe.weights == "raw" else "ema", recipe.overrides or None, say=None)
    channels = loaded.image_shape[0]
    shape = (channels, old.shape[0], old.shape[1])
    reference = _find_reference(recipe, source, args, shape)
    target = folder / source.name
    if (target.exists() and not args.overwrite) or target.resolve() == source.resolve():
        target = folder / f"{source.stem}_reproduced.png"
    check_writable(folder, "--out")
    if target.exists() and not args.overwrite:
        raise UserError(f"--out: {target} is there already; give another folder, or --overwrite")

    pixels, trained = old.shape[0] * old.shape[1], loaded.image_shape[1] * loaded.image_shape[2]
    if pixels > 64 * trained:
        raise UserError(
            f"--reproduce: {source} is of {old.shape[0]}x{old.shape[1]} pixels, far more than its network's "
            f"{loaded.image_shape[1]}x{loaded.image_shape[2]}; give a picture that sample.py wrote"
        )
    plan = plan_of(recipe)
    check_image_size(loaded, shape[1:], as_tuple(plan.factor) if reference else [], plan)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = torch.device(recipe.device if there[recipe.device] else "cpu")
    module = ILVRSampler(loaded, shape, plan, recipe.precision == "bf16").to(device)
    if recipe.compiled:
        module.compile_sampling()
    if recipe.threads:
        torch.set_num_threads(min(recipe.threads, MOST_THREADS))
    (setting,) = settings_of(plan.resolved(loaded.schedule.num_timesteps), [as_tuple(plan.factor)[0]])
    job = Job(reference=reference, setting=setting if reference else None, sample=recipe.sample, recipe=recipe,
              file=source.name)  # fmt: skip
    # Convolutions may round differently in a batch of another size.
    batch = min(recipe.batch_size, max(1, MOST_PIXELS // pixels))
    new = from_tensor(module.predict_step([job] * batch))[0]
    made = replace(recipe, **module.conditions(batch))
    write_atomically(target, lambda path: to_image(new).save(path, "PNG", pnginfo=recipe_info(made)))
    difference = int(np.abs(to_pixels(read_image(target)).astype(int) - old).max())
    verdict = "identical" if difference == 0 else f"at most {difference} of 255 apart"
    print(f"{target}: {verdict}")
    if device.type != recipe.device:
        print(f"it was made on {recipe.device}, which is not here; another kind of device draws other noise")
    if batch != recipe.batch_size:
        print(f"it was made in a batch of {recipe.batch_size}, now in one of {batch}; the last digits may differ")
    if made.compiled != recipe.compiled:
        print("it was made by a compiled network, which rounds otherwise")
    return 0


MOST_THREADS = 256
"""OpenMP ends the process where it cannot start as many as it is told to."""


MOST_PIXELS = 2**20
"""Of a batch: 16 images of 256 px."""


def _find_checkpoint(recipe: Recipe, source: Path, given: str | None) -> Path:
    def candidates() -> Iterator[Path]:
        for pattern in ("*.ckpt", "*.safetensors", "*.pt"):
            yield from source.parent.glob(pattern)
        yield from Path("runs").rglob("*.ckpt")
        yield from BUNDLED.glob("*/model.safetensors")

    if given is not None:
        found = find_checkpoint(given)
        if identify(found, overrides=recipe.overrides or None).sha256 == recipe.checkpoint_sha256:
            return found
    for path in candidates():
        if path.is_file() and file_sha256(path) == recipe.checkpoint_sha256:
            return path
    raise UserError(
        f"--reproduce: the checkpoint with SHA-256 {recipe.checkpoint_sha256[:16]}... is not beside the file, "
        "given by --ckpt, under runs/, or one that comes with the project; give it with --ckpt"
    )


def _find_reference(
    recipe: Recipe, source: Path, args: argparse.Namespace, shape: tuple[int, int, int]
) -> Reference | None:
    if recipe.reference_sha256 is None:
        return None
    folder = _kept_references(source)
    kept = folder / f"{recipe.reference_sha256}.png"
    candidates: list[Reference] = []
    if kept.is_file():
        candidates += find_references([str(kept)], shape, "crop")
    if args.ref:
        given = find_references(args.ref, shape, args.fit, args.mask)
        candidates += [r for r in given if r.sha256 == recipe.reference_sha256]
    mask = None
    if recipe.mask_sha256 is not None and (kept_mask := folder / f"{recipe.mask_sha256}.png").is_file():
        mask = to_pixels(read_image(kept_mask, 1))
    candidates = [r for r in candidates if r.sha256 == recipe.reference_sha256]
    masked = [replace(r, mask=mask) for r in candidates if mask is None or mask.shape[:2] == r.pixels.shape[:2]]
    for reference in [*candidates, *masked]:
        if reference.mask_sha256 == recipe.mask_sha256:
            return reference
    if candidates:
        raise UserError(
            f"--reproduce: the mask of the reference (SHA-256 {str(recipe.mask_sha256)[:16]}...) is not in {folder} or "
            "given by --mask; give it with --mask, beside --ref"
        )
    raise UserError(
        f"--reproduce: the reference {recipe.reference!r} (SHA-256 {recipe.reference_sha256[:16]}...) is not in "
        f"{folder} or given by --ref; give it with --ref (and --fit as it was)"
    )


def _kept_references(source: Path) -> Path:
    """Where sample.py keeps references: beside the picture, or beside the subfolder of a large run."""
    folder = source.parent.parent if SUBFOLDER.fullmatch(source.parent.name) else source.parent
    return folder / "references"
