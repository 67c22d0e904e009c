"""Tasks of lmms-eval as calibration splits: the questions, prompts and images that evaluation uses too."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from lmms_eval.tasks import TaskManager
from torch.utils.data import DataLoader

from catp_lightning.errors import DataError
from catp_lightning.integrations.lmms_eval.model import made
from catp_lightning.utils.messages import rank_zero_info


class Requests:
    """A batch: requests to an lmms-eval model, and by the name of each task its data.

    Not a list nor a dataclass: Lightning looks into those for tensors to move.
    """

    def __init__(self, requests: Sequence[Any], documents: Mapping[str, Any]) -> None:
        self.requests, self.documents = list(requests), documents


class LmmsModule(LightningModule):
    """Answers requests of lmms-eval with one of its own models, unpruned, in the predict step.

    Args:
        pretrained: folder or name of the model, as in lmms-eval's `--model_args pretrained=`.
        model_args: other arguments of that model, {"device_map": "cuda"} say.
        backend: name of the lmms-eval model; None: that of the model's type.
        device: device that lmms-eval's model is told; it should be that of the Trainer.
        batch_size: requests that the model answers at once.
    """

    def __init__(
        self,
        pretrained: str,
        model_args: dict[str, Any] | None = None,
        backend: str | None = None,
        device: str = "cuda",
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        arguments = {"pretrained": pretrained, **(model_args or {}), "device": device, "batch_size": batch_size}
        self.lm, self.backend = made(arguments, backend)
        self.model = self.lm.model

    def predict_step(self, batch: Requests, batch_idx: int) -> list[str]:
        self.lm.task_dict.update(batch.documents)
        return [getattr(answer, "text", answer) for answer in self.lm.generate_until(list(map(_fresh, batch.requests)))]


class LmmsTask(LightningDataModule):
    """A split of an lmms-eval task, as a loader of `Requests` for `LmmsModule`; it is never shuffled.

    Questions about an image that is evaluated are left out, by the image's pixels.

    Args:
        task: name of the task.
        split: split of the task's data; None: its training split, or the validation split if another is evaluated.
        evaluated: names of tasks whose evaluated images are left out; None: `task` itself.
        include_path: folder with more tasks, as lmms-eval's `--include_path`.
        limit: the first so many questions; None: all.

    Raises:
        DataError: there is no such task or split, it is what the task evaluates, or no question is left.
    """

    def __init__(
        self,
        task: str,
        split: str | None = None,
        evaluated: list[str] | None = None,
        include_path: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.task, self.split, self.limit = task, split, limit
        self.evaluated = [task] if evaluated is None else evaluated
        self.include_path = include_path
        self._requests: list[Any] = []
        self._documents: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the data: requests of the split, without those about images that are evaluated."""
        if self._requests:
            return
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, LmmsModule):
            raise DataError(f"LmmsTask makes requests for LmmsModule, and the module is {type(module).__name__}.")
        tasks = TaskManager(include_path=self.include_path, model_name=module.backend)
        for name in (self.task, *self.evaluated):
            if name not in tasks.all_subtasks:
                raise DataError(
                    f"lmms-eval has no task {name!r:.200}: `lmms-eval tasks subtasks` lists them; include_path= names "
                    "a folder with more."
                )
        kind: Any = "simple" if module.lm.is_simple else "chat"
        apart = tasks.load_task_or_group(self.evaluated, kind)
        own = apart.get(self.task) or tasks.load_task_or_group([self.task], kind)[self.task]
        split = self._split(own)
        chosen = tasks.load_task_or_group([{"task": self.task, "test_split": split}], kind)[self.task]
        chosen.build_all_requests(limit=self.limit)
        taken = {image for task in apart.values() for doc in task.eval_docs for image in _images(task, doc)}
        docs, found = chosen.eval_docs, chosen.instances
        self._requests = [one for one in found if taken.isdisjoint(_images(chosen, docs[one.doc_id]))]
        self._documents = {chosen.config.task: chosen.dataset}
        left = len(found) - len(self._requests)
        if not self._requests:
            raise DataError(
                f"No question of the split {split!r:.200} of {self.task} is left: its {len(found)} are about images "
                f"that {', '.join(self.evaluated)} evaluates."
            )
        rank_zero_info(
            f"catp: {len(self._requests)} questions of the split {split!r:.200} of {self.task}; {left} left out, about "
            f"images that {', '.join(self.evaluated)} evaluates"
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        requests: Any = self._requests
        collate = partial(Requests, documents=self._documents)
        return DataLoader(requests, batch_size=module.lm.batch_size, collate_fn=collate)

    def _split(self, task: Any) -> str:
        """Return the split to calibrate on; `task` is the task as it is evaluated."""
        config, splits = task.config, list(task.dataset)
        evaluated = config.test_split or config.validation_split
        named = self.split or config.training_split or config.validation_split
        if self.split is None and named in (None, evaluated) and self.task not in self.evaluated:
            named = evaluated  # a task that is there to calibrate on
        if named is None or named not in splits or (named == evaluated and self.task in self.evaluated):
            raise DataError(
                f"split={self.split!r:.200} of {self.task}: give another split of its data than the one that it "
                f"evaluates, {evaluated!r:.200}. There are {', '.join(map(repr, splits))}. If the task is there to "
                "calibrate on, name in evaluated= those that you evaluate."
            )
        return str(named)


def _images(task: Any, doc: Any) -> Iterator[str]:
    """Yield a checksum of the pixels of each image of a document."""
    visuals: Iterable[Any] = task.doc_to_visual(doc) or ()
    for visual in visuals:
        if hasattr(visual, "tobytes"):
            yield hashlib.sha256(f"{visual.size} {visual.mode}".encode() + visual.tobytes()).hexdigest()


def _fresh(request: Any) -> Any:
    """Return a request with arguments of `generate` of its own: some models write into them."""
    own = copy(request)
    own.arguments = tuple(dict(one) if isinstance(one, dict) else one for one in request.arguments)
    return own
