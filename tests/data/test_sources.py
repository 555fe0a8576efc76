"""Where images come from: every kind of place, what is held out, and what is said of a place that does not load."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import huggingface_hub.errors as hub
import pytest
from PIL import Image

from ilvr_lightning.config.schema import DataConfig
from ilvr_lightning.data.image_files import image_files
from ilvr_lightning.data.image_source import ImageSource
from ilvr_lightning.data.sources import SOURCES, SourceKind, locate, open_split
from ilvr_lightning.errors import UserError
from tests.support.image_sets import data_config as config
from tests.support.image_sets import encode, png, set_up, stream_config, table, write_shards
from tests.support.image_sets import reds as values


def test_plain_folder(tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    train, validation = values(config(tmp_path))
    assert (len(train), len(validation)) == (5, 1)
    assert sorted(train + validation) == [0, 1, 2, 3, 4, 5]


def test_no_image_is_dropped_because_others_have_the_name_of_a_split(tmp_path: Path) -> None:
    """`datasets` would read the files of the split alone."""
    for i in range(6):
        folder = tmp_path / ("train" if i < 2 else "car")
        folder.mkdir(exist_ok=True)
        (folder / f"{i}.png").write_bytes(png(i))
    with pytest.warns(UserWarning, match="only 2 of 6 images have the name of a split"):
        train, validation = values(config(tmp_path))
    assert sorted(train + validation) == [0, 1, 2, 3, 4, 5]
    with pytest.warns(UserWarning, match="only 2 of 6"):
        assert sorted(sum(values(config(tmp_path, label="train")), [])) == [0, 1]
    with pytest.raises(UserError, match="'test' is not in"):
        values(config(tmp_path, split="test"))


def test_archives_and_metadata_files_change_nothing(tmp_path: Path) -> None:
    """`datasets` would add the images in the archive, and drop those that the metadata do not name."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "0.png", "0.png")
    for name, text in {"metadata.jsonl": '{"file_name": "1.png"}\n', "metadata.csv": "id,name\n1,cat\n"}.items():
        (tmp_path / name).write_text(text)
        assert sorted(sum(values(config(tmp_path)), [])) == [0, 1, 2, 3, 4, 5]
        (tmp_path / name).unlink()


def test_a_column_of_the_metadata_is_found_after_a_run_without_it(tmp_path: Path) -> None:
    """`datasets` keeps what it has read; the two must not be taken for each other."""
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = [f'{{"photo_file_name": "{i}.png"}}' for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert sorted(sum(values(config(tmp_path)), [])) == [0, 1, 2, 3, 4, 5]
    assert sorted(sum(values(config(tmp_path, image_column="photo")), [])) == [0, 1, 2]


def test_links_to_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for i in range(3):
        (tmp_path / "real" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cats").symlink_to(tmp_path / "real")
    with pytest.warns(UserWarning, match="links to folders are not followed: cats"):
        assert image_files(tmp_path / "images") == []


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    for name in ("._0.png", "__MACOSX/0.png", ".trash/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"none")
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    assert sorted(sum(values(config(tmp_path)), [])) == [0, 1, 2]
    assert [path.name for path in image_files(tmp_path)] == ["0.png", "1.png", "2.png"]


def test_folder_with_brackets_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "holiday [2023]"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(i))
    assert sorted(sum(values(config(folder)), [])) == [0, 1, 2]


def test_parquet_file_and_glob(tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "a.parquet")
    table(4, first=50).to_parquet(tmp_path / "b.parquet")
    assert sorted(sum(values(config(tmp_path / "a.parquet")), [])) == [0, 1, 2, 3]
    assert sorted(sum(values(config(tmp_path / "*.parquet")), [])) == [0, 1, 2, 3, 50, 51, 52, 53]
    with pytest.raises(UserError, match=r"data\.path=.*\*\.csv: give Parquet or Arrow files"):
        values(config(tmp_path / "*.csv"))


def test_saved_to_disk(tmp_path: Path) -> None:
    table(4).save_to_disk(tmp_path / "one")
    splits = {"train": table(3), "validation": table(2, first=50), "test": table(2, first=90)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "many")
    assert sorted(sum(values(config(tmp_path / "one")), [])) == [0, 1, 2, 3]
    assert values(config(tmp_path / "many")) == ([0, 1, 2], [50, 51])
    assert values(config(tmp_path / "many", split="validation", validation_split="test")) == ([50, 51], [90, 91])


def test_local_data_set_with_its_own_test_split(tmp_path: Path) -> None:
    """The layout of data/toon."""
    table(5).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table(2, first=50).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert values(config(tmp_path)) == ([0, 1, 2, 3, 4], [50, 51])
    for setting in ("split", "validation_split"):
        with pytest.raises(UserError, match=rf"data\.{setting}='dev' is not in .*: it has train, test"):
            values(config(tmp_path, **{setting: "dev"}))


def test_held_out_part_follows_from_the_seed(tmp_path: Path) -> None:
    table(40).to_parquet(tmp_path / "x.parquet")
    settings = config(tmp_path / "x.parquet", validation_fraction=0.25)
    train, validation = values(settings, seed=1)
    assert (len(train), len(validation)) == (30, 10)
    assert sorted(train + validation) == list(range(40))
    assert values(settings, seed=1) == (train, validation)
    assert set(values(settings, seed=2)[1]) != set(validation)


def test_one_image_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / "only.png").write_bytes(png(0))
    with pytest.raises(UserError, match="holds 1 image; at least 2"):
        values(config(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "some/where/else", "missing.parquet"])
def test_missing_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(UserError, match=r"data\.path=\S+: there is no such folder or file"):
        values(config(path))


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"data\.path=.*: no images in this folder"):
        values(config(tmp_path))


def gated() -> Exception:
    error: Exception = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'x/y' is a gated dataset on the Hub. You must be authenticated to access it."
    )
    return error


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (gated, "accept its terms on the Hub, then run `hf auth login`"),
        (
            lambda: datasets.exceptions.DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub"),
            "neither a local folder nor a data set on the Hub",
        ),
        (lambda: ConnectionError("Couldn't reach 'x/y' on the Hub (ProxyError)"), "the Hub cannot be reached"),
        (lambda: hub.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode"), "cannot be reached"),
        (lambda: hub.LocalEntryNotFoundError("Cannot find the file in the cache"), "the Hub cannot be reached"),
        (lambda: RuntimeError("first line\nsecond line"), "could not be loaded: first line$"),
    ],
)
def test_hub_errors_say_what_to_do(error: Callable[[], Exception], hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise error()

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(UserError, match=rf"^data\.path=x/y .*{hint}") as caught:
        values(config("x/y"))
    assert "\n" not in str(caught.value)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself, told to stay offline."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data\.path=nobody/nothing .*the Hub cannot be reached"):
        values(config("nobody/nothing"))


def test_kind_of_place(classes: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    table(3).to_parquet(tmp_path / "set" / "train.parquet")
    table(3).save_to_disk(tmp_path / "saved")
    kinds = {
        str(classes): "image folder", str(tmp_path / "set"): "data set folder",
        str(tmp_path / "saved"): "saved data set",
        str(tmp_path / "set" / "train.parquet"): "files", str(tmp_path / "set" / "*.parquet"): "files",
        "hf://datasets/someone/pictures/*.parquet": "files", "someone/pictures": "Hub", "mnist": "Hub",
    }  # fmt: skip
    for path, kind in kinds.items():
        assert locate(config(path)) is SOURCES[kind], path


def test_both_ways_of_reading_see_the_same_splits(tmp_path: Path) -> None:
    write_shards(tmp_path, [7, 1, 13])
    write_shards(tmp_path, [4], "test")
    for path, train, validation in ((tmp_path, 21, 4), (tmp_path / "train-*.parquet", 20, 1)):
        for settings in (config(path), stream_config(path)):
            data = set_up(settings)
            assert data.train is not None and data.validation is not None
            assert (len(data.train), len(data.validation)) == (train, validation)


def test_all_rows_of_a_split(tmp_path: Path) -> None:
    """References are not held out."""
    table(5).to_parquet(tmp_path / "x.parquet")
    assert list(open_split(config(tmp_path / "x.parquet")).split_rows) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"data\.split='dev' is not in .*: it has train"):
        open_split(config(tmp_path / "x.parquet", split="dev"))


def test_cause_of_a_failure_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(UserError, match=r"data\.path=\S+ could not be loaded: .*[Pp]arquet"):
        values(config(tmp_path / "x.parquet"))


# A kind of place that is added


def squares(config: DataConfig) -> Mapping[str, ImageSource]:
    """Grey squares, each drawn when it is read: data.path=squares:COUNT."""
    count = int(config.path.partition(":")[2])
    return {"train": ImageSource("squares", lambda row: encode(Image.new("L", (16, 16), row)), range(count))}


def test_a_source_is_added_by_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "squares", SourceKind(matches=lambda path: path.startswith("squares:"), open=squares))
    train, validation = values(config("squares:40", validation_fraction=0.25))
    assert (len(train), len(validation)) == (30, 10)
    assert sorted(train + validation) == list(range(40))
    data = set_up(config("squares:40", batch_size=5), seed=3)
    assert len(set(data.rows_of(0) + data.rows_of(1))) == 10
    with pytest.raises(UserError, match=r"needs Parquet files, and data\.path=squares:40 has none"):
        set_up(stream_config("squares:40"))


def test_a_source_may_give_data_sets_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before the kinds that are there, whatever else matches its path."""
    kind = SourceKind(matches=lambda path: path == "mnist", open=lambda config: {"train": table(6), "test": table(2)})
    monkeypatch.setitem(SOURCES, "mine", kind)
    assert values(config("mnist")) == ([0, 1, 2, 3, 4, 5], [0, 1])
