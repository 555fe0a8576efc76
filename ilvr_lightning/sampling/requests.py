"""Which images a run of sample.py makes: each is made up when it is asked for, so that a run may have millions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from ilvr_lightning.checkpoints.load import LoadedDenoiser
from ilvr_lightning.data.references import Reference, References
from ilvr_lightning.diffusion.plan import LOW_BAND_FIELDS, SamplingPlan, as_tuple, check_factor
from ilvr_lightning.errors import UserError
from ilvr_lightning.metrics.fit import are_enough
from ilvr_lightning.sampling.arguments import AUTO, Arguments, flags_in_errors
from ilvr_lightning.sampling.fit import choose_factors
from ilvr_lightning.sampling.notes import note_missing, note_small
from ilvr_lightning.sampling.recipe import Recipe, identity

MAX_SAMPLES = 10**7
"""A run makes at most this many images."""
SWEEP_FACTORS = (4, 8, 16, 32, 64)
"""The factors of --sweep; those that divide the image's size and are below it are sampled."""
SWEEP_RANGES = (1.0, 0.0), (1.0, 0.25), (1.0, 0.5), (1.0, 0.75)
"""The ranges of --sweep, as fractions of T: figure 7 of Choi et al. 2021 in four columns."""
DEFAULT_FACTOR = 8
"""The factor that is sampled if none is given and none can be chosen."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """One image to make."""

    recipe: Recipe
    """Its plan, seed, sample number, checkpoint and hashes; the environment is filled in when the image is made."""
    reference: Reference | None
    """The reference that it follows, or None for an unconditional image."""
    index: int = 0
    """Its position in the run."""


class SampleRequests(Sequence[SampleRequest]):
    """Every image of a run, in the order of references, plans and samples.

    Args:
        references: what the images follow; without any they are unconditional.
        plans: resolved, for each reference, or those of its own factor.
        num_samples: samples per reference and plan.
        seed: of the noise.
        weights: the weights that the checkpoint is read for.
        checkpoint_sha256: the checkpoint's hash.
        overrides: what the user said of the checkpoint.
        estimate_noise: whether each reference's reference_sigma is what `Reference.noise` estimates.
        factors: the one N of each reference, if each has its own.

    Raises:
        UserError: the images are too many, or one of few references cannot be used with the plans.
    """

    def __init__(
        self,
        references: References,
        plans: Sequence[SamplingPlan],
        num_samples: int,
        *,
        seed: int,
        weights: Literal["ema", "raw"],
        checkpoint_sha256: str,
        overrides: dict[str, Any],
        estimate_noise: bool = False,
        factors: Sequence[int] = (),
    ) -> None:
        self.references, self.plans, self.num_samples, self.seed = references, list(plans), num_samples, seed
        self.estimate_noise = estimate_noise
        own = {n: [i for i, plan in enumerate(plans) if plan.factor == n] for n in set(factors)}
        self._own = [own[n] for n in factors] or [list(range(len(plans)))] * max(1, len(references))
        self.unusable: dict[int, UserError] = {}
        """The references that turned out to be unusable, by their numbers, and why."""
        self._recipes = [
            Recipe(
                plan=plan,
                seed=seed,
                sample=0,
                weights=weights,
                checkpoint_sha256=checkpoint_sha256,
                overrides=overrides,
                reference=None,
                reference_sha256=None,
            )
            for plan in plans
        ]
        self._identities = [identity(recipe.plain()) for recipe in self._recipes]
        for meant in self._identities:
            del meant["reference_sha256"]  # the reference is compared apart
        if len(self) > MAX_SAMPLES:
            raise UserError(
                f"these are {len(self)} images, and a run makes at most {MAX_SAMPLES}; lower --num-samples, and take "
                "another --seed and --out for more"
            )
        if self.references_are_few and plans[0].start_from is not None:
            for number in range(len(references)):
                self._reference(number)

    @classmethod
    def of_arguments(
        cls, args: Arguments, references: References, plans: Sequence[SamplingPlan], checkpoint_sha256: str
    ) -> "SampleRequests":
        """What sample.py's flags ask for; the other arguments are as for the class.

        A note names each reference that has fewer pixels than the smallest factor follows.
        """
        requests = cls(
            references,
            plans,
            args.num_samples,
            seed=args.seed,
            weights=args.weights,
            checkpoint_sha256=checkpoint_sha256,
            overrides=dict(args.override),
            estimate_noise=args.reference_sigma == "auto",
            factors=args.chosen,
        )
        for number, reference in enumerate(references if requests.references_are_few else ()):
            note_small(reference, min(min(as_tuple(plan.factor)) for plan in requests.plans_of(number)))
        return requests

    @property
    def references_are_few(self) -> bool:
        """Whether all references were read at the start; then copies of them are kept, and grids are drawn."""
        return self.references.all_validated

    @property
    def per_reference(self) -> int:
        """The number of images per reference, or of the whole run where there is none."""
        return len(self._own[0]) * self.num_samples

    def plans_of(self, number: int) -> list[SamplingPlan]:
        """The plans that a reference is sampled with."""
        return [self.plans[i] for i in self._own[number]]

    def __len__(self) -> int:
        return max(1, len(self.references)) * self.per_reference

    @overload
    def __getitem__(self, index: int) -> SampleRequest: ...

    @overload
    def __getitem__(self, index: slice) -> list[SampleRequest]: ...

    def __getitem__(self, index: int | slice) -> SampleRequest | list[SampleRequest]:
        """One request, its reference read, or several.

        Raises:
            UserError: its reference cannot be used.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, plan, sample = self.locate(index)
        reference = self._reference(number)
        recipe = self._recipes[plan]
        if reference is not None and self.estimate_noise:
            recipe = replace(recipe, plan=replace(recipe.plan, reference_sigma=reference.noise))
        recipe = replace(
            recipe,
            sample=sample,
            reference=reference.name if reference else None,
            reference_sha256=reference.sha256 if reference else None,
            mask_sha256=reference.mask_sha256 if reference else None,
        )
        return SampleRequest(recipe=recipe, reference=reference, index=int(index))

    def locate(self, index: int) -> tuple[int, int, int]:
        """The numbers of a request's reference, plan and sample."""
        rest, sample = divmod(int(index), self.num_samples)
        number, plan = divmod(rest, len(self._own[0]))
        return number, self._own[number][plan], sample

    def is_usable(self, index: int) -> bool:
        """Whether a request has a reference that can be used, or needs none."""
        try:
            self._reference(self.locate(index)[0])
        except UserError:
            return False
        return True

    def matches(self, index: int, values: Mapping[str, Any]) -> bool:
        """Whether the recipe of a PNG is that of a request; its reference is read only if everything else agrees.

        Args:
            index: the request's position.
            values: the PNG's recipe as JSON holds it.
        """
        number, plan, sample = self.locate(index)
        found = identity(values)
        hashes = {name: found.pop(name, None) for name in ("reference_sha256", "mask_sha256")}
        sigma = found["plan"].pop("reference_sigma", 0.0) if self.estimate_noise else None
        if found != {**self._identities[plan], "sample": sample} or not self.is_usable(index):
            return False
        reference = self._reference(number)
        wanted = (reference.sha256, reference.mask_sha256) if reference else (None, None)
        noise = reference.noise if reference and self.estimate_noise else None
        return (*hashes.values(), sigma) == (*wanted, noise)

    def _reference(self, number: int) -> Reference | None:
        if not len(self.references):
            return None
        if number in self.unusable:
            raise self.unusable[number]
        try:
            reference = self.references[number]
            if reference.mask is not None and self.plans[0].start_from is not None:
                raise UserError(
                    f"--start-from cannot be combined with a mask, and {reference.name} has one of its own; remove "
                    "--start-from or the transparency"
                )
        except UserError as error:
            self.unusable[number] = error
            raise
        return reference


def check_image_size(denoiser: LoadedDenoiser, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W) of the images: the size asked for, if the network allows it, else the network's own.

    Raises:
        UserError: the network does not allow it.
    """
    channels, *trained = denoiser.image_shape
    height, width = size or (trained[0], trained[1])
    with flags_in_errors():
        denoiser.network.config.check_size(height, width)
    return channels, height, width


def check_plan(
    plan: SamplingPlan, denoiser: LoadedDenoiser, shape: tuple[int, int, int], follows: bool
) -> SamplingPlan:
    """The plan with what depends on T filled in, if checkpoint and image size allow it.

    Args:
        plan: the settings of one image.
        denoiser: tells T.
        shape: (C, H, W) of the image.
        follows: whether the image follows a reference.

    Raises:
        UserError: they do not.
    """
    if plan.variance == "learned" and not denoiser.network.config.learn_sigma:
        raise UserError("--variance learned needs a network that learned its variance; give small, large or auto")
    with flags_in_errors():
        for factor in as_tuple(plan.factor) if follows else ():
            check_factor(factor, (shape[1], shape[2]), "--factor")
        return plan.resolved(denoiser.schedule.num_timesteps)


def expand_sweep(
    args: Arguments, denoiser: LoadedDenoiser, shape: tuple[int, int, int], references: Sequence[Reference] = ()
) -> list[SamplingPlan]:
    """Every factor with every range, each a resolved plan.

    What is not given is the preset's, or with --sweep the paper's. Each factor comes with the octave_gains that the
    checkpoint was calibrated to for the preset.

    Args:
        args: the command line, as parse_arguments gives it.
        denoiser: tells T and the calibrated octave_gains.
        shape: (C, H, W) of the images.
        references: for --factor auto, which chooses args.chosen, the N of each; it is the default for few references
            where the checkpoint holds scores of held-out images.

    Raises:
        UserError: checkpoint, image size, factors, ranges and settings do not fit each other.
    """
    plan: SamplingPlan = args.plan if args.clip is not None else replace(args.plan, clip=denoiser.clip)
    if not args.ref:
        return [check_plan(plan, denoiser, shape, follows=False)]
    few = isinstance(references, References) and references.all_validated
    own_size = shape == denoiser.image_shape
    by_default = few and are_enough(denoiser.fit_scores) and own_size and not (args.factor or args.sweep)
    if args.factor == [AUTO] or by_default:
        args.chosen = choose_factors(denoiser, references, args.device, DEFAULT_FACTOR)
    factors, ranges = sorted(set(args.chosen)) or args.factor, args.range
    if args.sweep:
        T = denoiser.schedule.num_timesteps
        factors = factors or [n for n in SWEEP_FACTORS if all(side % n == 0 and n < side for side in shape[1:])]
        ranges = ranges or [(round(a * T), round(b * T)) for a, b in SWEEP_RANGES]
    calibrated = args.octave_gains is None and own_size
    if all(getattr(args, name) is None for name in LOW_BAND_FIELDS):
        plan = denoiser.calibrated(args.preset, plan)
    gains = denoiser.gains(args.preset, plan) if calibrated else {}
    plans = []
    for factor in factors or [DEFAULT_FACTOR]:
        for a, b in ranges or [(plan.condition_from, plan.condition_to)]:
            changes = {"factor": factor, "condition_from": a, "condition_to": b}
            with flags_in_errors():
                changed = replace(plan, octave_gains=gains.get(factor, plan.octave_gains), **changes)
            plans.append(check_plan(changed, denoiser, shape, follows=True))
    note_missing(plan, denoiser, args)
    return plans
