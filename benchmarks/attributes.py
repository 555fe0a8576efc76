"""Attributes of drawn images (data/*/attributes.json), and a small network that sees them in any image."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ilvr_lightning.errors import UserError

SIDE = 64
FEATURES = 128
COMPONENTS = 16
"""So many principal components of the features are kept."""


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """What data/tools/make_attributes.py wrote."""

    values: dict[str, list[str]]
    """The values of each attribute that has several."""
    codes: dict[str, dict[str, list[int]]]
    """By split and attribute the position of each image's value."""

    @classmethod
    def read(cls, folder: Path) -> "Attributes":
        """The attributes of a set.

        Raises:
            UserError: the folder has none.
        """
        if not (folder / "attributes.json").is_file():
            raise UserError(f"{folder} has no attributes.json; data/tools/make_attributes.py writes it")
        content = json.loads((folder / "attributes.json").read_text())
        values = {name: shapes for name, shapes in content.pop("shapes").items() if len(shapes) > 1}
        return cls(values=values, codes=content)

    def of(self, split: str) -> Tensor:
        """(images, A) the values of the images of a split."""
        return torch.tensor([self.codes[split][name] for name in self.values]).mT


class AttributeNetwork(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> FEATURES numbers; `logits` has the values of all attributes, one after another.

    Args:
        sizes: the number of values of each attribute.
    """

    centre: Tensor
    axes: Tensor

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        widths = [3, 16, 32, 64, 96]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in pairwise(widths)
            ),
            nn.Flatten(),
            nn.Linear(widths[-1] * (SIDE // 16) ** 2, FEATURES, bias=False),
            nn.BatchNorm1d(FEATURES),
        )
        self.head = nn.Linear(FEATURES, sum(sizes))
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("axes", torch.zeros(FEATURES, COMPONENTS))

    def forward(self, x: Tensor) -> Tensor:
        small = x.float().expand(-1, 3, -1, -1)
        if x.shape[-2:] != (SIDE, SIDE):
            small = F.interpolate(small, (SIDE, SIDE), mode="bicubic", antialias=True)
        features: Tensor = self.layers(small)
        return features

    def logits(self, x: Tensor) -> list[Tensor]:
        """(B, values) of each attribute."""
        return list(torch.split(self.head(self(x).relu()), self.sizes, 1))

    @torch.no_grad()
    def see(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, COMPONENTS) whitened components of the features, and the logits of each attribute, in float64."""
        parts = [self(part) for part in torch.split(x, 256)]
        features = torch.cat(parts)
        logits = torch.split(self.head(features.relu()).double(), self.sizes, 1)
        return (features - self.centre).double() @ self.axes.double(), list(logits)


def log_odds(logits: Tensor) -> Tensor:
    """(B, V) of each value of an attribute against its other values."""
    log_p = logits.log_softmax(1)
    others = torch.stack([log_p[:, torch.arange(log_p.shape[1]) != v].logsumexp(1) for v in range(log_p.shape[1])], 1)
    return log_p - others


def train_network(x: Tensor, codes: Tensor, sizes: list[int], epochs: int, batch: int = 64) -> AttributeNetwork:
    """A network trained on images (B, C, H, W) in [-1, 1] and their attributes (B, A), in eval mode."""
    torch.manual_seed(0)
    batch = min(batch, len(x))
    network, batches = AttributeNetwork(sizes), len(x) // batch
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: batches * batch].reshape(batches, batch):
            images = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x[rows].flip(-1), x[rows])
            dy, dx = (int(torch.randint(-2, 3, ())) for _ in range(2))
            logits = network.logits(images.roll((dy, dx), (2, 3)))
            loss = torch.stack([F.cross_entropy(a, codes[rows, i]) for i, a in enumerate(logits)]).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    _find_components(network.eval(), x[:1000])
    return network


@torch.no_grad()
def _find_components(network: AttributeNetwork, x: Tensor) -> None:
    features = torch.cat([network(part) for part in torch.split(x, 256)]).double()
    centre = features.mean(0)
    _, sizes, axes = torch.linalg.svd(features - centre, full_matrices=False)
    kept = min(COMPONENTS, len(x) - 1)
    deviations = (sizes / (len(x) - 1) ** 0.5).clamp(min=1e-6)
    network.centre.copy_(centre)
    network.axes[:, :kept].copy_((axes / deviations[:, None])[:kept].mT)


def accuracies(network: AttributeNetwork, x: Tensor, codes: Tensor) -> list[float]:
    """For each attribute the share of images (B, C, H, W) whose value (B, A) the network sees."""
    _, logits = network.see(x)
    return [float((each.argmax(1) == codes[:, i]).float().mean()) for i, each in enumerate(logits)]
