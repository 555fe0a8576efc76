"""What the page does, without the page: draw samples while one looks on, draw a sheet, read drawings and PNGs."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ilvr_lightning.app import pictures
from ilvr_lightning.app.models import Model, Models
from ilvr_lightning.app.pictures import Picture
from ilvr_lightning.app.settings import Settings, make_requests
from ilvr_lightning.data.images import Pixels, from_tensor
from ilvr_lightning.data.references import Reference
from ilvr_lightning.diffusion.plan import SamplingPlan, as_tuple
from ilvr_lightning.diffusion.samplers import SamplerState
from ilvr_lightning.metrics.fit import are_enough, check_reference, recommend
from ilvr_lightning.sampling.requests import SampleRequest
from ilvr_lightning.sampling.trajectory import evenly_chosen
from ilvr_lightning.visual.grids import low_pass_pixels

MAX_FRAMES = 20
"""A drawing shows at most this many of its steps."""
MAX_PIXELS = 2**18
"""A group of a sheet has at most this many pixels, which are four images of 256 by 256, so that memory is bounded."""
SHEET_BATCH = 8
"""A sheet shows its samples in groups of this many, as soon as they are drawn."""
MAX_VISITORS = 1000
"""So many visitors are known; whoever was there before them only loses the rule that a newer request stops an older."""


class Turns:
    """Who draws what: a visitor's newer request stops the older one, and all take turns step by step."""

    def __init__(self) -> None:
        self._latest: OrderedDict[str, object] = OrderedDict()
        self._lock, self._computing = threading.Lock(), threading.Lock()

    def steps(self, visitor: str, steps: Iterator[Any]) -> Iterator[Any]:
        """The steps of a request, until the visitor begins another one."""
        mine = object()
        with self._lock:
            self._latest[visitor] = mine
            self._latest.move_to_end(visitor)
            if len(self._latest) > MAX_VISITORS:
                self._latest.popitem(last=False)
        while self._latest.get(visitor) is mine:
            with self._computing:
                if self._latest.get(visitor) is not mine or (step := next(steps, None)) is None:
                    return
            yield step


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What is drawn so far."""

    html: str = ""
    reference: Pixels | None = None
    samples: Sequence[Pixels] = ()
    """Each (H, W, C); none until all steps are done."""


class Studio:
    """Draws for the page.

    Args:
        models: to choose from.
    """

    def __init__(self, models: Models) -> None:
        self.models, self.turns = models, Turns()

    def draw(self, visitor: str, name: str, reference: str, settings: Settings) -> Iterator[Drawn]:
        """Samples of a reference: x_0 as it is predicted at each step, then the samples with their recipes.

        Raises:
            UserError: the reference cannot be read, or a setting does not fit.
        """
        model = self.models.load(name)
        requests = make_requests(model, reference, settings)
        batch, plan = requests[:], requests.plans[0]
        assert batch[0].reference is not None
        given = given_pictures(batch[0].reference, plan)
        shown = set(evenly_chosen(range(plan.evaluations), MAX_FRAMES))
        for number, (_, state) in enumerate(self.turns.steps(visitor, model.sampler.steps(batch))):
            is_last = number == plan.evaluations - 1
            if not is_last and number not in shown:
                continue
            if is_last:
                drawn = sampled_pictures(model, batch, state)
            else:
                predicted = enumerate(from_tensor(state.x0), 1)
                drawn = [Picture(pixels=x0, caption=f"Sample {i}", is_quiet=True) for i, x0 in predicted]
            yield Drawn(
                html=pictures.strip(given, drawn),
                reference=batch[0].reference.preview(),
                samples=[picture.pixels for picture in drawn] if is_last else (),
            )

    def sheet(self, visitor: str, name: str, reference: str, settings: Settings) -> Iterator[str]:
        """The table of one sample for each N and range, as far as it is drawn.

        Raises:
            UserError: as for `draw`.
        """
        model = self.models.load(name)
        requests = make_requests(model, reference, settings, sweep=True)
        everything, size = requests[:], max(1, min(SHEET_BATCH, MAX_PIXELS // (model.shape[1] * model.shape[2])))
        done: list[Picture] = []

        def steps() -> Iterator[tuple[Sequence[SampleRequest], SamplerState]]:
            for start in range(0, len(everything), size):
                batch = everything[start : start + size]
                yield from ((batch, state) for _, state in model.sampler.steps(batch))

        for batch, state in self.turns.steps(visitor, steps()):
            if state.t == 0:
                done += sampled_pictures(model, batch, state)
                yield _sheet(everything, done)


def remarks(reference: Reference, model: Model) -> list[str]:
    """Sentences that the page shows beside a reference."""
    height, width, _ = reference.pixels.shape
    own = reference.size or (height, width)
    words = [f"{own[1]}x{own[0]} pixels, seen by the model at {width}x{height}."]
    if min(own) < min(height, width):
        words.append("It has fewer pixels than the model's images: a small N follows its blur.")
    denoiser = model.sampler.denoiser
    if are_enough(denoiser.fit_scores) and reference.mask is None:
        fits = check_reference(denoiser, reference.tensor[None].to(model.sampler.device))
        words.append(f"Advice: {recommend(fits, (height, width))[1]}.")
    return words


def given_pictures(reference: Reference, plan: SamplingPlan) -> list[Picture]:
    """The reference, and what of it is followed."""
    (low_pass,) = low_pass_pixels([reference], as_tuple(plan.factor)[0], plan)
    return [
        Picture(pixels=reference.preview(), caption="Reference"),
        Picture(pixels=low_pass, caption=f"What is kept at N={plan.factor}"),
    ]


def sampled_pictures(model: Model, batch: Sequence[SampleRequest], state: SamplerState) -> list[Picture]:
    """The samples of a batch, whose PNGs hold their recipes."""
    environment, made = model.sampler.environment(len(batch)), []
    for i, (request, pixels) in enumerate(zip(batch, from_tensor(state.x), strict=True)):
        recipe, plan = request.recipe, request.recipe.plan
        evidence = None if state.evidence is None else round(float(state.evidence[i]), 2)
        until = f"_t{plan.condition_from}-{plan.condition_to}" if plan.condition_to else ""
        made.append(
            Picture(
                pixels=pixels,
                caption=f"Sample {recipe.sample + 1}",
                file=f"{recipe.reference}_N{plan.factor}{until}_{recipe.sample}.png",
                recipe=replace(recipe, **environment, evidence=evidence).png_info(),
            )
        )
    return made


def _sheet(requests: Sequence[SampleRequest], done: Sequence[Picture]) -> str:
    """The table of a sweep, whose requests lie row by row, as far as it is drawn."""
    plans = [request.recipe.plan for request in requests]
    ranges = list(dict.fromkeys((plan.condition_from, plan.condition_to) for plan in plans))
    rows = []
    for start in range(0, len(plans), len(ranges)):
        reference = requests[start].reference
        assert reference is not None
        there = done[start : start + len(ranges)]
        missing = [None] * (len(ranges) - len(there))
        rows.append((f"N={plans[start].factor}", given_pictures(reference, plans[start])[1], [*there, *missing]))
    return pictures.sheet(["followed to the end" if b == 0 else f"let go at {b}" for _, b in ranges], rows)
