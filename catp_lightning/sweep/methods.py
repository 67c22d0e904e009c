"""Which methods a sweep compares on a model, and why some make no sense there."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.families import Family
from catp_lightning.guide import refuse_without_rows
from catp_lightning.observation import BY_LAYER, Signal
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import Pruning
from catp_lightning.scorers import SCORERS, AttentionScorer

ALL, CALIBRATED = "all", "calibrated"
IMPROVED = ("fastervlm", "fastv", "trimmed-llama")
"""Methods whose own layers and head weights `all` calibrates, beside the free choice."""
RANDOM_SEEDS = (0, 1, 2)
SETTINGS: dict[str, tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]] = {
    "catp": (("catp weighted by image token", {"image_weight": "received"}, {}),),
    "trimmed-llama": (("trimmed-llama at equal rows", {}, {"budget": "rows"}),),
}
"""Other published settings of a method that are compared too: title, arguments of the scorer and of the selector."""
GUIDED = "{} (guided by the model itself)"


@dataclass(frozen=True)
class Rule:
    """A method without its budget.

    Attributes:
        title: its name in tables; several rules of one title are averaged.
        name: unique.
        control: whether it is a control that a real method must beat.
        guided: whether another model's attention is read; here it is the model's own.
        selector_args: of the method's own selector.
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
    """One method at one budget: title and name as a rule's, and what is pruned by."""

    title: str
    name: str
    policy: PruningPolicy
    control: bool = False
    guided: bool = False

    @property
    def file_name(self) -> str:
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}-keep-{self.policy.keep!r}.json"


def check_names(names: Sequence[str]) -> None:
    """Raise PolicyError where a name is none of a method."""
    shown = ", ".join(sorted([*SCORERS, CALIBRATED, ALL]))
    known = [*SCORERS, CALIBRATED, *(f"{CALIBRATED} {name}" for name in SCORERS), ALL]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"There is no scorer {name!r}; known are {shown}.{hint}")
    if not names:
        raise PolicyError(f"No scorer is named; known are {shown}.")


def named(names: Sequence[str]) -> list[str]:
    """The names, each once, with `ALL` spelled out."""
    every = [*SCORERS, CALIBRATED, *(f"{CALIBRATED} {name}" for name in IMPROVED)]
    spelled = [own for name in names for own in (every if name == ALL else [name])]
    return list(dict.fromkeys(spelled))


def is_calibrated(name: str) -> bool:
    """Whether a name asks for a calibration: of everything, or of one method, `calibrated fastv`."""
    return name.partition(" ")[0] == CALIBRATED


def rules(names: Sequence[str], family: Family, layers: bool) -> tuple[list[Rule], dict[str, str]]:
    """The rules of some scorers that make sense on a model, and for each of the others the reason why not.

    Args:
        names: of `SCORERS`.
        family: of the model.
        layers: whether every attention scorer is also asked layer by layer.
    """
    found: list[Rule] = []
    refused: dict[str, tuple[str, str]] = {}
    for name in names:
        try:
            several = list(_of_scorer(name, family, layers))
        except PolicyError as error:  # of another package, and broken
            refused[name] = (name, str(error))
            continue
        for rule in several:
            try:
                _try(rule, family)
                found.append(rule)
            except (PruningError, PolicyError) as error:
                refused.setdefault(name, (rule.title, str(error)))  # of its layers one reason is enough
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
            at = "at layer" if "layer" in args else "layer"  # where tokens leave, or which layer is asked
            title = f"{name} {at} {next(iter(args.values()))}".replace("[", "").replace("]", "")
            yield Rule(title, title, name, args, scorer.control, guided)


def _single_layers(scorer: Any, family: Family) -> Iterator[dict[str, Any]]:
    """Arguments for each layer a scorer could ask alone; none where it asks no attention, or there is no choice."""
    if scorer.stages(family.depth):  # `layer` is where tokens leave, and the one before it is asked
        if any(part.name == "layer" for part in fields(scorer)):
            yield from ({"layer": n} for n in range(1, family.depth))
        return
    if not isinstance(scorer, AttentionScorer):
        return
    counts = [count for signal, count in family.layers().items() if signal in BY_LAYER & scorer.needs.keys()]
    if len(counts) == 1 and counts[0] > 1:
        yield from ({"layers": [n]} for n in range(counts[0]))


def _try(rule: Rule, family: Family) -> None:
    """Raise PruningError or PolicyError where the model cannot be pruned by a rule; the model is not touched."""
    if rule.guided:  # by a copy of the model, which is not made to ask
        refuse_without_rows(family)
        return
    Pruning(family, rule.policy(0.5))
