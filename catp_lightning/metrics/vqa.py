"""VQA accuracy, as the official evaluation computes it.

Metrics count in int64, so that any number of processes and batches gives the same result to the last bit; results are
float32, because Apple's MPS devices have no float64.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe (girl's), the colon (2:50), or the period (2.5)
_COMMA_IN_NUMBER = re.compile("[0-9],[0-9]")
_FINAL_PERIOD = re.compile(r"\.(?![0-9])")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
# The official list: a word of an answer that lacks exactly one apostrophe of one of these contractions is given it.
# (Officially somebody'd loses its apostrophe; either way its two spellings are equal.)
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COMPLETED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, sign in enumerate(word)
    if sign == "'"
}


def normalise_answer(text: str) -> str:
    """Normalise an answer as the official VQA evaluation does before it compares answers.

    Punctuation other than apostrophe, colon and period becomes a space; it is removed where that mark stands beside a
    space or the answer has a comma between digits. Periods are removed unless a digit follows; letters become lower
    case; number words up to ten become digits ("none" is 0); articles are removed; missing apostrophes of common
    contractions are added.

    >>> normalise_answer("The two dogs.")
    '2 dogs'
    >>> normalise_answer("$100,978"), normalise_answer("2.5 m."), normalise_answer("dont know")
    ('$100978', '2.5 m', "don't know")
    >>> normalise_answer("black-and-white"), normalise_answer("left, right")
    ('black and white', 'left right')
    """
    text = text.strip()
    number = _COMMA_IN_NUMBER.search(text)
    marks = {
        ord(mark): "" if number or f"{mark} " in text or f" {mark}" in text else " "
        for mark in set(text).intersection(_PUNCTUATION)
    }
    words = _FINAL_PERIOD.sub("", text.translate(marks)).lower().split()
    words = [_DIGITS.get(word, word) for word in words]
    return " ".join(_COMPLETED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> int:
    """Official VQA accuracy of one prediction against ten answers, in thirtieths (0 to 30), so that sums are exact.

    Each of the ten people is left out once; the accuracy against the other nine is min(1, equal answers / 3), and the
    mean over the ten is taken. Prediction and answers are normalised, except where all ten people gave the same answer:
    then the official evaluation compares the text as written, and "Yes" is not "yes".

    Raises:
        ValueError: there are not ten answers.

    >>> vqa_score("Two dogs", ["2 dogs"] * 2 + ["dogs"] * 8)  # 8 x 2/3 + 2 x 1/3, by ten
    18
    >>> vqa_score("Yes", ["yes"] * 10), vqa_score("Yes", ["yes"] * 9 + ["no"])
    (0, 30)
    """
    if len(answers) != 10:
        raise ValueError(f"VQA accuracy is defined for ten answers a question, got {len(answers)}: {list(answers)}.")
    prediction, answers = _plain(prediction), [_plain(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    return thirtieths(answers.count(prediction))


def thirtieths(equal: int) -> int:
    """Accuracy of a prediction that equals `equal` of ten answers, in thirtieths: the mean over leaving each out.

    >>> [thirtieths(equal) for equal in range(6)]
    [0, 9, 18, 27, 30, 30]
    """
    return (10 - equal) * min(3, equal) + equal * min(3, equal - 1)


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


# Updates make new tensors instead of adding in place: a state that was reset under inference_mode may not be changed in
# place by a later validation inside fit.


class VQAAccuracy(Metric):
    """VQA accuracy by the official ten-answer rule (`vqa_score`): mean over questions, in [0, 1].

    >>> accuracy = VQAAccuracy()
    >>> accuracy.update(["yes", "3"], [["yes"] * 10, ["2"] * 8 + ["3"] * 2])
    >>> accuracy.compute()
    tensor(0.8000)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    thirtieths: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("thirtieths", torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
        """Add B predictions and the ten answers to each question.

        Raises:
            ValueError: there are not as many lists of answers as predictions, or not ten answers in a list.
        """
        scores = [vqa_score(*pair) for pair in zip(predictions, answers, strict=True)]
        self.thirtieths = self.thirtieths + sum(scores)
        self.total = self.total + len(scores)

    def compute(self) -> Tensor:
        return self.thirtieths.float() / (30 * self.total).float()
