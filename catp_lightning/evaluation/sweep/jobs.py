"""Jobs of a sweep: one method at one budget is a real prediction run, whose answers are kept in a file of their own."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import DataError
from catp_lightning.evaluation.sweep.methods import Job
from catp_lightning.evaluation.sweep.prices import Sizes
from catp_lightning.policy import PruningPolicy
from catp_lightning.pricing import Prices
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.files import read_bytes, write_json

Predict = Callable[[Callback | None], Sequence[Any]]
"""`trainer.predict` on the compared questions, with a callback or None: returns the predictions."""

UNPRUNED = "unpruned.json"
EVERYTHING = PruningPolicy(keep=1.0)
"""Policy of the unpruned run in which prompts are counted."""


@dataclass(frozen=True)
class Outcome:
    """Answers of one prediction run, and the visual tokens it kept.

    Attributes:
        question_ids: ids of the questions, in the order of the data.
        answers: one answer a question.
        tokens_kept: mean number of visual tokens kept of a sample; None: nothing was pruned.
        tokens_per_layer: mean number of visual tokens that a layer of the decoder reads; None: as many as were kept.
        visual_tokens: mean number of visual tokens of a sample before pruning; None: nothing was pruned, or no token
            was kept.
        prices: what the prefills paid, as shares of what the unpruned model pays, by unit; None: not counted.
        sizes: [rows of text, visual tokens, number of prompts], as `Sizes.to_json`; None: not counted.
        seconds: how long the run took, from the first question to the last answer, by the clock; None: of a file that
            an earlier version wrote.
        batches: number of answers of each batch; empty in a file that an earlier version wrote.
    """

    question_ids: list[int]
    answers: list[str]
    tokens_kept: float | None = None
    tokens_per_layer: float | None = None
    visual_tokens: float | None = None
    prices: dict[str, float] | None = None
    sizes: list[list[int]] | None = None
    seconds: float | None = None
    batches: list[int] = field(default_factory=list)


class Counted(TokenPruning):
    """Pruning that keeps what was counted of each prefill: `sizes`, once the loop is over."""

    def __init__(self, policy: PruningPolicy, guide: nn.Module | None) -> None:
        super().__init__(policy, guide=guide)
        self._prefills: list[Prefill] = []

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self._prefills)

    def _read_batch(self) -> None:
        if self._loop is not None:
            self._prefills += self._loop.prefills
        super()._read_batch()


class Jobs:
    """Runner of a sweep's jobs, which saves their outcomes and reuses those of an earlier run with equal settings.

    Args:
        folder: folder that gets a file for each job.
        predict: runs the model on the compared questions.
        settings: settings that every answer depends on beside the policy; JSON types. A file with other settings is
            replaced.
        guide: returns the model whose attention guided methods read.
        prices: prices of the model's prompts, to count what each run pays; None: it is not counted.
    """

    def __init__(
        self,
        folder: Path,
        predict: Predict,
        settings: Mapping[str, Any],
        guide: Callable[[], nn.Module],
        prices: Prices | None = None,
    ) -> None:
        self.folder, self._predict, self.settings, self._guide = folder, predict, dict(settings), guide
        self._prices = prices

    def finished(self, job: Job | None) -> Outcome | None:
        """Return the outcome of a job that an earlier run saved with the same settings and policy; None: there is none.

        `job` None is the unpruned run.
        """
        try:
            saved = json.loads(read_bytes(self._file(job)))
            return Outcome(**saved["outcome"]) if saved["settings"] == self._of(job) else None
        except (OSError, ValueError, KeyError, TypeError):  # no file, or a damaged one
            return None

    def run(self, job: Job | None) -> Outcome:
        """Answer all questions, pruned by `TokenPruning` as users add it (`job` None: unpruned), and save the outcome.

        Raises:
            PruningError, PolicyError: the model cannot be pruned by the job's policy.
            DataError: the module's prediction step returns something else than answers.
        """
        guide = self._guide() if job is not None and job.guided else None
        begun = time.perf_counter()
        if self._prices is None:
            pruning = None if job is None else TokenPruning(job.policy, guide=guide)
            outcome = _outcome(self._predict(pruning), {} if pruning is None else pruning.figures)
        else:
            counted = Counted(EVERYTHING if job is None else job.policy, guide)
            outcome = _outcome(self._predict(counted), {} if job is None else counted.figures)
            sizes = counted.sizes
            paid = sizes.paid(self._prices) if sizes.counts else None
            outcome = replace(outcome, prices=paid, sizes=sizes.to_json() if job is None else None)
        outcome = replace(outcome, seconds=round(time.perf_counter() - begun, 3))
        write_json(self._file(job), {"settings": self._of(job), "outcome": asdict(outcome)}, indent=1)
        return outcome

    def _file(self, job: Job | None) -> Path:
        return self.folder / (UNPRUNED if job is None else job.file_name)

    def _of(self, job: Job | None) -> dict[str, Any]:
        policy = None if job is None else described(job.policy)
        return dict(json.loads(json.dumps({**self.settings, "policy": policy})))  # as it comes back from a file


def described(policy: PruningPolicy) -> dict[str, Any]:
    """Return a policy as a dict without `evidence` and `model`: only the settings that determine what it prunes."""
    return {key: value for key, value in policy.to_dict().items() if key not in ("evidence", "model")}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("catp-lightning", "torch", "transformers")}


def _outcome(predictions: Sequence[Any], figures: Mapping[str, float]) -> Outcome:
    ids, answers = [], []
    parts = [batch if isinstance(batch, list) else [batch] for batch in predictions]
    for batch in parts:
        for item in batch:
            fields = item if isinstance(item, Mapping) else {}
            question_id, answer = fields.get("question_id"), fields.get("answer")
            if not isinstance(question_id, int) or not isinstance(answer, str):
                raise DataError(
                    "A sweep needs predict_step to return a list of {'question_id': int, 'answer': str}, as VQAModule "
                    f"does; one of what it returned is {item!r:.120}."
                )
            ids.append(question_id)
            answers.append(answer)
    batches = [len(batch) for batch in parts]
    if not figures:
        return Outcome(ids, answers, batches=batches)
    kept, share = figures["catp/tokens_kept"], figures["catp/keep_share"]
    per_layer = figures.get("catp/tokens_per_layer")
    visual_tokens = round(kept / share, 3) if share else None
    return Outcome(ids, answers, kept, per_layer, visual_tokens, batches=batches)


def data_fingerprint(batches: Iterable[Any]) -> str:
    """Return a checksum of everything in some batches, on whatever device it lies: 16 hex digits."""
    found = hashlib.sha256()
    for batch in batches:
        _add(found, batch)
    return found.hexdigest()[:16]


def _add(found: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"tensor {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=str):
            _add(found, str(key))
            _add(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)}".encode())
        for item in value:
            _add(found, item)
    else:
        found.update(f"{type(value).__name__} {value!r}".encode())
