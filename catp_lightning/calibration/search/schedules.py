"""Schedules as candidates: a rule at the decoder's input, then stages inside it, proposed by what each part costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from catp_lightning.calibration.plan import Plan, why_not
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.payments import Payments, Stop
from catp_lightning.methods.method import Method
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy, Stage
from catp_lightning.policy.schedules import SCHEDULES

EXIT = "visual-exit"
"""Scorer of a stage after which none stays."""

SHARES = (0.5, 0.25, 0.125, 0.0625)
"""Shares to which single stages are measured, at every layer; between them their loss is interpolated."""

WIDER = (0.75, 0.5)
"""Shares at the decoder's input that are measured beside those that meet a price alone: stages inside shorten more."""

LAYERS = 11
"""Most layers at which stages are tried; of deeper decoders that many are taken, evenly spread."""

PROPOSED = 24
"""Number of schedules that are measured at each price, those of the least predicted loss."""


NOTHING = Candidate("", "position")
"""Rule of schedules that keep everything at the decoder's input."""


@dataclass(frozen=True)
class Scheduled(Candidate):
    """Rule with a share of its own, whatever the budget is, and the stages after it.

    Attributes:
        share: tokens that stay at the decoder's input; 1.0: the rule is left out.
        then: the stages after it, at least one.
    """

    share: float = 1.0
    then: tuple[Stage, ...] = field(default=(), kw_only=True)

    @classmethod
    def of(cls, entry: Candidate, share: float, then: Sequence[Stage], reference: bool = False) -> "Scheduled":
        """Return the schedule of an entry rule at a share, and of stages after it."""
        parts = [f"{entry.name} to {share:.3g}"] if share < 1.0 else []
        parts += map(_named, then)
        rule = (entry.scorer, entry.scorer_args, entry.selector, entry.selector_args)
        return cls(", ".join(parts), *rule, reference=reference, share=share, then=tuple(then))

    def policy(self, keep: int | float) -> PruningPolicy:
        if self.share < 1.0:
            return replace(super().policy(self.share), then=self.then)
        first, *then = self.then
        rule = (first.scorer, first.scorer_args, first.selector, first.selector_args)
        return PruningPolicy(*rule, first.keep, then=then)

    @cached_property
    def method(self) -> Method:
        """The method of the first stage."""
        return self.policy(1.0).method()

    @property
    def inside(self) -> bool:
        return True

    @property
    def alone(self) -> bool:
        return self.share == 1.0 and len(self.then) == 1

    @property
    def fitted(self) -> int:
        return max(1, super().fitted) if self.share < 1.0 else 1


def _named(stage: Stage) -> str:
    """Return the name of a stage in a schedule's."""
    layers = [stage.scorer_args["layer"]] if "layer" in stage.scorer_args else stage.scorer_args.get("stages_at", ())
    place = f" at layer {', '.join(map(str, layers))}" if layers else ""
    return f"{stage.scorer}{place}{'' if stage.scorer == EXIT else f' to {stage.keep:.3g}'}"


def published_schedules(plan: Plan) -> list[str]:
    """Return the names of the published methods of several stages that run on a plan's model, if budgets are prices."""
    if plan.unit is None or plan.method is not None:
        return []
    depth = plan.family.depth
    return [name for name in SCHEDULES if why_not(plan.family, PruningPolicy.schedule(name, 0.5, depth)) is None]


def inner_layers(family: Family) -> list[int]:
    """Return the layers at whose entry stages are tried, ascending."""
    vision = getattr(family.model.config, "vision_config", None)
    added = getattr(vision, "deepstack_visual_indexes", None)  # to all visual tokens, after as many of the first layers
    first = max(1, len(added or ()))
    there = np.arange(first, family.depth)
    spread = np.linspace(0, len(there) - 1, min(LAYERS, len(there))).round().astype(int)
    return sorted({int(at) for at in there[spread]}) if len(there) else []


def attended(layer: int, keep: float) -> Stage:
    """Return the stage that keeps what the prompt's last row attends to in the layer before: FastV's."""
    return Stage("fastv", {"layer": layer}, keep=keep)


def asked_about(layer: int, keep: float) -> Stage:
    """Return the stage that keeps what the text relevant to the image attends to: SparseVLM's, dropping the rest."""
    return Stage("sparsevlm", {"stages_at": [layer]}, "top-k", {"per": "sample"}, keep=keep)


INSIDE: tuple[Callable[[int, float], Stage], ...] = (attended, asked_about)
"""Stages inside the decoder, by layer and share; at each layer the better one is taken."""


def single_stages(family: Family) -> dict[tuple[int, int, float], Candidate]:
    """Return each stage that is measured alone, by its place in `INSIDE`, layer and share; share 0 is leaving."""
    layers, found = inner_layers(family), dict[tuple[int, int, float], Candidate]()
    for layer in layers:
        found[0, layer, 0.0] = Scheduled.of(NOTHING, 1.0, [Stage(EXIT, {"layer": layer})])
        for kind, make in enumerate(INSIDE):
            found |= {(kind, layer, share): Scheduled.of(NOTHING, 1.0, [make(layer, share)]) for share in SHARES}
    return found


@dataclass(frozen=True)
class Losses:
    """Measured divergences, in nats, of rules at the decoder's input and of single stages inside it.

    Attributes:
        entry: by share at the decoder's input, of the rule that is best there.
        inside: by layer and share, with nothing dropped before, of the better of `INSIDE` at each layer.
        kinds: by layer, which of `INSIDE` that is.
    """

    entry: Mapping[float, float]
    inside: Mapping[tuple[int, float], float]
    kinds: Mapping[int, int]

    @classmethod
    def of(cls, entry: Mapping[float, float], singles: Mapping[tuple[int, int, float], float]) -> "Losses":
        """Return losses of single stages by their place in `INSIDE`, layer and share, of which the better are taken."""
        inside, kinds = dict[tuple[int, float], float](), dict[int, int]()
        for layer in {layer for _, layer, _ in singles}:
            total = [sum(singles[kind, layer, share] for share in SHARES) for kind in range(len(INSIDE))]
            kinds[layer] = total.index(min(total))
            inside |= {(layer, share): singles[kinds[layer], layer, share] for share in SHARES}
            inside[layer, 0.0] = singles[0, layer, 0.0]
        return cls(entry, inside, kinds)

    def predicted(self, stops: Sequence[Stop]) -> float:
        """Return the predicted divergence of a schedule: the sum of what its parts cost alone."""
        return sum(self._of(stop) for stop in stops)

    def _of(self, stop: Stop) -> float:
        if stop.layer == 0:
            return _between(stop.keep, {1.0: 0.0, **self.entry})
        own = {share: loss for (layer, share), loss in self.inside.items() if layer == stop.layer}
        return _between(stop.keep, {1.0: 0.0, **own})


def _between(share: float, measured: Mapping[float, float]) -> float:
    """Interpolate losses between shares on a logarithmic scale; a share of 0 counts as half of the least other one."""
    least = min(known for known in measured if known > 0) / 2
    shares = sorted(measured)
    logs = [np.log(max(known, least)) for known in shares]
    return float(np.interp(np.log(max(share, least)), logs, [measured[known] for known in shares]))


def proposals(family: Family, losses: Losses, payments: Payments, budget: float) -> list[tuple[Stop, ...]]:
    """Return the schedules of the least predicted loss that meet a price, best first; layer 0 is the decoder's input.

    Each has a share at the input, one at a layer inside, and a layer at which all tokens leave, or only some of the
    three. One of the shares is what the price leaves for it.
    """
    layers, found = inner_layers(family), list[tuple[Stop, ...]]()
    wide = [1.0, *sorted(losses.entry, reverse=True)]
    for place, layer in enumerate(layers):
        own = payments.most(lambda share, at=layer: (Stop(0, share), Stop(at, 0.0)), budget)  # type: ignore[misc]
        if own is not None:
            found.append((Stop(0, own), Stop(layer, 0.0)))
        for share in wide:
            for end in (None, *layers[place + 1 :]):
                last = () if end is None else (Stop(end, 0.0),)
                first = () if share == 1.0 else (Stop(0, share),)
                kept = payments.most(lambda keep: (*first, Stop(layer, keep), *last), budget)  # noqa: B023 - called here
                if kept is not None and kept < share:
                    found.append((*first, Stop(layer, kept), *last))
    return sorted(found, key=lambda stops: (losses.predicted(stops), stops))[:PROPOSED]


def scheduled(stops: Sequence[Stop], entry: Candidate, kinds: Mapping[int, int]) -> Scheduled:
    """Return the candidate of a schedule.

    Args:
        stops: its places; the first may be the decoder's input.
        entry: the rule there.
        kinds: by layer, which of `INSIDE` keeps tokens.
    """
    then = [
        INSIDE[kinds[stop.layer]](stop.layer, stop.keep) if stop.keep else Stage(EXIT, {"layer": stop.layer})
        for stop in stops
        if stop.layer
    ]
    return Scheduled.of(entry, 1.0 if stops[0].layer else stops[0].keep, then)
