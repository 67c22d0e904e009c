"""Accuracy by the answers of ten people, on TextVQA and VizWiz."""

from collections.abc import Sequence
from typing import ClassVar

from catp_lightning.metrics.benchmarks.mean_score import MeanScore
from catp_lightning.metrics.vqa import normalise_answer, thirtieths


def normalise_textvqa(text: str) -> str:
    """Normalise an answer as TextVQA's evaluation does (MMF, `EvalAIAnswerProcessor`).

    Letters become lower case, commas and question marks are removed, "'s" becomes a word of its own, and the rest is as
    in `normalise_answer`.

    >>> normalise_textvqa("The girl's two dogs, 1,000?")
    "girl 's 2 dogs 1000"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_answer(text.replace("\n", " ").replace("\t", " "))


class TextVQAAccuracy(MeanScore):
    """Mean accuracy by ten answers, in [0, 1], as MMF's `TextVQAAccuracyEvaluator` does.

    Each of the ten people is left out once; the accuracy against the other nine is min(1, equal answers / 3), and the
    mean over the ten is taken. Answers are always normalised, unlike VQAv2's, also where all ten people agree.

    >>> accuracy = TextVQAAccuracy()
    >>> accuracy.update(["Stop.", "7"], [["stop"] * 10, ["8"] * 8 + ["seven"] * 2])
    >>> accuracy.compute()
    {'accuracy': tensor(0.8000)}
    """

    unit: ClassVar[int] = 30

    def points(self, prediction: str, reference: Sequence[str]) -> int:
        """Return the accuracy of one prediction against ten answers, in thirtieths."""
        return thirtieths([normalise_textvqa(answer) for answer in reference].count(normalise_textvqa(prediction)))


class VizWizAccuracy(MeanScore):
    """Mean accuracy by ten answers, in [0, 1], as the VizWiz API's `vqaEval.py` does.

    As for TextVQA, but the prediction is normalised as for VQAv2, and the ten answers are compared as they are written:
    VizWiz ships them in that form.

    >>> accuracy = VizWizAccuracy()
    >>> accuracy.update(["Unanswerable.", "7"], [["unanswerable"] * 10, ["7"] * 2 + ["Seven"] * 8])
    >>> accuracy.compute()
    {'accuracy': tensor(0.8000)}
    """

    unit: ClassVar[int] = 30

    def points(self, prediction: str, reference: Sequence[str]) -> int:
        """Return the accuracy of one prediction against ten answers, in thirtieths."""
        text = prediction.replace("\n", " ").replace("\t", " ")
        return thirtieths(list(reference).count(normalise_answer(text)))
