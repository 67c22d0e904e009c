"""Rank correlation between layers: how alike two layers rank the tokens of an image."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.statistics.base import Statistic
from catp_lightning.methods.precision import without_autocast
from catp_lightning.safe_text import figure_text
from catp_lightning.utils.plots import WRITTEN, heatmap


class RankCorrelation(Statistic):
    """Mean over images of Spearman's rank correlation between layers' scores of an image's tokens, by scorer.

    As in figure 4 of 2504.00557, for any scores that come by layer. Images with padding or protected tokens are left
    out: those would shift an image's ranks.

    Args:
        plan: plan of the calibration, with its scorers.
    """

    name: ClassVar[str] = "rank_correlation"
    caption: ClassVar[str] = (
        "How alike two layers rank the tokens of an image (Spearman's correlation, a mean over images): near 1 they "
        "say the same, near 0 they have nothing to do with each other."
    )

    images: Tensor

    def __init__(self, plan: Plan, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plan = plan
        for number, scorer in enumerate(plan.scorers):
            shape = (len(plan.layers_read(scorer)),) * 2
            self.add_state(f"sum_{number}", torch.zeros(shape, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(1, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    @classmethod
    def of(cls, plan: Plan) -> Self:
        return cls(plan)

    def update(self, samples: Samples) -> None:
        seen = samples.seen if samples.inside is None else samples.inside
        whole = seen.droppable.all(1)
        with without_autocast(whole):
            for number, scorer in enumerate(self.plan.scorers.values()):
                getattr(self, f"sum_{number}").add_(correlations(scorer.head_scores(seen).sum(2)[whole]))
        self.images += whole.sum()

    def compute(self) -> dict[str, list[list[float]]]:
        """Return the mean correlation by scorer, [L, L], without scorers that were not seen."""
        found = {
            name: getattr(self, f"sum_{number}") / self.images.clamp(min=1)
            for number, name in enumerate(self.plan.scorers)
        }
        return {name: mean.cpu().numpy().round(4).tolist() for name, mean in found.items() if bool(mean.any())}

    @staticmethod
    def figure(entry: Mapping[str, Sequence[Sequence[float]]]) -> Figure | None:
        """Plot the correlations of each scorer that has several layers as a heatmap."""
        found = {name: np.array(matrix) for name, matrix in entry.items() if len(matrix) > 1}
        if not found:
            return None
        size = min(6.0, max(3.2, 0.5 * max(map(len, found.values())) + 1))
        figure = Figure(figsize=(size * len(found) + 0.8, size), layout="constrained")
        for axes, (name, matrix) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            heatmap(figure, axes, matrix, 1.0, "rank correlation", ".2f")
            axes.yaxis.set_major_locator(MaxNLocator(WRITTEN, integer=True))
            axes.set(title=figure_text(name), xlabel="layer", ylabel="layer")
        return figure


def correlations(scores: Tensor) -> Tensor:
    """Return Spearman's correlation between the rows of each image, summed over images: float64 [L, L].

    Of equal scores the lower index ranks lower.

    Args:
        scores: float [I, L, T], T at least 2.
    """
    ranks = scores.argsort(dim=-1, stable=True).argsort(-1).double()
    centred = ranks - ranks.mean(-1, keepdim=True)
    unit = centred / centred.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (unit @ unit.transpose(1, 2)).sum(0)
