"""Methods that a sweep compares on a model, and the reasons why others make no sense there."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from catp_lightning.errors import PolicyError, PruningError, did_you_mean
from catp_lightning.methods.observation import BY_LAYER, Signal
from catp_lightning.methods.scorers import SCORERS, AttentionScorer
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning.guide import refuse_without_rows
from catp_lightning.pruning.pruner import Pruner

ALL, CALIBRATED = "all", "calibrated"
IMPROVED = ("fastervlm", "fastv", "trimmed-llama")
"""Scorers whose own layers and head weights `all` calibrates, beside the calibration where all candidates compete."""
RANDOM_SEEDS = (0, 1, 2)
SETTINGS: dict[str, tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]] = {
    "catp": (("catp weighted by image token", {"image_weight": "received"}, {}),),
    "trimmed-llama": (("trimmed-llama at equal rows", {}, {"budget": "rows"}),),
}
"""Other published settings of a scorer that are compared too: title, arguments of the scorer and of the selector."""
GUIDED = "{} (guided by the model itself)"


@dataclass(frozen=True)
class Rule:
    """One method with its arguments, without a budget.

    Attributes:
        title: name in tables; several rules of one title are averaged.
        name: unique name.
        scorer: name of the scorer.
        args: arguments of the scorer.
        control: True if it is a control that a real method must beat.
        guided: True if it reads the attention of a guide, another model; in a sweep that is a copy of the model itself.
        selector_args: arguments of the scorer's own selector.
    """

    title: str
    name: str
    scorer: str
    args: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    guided: bool = False
    selector_args: Mapping[str, Any] = field(default_factory=dict)

    def policy(self, keep: int | float) -> PruningPolicy:
        return PruningPolicy(self.scorer, self.args, selector_args=self.selector_args, keep=keep)


@dataclass(frozen=True, eq=False)
class Job:
    """One method at one budget: the policy that prunes, with title, name, control and guided as in `Rule`."""

    title: str
    name: str
    policy: PruningPolicy
    control: bool = False
    guided: bool = False

    @property
    def file_name(self) -> str:
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}-keep-{self.policy.keep!r}.json"


def check_names(names: Sequence[str]) -> None:
    """Raise PolicyError if a name is not a method's, or if there is no name."""
    shown = ", ".join(sorted([*SCORERS, CALIBRATED, ALL]))
    known = [*SCORERS, CALIBRATED, *(f"{CALIBRATED} {name}" for name in SCORERS), ALL]
    for name in names:
        if name not in known:
            raise PolicyError(f"There is no scorer {name!r}; known are {shown}.{did_you_mean(name, known)}")
    if not names:
        raise PolicyError(f"No scorer is named; known are {shown}.")


def named(names: Sequence[str]) -> list[str]:
    """Return the names of methods, each once, with `ALL` expanded."""
    every = [*SCORERS, CALIBRATED, *(f"{CALIBRATED} {name}" for name in IMPROVED)]
    spelled = [own for name in names for own in (every if name == ALL else [name])]
    return list(dict.fromkeys(spelled))


def is_calibrated(name: str) -> bool:
    """True if a name asks for a calibration: `calibrated`, of all candidates, or of one method, `calibrated fastv`."""
    return name.partition(" ")[0] == CALIBRATED


def rules(names: Sequence[str], family: Family, layers: bool) -> tuple[list[Rule], dict[str, str]]:
    """Return the rules of the named scorers that make sense on a model, and by title the reason why others do not.

    Args:
        names: names of scorers, in `SCORERS`.
        family: family of the model.
        layers: add a rule for each single layer of every attention scorer.
    """
    found: list[Rule] = []
    refused: dict[str, tuple[str, str]] = {}
    for name in names:
        try:
            several = list(_of_scorer(name, family, layers))
        except PolicyError as error:  # a broken scorer of another package
            refused[name] = (name, str(error))
            continue
        for rule in several:
            try:
                _try(rule, family)
                found.append(rule)
            except (PruningError, PolicyError) as error:
                refused.setdefault(name, (rule.title, str(error)))  # one reason is enough for all layers of a scorer
    return found, dict(refused.values())


def _of_scorer(name: str, family: Family, layers: bool) -> Iterator[Rule]:
    scorer = SCORERS[name]
    if name == "random":
        title = f"random ({len(RANDOM_SEEDS)} seeds)"
        yield from (Rule(title, f"random seed {n}", name, {"seed": n}, control=True) for n in RANDOM_SEEDS)
        return
    guided = Signal.GUIDE_ATTENTION in scorer().needs
    yield Rule(GUIDED.format(name) if guided else name, name, name, control=scorer.control, guided=guided)
    for title, scorer_args, selector_args in SETTINGS.get(name, ()):
        yield Rule(title, title, name, scorer_args, scorer.control, guided, selector_args)
    if layers:
        for args in _single_layers(scorer(), family):
            at = "at layer" if "layer" in args else "layer"  # tokens leave there, or its attention is read
            title = f"{name} {at} {next(iter(args.values()))}".replace("[", "").replace("]", "")
            yield Rule(title, title, name, args, scorer.control, guided)


def _single_layers(scorer: Any, family: Family) -> Iterator[dict[str, Any]]:
    """Yield scorer arguments for each layer it could read alone; none if it reads no attention or has no choice."""
    if scorer.stages(family.depth):  # tokens leave at `layer`; the one before it scores them
        if any(part.name == "layer" for part in fields(scorer)):
            yield from ({"layer": n} for n in range(1, family.depth))
        return
    if not isinstance(scorer, AttentionScorer):
        return
    counts = [count for signal, count in family.layers().items() if signal in BY_LAYER & scorer.needs.keys()]
    if len(counts) == 1 and counts[0] > 1:
        yield from ({"layers": [n]} for n in range(counts[0]))


def _try(rule: Rule, family: Family) -> None:
    """Raise PruningError or PolicyError if the model cannot be pruned by a rule; the model is not touched."""
    if rule.guided:  # the guide, a copy of the model, is not made for this check
        refuse_without_rows(family)
        return
    Pruner(family, rule.policy(0.5))
