"""Accuracy on easy-VQA."""

from catp_lightning.metrics.benchmarks.mean_score import MeanScore


class EasyVQAAccuracy(MeanScore):
    """Share of answers that equal easy-VQA's, in [0, 1].

    Its author classifies into the 13 answers, words in lower case. Predictions are brought to that form first: without
    spaces around them or a final period, in lower case.

    >>> accuracy = EasyVQAAccuracy()
    >>> accuracy.update(["Yes.", "dark red"], ["yes", "red"])
    >>> accuracy.compute()
    {'accuracy': tensor(0.5000)}
    """

    def points(self, prediction: str, reference: str) -> int:
        """Return 1 if a prediction is the answer, else 0."""
        return int(prediction.strip().rstrip(".").lower() == reference)
