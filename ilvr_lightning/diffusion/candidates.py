"""The choice among several runs for one reference, by their evidence."""

from typing import NamedTuple

import torch
from torch import Tensor

from ilvr_lightning.diffusion.noise import NoiseSource
from ilvr_lightning.diffusion.samplers import SamplerState


class Chosen(NamedTuple):
    """The run that is chosen so far, for each image."""

    state: SamplerState
    """At t = 0."""
    score: Tensor
    """(B, 1, 1, 1) evidence plus Gumbel noise: the largest is that of a draw from the softmax of the evidence."""


def choose(chosen: Chosen | None, state: SamplerState, noise: NoiseSource) -> Chosen:
    """Choose one of the runs so far, each with a probability that is proportional to exp(evidence).

    Args:
        chosen: the choice among the runs before, or None.
        state: the end of the new run.
        noise: its stream "candidate" decides.
    """
    assert state.evidence is not None
    evidence = state.evidence.reshape(-1, 1, 1, 1)
    drawn = noise.draw("candidate", evidence).cpu()  # log_ndtr is not there on every kind of device
    score = evidence - torch.log(-torch.special.log_ndtr(drawn)).to(evidence)
    if chosen is None:
        return Chosen(state, score)
    old, better = chosen.state, score > chosen.score
    assert old.evidence is not None
    best = SamplerState(
        x=torch.where(better, state.x, old.x),
        x0=torch.where(better, state.x0, old.x0),
        t=0,
        evidence=torch.where(better.flatten(), state.evidence, old.evidence),
    )
    return Chosen(best, torch.maximum(score, chosen.score))
