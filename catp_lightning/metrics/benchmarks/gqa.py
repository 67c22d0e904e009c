"""Accuracy on GQA."""

from catp_lightning.metrics.benchmarks.mean_score import MeanScore


class GQAAccuracy(MeanScore):
    """Share of answers that equal GQA's, in [0, 1], as the authors' `eval.py` counts ("accuracy").

    The authors compare texts as they are. GQA's answers are in lower case and without a final period; predictions are
    brought to that form first, as LLaVA's evaluation does.

    >>> accuracy = GQAAccuracy()
    >>> accuracy.update(["Yes.", "a dog"], ["yes", "dog"])
    >>> accuracy.compute()
    {'accuracy': tensor(0.5000)}
    """

    def points(self, prediction: str, reference: str) -> int:
        """Return 1 if a prediction is the answer, else 0."""
        return int(prediction.strip().rstrip(".").lower() == reference)
