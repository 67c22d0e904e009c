"""What a calibration compares: rules by name, each a scorer and a selector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from catp_lightning.families import Family
from catp_lightning.observation import Signal
from catp_lightning.policy import PruningPolicy
from catp_lightning.scorers import SCORERS

STRENGTHS = (0.5, 1.5)
"""Weights of relevance beside diversity, tried with both signs: which relevance helps changes with the model."""


FITTED_STRENGTHS = (0.5, 1.0, 2.0)
"""Of fitted relevance, whose sign is known."""


@dataclass(frozen=True)
class Candidate:
    """A rule without its budget.

    Attributes:
        name: unique, and what breaks a tie.
        control: whether it is a control that a finding has to beat: it looks at no attention, or at diversity alone.
    """

    name: str
    scorer: str
    scorer_args: Mapping[str, Any] = field(default_factory=dict)
    selector: str | None = None
    selector_args: Mapping[str, Any] = field(default_factory=dict)
    control: bool = False

    def policy(self, keep: int | float) -> PruningPolicy:
        return PruningPolicy(self.scorer, self.scorer_args, self.selector, self.selector_args, keep)


def default_candidates(family: Family) -> list[Candidate]:
    """Every rule by itself, every cross-attention layer and head by itself, and sets of several kinds and strengths.

    The first cross-attention layer is `catp layer 0`, the last has the highest number.
    """
    layers, heads = range(family.layers()[Signal.CROSS_ATTENTION]), family.shape()["heads"]
    found = [Candidate(name, name, control=cls.control) for name, cls in SCORERS.items()]
    found += [
        Candidate(f"{name} layer {n}", name, {"layers": [n]}) for name in ("catp", "cross-attention") for n in layers
    ]
    found += [_head(layer, head, heads) for layer in layers for head in range(heads)]
    found.append(Candidate("catp weighted by image token", "catp", {"image_weight": "received"}))
    for similarity in ("cross-attention", "outputs"):
        for scorer in ("catp", "cross-attention", "self-attention"):
            for strength in sorted(sign * size for sign in (1, -1) for size in STRENGTHS):
                args = {"similarity": similarity, "relevance": strength}
                name = f"dpp of {similarity}, {scorer} x {strength:+g}"
                found.append(Candidate(name, scorer, selector="dpp", selector_args=args))
        found.append(_diversity(f"diversity of {similarity}", {"similarity": similarity}))
    # Maps of chosen layers are a finding; all of them, or the tokens themselves, are the plain control.
    found += [_diversity(f"diversity of cross-attention layer {n}", {"layers": [n]}, control=False) for n in layers]
    return found


def fitted_candidates(family: Family, weights: Sequence[float]) -> list[Candidate]:
    """Sets that weigh what each slot is worth: by itself, and with diversity of several kinds and strengths."""
    scorer_args = {"weights": list(weights)}
    found = [Candidate("slots", "position", scorer_args)]
    layers = range(family.layers()[Signal.CROSS_ATTENTION])
    kinds: dict[str, dict[str, Any]] = {
        "outputs": {"similarity": "outputs"},
        "cross-attention": {},
        **{f"cross-attention layer {layer}": {"layers": [layer]} for layer in layers},
    }
    for kind, args in kinds.items():
        for strength in FITTED_STRENGTHS:
            selector_args = {**args, "relevance": strength}
            found.append(
                Candidate(f"dpp of {kind}, slots x {strength:g}", "position", scorer_args, "dpp", selector_args)
            )
    return found


def _head(layer: int, head: int, heads: int) -> Candidate:
    alone = [1.0 if other == head else 0.0 for other in range(heads)]
    args = {"layers": [layer], "head_weights": [alone]}
    return Candidate(f"cross-attention layer {layer} head {head}", "cross-attention", args)


def _diversity(name: str, args: Mapping[str, Any], control: bool = True) -> Candidate:
    return Candidate(name, "position", {}, "dpp", {**args, "relevance": 0.0}, control)
