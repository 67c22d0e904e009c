"""Section of a calibration's page on what questions are told apart by: their components, and the network."""

from collections.abc import Callable, Sequence
from itertools import takewhile

from catp_lightning.calibration.fit.texts import QuestionComponent
from catp_lightning.calibration.report.evidence import evidence_of
from catp_lightning.policy import PruningPolicy
from catp_lightning.utils.markdown import markdown_table

SHOWN = 80
"""Most characters of a question in the table."""

Decode = Callable[[Sequence[int]], str]
"""Function that turns token ids into their text; it may fail with any exception."""


def decoded(modules: Sequence[object], ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens, by the first tokenizer that one of `modules` has.

    A tokenizer is an attribute `tokenizer`, or that of an attribute `processor`.

    Raises:
        LookupError: no module has a tokenizer. What the tokenizer itself raises is passed on.
    """
    for module in modules:
        for holder in (module, getattr(module, "processor", None)):
            tokenizer = getattr(holder, "tokenizer", None)
            if tokenizer is not None:
                return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    raise LookupError("no module has a tokenizer")


def questions_section(policy: PruningPolicy, decode: Decode) -> str:
    """Return the section on the components of questions; "" if there are none, as of questions that are all alike.

    Args:
        policy: a calibrated policy.
        decode: decodes the questions; if it fails, their token ids are shown.
    """
    components = evidence_of(policy).get("components", ())
    if not components:
        return ""
    shown = ""
    try:
        cells = _cells(components, decode)
    except Exception:  # any tokenizer may raise anything, and a table with ids is better than no calibration
        cells = _cells(components, lambda ids: " ".join(map(str, ids)))
        shown = (
            " Questions are token ids here, because neither the module nor its model has a tokenizer (an attribute "
            "called tokenizer, or that of a processor) that decodes them: give the ids, which are the policy's "
            "evidence called components, to the decode method of the model's tokenizer."
        )
    rows = [
        [number, f"{component['variance']:.1%}", *ends]
        for number, (component, ends) in enumerate(zip(components, cells, strict=True), 1)
    ]
    return (
        "## What questions are told apart by\n\n"
        "Methods that know the question read these numbers of it, the principal components of its mean embedding; "
        "each is shown by the share of the questions' variance that it has, and by the questions that are lowest and "
        f"highest in it, the extreme one first, without what all of them begin and end with.{shown}\n\n"
        f"{markdown_table(('component', 'share of variance', 'questions low', 'questions high'), rows)}\n"
        f"{_network(policy)}"
    )


def _cells(components: Sequence[QuestionComponent], decode: Decode) -> list[list[str]]:
    """Return the questions at the low and the high end of each component, without what all of them share."""
    ends = [[[decode(ids).split() for ids in end] for end in (one["low"], one["high"])] for one in components]
    every = [words for both in ends for end in both for words in end]
    first, last = _shared(every), _shared([words[::-1] for words in every])
    if first + last >= min(map(len, every), default=0):  # nothing would be left of one
        first = last = 0
    return [
        [", ".join(f'"{_short(" ".join(words[first : len(words) - last]))}"' for words in end) for end in both]
        for both in ends
    ]


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """Return the number of first words that all rows share."""
    return len(list(takewhile(lambda words: len(set(words)) == 1, zip(*rows, strict=False))))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _network(policy: PruningPolicy) -> str:
    """Say in a line what the network explains, or why there is none."""
    found = evidence_of(policy)["fitted"].get("learned")
    if found is None:
        return (
            "No network (*learned*) takes part: what one explains of the answers on images that it has not seen is too "
            "little to tell from chance, or no small sets were probed."
        )
    return (
        f"The network (*learned*), trained on {found['records']} recorded samples, explains {found['explained']:.2%} ± "
        f"{found['explained_error']:.2%} of the variance of the answers' log-probability on images that it has not "
        "seen."
    )
