"""`CrossAttentionCalibration`: a policy measured on a calibration split, during `trainer.predict`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.recorder import Recorder
from catp_lightning.calibration.replay import Replay
from catp_lightning.calibration.report import log_calibration, summary_line
from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.families import find_family
from catp_lightning.locations import budget_file_name
from catp_lightning.observation import Observation
from catp_lightning.policy import Budget, PruningPolicy, check_keep
from catp_lightning.pruning import refuse_unprunable


@dataclass
class _Run:
    """What lives while one predict loop runs."""

    calibrator: Calibrator
    recorder: Recorder
    batches: int = 0


class CrossAttentionCalibration(LoopContext):
    """Compares candidate policies with the unpruned model's own answers and saves the best for each budget.

    `trainer.predict` returns its usual, unpruned predictions, and nothing needs labels. The split is divided by image.
    During the loop, random subsets measure on the first part what each visual token is worth; at its end the user's
    step runs over the split once more, and every candidate answers the second part again, at every budget: the one that
    diverges least from the unpruned answers is chosen. On the third part nothing is decided, so its figures are those
    to quote. Vision runs once for all candidates. Every candidate's figures are kept in the policy's evidence.

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
        keep: Budget | Sequence[Budget] = 0.5,
        *,
        model: str | None = None,
    ) -> None:
        super().__init__(("predict",))
        self.path, self.model = Path(path), model
        self.several = isinstance(keep, Sequence) and not isinstance(keep, str)
        self.budgets: tuple[int | float, ...] = tuple(keep) if isinstance(keep, Sequence) else (keep,)
        for budget in self.budgets:
            check_keep(budget)
        if self.several and self.path.suffix:
            raise PolicyError(f"path is {str(path)!r}, a file, but several budgets are asked for: give a folder.")
        self.policies: list[PruningPolicy] = []
        self._run: _Run | None = None

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        family = find_family(pl_module, self.model)
        refuse_unprunable(pl_module, family)
        calibrator = Calibrator(family, self.budgets, pl_module.device)
        recorder = Recorder(family, calibrator.needs)
        self._run = _Run(calibrator, recorder)
        rank_zero_info(f"catp: measuring what each visual token is worth, at {_listed(self.budgets)}.")
        try:
            with recorder.recording():
                yield
        finally:
            self._run = None

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._run is not None:
            self._run.batches += 1
            _replay(trainer, self._run.recorder, self._run.calibrator.probe)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None:
            return
        calibrator = self._run.calibrator
        calibrator.fit()
        rank_zero_info(f"catp: comparing {len(calibrator.candidates[0])} candidates with the unpruned model.")
        self._compare(trainer, pl_module, self._run)
        self.policies = calibrator.policies()
        if trainer.is_global_zero:
            log_calibration(trainer.loggers, self.policies, [self._save(policy) for policy in self.policies])
        for policy in self.policies:
            rank_zero_info(f"catp: {summary_line(policy)}")
        rank_zero_info(f"catp: saved to {self.path}.")

    def _compare(self, trainer: Trainer, pl_module: LightningModule, run: _Run) -> None:
        """The user's step once more on every batch: candidates can only be built when all probes are in."""
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
        batches = tqdm(_batches_again(trainer), total=run.batches, desc="catp: comparing", disable=hidden)
        seen = 0
        for arguments in batches:
            seen += 1
            trainer.strategy.predict_step(*arguments)
            _replay(trainer, run.recorder, run.calibrator.compare)
        if seen != run.batches:
            raise PruningError(
                f"The calibration loader gave {run.batches} batches at first and {seen} when asked again. Calibration "
                "reads its split twice: give a DataLoader over a data set, not an iterator that ends."
            )

    def _save(self, policy: PruningPolicy) -> Path:
        return policy.save(self.path / budget_file_name(policy.keep) if self.several else self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}


def _replay(trainer: Trainer, recorder: Recorder, use: Callable[[Replay, Observation], None]) -> None:
    """Answer again what the step that just ran asked, under the same precision."""
    with recorder.recorded() as pairs, torch.no_grad(), trainer.precision_plugin.predict_step_context():
        for replay, seen in pairs:
            use(replay, seen)


def _batches_again(trainer: Trainer) -> Iterator[tuple[Any, ...]]:
    """The arguments of `predict_step` for every batch of this process, prepared as the predict loop prepares them."""
    loaders = trainer.predict_dataloaders
    loaders = loaders if isinstance(loaders, list) else [loaders]
    for index, (loader, most) in enumerate(zip(loaders, trainer.predict_loop.max_batches, strict=True)):
        for number, batch in enumerate(islice(loader, most if isinstance(most, int) else None)):
            converted = trainer.precision_plugin.convert_input(batch)
            prepared = trainer.lightning_module._on_before_batch_transfer(converted, dataloader_idx=index)
            moved = trainer.strategy.batch_to_device(prepared, dataloader_idx=index)
            yield (moved, number, index) if len(loaders) > 1 else (moved, number)


def _listed(budgets: Sequence[int | float]) -> str:
    return ", ".join(f"keep {keep}" for keep in budgets)
