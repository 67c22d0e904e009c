"""Measurement of a `PrefillProfile`: short runs of the real model, unpruned, with fewer rows, and under methods."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import STAGED
from catp_lightning.models import Family, find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing.profile import Points, PrefillProfile, named
from catp_lightning.pricing.prompts import Prompts
from catp_lightning.pruning.pruner import applied
from catp_lightning.utils.hooks import hooked

SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the visual tokens, with which the model is timed
KEPT = (1 / 16, 1 / 4, 3 / 4)  # the same, for each method
ROUNDS = 3  # at least


@dataclass
class Run:
    """One way to run the model, and the least seconds that it took.

    Attributes:
        policy: what prunes the model; None: nothing does.
        spread: share of the visual tokens that stay, evenly spread, in place of the policy's choice; None: its choice.
        inside: seconds in the part of the language model that reads visual tokens.
        before: seconds before that, from the beginning of the call.
        prompts: sizes of the batch's prompts.
        visual: int64 [B, depth], visual tokens that each layer read.
        observes: True if the policy reads signals of the vision part: observing them takes a part of `before`.
    """

    policy: PruningPolicy | None
    spread: float | None = None
    inside: float = float("inf")
    before: float = float("inf")
    prompts: Prompts | None = None
    visual: Tensor | None = None
    observes: bool = False

    def rows(self, image_alone: bool) -> int:
        """Return the rows of the longest sample in the last layer."""
        assert self.prompts is not None
        assert self.visual is not None
        return int((self.visual[:, -1] + (0 if image_alone else self.prompts.text)).max())


class Measurement:
    """Timing of one model on one batch.

    Args:
        module, model, guide: as in `prune`.
        call: runs the model once on the batch.
        clock: returns seconds.
    """

    def __init__(
        self, module: nn.Module, call: Callable[[Family], Any], model: str | None, guide: nn.Module | None, clock: Any
    ) -> None:
        self.module, self.model, self.guide = module, model, guide
        self.family = find_family(module, model)
        self.call, self._clock = partial(call, self.family), clock

    @property
    def device(self) -> torch.device:
        return self.family.model.device

    def now(self) -> float:
        """Return the time when all work that was given to the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return float(self._clock())

    def time(self, run: Run) -> None:
        """Run the model once as `run` says, and note its seconds if they are fewer than before.

        Raises:
            PruningError: the call does not reach the language model with an image.
        """
        times: list[float] = []

        def note(*_: Any) -> None:
            if len(times) < 3:  # the first call of the decoder is the prefill
                times.append(self.now())

        with ExitStack() as undo:
            undo.enter_context(hooked(self.family.decoder, before=note))  # before the pruner's own hook
            if run.policy is not None:
                self._pruned(run, undo)
            undo.enter_context(hooked(self.family.decoder, after=note))  # after it
            note()
            self.call()
        if len(times) < 3 or (run.policy is not None and (run.prompts is None or not run.prompts.tokens.any())):
            raise PruningError(
                f"The batch did not bring {type(self.family.model).__name__} to read an image, so its prefill cannot "
                "be timed. Give a batch with images, as the model's own generate takes it."
            )
        run.before, run.inside = min(run.before, times[1] - times[0]), min(run.inside, times[2] - times[1])

    def time_all(self, runs: Sequence[Run], seconds: float) -> None:
        """Let runs take turns for so many seconds, in an order that differs from round to round, three times at least.

        Raises:
            PruningError: as `time`.
        """
        end, rounds, order = time.monotonic() + seconds, 0, random.Random(0)
        with torch.inference_mode():
            for run in {id(run): run for run in runs}.values():  # to warm up
                self.time(run)
                run.before = run.inside = float("inf")
            while rounds < ROUNDS or time.monotonic() < end:
                for run in order.sample(runs, len(runs)):
                    self.time(run)
                rounds += 1

    def _pruned(self, run: Run, undo: ExitStack) -> None:
        """Prune the model by a run's policy until `undo`, and note what the prompts are and what layers read."""
        assert run.policy is not None
        choose = None if run.spread is None else partial(spread, run.spread)
        on_prefill = lambda prefill: setattr(run, "visual", prefill.per_layer)  # noqa: E731
        pruner = undo.enter_context(
            applied(self.module, run.policy, model=self.model, choose=choose, guide=self.guide, on_prefill=on_prefill)
        )
        wanted, decide = run.policy.steps()[0].method.needs.keys(), pruner.site.decide
        run.observes = choose is None and bool(wanted - self.family.at_entry - STAGED)

        def seen(prompt: Any) -> Any:
            run.prompts = Prompts.read(prompt)
            return decide(prompt)

        pruner.site.decide = seen


def spread(share: float, tokens: Tensor) -> Tensor:
    """Return a share of each sample's tokens, rounded up and evenly spread: bool [B, T] -> bool [B, T].

    >>> spread(0.4, torch.tensor([[True, True, True, True, True]])).int()
    tensor([[0, 0, 1, 0, 1]], dtype=torch.int32)
    """
    count = tokens.sum(1, keepdim=True)
    kept, place = (share * count).ceil().long(), tokens.cumsum(1)
    size = count.clamp(min=1)
    return tokens & (place * kept // size > (place - 1) * kept // size)


def measure(
    module: nn.Module,
    batch: Mapping[str, Any],
    policies: Sequence[PruningPolicy] = (),
    *,
    seconds: float = 30.0,
    model: str | None = None,
    guide: nn.Module | None = None,
    call: Callable[[Family], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> PrefillProfile:
    """Measure a profile of a model's prefill on the device that it is on.

    All runs take turns, in an order that differs from round to round, and the least time of each counts: what other
    programs take from the device is mostly left out.

    Args:
        module: as in `prune`.
        batch: arguments of the model's `generate`: as many samples as batches will have, of usual and equal sizes.
        policies: the methods of their stages are measured, each alone, at several budgets.
        model: as in `prune`.
        guide: as in `prune`.
        seconds: about how long to measure; three rounds are run however long they take.
        call: runs the family's model on the batch in another way; None: `generate`, for one token.
        clock: returns seconds.

    Raises:
        PolicyError, PruningError: as in `prune`; or the batch has no image.
    """

    def generate(family: Family) -> Any:
        model: Any = family.model
        return model.generate(**batch, max_new_tokens=1, min_new_tokens=1, do_sample=False)

    timing, runs = Measurement(module, call or generate, model, guide, clock), Runs.of(policies)
    timing.time_all(runs.all, seconds)
    return runs.profile(timing.family)


@dataclass(frozen=True)
class Runs:
    """The runs that a profile is made of.

    Attributes:
        plain: the unpruned model.
        fewer: evenly spread visual tokens, of several shares.
        methods: each method alone, at several budgets.
    """

    plain: Run
    fewer: list[Run]
    methods: dict[str, list[Run]]

    @classmethod
    def of(cls, policies: Sequence[PruningPolicy]) -> "Runs":
        """Return runs for the methods of all stages of some policies."""
        methods: dict[str, list[Run]] = {}
        for policy in policies:
            for stage, step in zip(policy.stages, policy.steps(), strict=True):
                alone = PruningPolicy(stage.scorer, stage.scorer_args, stage.selector, stage.selector_args)
                methods.setdefault(named(step), [Run(replace(alone, keep=share)) for share in KEPT])
        return cls(Run(None), [Run(PruningPolicy("position"), share) for share in SHARES], methods)

    @property
    def all(self) -> list[Run]:
        """All runs; those whose times stand in every prediction are there twice."""
        shared = [self.plain, *self.fewer]
        return [*shared, *shared, *(run for some in self.methods.values() for run in some)]

    def profile(self, family: Family) -> PrefillProfile:
        """Return the profile of a family's model that the runs, once timed, amount to."""
        prompts, alone = self.fewer[0].prompts, family.reads == "cross-attention"
        assert prompts is not None
        full = int((prompts.tokens + (0 if alone else prompts.text)).max())
        rows = {run.rows(alone): run.inside for run in self.fewer} | {full: self.plain.inside}
        device = family.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        kind, count = type(family.model).__name__, len(prompts.text)
        profile = PrefillProfile(kind, name, count, family.depth, alone, tuple(sorted(rows.items())))
        costs = {method: self._costs(profile, some) for method, some in self.methods.items()}
        return replace(profile, costs=costs)

    def _costs(self, profile: PrefillProfile, runs: Sequence[Run]) -> Points:
        """Return the seconds that choosing took in runs of one method, by the tokens kept of the largest sample."""
        found: dict[int, float] = {}
        for run in runs:
            assert run.prompts is not None
            assert run.visual is not None
            without = profile.seconds(run.prompts, run.visual).max().item()
            observing = run.before - self.plain.before if run.observes else 0.0
            kept = int(run.visual[:, -1].max())
            found[kept] = min(found.get(kept, float("inf")), run.inside - without + observing)
        return tuple(sorted(found.items()))
