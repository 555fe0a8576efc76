"""This project's own files: Lightning checkpoints of train.py, and safetensors whose metadata holds the description."""

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.checkpoints.families.family import Export, Family, FileContent, ParameterNames, TensorDict
from ilvr_lightning.config.load import config_from_dict
from ilvr_lightning.config.schema import without_local_paths
from ilvr_lightning.diffusion.plan import Gains
from ilvr_lightning.errors import UserError, first_line
from ilvr_lightning.models.config import UNetConfig

if TYPE_CHECKING:
    from ilvr_lightning.checkpoints.files import StateDict

KEY = "ilvr_lightning"
"""The metadata of a safetensors file holds the description under this key."""

MODEL_FILE = "model.safetensors"
"""A folder of this project, such as a bundled model, has its weights in this file."""

MAX_FACT_CHARS = 200
"""A file may hold a text of any length where a fact such as the number of steps is expected."""


def is_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a Lightning checkpoint of train.py."""
    return (
        isinstance(content.get("hyper_parameters"), dict)
        and isinstance(content["hyper_parameters"].get("config"), dict)
        and isinstance(content.get("state_dict"), dict)
    )


def recognises(state: "StateDict") -> bool:
    """Whether a file is one of this project."""
    return KEY in state.metadata or is_checkpoint(state.content)


def describe(state: "StateDict", overrides: Overrides) -> ModelDescription:
    """What a file of this project says about itself."""
    return describe_metadata(state.metadata[KEY]) if KEY in state.metadata else describe_checkpoint(state.content)


def describe_checkpoint(content: Mapping[str, Any]) -> ModelDescription:
    """What a Lightning checkpoint says about itself.

    Raises:
        UserError: its configuration is none of this project.
        AttributeError, TypeError, ValueError: it is damaged.
    """
    plain = content["hyper_parameters"]["config"]
    config = config_from_dict(plain)
    gains: Any = {}
    counts = {"step": content.get("global_step"), "epoch": content.get("epoch")}
    facts: dict[str, Any] = {name: n for name, n in counts.items() if type(n) is int and 0 <= n < 2**63}
    batch_size = plain.get("data", {}).get("batch_size")
    if "step" in facts and type(batch_size) is int:
        facts["images seen"] = facts["step"] * batch_size
    for state in content.get("callbacks", {}).values():
        if not isinstance(state, dict):
            continue
        for key, fact in (("best", "best val/loss"), ("last", "val/loss")):
            if isinstance(state.get(key), float):
                facts[fact] = round(state[key], 6)
        if isinstance(state.get("training_seconds"), float):
            facts["hours of training"] = round(state["training_seconds"] / 3600, 2)
        if state.get("calibrated_at") == content.get("global_step"):
            gains = state.get("octave_gains")
    return ModelDescription(
        kind="ilvr_lightning checkpoint",
        model=config.model,
        image_shape=(config.data.channels, *config.data.size),
        diffusion=config.diffusion,
        config=json.loads(json.dumps(plain)),
        facts=facts,
        octave_gains=_gains(gains),
    )


def to_metadata(description: ModelDescription) -> dict[str, str]:
    """A description as the metadata of safetensors, without paths of the machine that trained the model."""
    values = dataclasses.asdict(description)
    if values["config"] is not None:
        values["config"] = without_local_paths(values["config"])
    return {"format": "pt", KEY: json.dumps(values, sort_keys=True)}


def describe_metadata(text: str) -> ModelDescription:
    """The description that to_metadata wrote.

    Raises:
        UserError: it is not of this version.
    """
    try:
        values = json.loads(text)
        channels, *size = values["image_shape"]
        # A configuration checks every type and range; the factor and the preset fit images of every size.
        config = config_from_dict(
            {
                "model": values["model"], "diffusion": values["diffusion"],
                "data": {"image_size": size, "channels": channels}, "grid": {"factors": [1], "preset": "paper"},
            }
        )  # fmt: skip
        kind, clip, facts, training = (values[name] for name in ("kind", "clip", "facts", "config"))
        if training is not None:
            config_from_dict(training)
        if not (isinstance(kind, str) and isinstance(clip, bool) and isinstance(facts, dict)):
            raise TypeError(f"kind {kind!r:.40}, clip {clip!r:.40}, facts of type {type(facts).__name__}")
        if not all(isinstance(fact, int | float | str) and len(str(fact)) <= MAX_FACT_CHARS for fact in facts.values()):
            raise TypeError("a fact is neither a number nor a short text")
        return ModelDescription(
            kind=kind,
            model=config.model,
            diffusion=config.diffusion,
            image_shape=(config.data.channels, *config.data.size),
            clip=clip,
            assumed=tuple(map(str, values["assumed"])),
            config=training,
            facts=facts,
            octave_gains=_gains(values.get("octave_gains", {})),
        )
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"its description is not of this version ({first_line(error, 120)})") from None


def _gains(values: Any) -> dict[str, dict[int, Gains]]:
    """{preset: {factor: gains}} from a file; JSON turns the factors into text.

    Raises:
        AttributeError, TypeError, ValueError: it is something else.
    """
    gains = {
        str(preset): {int(n): tuple(float(gain) for gain in each) for n, each in by_factor.items()}
        for preset, by_factor in (values or {}).items()
    }
    if not all(n >= 1 and all(0.5 <= g <= 2 for g in each) for of in gains.values() for n, each in of.items()):
        raise ValueError("octave_gains must be numbers from 0.5 to 2, by preset and factor")
    return gains


def parameter_names(parameters: Iterable[str], config: UNetConfig, in_file: Collection[str]) -> ParameterNames:
    """UNet's own names."""
    return {name: (name,) for name in parameters}


def weights_in(folder: Path) -> Path | None:
    """The weights of a folder that `export --to safetensors` wrote."""
    return file if (file := folder / MODEL_FILE).is_file() else None


def _exported_files(description: ModelDescription, weights: TensorDict, out: Path) -> dict[Path, FileContent]:
    return {out if out.suffix == ".safetensors" else out / MODEL_FILE: (weights, to_metadata(description))}


FAMILY = Family(
    name="ilvr_lightning",
    loads="a checkpoint of train.py, or what export --to safetensors wrote",
    recognises=recognises,
    describe=describe,
    parameter_names=parameter_names,
    weights_in=weights_in,
    export=Export(
        name="safetensors",
        writes=f"a .safetensors file, or a folder with {MODEL_FILE} (holds everything)",
        refusal=lambda description: None,
        files=_exported_files,
        keeps_gains=True,
    ),
)
