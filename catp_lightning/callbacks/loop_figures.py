"""Figures of one loop with pruned tokens, for `TokenPruning`."""

import math
from dataclasses import dataclass

from torchmetrics import MeanMetric

from catp_lightning.callbacks.call_profile import CallProfile, profile_line
from catp_lightning.callbacks.loop_pictures import LoopPictures
from catp_lightning.metrics import Agreement, TokensKept
from catp_lightning.metrics.outside import OutsideCheck
from catp_lightning.metrics.overlap import OverlapCheck
from catp_lightning.pruning.answers import AnswerComparison
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.messages import rank_zero_info, rank_zero_warn


@dataclass
class LoopFigures:
    """Metrics of one loop, and the prefills of the running batch.

    Attributes:
        prefills: what was kept in each prefill since the last batch ended.
        inside: True if tokens leave inside the decoder.
    """

    prefills: list[Prefill]
    inside: bool
    tokens: TokensKept
    comparison: AnswerComparison | None
    agreement: Agreement
    overlap: OverlapCheck | None
    outside: OutsideCheck | None
    per_layer: MeanMetric
    profile: CallProfile | None = None
    pictures: LoopPictures | None = None

    def read_batch(self) -> None:
        for prefill in self.prefills:
            self.tokens.update(prefill.keep, prefill.counts)
            self.per_layer.update(prefill.tokens_per_layer)
            if self.outside is not None and prefill.summaries is not None:
                self.outside.see(prefill.summaries)
        if self.outside is not None:
            self.outside.warn_early()
        if self.overlap is not None:
            self.overlap.see(prefill.images for prefill in self.prefills if prefill.images is not None)
        if self.pictures is not None:
            self.pictures.read(self.prefills)
        self.prefills.clear()
        if self.comparison is not None:
            for same in self.comparison.same:
                self.agreement.update(same)
            self.comparison.same.clear()

    def figures(self) -> dict[str, float]:
        """Figures of the epoch over all processes, by name; empty, with a warning, if no image was read.

        Every process must call this at the end of the epoch.
        """
        figures = {f"catp/{name}": float(value) for name, value in self.tokens.compute().items()}
        if math.isnan(figures["catp/keep_share"]):
            rank_zero_warn(
                "TokenPruning pruned nothing in this epoch: the model it prunes was given no image. If the steps of "
                "your module use another model, name it: TokenPruning(..., model=...)."
            )
            return {}
        if self.inside:
            per_layer = float(self.per_layer.compute())
            if not math.isclose(per_layer, figures["catp/tokens_kept"], rel_tol=1e-6):
                figures["catp/tokens_per_layer"] = per_layer
        if self.comparison is not None:
            figures["catp/agreement"] = float(self.agreement.compute())
        if self.profile is not None and (times := self.profile.figures()):
            figures.update(times)
            rank_zero_info(profile_line(times))
        if self.overlap is not None:
            self.overlap.warn()
        if self.outside is not None:
            self.outside.finish()
            figures["catp/outside"] = self.outside.share
        return figures
