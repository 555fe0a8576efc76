"""ImageDataModule: what ranks, resumed runs and other people's Trainers see."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ilvr_lightning.data.datamodule import ImageDataModule, TrainBatchSampler, ValidationSampler
from ilvr_lightning.data.dataset import Batch
from ilvr_lightning.data.order import ShuffledOrder, rank_share
from ilvr_lightning.errors import UserError
from tests.support.image_sets import data_config as config
from tests.support.image_sets import png, red, set_up, stream_config, table, write_shards


def trainer(step: int = 0, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> Any:
    """What the data module asks of a Trainer."""
    return SimpleNamespace(
        world_size=world_size, accumulate_grad_batches=accumulation, global_rank=rank, global_step=step, num_devices=1,
        training=True,
    )  # fmt: skip


def seen(batch: Batch) -> list[int]:
    """The red of each image, which is its row."""
    return [red(image) for image in batch["image"]]


@pytest.fixture(params=[False, True], ids=["map-style", "streaming"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> ImageDataModule:
    """Fifty images of two kinds of sources, two of them held out, in batches of six."""
    write_shards(tmp_path, [7, 1, 42])
    return set_up((stream_config if request.param else config)(tmp_path, batch_size=6, shuffle_window=12), seed=3)


# What ranks and resumed runs see


def epoch(data: ImageDataModule, step: int = 0, rank: int = 0, world_size: int = 1, accumulation: int = 1) -> Any:
    """The rows of an epoch's micro-batches."""
    data.trainer = trainer(step, rank, world_size, accumulation)
    loader = data.train_dataloader()
    batches = [seen(batch) for batch in loader]
    assert len(loader) == len(batches) == 8 * accumulation
    return batches


def test_batches_are_those_of_the_order(data: ImageDataModule) -> None:
    assert epoch(data) == [data.rows_of(step) for step in range(8)]
    assert len(set(sum(epoch(data), []))) == 48


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (3, 2)])
def test_a_batch_is_the_same_however_it_is_divided(data: ImageDataModule, world_size: int, accumulation: int) -> None:
    """Micro-batch m of rank r begins at index (m * world_size + r) * size, as the module's seeds assume."""
    ranks = [epoch(data, 0, rank, world_size, accumulation) for rank in range(world_size)]
    joined = []
    for step in range(8):
        micro_batches = range(step * accumulation, (step + 1) * accumulation)
        joined.append([row for m in micro_batches for rank in ranks for row in rank[m]])
    assert joined == epoch(data)


def test_a_resumed_run_continues_in_mid_epoch(data: ImageDataModule) -> None:
    both = epoch(data) + epoch(data, step=8)
    assert epoch(data, step=4) == both[4:12]


def test_epochs_of_a_number_of_images(tmp_path: Path) -> None:
    table(30).to_parquet(tmp_path / "x.parquet")
    lengths = {}
    for images in (None, 13, 100):
        data = set_up(config(tmp_path / "x.parquet", batch_size=4, epoch_images=images))
        data.trainer = trainer()
        lengths[images] = len(list(data.train_dataloader()))
    assert lengths == {None: 7, 13: 3, 100: 25}


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_change_nothing(workers: int, tmp_path: Path) -> None:
    table(30).to_parquet(tmp_path / "x.parquet")
    data = set_up(config(tmp_path / "x.parquet", batch_size=4, num_workers=workers, cache_mb=0))
    data.trainer = trainer()
    assert [seen(batch) for batch in data.train_dataloader()] == [data.rows_of(step) for step in range(7)]


def test_samplers_are_left_alone_by_lightning() -> None:
    """It would divide the shares of the ranks among the ranks again."""
    order = ShuffledOrder(22, 4, seed=3)
    samplers = (TrainBatchSampler(order, rank_share(4, 2, 0, 2), lambda: 0, 5), ValidationSampler(6, 2, 0, 2))
    assert all(isinstance(sampler, DistributedSampler) for sampler in samplers)


@pytest.mark.parametrize(("length", "world_size"), [(6, 1), (6, 2), (7, 2), (1, 3), (2, 4)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_validation_covers_all_images_once(length: int, world_size: int, batch_size: int) -> None:
    shares = [list(ValidationSampler(length, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({tuple(map(len, share)) for share in shares}) == 1  # ranks have as many batches of the same sizes
    assert {len(batch) for share in shares for batch in share[:-1]} <= {batch_size}
    indices = [i for share in shares for batch in share for i in batch]
    assert sorted(i for i in indices if i >= 0) == list(range(length))


def test_validation_batches(data: ImageDataModule) -> None:
    data.trainer = trainer()
    (batch,) = data.val_dataloader()
    assert batch["index"].tolist() == [0, 1]
    assert batch["image"].shape == (2, 3, 8, 8)
    counted = []
    for rank in (0, 1):
        data.trainer = trainer(rank=rank, world_size=2)
        counted += [i for batch in data.val_dataloader() for i in batch["index"].tolist() if i >= 0]
    assert sorted(counted) == [0, 1]


# Batch sizes that do not fit


def test_batch_that_does_not_divide(data: ImageDataModule) -> None:
    assert data.check_batch_size(trainer(world_size=3, accumulation=2)) == 6
    message = "data.batch_size is the global batch, and must be a multiple of devices x nodes x accumulation: got 6"
    with pytest.raises(UserError, match=f"{message} for 4 x 1; give 4"):
        data.check_batch_size(trainer(world_size=4))
    with pytest.raises(UserError, match=f"{message} for 4 x 2; give 8"):
        data.check_batch_size(trainer(world_size=4, accumulation=2))


@pytest.mark.parametrize("streaming", [False, True])
def test_batch_larger_than_the_set(streaming: bool, tmp_path: Path) -> None:
    write_shards(tmp_path, [7, 1, 42])
    data = set_up((stream_config if streaming else config)(tmp_path, batch_size=49))
    with pytest.raises(UserError, match=r"data\.batch_size must be at most the number of training images, 48: got 49"):
        data.check_batch_size(trainer())


# Rows and references


def test_rows_of_a_step_are_numbered_as_their_split_counts(tmp_path: Path) -> None:
    """Whatever was held out, left out or of another class."""
    write_shards(tmp_path / "broken", [7, 1, 42], broken=[5])
    for cache_mb in (0, 1024):
        with pytest.warns() if cache_mb else pytest.MonkeyPatch.context():
            data = set_up(config(tmp_path / "broken", cache_mb=cache_mb, batch_size=6))
        data.trainer = trainer(step=4)
        found, wanted = seen(next(iter(data.train_dataloader()))), data.rows_of(4)
        assert [w for w in wanted if w != 5] == [f for f, w in zip(found, wanted, strict=True) if w != 5]
        assert (5 in [row for step in range(8) for row in data.rows_of(step)]) == (cache_mb == 0)

    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    images = [{"bytes": png(row), "path": None} for row in range(12)]
    pets = datasets.Dataset.from_dict({"image": images, "kind": [row % 2 for row in range(12)]}, features)
    pets.to_parquet(tmp_path / "x.parquet")
    data = set_up(config(tmp_path / "x.parquet", label="dog", batch_size=5))
    assert len(set(data.rows_of(0)) | set(data.rows_of(1))) == 5
    assert set(data.rows_of(0)) < {1, 3, 5, 7, 9, 11}


def test_references_of_grids(data: ImageDataModule, tmp_path: Path) -> None:
    held_out = data.references([])
    assert data.validation is not None
    assert [r.name for r in held_out] == [f"validation_{i}" for i in range(len(data.validation))]
    assert [int(r.pixels[0, 0, 0]) for r in held_out] == [red(data.validation[i][0]) for i in range(len(held_out))]
    (tmp_path / "a.png").write_bytes(png(99))
    (given,) = data.references([str(tmp_path / "*.png")])
    assert (given.name, given.pixels.shape, int(given.pixels[0, 0, 0])) == ("a", (8, 8, 3), 99)
    with pytest.raises(UserError, match=r"grid\.references: there is no file or folder nothing\.png"):
        data.references(["nothing.png"])


# Without the rest of the project


class Denoiser(pl.LightningModule):
    """Somebody else's module: it predicts the noise that it adds, and remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(3, 3, 3, padding=1)
        self.batches: list[Batch] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.batches.append(batch)
        noise = torch.randn_like(batch["image"])
        loss: Tensor = (self.network(batch["image"] + noise) - noise).square().mean()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_keyword_arguments_are_fields_of_the_configuration(tmp_path: Path) -> None:
    data = ImageDataModule(path="images", image_size=(48, 64), batch_size=16)
    assert (data.config.path, data.config.size, data.config.batch_size) == ("images", (48, 64), 16)
    changed = ImageDataModule(config(tmp_path, channels=1), batch_size=16, seed=5)
    assert (changed.config.path, changed.config.channels, changed.seed) == (str(tmp_path), 1, 5)
    assert ImageDataModule(config(tmp_path)).config == config(tmp_path)
    assert ImageDataModule(path=tmp_path / "images").config.path == str(tmp_path / "images")
    with pytest.raises(UserError, match=r"data\.channels must be 3 or 1: got 4"):
        ImageDataModule(path="images", channels=4)
    with pytest.raises(UserError, match=r"'batchsize' not in 'DataConfig'\. Did you mean: 'batch_size'"):
        ImageDataModule(path="images", batchsize=4)


@pytest.mark.parametrize("streaming", [False, True])
def test_any_trainer_and_any_module(streaming: bool, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", [7, 1, 42])
    data = ImageDataModule(path=str(tmp_path / "set"), image_size=16, batch_size=8, num_workers=0, streaming=streaming)
    module = Denoiser()
    pl.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    ).fit(module, datamodule=data)  # fmt: skip
    assert [seen(batch) for batch in module.batches] == [data.rows_of(step) for step in range(12)]
    assert {(tuple(b["image"].shape), b["image"].dtype, *sorted(b)) for b in module.batches} == {
        ((8, 3, 16, 16), torch.float32, "image", "index")
    }
    assert all(float(b["image"].min()) >= -1 and float(b["image"].max()) <= 1 for b in module.batches)
    assert data.validation is not None
    assert module.validated == 2 * list(range(len(data.validation)))
