"""What a calibration compares: rules by name, each a scorer and a selector."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from catp_lightning.calibration.fitting import Fitted
from catp_lightning.calibration.importance import VOTERS
from catp_lightning.families import Family
from catp_lightning.observation import Signal
from catp_lightning.policy import PruningPolicy
from catp_lightning.scorers import SCORERS

STRENGTHS = (0.5, 1.5)
"""Weights of a fixed rule beside diversity, tried with both signs: which relevance helps changes with the model."""


FITTED_STRENGTHS = (0.25, 0.5, 1.0)
"""Of fitted relevance, whose sign is known."""


@dataclass(frozen=True)
class Candidate:
    """A rule without its budget.

    Attributes:
        name: unique, and what breaks a tie.
        control: whether it is a control that a finding has to beat: it looks at no attention, or at diversity alone.
        reference: whether it is checked beside the chosen policy, however it does: controls, each layer of CATP.
    """

    name: str
    scorer: str
    scorer_args: Mapping[str, Any] = field(default_factory=dict)
    selector: str | None = None
    selector_args: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False
    reference: bool = False

    def policy(self, keep: int | float) -> PruningPolicy:
        return PruningPolicy(self.scorer, self.scorer_args, self.selector, self.selector_args, keep)


def default_candidates(family: Family) -> list[Candidate]:
    """Every rule and every cross-attention layer by itself, and sets of several kinds and strengths.

    The first cross-attention layer is `catp layer 0`, the last has the highest number.
    """
    layers = range(family.layers()[Signal.CROSS_ATTENTION])
    found = [
        Candidate(name, name, control=cls.control, reference=cls.control)
        for name, cls in SCORERS.items()
        if family.shows(cls().needs)
    ]
    for name in ("catp", *VOTERS):
        found += [Candidate(f"{name} layer {n}", name, {"layers": [n]}, reference=name == "catp") for n in layers]
    found.append(Candidate("catp weighted by image token", "catp", {"image_weight": "received"}))
    for similarity in ("cross-attention", "outputs"):
        for scorer in ("catp", "cross-attention", "region-attention", "self-attention"):
            for strength in sorted(sign * size for sign in (1, -1) for size in STRENGTHS):
                args = {"similarity": similarity, "relevance": strength}
                name = f"dpp of {similarity}, {scorer} x {strength:+g}"
                found.append(Candidate(name, scorer, selector="dpp", selector_args=args))
        found.append(_diversity(similarity, {"similarity": similarity}, control=True))
    # Maps of chosen layers are a finding; all of them, or the tokens themselves, are the plain control.
    found.append(_diversity("regions", {"similarity": "regions"}))
    return found + [_diversity(f"cross-attention layer {n}", {"layers": [n]}) for n in layers]


def fitted_candidates(family: Family, fitted: Fitted) -> list[Candidate]:
    """What probes found to be relevant, by itself, and with diversity of several kinds and strengths."""
    found = []
    if fitted.greedy is not None:
        found.append(Candidate("fixed set", "position", {"weights": fitted.greedy}))
    several = dict(_similarities(family, fitted))
    found += _sets("slots", "position", {"weights": fitted.slots}, several)
    for name, voter in fitted.voters.items():
        if voter.selected:
            heads = {"layers": list(voter.layers), "head_weights": voter.head_weights(family.shape()["heads"])}
            both = {**heads, "slot_weights": voter.slot_weights}
            plain = {kind: several[kind] for kind in ("outputs", "cross-attention")}
            found += _sets(f"{name} heads", name, heads, plain)
            found += _sets(f"{name} heads and slots", name, both, several)
    return found


def _sets(
    name: str, scorer: str, scorer_args: Mapping[str, Any], similarities: Mapping[str, dict[str, Any]]
) -> Iterator[Candidate]:
    """One relevance, by itself and beside each similarity."""
    yield Candidate(name, scorer, scorer_args)
    for kind, args in similarities.items():
        for strength in FITTED_STRENGTHS:
            selector_args = {**args, "relevance": strength}
            yield Candidate(f"dpp of {kind}, {name} x {strength:g}", scorer, scorer_args, "dpp", selector_args)


def _similarities(family: Family, fitted: Fitted) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and arguments of the selector."""
    layers = range(family.layers()[Signal.CROSS_ATTENTION])
    yield "outputs", {"similarity": "outputs"}
    yield "cross-attention", {}
    yield "regions", {"similarity": "regions"}
    yield from ((f"cross-attention layer {layer}", {"layers": [layer]}) for layer in layers)
    chosen = {voter.layers for voter in fitted.voters.values() if 1 < len(voter.layers) < len(layers)}
    for several in sorted(chosen):
        yield f"cross-attention layers {' and '.join(map(str, several))}", {"layers": list(several)}


def _diversity(name: str, args: Mapping[str, Any], control: bool = False) -> Candidate:
    selector_args = {**args, "relevance": 0.0}
    return Candidate(f"diversity of {name}", "position", {}, "dpp", selector_args, control, reference=control)
