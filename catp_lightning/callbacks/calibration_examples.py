"""Examples for a calibration's page: samples of the checking part, asked again under the policies that were saved."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice, starmap
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.report.evidence import budget_name
from catp_lightning.calibration.report.questions import decoded
from catp_lightning.callbacks.calibration_run import CalibrationRun
from catp_lightning.callbacks.steps import batches_again, unshared
from catp_lightning.errors import PolicyError
from catp_lightning.pages import Example
from catp_lightning.plots import kept_tokens
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning.answers import Answer, listening
from catp_lightning.pruning.pruner import Pruner
from catp_lightning.pruning.record import Prefill
from catp_lightning.pruning.shown import Shown
from catp_lightning.utils.messages import rank_zero_warn

BATCHES = 4
"""Number of batches that are answered again for one policy, once without pruning and once under it."""

MOST = 32
"""Number of examples of all policies together: each is drawn, in about 0.15 seconds."""

Wanted = dict[int, set[int]]
"""Checksums of samples (image and question) by the number of their batch."""

Asked = tuple[Tensor, Tensor]
"""Of the samples of one call: their checksums, int64 [B], and token ids of the text, int64 [B, R], then -1."""


def checked_number(examples: int) -> int:
    """Return a number of examples.

    Raises:
        PolicyError: it is no whole number from 0 on.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 0:
        raise PolicyError(f"examples is {examples!r:.200}; it is a whole number of questions of each kind, 0 for none.")
    return examples


def examples_of(
    trainer: Trainer, run: CalibrationRun, policies: Sequence[PruningPolicy], most: int, guide: nn.Module | None = None
) -> list[Example]:
    """Ask samples of this process's checking part again, and return what each policy kept and answered.

    If that fails there is a warning and no example: all is measured by now, and policies are saved.

    The user's step runs again on a few batches, found by what the checking part measured. Pictures are drawn while
    their batch is there: none is held longer, and nothing was held for them before.

    Args:
        trainer: the trainer, in its predict loop.
        run: the calibration, after its last pass.
        policies: its policies.
        most: number of samples of each policy whose answer it keeps, and of those whose answer it changes; fewer where
            there are none, or where all policies together would have more than `MOST`. 0: no step runs.
        guide: the model that the scorer `sgl` reads.
    """
    if not most:
        return []
    run.lines.now = "asking a few questions again, for the report"
    try:
        return _asked_again(trainer, run, policies, min(most, max(1, MOST // (2 * len(policies)))), guide)
    except Exception as error:  # of any type: the user's step and data run again
        rank_zero_warn(f"The report shows no examples, for they failed ({type(error).__name__}: {error!s:.200}).")
        return []


def _asked_again(
    trainer: Trainer, run: CalibrationRun, policies: Sequence[PruningPolicy], most: int, guide: nn.Module | None
) -> list[Example]:
    assert run.found is not None
    wanted = [wanted_samples(run.keys, *run.found.checked_answers(policy), most) for policy in policies]
    numbers = {number for own in wanted for number in own}
    found: list[list[Example]] = [[] for _ in policies]
    for number, arguments in islice(enumerate(batches_again(trainer)), max(numbers, default=-1) + 1):
        if number in numbers:
            those = [place for place, own in enumerate(wanted) if number in own]
            unpruned = _unpruned(run, arguments)
            for place in those:
                calls = _pruned(run, policies[place], guide, arguments)
                keys = wanted[place][number]
                found[place] += _examples(trainer, run, policies[place], keys, unpruned, calls)
                gc.collect()  # figures are cycles of references, and each holds some 10 MiB until they are collected
    return [one for own in found for one in sorted(own, key=lambda example: example.agrees)]


def wanted_samples(batches: Sequence[Tensor], keys: np.ndarray, agreed: np.ndarray, most: int) -> Wanted:
    """Return the samples to show, from at most `BATCHES` batches, the ones with most samples that disagree.

    Args:
        batches: int64 [B], checksums of the samples of each batch.
        keys: int64 [N], checksums of the samples of the checking part.
        agreed: bool [N], True if the pruned answer is the unpruned one.
        most: number of samples of each kind.
    """
    place = {key: number for number, own in reversed(list(enumerate(batches))) for key in own.tolist()}
    found: Wanted = {}
    for kind in (False, True):  # those that disagree first: they are few
        own = [key for key in dict.fromkeys(keys[agreed == kind].tolist()) if key in place]
        left, counts = most, Counter(place[key] for key in own)
        for number in sorted(counts, key=lambda number: (number not in found, -counts[number], number)):
            if left > 0 and (number in found or len(found) < BATCHES):
                chosen = [key for key in own if place[key] == number][:left]
                found.setdefault(number, set()).update(chosen)
                left -= len(chosen)
    return found


def _unpruned(run: CalibrationRun, arguments: Sequence[Any]) -> tuple[list[Asked], list[Answer]]:
    """Run the user's step on a batch unpruned; return what each call with images asked, and answers of every call."""
    answers: list[Answer] = []
    with listening(run.recorder.plan.family, answers.append):
        run.step(*unshared(tuple(arguments)))
    run.recorder.again = None
    with run.recorder.recorded() as found:
        return [(samples.keys, samples.replay.text_ids) for samples in starmap(Samples.of, found)], answers


def _pruned(
    run: CalibrationRun, policy: PruningPolicy, guide: nn.Module | None, arguments: Sequence[Any]
) -> list[tuple[Answer, Sequence[Shown]]]:
    """Run the user's step on a batch under a policy; return the answers of every call, and what is kept in it."""
    family, answers, prefills = run.recorder.plan.family, list[Answer](), list[Prefill]()
    pruner = Pruner(family, policy, guide=guide, on_prefill=prefills.append, show=True)
    with pruner.installed(), listening(family, answers.append):
        run.unrecorded(*unshared(tuple(arguments)))
    return [(answer, prefill.shown) for answer, prefill in zip(answers, prefills, strict=True)]


def _examples(
    trainer: Trainer,
    run: CalibrationRun,
    policy: PruningPolicy,
    keys: set[int],
    unpruned: tuple[Sequence[Asked], Sequence[Answer]],
    pruned: Sequence[tuple[Answer, Sequence[Shown]]],
) -> Iterator[Example]:
    """Yield the examples of one batch, samples whose checksum is among `keys`, each once."""
    decode = partial(_text, (trainer.lightning_module, run.recorder.plan.family.model))
    batch, answers = unpruned
    with_images = [(full, answer, shown) for full, (answer, shown) in zip(answers, pruned, strict=True) if shown]
    left = set(keys)
    for (own, questions), (full, answer, shown) in zip(batch, with_images, strict=True):
        for row, key in enumerate(own.tolist()):
            if key not in left or not shown[row].drawable:
                continue
            left.remove(key)
            question = questions[row]
            ours, theirs = (_first_answer(one, row) for one in (full, answer))
            yield Example(
                budget_name(policy),
                ours == theirs,
                decode(question[question >= 0].tolist()),
                decode(ours),
                decode(theirs),
                kept_tokens(shown[row]).jpeg(),
            )


def _first_answer(answer: Answer, row: int) -> list[int]:
    """Return the ids of the answer to a prompt, the first of several beams."""
    place = row * (len(answer.ids) // answer.prompts)
    return [int(number) for number in torch.masked_select(answer.ids[place], answer.valid[place]).tolist()]


def _text(modules: Sequence[object], ids: Sequence[int]) -> str:
    try:
        return decoded(modules, ids)
    except Exception:  # any tokenizer may raise anything
        return f"token ids {' '.join(map(str, ids))}"
