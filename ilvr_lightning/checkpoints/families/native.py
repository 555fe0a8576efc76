"""This project's own files: Lightning checkpoints of train.py, and safetensors whose metadata holds the description."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription, Overrides
from ilvr_lightning.checkpoints.families.family import Family, FileContent, StateDict, TensorDict
from ilvr_lightning.config.load import config_from_dict, from_dict
from ilvr_lightning.config.schema import MAX_SIDE, DiffusionConfig, without_local_paths
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, FitScores, Gains, SamplingPlan
from ilvr_lightning.models.config import UNetConfig

KEY = "ilvr_lightning"
"""The metadata of a safetensors file holds the description under this key."""

MODEL_FILE = "model.safetensors"
"""A folder of this project, such as a bundled model, has its weights in this file."""

MAX_FACT_CHARS = 200
"""A file may hold a text of any length where a fact such as the number of steps is expected."""

CALLBACK_FACTS = (
    ("best", "best val/loss", 1, 6),
    ("last", "val/loss", 1, 6),
    ("training_seconds", "hours of training", 3600, 2),
)
"""(key in a callback's state, the fact that it is, its unit, digits after the point)."""


CALIBRATION = ("spectrum", "components", "low_band", "octave_gains", "fit_scores")
"""What a calibration leaves in the description of a model, and in the state of the callback that made it."""

MAX_RADIUS = 2 * MAX_SIDE
"""A file may hold a list of any length where the spectrum is expected."""

MAX_STORED_SCORES = 100_000
"""A file may hold scores of so many images."""


def is_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a Lightning checkpoint of train.py."""
    return (
        isinstance(content.get("hyper_parameters"), dict)
        and isinstance(content["hyper_parameters"].get("config"), dict)
        and isinstance(content.get("state_dict"), dict)
    )


def describe_checkpoint(content: Mapping[str, Any]) -> ModelDescription:
    """What a Lightning checkpoint says about itself.

    Raises:
        UserError: its configuration is none of this project.
        AttributeError, LookupError, TypeError, ValueError: it is damaged.
    """
    plain = content["hyper_parameters"]["config"]
    config = config_from_dict(plain)
    calibration: dict[str, Any] = {}
    counts = {"step": content.get("global_step"), "epoch": content.get("epoch")}
    facts: dict[str, int | float | str] = {k: n for k, n in counts.items() if type(n) is int and 0 <= n < 2**63}
    batch_size = plain.get("data", {}).get("batch_size")
    if type(batch_size) is int and isinstance(step := facts.get("step"), int):
        facts["images seen"] = step * batch_size
    for state in filter(lambda state: isinstance(state, dict), content.get("callbacks", {}).values()):
        for key, fact, unit, digits in CALLBACK_FACTS:
            if isinstance(state.get(key), float):
                facts[fact] = round(state[key] / unit, digits)
        if state.get("calibrated_at") == content.get("global_step"):
            calibration = {name: state[name] for name in CALIBRATION if name in state}
    return ModelDescription(
        kind="ilvr_lightning checkpoint",
        model=config.model,
        image_shape=(config.data.channels, *config.data.size),
        diffusion=config.diffusion,
        config=json.loads(json.dumps(plain)),
        facts=facts,
        **_checked(calibration, (config.data.channels, *config.data.size)),
    )


def to_metadata(description: ModelDescription) -> dict[str, str]:
    """A description as the metadata of safetensors, without paths of the machine that trained the model."""
    values = dataclasses.asdict(dataclasses.replace(description, components=None))
    values["components"] = description.components.plain() if description.components is not None else None
    if values["config"] is not None:
        values["config"] = without_local_paths(values["config"])
    return {"format": "pt", KEY: json.dumps(values, sort_keys=True)}


def describe_metadata(text: str) -> ModelDescription:
    """The description that to_metadata wrote.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is of another version, or damaged.
    """
    values = json.loads(text)
    kind, clip, facts, config = (values[name] for name in ("kind", "clip", "facts", "config"))
    channels, height, width = values["image_shape"]
    if [type(value) for value in (kind, clip, channels, height, width)] != [str, bool, int, int, int]:
        raise TypeError(f"kind={kind!r:.40}, clip={clip!r:.40}, image_shape={values['image_shape']!r:.40}")
    if not all(isinstance(fact, int | float | str) and len(str(fact)) <= MAX_FACT_CHARS for fact in facts.values()):
        raise TypeError("a fact is neither a number nor a short text")
    if config is not None:
        config_from_dict(config)
    return ModelDescription(
        kind=kind,
        model=from_dict(UNetConfig, values["model"], "model"),
        diffusion=from_dict(DiffusionConfig, values["diffusion"]),
        image_shape=(channels, height, width),
        clip=clip,
        assumed=tuple(map(str, values["assumed"])),
        config=config,
        facts=facts,
        **_checked({name: values[name] for name in CALIBRATION if name in values}, (channels, height, width)),
    )


def _checked(calibration: Mapping[str, Any], image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The calibration that a file holds, with the types and ranges that it must have.

    Raises:
        AttributeError, LookupError, TypeError, ValueError: it is something else.
    """
    spectrum = tuple(float(variance) for variance in calibration.get("spectrum", ()))
    if len(spectrum) > MAX_RADIUS or not all(0 <= variance < math.inf for variance in spectrum):
        raise ValueError("the spectrum must be variances by radius")
    low_band: dict[str, dict[str, float]] = {
        str(preset): {name: float(settings[name]) for name in LOW_BAND_FIELDS if name in settings}
        for preset, settings in calibration.get("low_band", {}).items()
    }
    for settings in low_band.values():
        SamplingPlan(**settings)  # type: ignore[arg-type]  # it checks the ranges
    from ilvr_lightning.diffusion.components import Components  # the help lists the families without torch

    components = calibration.get("components")
    return {
        "spectrum": spectrum,
        "components": Components.from_plain(components, image_shape) if components else None,
        "low_band": low_band,
        "octave_gains": _gains(calibration.get("octave_gains")),
        "fit_scores": _fit_scores(calibration.get("fit_scores")),
    }


def _fit_scores(values: Any) -> FitScores:
    """{factor: scores by image and octave} from a file.

    Raises:
        AttributeError, TypeError, ValueError: it is something else.
    """
    scores = {
        int(n): tuple(tuple(float(score) for score in octaves) for octaves in images)
        for n, images in (values or {}).items()
    }
    for images in scores.values():
        if len(images) != len(next(iter(scores.values()))) or not 1 <= len(images) <= MAX_STORED_SCORES:
            raise ValueError("fit_scores must be of the same images at each factor")
        if any(len(octaves) != len(images[0]) or not all(0 <= s < math.inf for s in octaves) for octaves in images):
            raise ValueError("fit_scores must be positive numbers by octave")
    return dict(sorted(scores.items()))


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


class Native(Family):
    """Lightning checkpoints of train.py, and safetensors with a description."""

    name = "ilvr_lightning"
    loads = "a checkpoint of train.py, or what export --to safetensors wrote"
    export_name = "safetensors"
    writes = f"a .safetensors file, or a folder with {MODEL_FILE} (holds everything)"

    def recognises(self, state: StateDict) -> bool:
        return KEY in state.metadata or is_checkpoint(state.content)

    def describe(self, state: StateDict, overrides: Overrides) -> ModelDescription:
        return describe_metadata(state.metadata[KEY]) if KEY in state.metadata else describe_checkpoint(state.content)

    def weights_in(self, folder: Path) -> Path | None:
        return file if (file := folder / MODEL_FILE).is_file() else None

    def exported_files(self, description: ModelDescription, weights: TensorDict, out: Path) -> dict[Path, FileContent]:
        return {out if out.suffix == ".safetensors" else out / MODEL_FILE: (weights, to_metadata(description))}


FAMILY = Native()
