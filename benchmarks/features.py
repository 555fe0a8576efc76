"""A fixed feature space where Inception's weights are absent: a small classifier of the images at hand.

    python -m benchmarks.features --data FOLDER_OR_DATASET --out FEATURES.pt [--epochs 8]

The data have an image and a label column (CIFAR-10's animals: cat, deer, dog, horse). What the last pooling gives, 128
numbers per image, is the space in which `benchmarks.trained --features FEATURES.pt` takes the Frechet distance.
Wherever a benchmark takes such a file, it takes a name that `ilvr_lightning.evaluation` knows, too, such as efflite.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor, nn

from ilvr_lightning.data.images import convert, from_tensor, to_pixels, to_tensor
from ilvr_lightning.evaluation.features import Extractor
from ilvr_lightning.evaluation.features import load_features as load_named

WIDTH = 128


class Features(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> (B, WIDTH) features; `classify` computes the labels."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        widths = [3, 32, 64, 96, WIDTH]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in pairwise(widths)
        )
        self.head = nn.Linear(WIDTH, labels)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean((2, 3))

    def classify(self, x: Tensor) -> Tensor:
        """(B, labels) logits."""
        logits: Tensor = self.head(self(x))
        return logits


def load_features(given: str | Path) -> Extractor:
    """The space of what main() saved, or one of the package by its name."""
    if not Path(given).is_file():
        return load_named([str(given)])[0]
    state = torch.load(given, weights_only=True)
    network = Features(len(state["head.bias"]))
    network.load_state_dict(state)
    network.eval()
    return Extractor(
        label="CIFAR", side=32, compute=lambda x: network(x.float() / 127.5 - 1), device=torch.device("cpu")
    )


def features_of(extract: Extractor, x: Tensor) -> Tensor:
    """(B, D) of images (B, C, H, W) in [-1, 1]."""
    return torch.cat([extract(from_tensor(part.expand(-1, 3, -1, -1))) for part in torch.split(x, 256)])


def _tensors(rows: dict[str, Any]) -> tuple[Tensor, Tensor]:
    images = [to_pixels(convert(image)) for image in rows["image"]]
    return to_tensor(np.stack(images)), torch.tensor(rows["label"])


def main() -> None:
    """Train, print the accuracy, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    data = load_dataset("parquet", data_dir=args.data) if Path(args.data).is_dir() else load_dataset(args.data)
    (x, labels), (test_x, test_labels) = (_tensors(data[split][:]) for split in ("train", "test"))
    torch.manual_seed(0)
    network = Features(int(labels.max()) + 1)
    batches = len(x) // 128
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.epochs * batches)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        network.train()
        for batch in torch.randperm(len(x))[: batches * 128].reshape(batches, 128):
            images = x[batch]
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
            dy, dx = (int(torch.randint(-3, 4, ())) for _ in range(2))
            loss = F.cross_entropy(network.classify(images.roll((dy, dx), (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = torch.cat([network.classify(part).argmax(1) for part in torch.split(test_x, 500)]) == test_labels
        print(f"epoch {epoch + 1}: {100 * right.float().mean():.1f}% of the held-out images, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    torch.save(network.state_dict(), args.out)


if __name__ == "__main__":
    main()
