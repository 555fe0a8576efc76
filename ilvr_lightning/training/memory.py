"""How large a batch fits: what one image keeps for the backward pass, measured, against the memory that is free."""

import contextlib
import gc
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from torch import Tensor

from ilvr_lightning.config.schema import Config
from ilvr_lightning.errors import UserError
from ilvr_lightning.runtime.command import say
from ilvr_lightning.training.run_folder import agreed

if TYPE_CHECKING:
    from ilvr_lightning.data.datamodule import ImageDataModule
    from ilvr_lightning.training.module import DDPM


COPIES = 5
"""Of the weights: themselves, gradients, Adam's two moments, the average."""


HEADROOM = 1.5
"""What a step takes at its peak, over what it keeps for the backward pass: work space, gradients of activations."""


USED = 0.85
"""Share of the free memory that a training may take."""


MOST = 2**20
"""More images at once than these are not asked for."""


LARGEST = 256
"""The batch that auto stops at: larger ones train worse for the time they take."""


def images_that_fit(module: "DDPM", trainer: pl.Trainer) -> int:
    """How many images of a training batch the memory of this rank's device holds, at least 0.

    Args:
        module: is moved to the device; its weights are left alone.
        trainer: whose precision and device count.
    """
    device = trainer.strategy.root_device
    module.to(device)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    kept = bytes_an_image(module, trainer)
    free = free_memory(device) / (trainer.num_devices if device.type == "cpu" else 1)
    return int(min(MOST, max(0.0, (free * USED - COPIES * weights) / (HEADROOM * kept))))


def bytes_an_image(module: "DDPM", trainer: pl.Trainer) -> int:
    """What autograd keeps of one image (C, H, W), in the trainer's precision, where the module is."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(1, *module.image_shape, device=module.device)
    with trainer.precision_plugin.forward_context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        output = module.network(x, torch.zeros(1, dtype=torch.int64, device=module.device))
    del output
    return max(1, sum(kept.values()))


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take on a device, infinite where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if not sys.platform.startswith("linux"):
        return float("inf")
    limits = [_entry("/proc/meminfo", "MemAvailable:") * 1024]
    with contextlib.suppress(OSError, ValueError):  # of a container
        most = float(Path("/sys/fs/cgroup/memory.max").read_text())
        taken = float(Path("/sys/fs/cgroup/memory.current").read_text())
        limits.append(most - taken + _entry("/sys/fs/cgroup/memory.stat", "inactive_file "))  # which is given back
    with contextlib.suppress(ImportError, OSError, ValueError):  # ulimit -v
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            limits.append(most - _entry("/proc/self/status", "VmSize:") * 1024)
    return max(0.0, min(limits))


def _entry(file: str, name: str) -> float:
    """A line of /proc, in its own unit."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1])
    return float("inf")


def with_batch_size(config: Config, before: Config | None, data: "ImageDataModule") -> Config:
    """A run's configuration with data.batch_size=auto made a number: the one that it began with, else what fits.

    That is a power of two, times what the batch is shared out by, at most LARGEST and the number of images.

    Args:
        config: as asked for.
        before: of the checkpoint that is resumed.
        data: set up; it is told, too.

    Raises:
        UserError: not even one image a device fits.
    """
    if config.data.batch_size != "auto":
        return config
    if before is not None:
        found = before.data.global_batch
    else:
        found = int(agreed("data.batch_size=auto", lambda: str(_fitting(config, data)), config))
        say(f"batch        {found} images fit (data.batch_size=auto)")
    config = replace(config, data=replace(config.data, batch_size=found))
    data.config = config.data
    return config


def _fitting(config: Config, data: "ImageDataModule") -> int:
    from ilvr_lightning.runtime.trainer import trainer_from
    from ilvr_lightning.training.module import DDPM

    assert data.train is not None
    module, trainer = DDPM(config), trainer_from(config.trainer, logger=False)
    parts = trainer.world_size * trainer.accumulate_grad_batches
    each = images_that_fit(module, trainer)
    if each < 1 or parts > len(data.train):
        raise UserError(too_large(module, trainer, parts))
    batch = parts
    while batch * 2 <= min(parts * each, LARGEST, len(data.train)):
        batch *= 2
    return batch


def within_memory(fit: Callable[[], None], module: "DDPM", trainer: pl.Trainer) -> None:
    """Train, and say what to change, and a batch that would fit, where memory runs out.

    Raises:
        MemoryError: with that for its message.
    """
    try:
        fit()
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold the tensors that did not fit
    gc.collect()
    torch.cuda.empty_cache()
    message = too_large(module, trainer, module.config.data.global_batch)
    raise MemoryError(f"{message}; {getattr(trainer.checkpoint_callback, 'saved', 'nothing was saved')}")


def too_large(module: "DDPM", trainer: pl.Trainer, batch_size: int) -> str:
    """What to change where a batch does not fit, and a value that does."""
    parts = trainer.world_size * trainer.accumulate_grad_batches
    each = images_that_fit(module, trainer)
    share = max(1, batch_size // parts)
    each = min(each, share - 1)  # what ran out was not enough
    if each >= 1:
        fits = 1 << (each.bit_length() - 1)
        return (
            f"out of memory with data.batch_size={batch_size} ({share} images at once on each of {trainer.world_size} "
            f"devices): data.batch_size={fits * parts} would fit, or data.batch_size={batch_size} with "
            f"trainer.accumulate_grad_batches={-(-share // fits) * trainer.accumulate_grad_batches}, the same training"
        )
    return (
        f"out of memory with one image at once ({'x'.join(map(str, module.image_shape[1:]))} px, "
        f"{sum(p.numel() for p in module.parameters()):,} parameters): lower data.image_size or model.channels"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the processor's memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
