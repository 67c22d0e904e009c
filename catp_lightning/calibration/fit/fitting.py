"""Fit the relevance that candidates use from the probes' sums: slots, layers, head weights, a fixed set."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, TypedDict

import numpy as np

from catp_lightning.calibration.fit.heads import HeadFit, fit_heads, rounded
from catp_lightning.calibration.fit.layers import LayerChoice, choose_layers
from catp_lightning.calibration.fit.probes import Columns
from catp_lightning.calibration.fit.sums import FoldSums
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.methods.network import Network


@dataclass(frozen=True)
class ScorerFit:
    """Fit of one scorer: its chosen layers and the weights of their heads.

    Attributes:
        choice: selection of layers, in the order they were added.
        layers: the chosen layers, ascending.
        fit: weights of their heads, fitted together with the slots; None if no layer was chosen.
        selected: True if any head was selected.
    """

    choice: LayerChoice
    layers: tuple[int, ...] = ()
    fit: HeadFit | None = None
    selected: bool = False

    @property
    def slot_weights(self) -> list[float]:
        """Value of each slot, fitted together with the heads."""
        assert self.fit is not None
        return rounded(self.fit.slots)

    def head_weights(self, heads: int) -> list[list[float]]:
        """Return the head weights, a row for each chosen layer; `heads` is the number of heads of a layer."""
        assert self.fit is not None
        return [rounded(row) for row in self.fit.weights.reshape(len(self.layers), heads)]


class LayerStep(TypedDict):
    """A layer that forward selection added: share of the variance it explains beyond those before, and its error."""

    layer: int
    explained: float
    error: float


class FitEvidence(TypedDict):
    """Fit of one scorer as plain numbers; entries about heads are missing where no layer was chosen.

    `layer_stability` has, for each layer, the share of folds whose fit without them chose it too; `head_weights` and
    `head_stability` are lists [L, H] for the chosen layers, `explained` is a share of the variance, and `strength` the
    strength of the penalty.
    """

    layers: list[int]
    layer_steps: list[LayerStep]
    layer_stability: list[float]
    head_weights: NotRequired[list[list[float]]]
    head_stability: NotRequired[list[list[float]]]
    explained: NotRequired[float]
    explained_error: NotRequired[float]
    strength: NotRequired[float]


@dataclass(frozen=True)
class Fitted:
    """All findings of the probes.

    Attributes:
        slots: value of each slot, fitted without heads; empty without slots.
        greedy: a score for each slot, the highest of which form the best fixed set; None if there are too many slots,
            or none.
        scorers: fit of each scorer, by name.
        network: trained network; None if there is none.
    """

    slots: list[float] = field(default_factory=list)
    greedy: list[float] | None = None
    scorers: Mapping[str, ScorerFit] = field(default_factory=dict)
    network: Network | None = None

    def evidence(self, columns: Columns) -> dict[str, Any]:
        """Return the findings as plain numbers, for the policy's evidence."""
        return {
            "slots": self.slots,
            **{name: _evidence(found, columns.scorers[name][1]) for name, found in self.scorers.items()},
        }


def fit(sums: FoldSums, pairs: FoldSums | None, columns: Columns, ties: Tolerance) -> Fitted:
    """Fit slots, layers, head weights and the fixed set of the candidates, from sums alone.

    Args:
        sums: sums of `columns` over all processes.
        pairs: sums of pairs of slots, if those were measured.
        columns: column layout of a probe's row.
        ties: tolerance within which layers and sets are equally good.
    """
    slots, scorers = columns.of_slots, {}
    for name, (layers_read, _) in columns.scorers.items():
        choice = choose_layers(sums, columns.of_scorer(name), slots, ties)
        choice = replace(
            choice,
            layers=tuple(layers_read[place] for place in choice.layers),
            steps=tuple((layers_read[step[0]], *step[1:]) for step in choice.steps),
        )
        layers = tuple(sorted(choice.layers))
        found = fit_heads(sums, columns.of_heads(name, layers), slots) if layers else None
        scorers[name] = ScorerFit(choice, layers, found, found is not None and found.selected)
    return Fitted(_slots(sums, columns), _greedy(pairs, columns, ties), scorers)


def fit_without(
    fold: int, sums: FoldSums, pairs: FoldSums | None, columns: Columns, like: Fitted, ties: Tolerance
) -> Fitted:
    """Fit again without one fold, to be measured on it: layers that `like` chose, weights that never saw the fold."""
    sums, pairs = sums.without(fold), None if pairs is None else pairs.without(fold)
    scorers = {
        name: replace(found, fit=fit_heads(sums, columns.of_heads(name, found.layers), columns.of_slots))
        if found.selected
        else found
        for name, found in like.scorers.items()
    }
    return Fitted(_slots(sums, columns), _greedy(pairs, columns, ties), scorers)


def _slots(sums: FoldSums, columns: Columns) -> list[float]:
    """Return the value of each slot without heads: ridge regression on the slots alone."""
    if not columns.slots:
        return []
    own = sums.columns(columns.of_slots)
    gram, moment = own.gram.sum(0), own.moment.sum(0)
    ridge = 0.01 * max(1e-12, gram.diagonal().mean())
    return rounded(np.linalg.solve(gram + ridge * np.eye(len(moment)), moment))


def _greedy(pairs: FoldSums | None, columns: Columns, ties: Tolerance) -> list[float] | None:
    """Return a score for each slot by the order in which it joins the fixed set that keeps the answers best.

    The gain of a set is modelled as a quadratic function of its members, fitted to the probes: a value for each slot,
    and one for each pair beyond that (negative for two redundant slots). The set is grown greedily.
    """
    if pairs is None:
        return None
    gram, moment = pairs.gram.sum(0), pairs.moment.sum(0)
    ridge = 0.1 * max(1e-12, gram.diagonal().mean())
    worth = np.zeros((columns.slots, columns.slots))
    worth[np.triu_indices(columns.slots)] = np.linalg.solve(gram + ridge * np.eye(len(moment)), moment)
    gain, together = worth.diagonal().copy(), np.triu(worth, 1) + np.triu(worth, 1).T
    scores, scale, rest = np.zeros(columns.slots), float(np.abs(gain).max()), list(range(columns.slots))
    for step in range(columns.slots):
        best = rest.pop(ties.order((-gain[rest]).tolist(), scale)[0])
        scores[best] = columns.slots - step
        gain = gain + together[best]
    return scores.tolist()


def _evidence(found: ScorerFit, heads: int) -> FitEvidence:
    steps = found.choice.steps
    shown: FitEvidence = {
        "layers": list(found.layers),
        "layer_steps": [{"layer": at, "explained": float(share), "error": float(error)} for at, share, error in steps],
        "layer_stability": [float(share) for share in found.choice.stability],
    }
    if found.fit is not None:
        shown |= {
            "head_weights": found.head_weights(heads),
            "head_stability": found.fit.stability.reshape(len(found.layers), heads).tolist(),
            "explained": float(found.fit.explained),
            "explained_error": float(found.fit.explained_error),
            "strength": float(found.fit.strength),
        }
    return shown
