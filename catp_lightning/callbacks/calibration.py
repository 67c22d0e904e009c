"""`CrossAttentionCalibration`: a policy measured on a calibration split, during `trainer.predict`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from catp_lightning.answers import Answer, listening
from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.candidates import default_candidates
from catp_lightning.calibration.replay import Replay
from catp_lightning.calibration.report import log_calibration, summary_line
from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.dropping import DecoderEntry, Prompt
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.families import find_family
from catp_lightning.locations import budget_file_name
from catp_lightning.observation import Observation
from catp_lightning.observing import Observer
from catp_lightning.policy import PruningPolicy, check_keep
from catp_lightning.pruning import refuse_unprunable


class CrossAttentionCalibration(LoopContext):
    """Compares candidate policies with the unpruned model's own answers and saves the best for each budget.

    `trainer.predict` returns its usual, unpruned predictions. After each batch the language model alone answers it
    again, under every candidate at every budget; vision runs once. No labels are needed. The split is divided by
    image: one part chooses, the other checks, and the checked figures are the ones to quote. Every candidate's
        figures are kept in the policy's evidence.

    Args:
        path: where the policy goes: a file, or a folder that gets `policy.json`; with several budgets a folder that
            gets one `keep-<value>.json` each. Written once, atomically, at the end.
        keep: the budget, or several: a float in (0, 1] is a share, an int >= 1 a number of tokens.
        model: the name of the submodule to calibrate, where the module holds several supported models.

    Attributes:
        policies: the policies of the last run, in the order of `keep`.

    Raises:
        PolicyError: a budget is not allowed, a file is named for several budgets, or the split has too few images.
        PruningError: the model cannot be pruned, or its answers are sampled.

    Example::

        trainer = Trainer(callbacks=[CrossAttentionCalibration("policy.json", keep=0.25)])
        trainer.predict(module, calibration_loader)
    """

    def __init__(
        self,
        path: str | Path = "policy.json",
        keep: float | int | Sequence[float | int] = 0.5,
        *,
        model: str | None = None,
    ) -> None:
        super().__init__(("predict",))
        self.path, self.model = Path(path), model
        self.several = isinstance(keep, Sequence)
        self.budgets: tuple[float | int, ...] = tuple(keep) if isinstance(keep, Sequence) else (keep,)
        for budget in self.budgets:
            check_keep(budget)
        if self.several and self.path.suffix:
            raise PolicyError(f"path is {str(path)!r}, a file, but several budgets are asked for: give a folder.")
        self.policies: list[PruningPolicy] = []
        self._calibrator: Calibrator | None = None
        self._entry: DecoderEntry | None = None
        self._observer: Observer | None = None
        self._prompts: list[tuple[Prompt, Observation]] = []
        self._answers: list[Answer] = []

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        family = find_family(pl_module, self.model)
        refuse_unprunable(pl_module, family)
        self._calibrator = Calibrator(family, default_candidates(family), self.budgets)
        self._calibrator.sums.to(pl_module.device)
        self._observer = Observer(family, self._calibrator.needs)
        self._entry = DecoderEntry(family, self._record)
        rank_zero_info(
            f"catp: comparing {len(self._calibrator.candidates)} candidates with the unpruned model at "
            f"{', '.join(f'keep {keep}' for keep in self.budgets)}."
        )
        try:
            with ExitStack() as stack:
                stack.enter_context(self._observer.watching())
                stack.enter_context(self._entry.dropping())
                stack.enter_context(listening(family, self._answers.append))
                yield
        finally:
            self._calibrator = self._observer = self._entry = None
            self._prompts.clear()
            self._answers.clear()

    def _record(self, prompt: Prompt) -> Tensor:
        assert self._observer is not None
        self._prompts.append((prompt, self._observer.take()))
        return torch.ones_like(prompt.visual)  # nothing is dropped: predictions stay the usual ones

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._calibrator is None or self._entry is None or self._observer is None:
            return
        if len(self._prompts) != len(self._answers):
            raise PruningError(
                f"The step sent {len(self._prompts)} prompts to the language model but got {len(self._answers)} "
                "answers from the model's own generate or forward. Call those, not its language model's."
            )
        self._entry.active = self._observer.active = False
        try:
            with torch.no_grad(), trainer.precision_plugin.predict_step_context():
                for (prompt, seen), answer in zip(self._prompts, self._answers, strict=True):
                    self._calibrator.update(Replay.of(self._calibrator.family, prompt, answer), seen)
        finally:
            self._entry.active = self._observer.active = True
            self._prompts.clear()
            self._answers.clear()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._calibrator is None:
            return
        self.policies = self._calibrator.policies()
        if trainer.is_global_zero:
            log_calibration(trainer.loggers, self.policies, [self._save(policy) for policy in self.policies])
        for policy in self.policies:
            rank_zero_info(f"catp: {summary_line(policy)}")
        rank_zero_info(f"catp: saved to {self.path}.")

    def _save(self, policy: PruningPolicy) -> Path:
        return policy.save(self.path / budget_file_name(policy.keep) if self.several else self.path)

    def __getstate__(self) -> dict[str, Any]:
        inside: dict[str, Any] = {
            "_calibrator": None,
            "_entry": None,
            "_observer": None,
            "_prompts": [],
            "_answers": [],
        }
        return {**super().__getstate__(), **inside}
