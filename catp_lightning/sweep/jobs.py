"""One method at one budget: a real prediction run, whose answers are kept in a file of their own."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import DataError
from catp_lightning.files import read_bytes, write_json
from catp_lightning.policy import PruningPolicy
from catp_lightning.sweep.methods import Job

Predict = Callable[[Callback | None], Sequence[Any]]
"""What `trainer.predict` returns for the compared questions, with a callback or without one."""

UNPRUNED = "unpruned.json"


@dataclass(frozen=True)
class Outcome:
    """What a prediction run gave.

    Attributes:
        question_ids: in the order of the data.
        answers: one a question.
        tokens_kept: mean visual tokens kept of a sample; None: nothing was pruned.
        tokens_per_layer: mean visual tokens that a layer of the decoder reads; None: as many as were kept.
        visual_tokens: mean visual tokens of a sample before; None: nothing was pruned, or nothing was left.
    """

    question_ids: list[int]
    answers: list[str]
    tokens_kept: float | None = None
    tokens_per_layer: float | None = None
    visual_tokens: float | None = None


class Jobs:
    """Runs jobs, or reads what an earlier run of the same left.

    Args:
        folder: for a file a job.
        predict: runs the model on the compared questions.
        settings: what every answer depends on beside the policy; JSON types. A file with other settings is replaced.
        guide: gives the model that guided methods ask.
    """

    def __init__(
        self, folder: Path, predict: Predict, settings: Mapping[str, Any], guide: Callable[[], nn.Module]
    ) -> None:
        self.folder, self._predict, self._settings, self._guide = folder, predict, dict(settings), guide

    def finished(self, job: Job | None) -> Outcome | None:
        """What an earlier run left of a job, None for the unpruned model's; None where that is not the same."""
        try:
            saved = json.loads(read_bytes(self._file(job)))
            return Outcome(**saved["outcome"]) if saved["settings"] == self._of(job) else None
        except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
            return None

    def run(self, job: Job | None) -> Outcome:
        """Answer all questions, pruned by the callback that users add; None: unpruned.

        Raises:
            PruningError, PolicyError: the model cannot be pruned so.
            DataError: the module's prediction step returns something else than answers.
        """
        guide = self._guide() if job is not None and job.guided else None
        pruning = None if job is None else TokenPruning(job.policy, guide=guide)
        outcome = _outcome(self._predict(pruning), {} if pruning is None else pruning.figures)
        write_json(self._file(job), {"settings": self._of(job), "outcome": asdict(outcome)}, indent=1)
        return outcome

    def _file(self, job: Job | None) -> Path:
        return self.folder / (UNPRUNED if job is None else job.file_name)

    def _of(self, job: Job | None) -> dict[str, Any]:
        policy = None if job is None else described(job.policy)
        return dict(json.loads(json.dumps({**self._settings, "policy": policy})))  # as it comes back from a file


def described(policy: PruningPolicy) -> dict[str, Any]:
    """What a policy does, without what was found out about it."""
    return {key: value for key, value in policy.to_dict().items() if key not in ("evidence", "model")}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("catp-lightning", "torch", "transformers")}


def _outcome(predictions: Sequence[Any], figures: Mapping[str, float]) -> Outcome:
    ids, answers = [], []
    for batch in predictions:
        for item in batch if isinstance(batch, list) else [batch]:
            fields = item if isinstance(item, Mapping) else {}
            question_id, answer = fields.get("question_id"), fields.get("answer")
            if not isinstance(question_id, int) or not isinstance(answer, str):
                raise DataError(
                    "A sweep needs predict_step to return a list of {'question_id': int, 'answer': str}, as VQAModule "
                    f"does; one of what it returned is {item!r:.120}."
                )
            ids.append(question_id)
            answers.append(answer)
    if not figures:
        return Outcome(ids, answers)
    kept, share = figures["catp/tokens_kept"], figures["catp/keep_share"]
    per_layer = figures.get("catp/tokens_per_layer")
    return Outcome(ids, answers, kept, per_layer, round(kept / share, 3) if share else None)


def data_fingerprint(batches: Iterable[Any]) -> str:
    """A checksum of everything in some batches, wherever it lies: 16 hex digits."""
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
