import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Trainer

import ilvr_lightning
from ilvr_lightning.config.describe import describe
from ilvr_lightning.config.load import RETIRED, config_from_dict, from_dict, load_config, to_yaml
from ilvr_lightning.config.schema import Config, DiffusionConfig, TrainerConfig
from ilvr_lightning.diffusion.plan import SamplingPlan
from ilvr_lightning.errors import UserError
from tests.support.paths import ROOT


def load(*arguments: str) -> Config:
    return load_config(arguments)


def message(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        load(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_overrides_come_after_the_file(tmp_path: Path) -> None:
    config_file = tmp_path / "mine.yaml"
    config_file.write_text("seed: 3\noptim: {lr: 0.5, betas: [0.8, 0.9]}\ntrainer: {max_epochs: 7}\n")
    config = load(str(config_file), "optim.lr=0.25", "trainer.devices=2", "grid.factors=[4,8]")
    assert config.name == "mine"
    assert (config.seed, config.optim.lr, config.optim.betas) == (3, 0.25, (0.8, 0.9))
    assert config.grid.factors == (4, 8)
    # What the file does not name keeps its default.
    assert (config.trainer.max_epochs, config.trainer.devices) == (7, 2)
    assert config.trainer.default_root_dir == "runs"
    assert config.data.batch_size == 32


def test_nothing_given_is_the_default() -> None:
    assert load() == Config()


def test_default_config(tmp_path: Path) -> None:
    config_file = tmp_path / "other.yml"
    config_file.write_text("seed: 9\n")
    config = load_config(["seed=10"], default=config_file)
    assert (config.seed, config.name) == (10, "other")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("data.batch_sise=3", ["unknown key data.batch_sise", "did you mean data.batch_size?"]),
        ("optm.lr=1", ["unknown key optm"]),
        ("sed=1", ["unknown key sed", "did you mean seed?"]),
        ("trainer.max_epoch=3", ["unknown key trainer.max_epoch", "max_epochs?"]),
        ("optim=3", ["optim is a section", "optim.KEY=VALUE"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "number"]),
        ("data.batch_size=2.5", ["data.batch_size", "2.5", "integer"]),
        ("data.flip=maybe", ["data.flip", "maybe", "true|false"]),
        ("diffusion.schedule=sigmoid", ["diffusion.schedule", "sigmoid", "linear|cosine"]),
        ("optim.lr=-1", ["optim.lr must be above 0: got -1"]),
        ("optim.lr=nan", ["optim.lr must be above 0: got nan"]),
        ("optim.lr=inf", ["optim.lr must be above 0: got inf"]),
        ("optim.betas=[0.9,1]", ["optim.betas must be in [0, 1): got [0.9, 1.0]"]),
        ("data.channels=4", ["data.channels must be 3 or 1: got 4"]),
        ("data.validation_fraction=1", ["data.validation_fraction must be between 0 and 1: got 1"]),
        ("seed=-1", ["seed must be from 0 to 4294967295: got -1"]),
        ("ema.decay=1", ["ema.decay must be in [0, 1): got 1"]),
        ("model.patch_size=2", ["model.patch_size=2: networks that work on patches are no longer supported"]),
        ("model.pixel_channels=8", ["model.pixel_channels=8: it went with patches"]),
        ("diffusion.betas=[0.1,1]", ["diffusion.betas must be a list of numbers, each above 0 and below 1"]),
        ("data.image_size=30", ["data.image_size must be a multiple of 8", "got 30x30"]),
        ("grid.factors=[4,5]", ["grid.factors must divide the image size: got factor=5 for 32 px"]),
        ("sampling.eta=2", ["sampling.eta must be between 0 and 1: got 2"]),
        ("sampling.condition_to=2000", ["sampling.condition_to must be in [0, 1000]: got 2000"]),
        ("grid.preset=papr", ["grid.preset must be one of fast", "got 'papr'"]),
        ("data.path=[", ["data.path could not be read", "data.path=["]),
        ("optim.betas=a: b", ["optim.betas: ", "it must be list"]),
        ("grid.factors[0]=8", ["grid.factors: ", "it must be list"]),
        ("data.path=${nope.key}", ["data.path must be a plain value", "${nope.key}"]),
        ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches must be at least 1: got 0"]),
        ("trainer.limit_train_batches=1.5", ["trainer.limit_train_batches must be a number of batches, or a share"]),
        ("name=a/b", ["a plain name: got 'a/b'"]),
        ("optim.decay_steps=never", ["optim.decay_steps", "never", "it must be integer or auto or null"]),
        ("words", ["'words' is neither a config (CONFIG.yaml) nor key=value without spaces; see --help"]),
        ("none.yaml", ["there is no config none.yaml", "configs/"]),
    ],
)
def test_mistakes_are_named_in_one_line(argument: str, parts: list[str]) -> None:
    text = message(argument)
    for part in parts:
        assert part in text


def test_octave_gains_need_factors_of_the_grids_that_have_octaves() -> None:
    changes = (
        "data.image_size=96",
        "model.attention_resolutions=[12]",
        "grid.factors=[4,6]",
        "sampling.octave_gains=[1.1]",
    )
    with pytest.raises(UserError, match="octave_gains need factors that are powers of two: got"):
        load(*changes)
    assert load(*changes[:3]).grid.factors == (4, 6)


def test_linear_schedules_need_more_timesteps() -> None:
    text = message("diffusion.num_timesteps=20", "diffusion.schedule=linear")
    assert "diffusion.num_timesteps must be above 20" in text


def test_a_decay_that_follows_the_run_needs_its_last_step() -> None:
    error = message("optim.decay_steps=auto", "trainer.max_epochs=-1")
    assert error == "optim.decay_steps=auto needs a last step: give trainer.max_steps or trainer.max_epochs"
    assert load("optim.decay_steps=auto", "trainer.max_epochs=-1", "trainer.max_steps=5").optim.decay_steps == "auto"


def test_two_configs() -> None:
    assert message("a.yaml", "b.yaml") == "give one config: got a.yaml and b.yaml"


def test_resume_and_init_from_exclude_each_other() -> None:
    assert message("resume=y.ckpt", "init_from=x.ckpt").startswith("give resume or init_from, not both")
    assert load("resume=auto", "init_from=x.ckpt").init_from == "x.ckpt"


@pytest.mark.parametrize("content", ["data: [1\n", "\tseed: 1\n", "- seed\n", b"\xff\xfe\x00seed"])
def test_broken_config(tmp_path: Path, content: str | bytes) -> None:
    config_file = tmp_path / "broken.yaml"
    config_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message(str(config_file)).startswith(str(config_file))


def test_unknown_key_in_a_config(tmp_path: Path) -> None:
    config_file = tmp_path / "typo.yaml"
    config_file.write_text("data: {image_sise: 64}\n")
    assert "unknown key data.image_sise; did you mean data.image_size?" in message(str(config_file))


def test_empty_config_is_the_default(tmp_path: Path) -> None:
    config_file = tmp_path / "empty.yaml"
    config_file.write_text("# nothing\n")
    assert load(str(config_file)) == Config(name="empty")


LEAKS = [
    "data: {path: '${oc.env:SECRET_OF_THE_TEST}'}",
    "data: {path: 'a${data.split}b${oc.env:SECRET_OF_THE_TEST}'}",
    "data: {path: '${oc.decode:${oc.env:SECRET_OF_THE_TEST}}'}",
    "data: {split: env, path: '${oc.${data.split}:SECRET_OF_THE_TEST}'}",
    "data: {split: oc.env, path: '${${data.split}:SECRET_OF_THE_TEST}'}",
    "data: {split: '}', path: '${ oc.env : SECRET_OF_THE_TEST}'}",
    "grid: {references: ['${oc.env:SECRET_OF_THE_TEST}']}",
    "trainer: {default_root_dir: '${oc.env:SECRET_OF_THE_TEST}'}",
    "trainer: {profiler: ['${oc.env:SECRET_OF_THE_TEST}']}",
]


@pytest.mark.parametrize("content", LEAKS)
def test_environment_does_not_leak_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "hunter2")
    config_file = tmp_path / "leak.yaml"
    config_file.write_text(content)
    text = message(str(config_file))
    assert "must be a plain value; ${...} is not resolved" in text
    assert "hunter2" not in text


def test_what_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    assert message("data.batch_size=" + "9" * 400).startswith("data.batch_size must be an integer below 2^63")
    circle: dict[str, object] = {}
    circle["seed"] = circle
    with pytest.raises(UserError, match="this is not a config: it holds more than 20000 values"):
        config_from_dict(circle)
    (tmp_path / "large.yaml").write_text("x" * 200_001)
    assert "it has 200001 bytes" in message(str(tmp_path / "large.yaml"))
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "pipe.yaml is not a file" in message(str(tmp_path / "pipe.yaml"))


def test_a_config_whose_runs_would_lie_elsewhere(tmp_path: Path) -> None:
    for name in ("..", "a\nb", "x" * 230):
        assert "the file's name is also that of a folder; rename it" in message(str(tmp_path / f"{name}.yaml"))


def test_environment_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "hunter2")
    text = message("data.path=${oc.env:SECRET_OF_THE_TEST}")
    assert text.startswith("data.path must be a plain value")


def test_plain_holds_builtins_alone_and_makes_the_same_again() -> None:
    config = load("data.image_size=[32,64]", "grid.factors=[4,8]", "diffusion.betas=[0.1,0.2]", "run.name=1",
                  "sampling.timesteps=[2,1]", "optim.decay_steps=5", "trainer.precision=bf16-mixed")  # fmt: skip
    plain = config.plain()

    def check(node: object) -> None:
        assert type(node) in (dict, list, tuple, str, int, float, bool, type(None))
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
            check(child)

    check(plain)
    assert config_from_dict(plain) == config
    assert config.data.size == (32, 64)


def test_yaml_makes_the_same_again(tmp_path: Path) -> None:
    config = load("optim.lr=3e-5", "grid.references=[a.png,b*.png]", "trainer.max_steps=9")
    config_file = tmp_path / "again.yaml"
    config_file.write_text(to_yaml(config.plain()))
    assert load(str(config_file)) == config


def test_T() -> None:  # noqa: N802
    assert DiffusionConfig(num_timesteps=400).T == 400
    assert DiffusionConfig(betas=(0.1, 0.2, 0.3)).T == 3


def test_grid_plan_is_its_preset_with_what_sampling_changes() -> None:
    plan = load("grid.preset=paper", "sampling.eta=1").grid_plan
    assert plan.resolved(1000).num_steps == 1000
    assert plan.eta == 1
    plan = load("sampling.num_steps=50", "sampling.condition_to=0").grid_plan  # SamplingPlan's own default, too
    assert (plan.sampler, plan.num_steps) == ("dpmpp_2m", 50)


def test_every_key_is_described() -> None:
    keys = [key for key, *_ in describe()]
    assert len(set(keys)) == len(keys)
    plain = Config().plain()
    for key, kind, meaning, default in describe():
        assert meaning.endswith("."), key
        if not key.startswith("trainer."):
            assert kind, key
            node = plain
            for part in key.split("."):
                node = node[part]
            assert node == default, key
    fixed = ("seed run.name resume init_from data.path data.name data.split data.image_column data.label "
             "data.batch_size data.image_size optim.lr grid.references grid.factors grid.samples "
             "grid.every_n_epochs grid.every_n_steps grid.preset sampling.eta diffusion.schedule")  # fmt: skip
    assert set(fixed.split()) <= set(keys)


@pytest.mark.parametrize("config_file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_configs(config_file: Path) -> None:
    config = load(str(config_file))
    assert config.name == config_file.stem
    first = config_file.read_text().splitlines()[0]
    assert first.startswith(f"# python train.py configs/{config_file.name}")
    # Nothing that it says is lost.
    resolved = yaml.safe_load(to_yaml(config.plain()))
    for section, values in yaml.safe_load(config_file.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            assert resolved[section][key] == value


def test_trainer_settings_are_the_trainers() -> None:
    names = set(TrainerConfig().arguments())
    assert names <= set(inspect.signature(Trainer.__init__).parameters)
    assert not {"callbacks", "logger", "use_distributed_sampler"} & names


@pytest.mark.parametrize(
    ("given", "epochs"),
    [({}, 100), ({"max_steps": 5}, -1), ({"max_steps": 5, "max_epochs": 3}, 3), ({"max_epochs": 7}, 7)],
)
def test_steps_alone_suffice(given: dict[str, Any], epochs: int) -> None:
    assert TrainerConfig(**given).arguments()["max_epochs"] == epochs


@pytest.mark.parametrize(
    ("arguments", "steps", "epochs"),
    [
        ([], 50, 7),
        (["trainer.max_steps=9"], 9, None),
        (["trainer.max_epochs=9"], -1, 9),
        (["trainer.max_steps=9", "trainer.max_epochs=3"], 9, 3),
        (["trainer.max_steps=-1"], -1, 7),
        (["trainer.max_epochs=null"], 50, None),
    ],
)
def test_a_limit_on_the_command_line_replaces_those_of_the_file(
    arguments: list[str], steps: int, epochs: int | None, tmp_path: Path
) -> None:
    (tmp_path / "both.yaml").write_text("trainer: {max_steps: 50, max_epochs: 7}")
    trainer = load(str(tmp_path / "both.yaml"), *arguments).trainer
    assert (trainer.max_steps, trainer.max_epochs) == (steps, epochs)


@pytest.mark.parametrize("retired", sorted(RETIRED))
def test_retired_keys_are_ignored_with_a_note(retired: str, tmp_path: Path) -> None:
    key, _, only = retired.partition("=")
    section, _, name = key.partition(".")
    said: list[str] = []
    (tmp_path / "old.yaml").write_text(f"{section}: {{{name}: {only or 3}}}")
    assert load_config([str(tmp_path / "old.yaml")], say=said.append) == Config(name="old")
    (note,) = said
    assert note.startswith(f"note         {retired} is no longer a setting and is ignored")
    assert note.endswith("; use grid.factors") == (retired == "sampling.factor")
    plain = Config().plain()
    plain[section][name] = only or 3
    assert config_from_dict(plain) == Config()


def test_what_an_old_checkpoint_lacks_means_what_it_meant_then() -> None:
    """Not the defaults of today."""
    config = config_from_dict({})
    assert (config.diffusion.schedule, config.diffusion.prediction) == ("linear", "eps")
    assert (config.optim.lr, config.ema.decay) == (1e-4, 0.9999)
    assert config_from_dict({"diffusion": {"prediction": "x0"}}).diffusion.prediction == "x0"


def test_plans_from_plain_values() -> None:
    plan = SamplingPlan(factor=4, octave_gains=(1.0, 0.9), condition_from=900).resolved(1000)
    assert from_dict(SamplingPlan, {**vars(plan)}) == plan
    for wrong in ({"etaa": 1.0}, {"eta": "much"}, {"eta": 7.0}, {"kernel": "none"}, {"octave_gains": ["x"]}):
        with pytest.raises(UserError):
            from_dict(SamplingPlan, wrong)


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import ilvr_lightning.config.schema, ilvr_lightning.sampling.arguments",
            {"torch", "numpy", "lightning", "datasets", "PIL"},
        ),
        (
            "from ilvr_lightning.diffusion import conditioning, generate, loss, plan",
            {"lightning", "datasets", "omegaconf", "torchvision"},
        ),
        (
            "from ilvr_lightning import SamplingPlan, generate, load_denoiser, respaced_timesteps, ILVR",
            {"lightning", "datasets", "torchvision"},
        ),
    ],
)
def test_imports_are_light(statement: str, absent: set[str]) -> None:
    loaded = loaded_by(statement)
    assert "ilvr_lightning" in loaded
    assert not loaded & absent


def test_public_names() -> None:
    expected = {
        "NoiseSchedule",
        "Prediction",
        "LowPassFilter",
        "ILVR",
        "SamplingPlan",
        "generate",
        "generate_steps",
        "load_denoiser",
        "DDPM",
        "ImageDataModule",
        "ILVRGrid",
        "EMA",
    }
    assert expected <= set(ilvr_lightning.__all__)
    for name in expected:
        assert getattr(ilvr_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ilvr_lightning.nothing  # noqa: B018
