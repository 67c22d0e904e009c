"""Probes of sets that are good already: what a token adds there differs from what it adds to a random set."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from catp_lightning.calibration.fit.learning import Networks
from catp_lightning.calibration.fit.probing import ProbeRecorder, probes
from catp_lightning.calibration.passes import Belongs, Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.split import fold_of
from catp_lightning.methods.method import score_tokens
from catp_lightning.methods.scorers import Learned
from catp_lightning.methods.selection import images_to_samples


class ProbingAround(Pass):
    """Pass that probes sets around those with the highest scores, in which a sample's network has never seen its image.

    Args:
        plan: plan of the calibration.
        networks: networks trained on random sets, one without each fold.
        belongs: says which samples are probed.
        device: device of the records.
    """

    title = "measuring what each visual token adds to good sets"

    def __init__(
        self,
        plan: Plan,
        networks: Networks,
        belongs: Belongs,
        device: torch.device | None,
    ) -> None:
        self.plan, self.belongs = plan, belongs
        self.networks = networks.by_fold
        self.recorder = ProbeRecorder(plan, (networks.whole.question, networks.whole.features), device)
        self.metrics = {"records": self.recorder.records}
        self.key = f"{self.title} {hashlib.sha256(repr(self.networks).encode()).hexdigest()}"

    def see(self, samples: Samples, copies: Sequence[Samples] = ()) -> None:
        chosen = self.belongs(samples)
        for copy, some in enumerate((samples, *copies) if chosen.any() else ()):
            own = some.where(chosen)
            nothing = torch.zeros(*own.visual.shape, 0, dtype=torch.float32, device=own.visual.device)
            # Another number of the copy: other draws than those of the random sets.
            found = probes(self.plan, own, nothing, self.recorder.sizes, -1 - copy, scores=self._scores(own))
            self.recorder.record(own, -1 - copy, list(found))

    def _scores(self, samples: Samples) -> Tensor:
        """Return scores with a standard deviation of 1 over a sample's tokens: float [B, T]."""
        seen, visual = samples.seen, samples.visual
        folds = fold_of(samples.images, self.plan.settings.folds)
        scores = torch.zeros(visual.shape, dtype=torch.float64, device=visual.device)
        for number in folds.unique().tolist():
            every = images_to_samples(
                score_tokens(Learned(self.networks[number]), seen, visual), seen.valid, visual, 0.0
            )
            scores = scores.where((folds != number)[:, None], every.double().nan_to_num(0.0, 0.0, 0.0))
        count = visual.sum(1, keepdim=True).clamp(min=1)
        centred = (scores - (scores * visual).sum(1, keepdim=True) / count) * visual
        return centred / (centred.square().sum(1, keepdim=True) / count).sqrt().clamp(min=1e-9)
