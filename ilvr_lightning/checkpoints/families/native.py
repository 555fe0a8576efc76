"""The project's own files: Lightning checkpoints of train.py, and safetensors with everything in the metadata."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from ilvr_lightning.checkpoints.description import ModelDescription
from ilvr_lightning.checkpoints.files import first_line
from ilvr_lightning.config.load import config_from_dict
from ilvr_lightning.config.schema import public_dataset_name, without_local_paths
from ilvr_lightning.diffusion.plan import Gains
from ilvr_lightning.errors import UserError

KEY = "ilvr_lightning"
"""Of the description in a safetensors file's metadata."""


def is_checkpoint(content: Any) -> bool:
    """Whether a file's content is a checkpoint of train.py."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("hyper_parameters"), dict)
        and isinstance(content["hyper_parameters"].get("config"), dict)
        and isinstance(content.get("state_dict"), dict)
    )


def describe_checkpoint(content: dict[str, Any]) -> ModelDescription:
    """What a Lightning checkpoint says of itself."""
    plain = content["hyper_parameters"]["config"]
    config = config_from_dict(plain)
    gains: Any = {}
    counts = {"step": content.get("global_step"), "epoch": content.get("epoch")}
    facts: dict[str, Any] = {name: n for name, n in counts.items() if type(n) is int and 0 <= n < 2**63}
    if "step" in facts:
        facts["images seen"] = facts["step"] * config.data.batch_size
    for state in content.get("callbacks", {}).values():
        for key, fact in (("best", "best val/loss"), ("last", "val/loss")):
            if isinstance(state, dict) and isinstance(state.get(key), float):
                facts[fact] = round(state[key], 6)
        if isinstance(state, dict) and isinstance(state.get("training_seconds"), float):
            facts["hours of training"] = round(state["training_seconds"] / 3600, 2)
        if isinstance(state, dict) and state.get("calibrated_at") == content.get("global_step"):
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
    """A description as safetensors' metadata, without paths of the machine that trained it."""
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
        # A configuration checks every type and range; what is not in the description must not stand in its way.
        config = config_from_dict(
            {
                "model": values["model"], "diffusion": values["diffusion"],
                "data": {"image_size": size, "channels": channels}, "grid": {"factors": [1], "preset": "paper"},
            }
        )  # fmt: skip
        kind, clip, facts, whole = (values[name] for name in ("kind", "clip", "facts", "config"))
        if whole is not None:
            config_from_dict(whole)
        if not (isinstance(kind, str) and isinstance(clip, bool) and isinstance(facts, dict)):
            raise TypeError(f"kind {kind!r:.40}, clip {clip!r:.40}, facts {facts!r:.40}")
        return ModelDescription(
            kind=kind,
            model=config.model,
            diffusion=config.diffusion,
            image_shape=(config.data.channels, *config.data.size),
            clip=clip,
            assumed=tuple(map(str, values["assumed"])),
            config=whole,
            facts=facts,
            octave_gains=_gains(values.get("octave_gains", {})),
        )
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"its description is not of this version ({first_line(error)})") from None


def _gains(values: Any) -> dict[str, dict[int, Gains]]:
    """{preset: {factor: gains}} from a file, where JSON makes words of numbers.

    Raises:
        ValueError: it is something else.
    """
    gains = {
        str(preset): {int(n): tuple(map(float, each)) for n, each in by_factor.items()}
        for preset, by_factor in dict(values or {}).items()
    }
    if not all(n >= 1 and all(0.5 <= g <= 2 for g in each) for of in gains.values() for n, each in of.items()):
        raise ValueError(f"octave_gains {values!s:.80}")
    return gains


def names(ours: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Our own."""
    return {name: (name,) for name in ours}


def data_set_of(description: ModelDescription) -> str:
    """The data set that a model was trained on, without a path of someone's machine."""
    path = (description.config or {}).get("data", {}).get("path")
    if not isinstance(path, str):
        return "not recorded"
    return public_dataset_name(path)
