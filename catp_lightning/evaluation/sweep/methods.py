"""Methods that a sweep compares on a model, and the reasons why others make no sense there."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from catp_lightning.errors import PolicyError, PruningError, did_you_mean
from catp_lightning.evaluation.sweep.prices import Price
from catp_lightning.methods.observation import BY_LAYER, Signal
from catp_lightning.methods.scorers import SCORERS, AttentionScorer
from catp_lightning.models import Family
from catp_lightning.policy import SCHEDULES, PruningPolicy
from catp_lightning.pruning.guide import refuse_without_rows
from catp_lightning.pruning.pruner import Pruner

ALL, CALIBRATED = "all", "calibrated"
ENTRY = f"{CALIBRATED} entry"
"""At a price: the calibration of rules before the decoder alone, beside that of schedules."""
IMPROVED = ("fastervlm", "fastv", "trimmed-llama")
"""Scorers whose own layers and head weights `all` calibrates, beside the calibration where all candidates compete."""
RANDOM_SEEDS = (0, 1, 2)
SETTINGS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "catp": (("catp weighted by image token", {"scorer_args": {"image_weight": "received"}}),),
    "divprune": (
        (
            "diversity alone (DPP)",
            {"scorer": "position", "selector": "dpp", "selector_args": {"similarity": "outputs", "relevance": 0.0}},
        ),
    ),
    "trimmed-llama": (("trimmed-llama at equal rows", {"selector_args": {"budget": "rows"}}),),
}
"""Other settings that are compared beside a scorer's own: title, and arguments of `PruningPolicy` that differ."""
GUIDED = "{} (guided by the model itself)"


@dataclass(frozen=True, eq=False)
class Job:
    """One method at one budget.

    Attributes:
        title: name in tables; several jobs of one title and budget are averaged.
        name: unique name of the method.
        policy: policy that prunes.
        control: True if the method is a control that a real method must beat.
        guided: True if it reads the attention of a guide, another model; in a sweep that is a copy of the model itself.
        price: price that it is to pay; None: `policy.keep` is the budget.
        schedule: returns the policy for a budget, of a method of `SCHEDULES`; None: `policy.with_keep`.
    """

    title: str
    name: str
    policy: PruningPolicy
    control: bool = False
    guided: bool = False
    price: Price | None = None
    schedule: Callable[[float], PruningPolicy] | None = None

    def at(self, keep: int | float) -> "Job":
        """Return the job of the same method at another budget."""
        return replace(self, policy=self.policy.with_keep(keep))

    @property
    def file_name(self) -> str:
        return f"{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}-keep-{self.policy.keep!r}.json"


def check_names(names: Sequence[str], priced: bool = False) -> None:
    """Raise PolicyError if a name is not a method's, or if there is no name; `priced`: methods are to pay a price."""
    only_priced = [*SCHEDULES, ENTRY] if priced else []
    shown = ", ".join(sorted([*SCORERS, CALIBRATED, *only_priced, ALL]))
    known = [*SCORERS, CALIBRATED, *(f"{CALIBRATED} {name}" for name in SCORERS), *only_priced, ALL]
    for name in names:
        if name in SCHEDULES and name not in known:
            raise PolicyError(
                f"{name} has several stages, and its budget is what layers of the decoder read, no number of tokens "
                "that stay: compare it at prices, --budget '{\"tokens_per_layer\": 0.25}' in place of --keep."
            )
        if name not in known:
            raise PolicyError(f"There is no scorer {name!r}; known are {shown}.{did_you_mean(name, known)}")
    if not names:
        raise PolicyError(f"No scorer is named; known are {shown}.")


def named(names: Sequence[str], priced: bool = False) -> list[str]:
    """Return the names of methods, each once, with `ALL` expanded; `priced`: methods are to pay a price."""
    of_one = [f"{CALIBRATED} {name}" for name in IMPROVED]
    every = [*SCORERS, *(SCHEDULES if priced else []), CALIBRATED, *([ENTRY] if priced else []), *of_one]
    spelled = [own for name in names for own in (every if name == ALL else [name])]
    return list(dict.fromkeys(spelled))


def is_calibrated(name: str) -> bool:
    """True if a name asks for a calibration: `calibrated`, of all candidates, or of one method, `calibrated fastv`."""
    return name.partition(" ")[0] == CALIBRATED


def controls_among(jobs: Iterable[Job]) -> dict[str, bool]:
    """Return by title the controls among jobs: True if one is a published rule as well."""
    return {job.title: SCORERS[job.policy.scorer].published for job in jobs if job.control}


def fixed_methods(names: Sequence[str], family: Family, layers: bool) -> tuple[list[Job], dict[str, str]]:
    """Return jobs of the named scorers that make sense on a model, and by title the reason why others do not.

    Args:
        names: names of scorers, in `SCORERS`, or of schedules, in `SCHEDULES`.
        family: family of the model.
        layers: add a job for each single layer of every attention scorer.

    Returns:
        One job a method, at half of the tokens: `Job.at` gives other budgets, `Job.schedule` those of a schedule.
    """
    found: list[Job] = []
    refused: dict[str, tuple[str, str]] = {}
    for name in names:
        try:
            several = list(_of_scorer(name, family, layers))
        except PolicyError as error:  # a broken scorer of another package
            refused[name] = (name, str(error))
            continue
        for job in several:
            try:
                _try(job, family)
                found.append(job)
            except (PruningError, PolicyError) as error:
                refused.setdefault(name, (job.title, str(error)))  # one reason is enough for all layers of a scorer
    return found, dict(refused.values())


def _of_scorer(name: str, family: Family, layers: bool) -> Iterator[Job]:
    if name in SCHEDULES:
        schedule = partial(PruningPolicy.schedule, name, depth=family.depth)
        yield Job(name, name, schedule(0.5), schedule=schedule)
        return
    scorer = SCORERS[name]
    if name == "random":
        title = f"random ({len(RANDOM_SEEDS)} seeds)"
        yield from (Job(title, f"random seed {n}", PruningPolicy(name, {"seed": n}), True) for n in RANDOM_SEEDS)
        return
    guided = Signal.GUIDE_ATTENTION in scorer().needs
    yield Job(GUIDED.format(name) if guided else name, name, PruningPolicy(name), scorer.control, guided)
    for title, settings in SETTINGS.get(name, ()):
        yield Job(title, title, PruningPolicy(**{"scorer": name, **settings}), scorer.control, guided)
    if layers:
        for args in _single_layers(scorer(), family):
            at = "at layer" if "layer" in args else "layer"  # tokens leave there, or its attention is read
            title = f"{name} {at} {next(iter(args.values()))}".replace("[", "").replace("]", "")
            yield Job(title, title, PruningPolicy(name, args), scorer.control, guided)


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


def _try(job: Job, family: Family) -> None:
    """Raise PruningError or PolicyError if the model cannot be pruned by a job's policy; the model is not touched."""
    if job.guided:  # the guide, a copy of the model, is not made for this check
        refuse_without_rows(family)
        return
    Pruner(family, job.policy)
