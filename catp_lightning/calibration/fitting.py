"""From the probes' sums to what may be relevant: slots, layers, head weights, a fixed set."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from catp_lightning.calibration.heads import HeadFit, fit_heads
from catp_lightning.calibration.importance import Columns
from catp_lightning.calibration.layers import LayerChoice, choose_layers
from catp_lightning.calibration.statistics import FoldSums
from catp_lightning.calibration.ties import Tolerance


@dataclass(frozen=True)
class VoterFit:
    """What one voter's heads say about answers.

    Attributes:
        choice: of layers.
        layers: those layers, ascending.
        fit: of their heads, beside the slots; None where no layer was chosen.
        selected: whether any head says anything.
    """

    choice: LayerChoice
    layers: tuple[int, ...] = ()
    fit: HeadFit | None = None
    selected: bool = False

    @property
    def slot_weights(self) -> list[float]:
        """What each slot is worth beside the heads."""
        assert self.fit is not None
        return rounded(self.fit.slots)

    def head_weights(self, heads: int) -> list[list[float]]:
        """A row for each chosen layer."""
        assert self.fit is not None
        return [rounded(row) for row in self.fit.weights.reshape(len(self.layers), heads)]


@dataclass(frozen=True)
class Fitted:
    """All that probes found.

    Attributes:
        slots: what each slot is worth, by itself.
        greedy: a score for each slot, whose highest are the best fixed set; None where there are too many slots.
        voters: by name.
    """

    slots: list[float] = field(default_factory=list)
    greedy: list[float] | None = None
    voters: Mapping[str, VoterFit] = field(default_factory=dict)

    def evidence(self, columns: Columns) -> dict[str, Any]:
        """For the policy: plain numbers."""
        return {
            "slots": self.slots,
            **{name: _evidence(found, columns.voters[name][1]) for name, found in self.voters.items()},
        }


def fit(sums: FoldSums, pairs: FoldSums | None, columns: Columns, ties: Tolerance) -> Fitted:
    """Fit all that candidates are made of, from sums alone.

    Args:
        sums: over all processes, of `columns`.
        pairs: of pairs of slots, if those were measured.
        columns: of a probe's row.
        ties: layers and sets this close are equally good.
    """
    slots, voters = columns.of_slots, {}
    for name, (layers_read, _) in columns.voters.items():
        choice = choose_layers(sums, columns.of_voter(name), slots, ties)
        choice = replace(
            choice,
            layers=tuple(layers_read[place] for place in choice.layers),
            steps=tuple((layers_read[step[0]], *step[1:]) for step in choice.steps),
        )
        layers = tuple(sorted(choice.layers))
        found = fit_heads(sums, columns.of_heads(name, layers), slots) if layers else None
        voters[name] = VoterFit(choice, layers, found, found is not None and found.selected)
    return Fitted(_slots(sums, columns), _greedy(pairs, columns, ties), voters)


def fit_without(
    fold: int, sums: FoldSums, pairs: FoldSums | None, columns: Columns, like: Fitted, ties: Tolerance
) -> Fitted:
    """The same without one fold, to be measured on it: what `like` selected, with weights that never saw the fold."""
    sums, pairs = sums.without(fold), None if pairs is None else pairs.without(fold)
    voters = {
        name: replace(found, fit=fit_heads(sums, columns.of_heads(name, found.layers), columns.of_slots))
        if found.selected
        else found
        for name, found in like.voters.items()
    }
    return Fitted(_slots(sums, columns), _greedy(pairs, columns, ties), voters)


def _slots(sums: FoldSums, columns: Columns) -> list[float]:
    """What each slot is worth by itself: ridge regression on the slots alone."""
    if not columns.slots:
        return []
    own = sums.columns(columns.of_slots)
    gram, moment = own.gram.sum(0), own.moment.sum(0)
    ridge = 0.01 * max(1e-12, gram.diagonal().mean())
    return rounded(np.linalg.solve(gram + ridge * np.eye(len(moment)), moment))


def _greedy(pairs: FoldSums | None, columns: Columns, ties: Tolerance) -> list[float] | None:
    """Slots in the order in which they join a fixed set that keeps the answers best: a score for each.

    What a set gains is a quadratic function of who is in it, fitted to the probes: what each slot is worth by itself,
    and what each pair is worth beyond that (two redundant slots: less). The set is grown greedily.
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


def rounded(values: np.ndarray) -> list[float]:
    """To six digits: other batches and processes, which add in another order, find the same, or its neighbour.

    With fewer digits neighbours would be too far apart: of four, by up to a thousandth.
    """
    return [float(f"{value:.6g}") for value in values]


def _evidence(found: VoterFit, heads: int) -> dict[str, Any]:
    steps = [{"layer": s[0], "explained": float(s[1]), "error": float(s[2])} for s in found.choice.steps]
    shown: dict[str, Any] = {
        "layers": list(found.layers),
        "layer_steps": steps,
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
