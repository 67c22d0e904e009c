"""A promise in words: a section of the report, and its part of the lines for the terminal."""

from collections.abc import Iterator
from typing import Any

from catp_lightning.calibration.report.evidence import PromiseEvidence, PromiseStep, budget_name, evidence_of
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import markdown_text, one_line
from catp_lightning.utils.markdown import markdown_table


def promise_section(policy: PruningPolicy) -> str:
    """Return the section of the report on what is promised and on the test of each budget."""
    promise = evidence_of(policy)["promise"]
    most, confidence, images = promise["max_disagreement"], promise["confidence"], promise["images"]
    over, groups = _over(promise), promise.get("groups")
    within = f"in each group of {markdown_text(promise['group_by'])}, " if groups else ""
    if any(step["holds"] for step in promise["steps"]):
        said = (
            f"With confidence {confidence:.4g}, {within}the policy at {budget_name(policy)} answers at most {most:.4g} "
            f"of new {over} otherwise than the unpruned model; {_counted(promise)}."
        )
    else:
        said = (
            f"No budget was found to change at most {most:.4g} of the answers {'in each group ' if groups else ''}with "
            f"confidence {confidence:.4g}: the policy keeps all tokens, so that nothing changes."
        )
    tested = f"{promise['questions']} questions about {images} images" if over == "questions" else f"{images} images"
    together = (
        f" Each of the {len(groups)} groups is tested with confidence {promise['group_confidence']:.6g}, so that the "
        f"bounds of all hold together with {confidence:.4g}; a budget holds if it does in every group."
        if groups
        else ""
    )
    header = (promise.get("unit", "keep"), *(("group",) if groups else ()), "disagreed", "bound", "tested", "holds")
    rows = [row for step in promise["steps"] for row in _rows(promise, step)]
    return (
        f"## The promise\n\n{said} It was tested on {tested} that nothing was decided on, from the largest "
        f"budget down; the first whose bound exceeds the promise ends the test.{together}\n\n"
        + markdown_table(header, rows)
    )


def promise_kept(promise: PromiseEvidence) -> str:
    """Return what is promised and what was seen at the budget that was chosen, for the terminal."""
    last = [step for step in promise["steps"] if step["holds"]][-1]
    return (
        f"at most {promise['max_disagreement']:.4g} of new {_over(promise)} disagree{_within(promise)}, with "
        f"confidence {promise['confidence']:.4g} ({_seen(promise, last, 'did')})"
    )


def promise_broken(promise: PromiseEvidence) -> str:
    """Return why not even the largest budget keeps the promise, for the terminal."""
    first = promise["steps"][0]
    return (
        f"at {promise.get('unit', 'keep')} {first['keep']} "
        f"{_seen(promise, first, f'{_over(promise)} disagree')}, which allows up to {first['bound']:.2%}, above "
        f"{promise['max_disagreement']:.4g}"
    )


def _over(promise: PromiseEvidence) -> str:
    return promise.get("over", "images")


def _within(promise: PromiseEvidence) -> str:
    if not _grouped(promise):
        return ""
    return f" in each of {len(promise['groups'])} groups of {one_line(promise['group_by'])}"


def _grouped(promise: PromiseEvidence) -> bool:
    return "groups" in promise


def _total(promise: PromiseEvidence) -> int:
    return promise["questions"] if _over(promise) == "questions" else promise["images"]


def _counted(promise: PromiseEvidence) -> str:
    """Say what counts of an image."""
    if _over(promise) == "questions":
        return (
            "questions about one image are tested together, and no image is expected to have more "
            f"{'of one group ' if _grouped(promise) else ''}than the {promise['most_questions']} that were asked about "
            "one here"
        )
    if _grouped(promise):
        return (
            "an image counts in a group if a question of it is asked about the image, with one of these questions, "
            "drawn at random"
        )
    return "of each image one question counts, drawn at random among those asked about it"


def _seen(promise: PromiseEvidence, step: PromiseStep, verb: str) -> str:
    """Say how many disagreed at a budget; with groups, in the one with the largest bound."""
    if not _grouped(promise):
        return f"{step['disagreed']} of {_total(promise)} {verb}"
    found = max(zip(step["groups"], promise["groups"], strict=True), key=lambda pair: pair[0]["bound"])
    counted = found[1]["questions" if _over(promise) == "questions" else "images"]
    name = one_line(found[0]["name"])
    return f"{found[0]['disagreed']} of {counted} {verb} in group '{name}', which has the largest bound"


def _rows(promise: PromiseEvidence, step: PromiseStep) -> Iterator[list[Any]]:
    tested, holds = ("yes" if step[name] else "no" for name in ("tested", "holds"))
    if not _grouped(promise):
        yield [step["keep"], f"{step['disagreed']} of {_total(promise)}", f"{step['bound']:.2%}", tested, holds]
        return
    counted = "questions" if _over(promise) == "questions" else "images"
    for found, group in zip(step["groups"], promise["groups"], strict=True):
        seen = f"{found['disagreed']} of {group[counted]} {counted}"  # type: ignore[literal-required]
        yield [step["keep"], found["name"], seen, f"{found['bound']:.2%}", tested, holds]
