"""`CrossAttentionCalibration`: a policy measured on a calibration split, during `trainer.predict`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from tqdm import tqdm

from catp_lightning.calibration.budget import GRID, Promise, descending
from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.competition import Race
from catp_lightning.calibration.controls import doubts
from catp_lightning.calibration.identity import batch_fingerprints, model_fingerprint
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.recorder import Recorder
from catp_lightning.calibration.report import PAGE, report, report_folder
from catp_lightning.calibration.resume import CalibrationCheckpoint
from catp_lightning.calibration.stages import Samples
from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.callbacks.loaders import Amount, refuse_unordered
from catp_lightning.callbacks.signals import end_if_told, ended_by, tell
from catp_lightning.callbacks.steps import StepFunction, batches_again, recorded_steps
from catp_lightning.callbacks.strategies import on_first, refuse_sharded
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.families import Family, find_family
from catp_lightning.files import check_writable
from catp_lightning.locations import POLICY, budget_file_name, policies_beside
from catp_lightning.locks import only_run, refuse_running
from catp_lightning.policy import Budget, PruningPolicy, check_keep
from catp_lightning.progress import Lines, batch_of, shows_bars
from catp_lightning.refusals import compiled_inside, occupied, refuse_unprunable
from catp_lightning.saying import rank_zero_info, rank_zero_warn

MANY = 2**20  # tokens; where images differ in their number shares are put in order, and then numbers of tokens

_SHARDED = (
    ": every forward of it waits for all processes, but each answers its own batches again, as often as those need. "
    "Nor can a process that holds a part of the weights tell which model it is. Calibrate where the model is whole, "
    "on one device or under DDP, and give the policy to TokenPruning under this strategy."
)


@dataclass
class _Run:
    """What lives while one predict loop runs."""

    calibrator: Calibrator
    recorder: Recorder
    partial: CalibrationCheckpoint
    amount: Amount
    lines: Lines
    step: StepFunction = field(init=False)
    batches: int = 0
    replaying: float = 0.0  # seconds
    started: float = field(default_factory=time.monotonic)


class CrossAttentionCalibration(LoopContext):
    """Compares candidate policies with the unpruned model's own answers and saves the best for each budget.

    `trainer.predict` returns its usual, unpruned predictions, and nothing needs labels. The split is divided by image.
    During the loop, random subsets of the larger part measure what each visual token, attention head and layer is
    worth; at its end the user's step runs over the split a few times more, and candidates, each fitted without the
    images it answers, answer that part again at every budget: losers leave early, and the one that diverges least from
    the unpruned answers is chosen. On the other part nothing is decided, so its figures are those to quote. Vision runs
    once a batch for all candidates. Every candidate's figures are kept in the policy's evidence; a report with tables
    and plots is written beside the policy.

    A run that was interrupted, even killed, goes on where it was when the same is started again. SIGTERM and SIGINT end
    it at once, with exit code 143 and 130, after what was measured is saved.

    Args:
        path: where the policy goes: a file, or a folder that gets `policy.json`; with several budgets a folder that
            gets one `keep-<value>.json` each. Written atomically, at the end.
        keep: the budget, or several: a float in (0, 1] is a share, an int >= 1 a number of tokens. None: 0.5; or, with
            `max_disagreement`, a grid of shares from 3/4 to 1/16.
        max_disagreement: the budget as a promise: of all budgets, walked down from the largest, the last is taken at
            which the answers to at most this share of new images change, in (0, 1). One policy is saved.
        confidence: of that promise, in (0, 1).
        model: the name of the submodule to calibrate, where the module holds several supported models.
        scorer: the one method to calibrate, its layers and head weights; None: every rule that drops before the
            decoder competes. A method that drops inside the decoder is calibrated only by its name: its first layers
            read all tokens, so that at the same budget it is no rival of the others.
        scorer_args: its arguments: of "fastv" the layer where tokens leave, {"layer": 2}.
        selector: its selector; None: its own.
        guide: the smaller model that the scorer "sgl" asks, or a module that holds one, on its device.

    Attributes:
        policies: the policies of the last run, in the order of `keep`; with a promise one.

    Raises:
        PolicyError: a budget is not allowed, a file is named for several budgets, the split has too few images or comes
            in another order each time, another calibration is writing to `path`, or an interrupted one there had other
            settings, another model or other data.
        PruningError: the model cannot be pruned, or its answers are sampled; at setup, its weights are sharded.
        OSError: at setup, `path` cannot be written; at the end, it cannot be any more. What was measured is then still
            in the file beside it, and the same, started again, only saves.

    Example::

        trainer = Trainer(callbacks=[CrossAttentionCalibration("policy.json", keep=0.25)])
        trainer.predict(module, calibration_loader)
    """

    def __init__(
        self,
        path: str | Path = "policy.json",
        keep: Budget | Sequence[Budget] | None = None,
        *,
        max_disagreement: float | None = None,
        confidence: float = 0.95,
        model: str | None = None,
        scorer: str | None = None,
        scorer_args: Mapping[str, Any] | None = None,
        selector: str | None = None,
        guide: nn.Module | None = None,
    ) -> None:
        super().__init__(("predict",))
        self.path, self.model = Path(path), model
        self.promise = None if max_disagreement is None else Promise(max_disagreement, confidence)
        if keep is None:
            keep = 0.5 if self.promise is None else list(GRID)
        self.several = isinstance(keep, Sequence) and not isinstance(keep, str) and self.promise is None
        self.budgets: tuple[int | float, ...] = tuple(keep) if isinstance(keep, Sequence) else (keep,)
        for budget in self.budgets:
            check_keep(budget)
        if self.several and self.path.suffix:
            raise PolicyError(f"path is {str(path)!r}, a file, but several budgets are asked for: give a folder.")
        if scorer is None and (scorer_args or selector or guide is not None):
            raise PolicyError(
                "scorer_args, selector and guide are those of a scorer: name it, scorer='fastv' for example."
            )
        self.guide = guide
        self.method = None if scorer is None else PruningPolicy(scorer, scorer_args or {}, selector)
        if scorer == "visual-exit":
            _check_exit(self.budgets, scorer_args or {})
        self.policies: list[PruningPolicy] = []
        self.summary: list[str] = []
        self._run: _Run | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            refuse_sharded(trainer, "CrossAttentionCalibration", _SHARDED)
            on_first(trainer, self._refuse_unwritable)
            on_first(trainer, lambda: refuse_running(self._stem(), PolicyError))

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        family = find_family(pl_module, self.model)
        refuse_unprunable(pl_module, family)
        amount = refuse_unordered(trainer)
        plan = Plan.of(family, self.method, self.guide)
        tokens = family.tokens_per_image or MANY
        budgets = self.budgets if self.promise is None else tuple(descending(self.budgets, tokens))
        if more := [keep for keep in budgets if isinstance(keep, int) and keep > tokens]:
            rank_zero_warn(
                f"keep is {', '.join(map(str, more))} tokens, and every image of {type(family.model).__name__} has "
                f"{tokens}: a policy at that budget prunes nothing. Give a smaller number, or a share."
            )
        calibrator = Calibrator(plan, budgets, self.promise, pl_module.device)
        recorder = Recorder(plan, calibrator.needs)
        settings = self._settings(trainer, family)
        with only_run(self._stem(), trainer.global_rank, PolicyError):
            partial = CalibrationCheckpoint(self._partial_file(trainer), settings)
            run = _Run(calibrator, recorder, partial, amount, Lines(calibrator.stage.title))
            done = self._begin(run)
            again = f" {done} batches of an interrupted calibration are taken over." if done else ""
            rank_zero_info(f"catp: {calibrator.stage.title}, at {_listed(budgets)}.{again}")
            try:
                with (
                    nullcontext() if _is_hidden(trainer) else run.lines,
                    occupied(family),
                    compiled_inside(pl_module, family.model),
                    recorder.recording(),
                    recorded_steps(trainer.strategy, recorder) as run.step,
                ):
                    self._run = run
                    yield
            finally:
                self._run = None

    def _settings(self, trainer: Trainer, family: Family) -> dict[str, Any]:
        """What the sums of this process depend on."""
        return {
            "catp-lightning": version("catp-lightning"),
            "keep": [repr(keep) for keep in self.budgets],
            "promise": None if self.promise is None else [self.promise.max_disagreement, self.promise.confidence],
            "process": f"{trainer.global_rank} of {trainer.world_size}",
            "precision": trainer.precision,
            "method": None if self.method is None else self.method.to_dict(),
            "guide": None if self.guide is None else model_fingerprint(self.guide),
            "batches": [str(number) for number in trainer.num_predict_batches],  # "inf" of a loader without a length
            "model": model_fingerprint(family.model),
        }

    def _partial_file(self, trainer: Trainer) -> Path:
        """Of this process, beside the policy."""
        stem = self._stem()
        return stem.with_name(f"{stem.name}.partial-{trainer.global_rank}.safetensors")

    def _stem(self) -> Path:
        return self.path if self.path.suffix else self.path / "policy"

    @staticmethod
    def _begin(run: _Run) -> int:
        """Take over what an interrupted run has of this stage: how many batches."""
        stage = run.calibrator.stage
        # What a later stage does depends on every process's data: a process that starts anew may change it.
        later = (stage.rules, stage.alive, run.calibrator.parts) if isinstance(stage, Race) else ()
        return run.partial.begin(repr((stage.title, *later)), stage.metrics)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._run is not None:
            before = time.monotonic()
            self._read_batch(trainer, self._run, self._run.batches)
            self._run.batches += 1
            self._run.replaying += time.monotonic() - before

    def _read_batch(self, trainer: Trainer, run: _Run, number: int) -> None:
        """Answer again what the step that just ran asked, under the same precision."""
        run.lines.now = f"{run.calibrator.stage.title}, {batch_of(number + 1, trainer.num_predict_batches)}"
        with run.recorder.recorded() as pairs, torch.no_grad(), trainer.precision_plugin.predict_step_context():
            batch = [Samples.of(*pair) for pair in pairs]
            marks = batch_fingerprints(batch)
            if run.partial.has(number, marks):
                return
            if number == 0 and self.promise is not None:
                run.amount.check(sum(len(samples.images) for samples in batch), self.promise)
            for samples in batch:
                run.calibrator.see(samples)
            run.partial.add(marks, run.calibrator.stage.metrics)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None:
            return
        run = self._run
        plain = time.monotonic() - run.started - run.replaying
        while self._finish(run):
            run.lines.now = run.calibrator.stage.title
            rank_zero_info(f"catp: {run.lines.now}.")
            self._read_again(trainer, run, self._begin(run))
        self.policies = run.calibrator.policies()
        for doubt in doubts(self.policies):
            rank_zero_warn(doubt)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # its policy must not replace one that was measured
            rank_zero_info("catp: nothing is saved by a fast_dev_run.")
        else:
            on_first(trainer, lambda: self._save(trainer, run, plain))
        run.partial.delete()  # not before all is written: what is started again then has nothing left to measure

    def save_what_was_done(self, trainer: Trainer, error: BaseException) -> None:
        if self._run is None:
            return
        run = self._run
        if isinstance(error, Exception):  # the batch that failed may fail again: what was saved last is gone on with
            return
        saved = run.partial.flush()
        if not trainer.is_global_zero:
            return
        if saved:
            tell(
                f"ended by {ended_by(error)}. What was measured is saved in {str(run.partial.path)!r}, up to batch "
                f"{run.partial.batches} of '{run.calibrator.stage.title}': the same command goes on from there."
            )
        elif not run.partial.batches:
            tell(f"ended by {ended_by(error)}, before a batch was measured: the same command goes on from the start.")

    def take_part(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_predict_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "predict" and trainer.world_size == 1 and not any(trainer.num_predict_batches):
            rank_zero_warn(f"CrossAttentionCalibration read no batch, so {self.path} was not written.")  # no loop ran
        for line in self.summary:  # as late as can be: progress bars write until the loop has ended
            rank_zero_info(line)
        self.summary = []

    @staticmethod
    def _finish(run: _Run) -> bool:
        """End a stage; what it added up is saved before, so that it need not be done again."""
        run.partial.finish(run.batches, run.calibrator.stage.metrics)
        try:
            return run.calibrator.finish()
        except PolicyError:  # too few images: with more it is another calibration
            run.partial.delete()
            raise

    def _read_again(self, trainer: Trainer, run: _Run, done: int) -> None:
        """The user's step once more on every batch that is not in the sums: what is compared depends on all before."""
        if done == run.batches:
            return
        hidden = _is_hidden(trainer) or not shows_bars()
        batches = tqdm(batches_again(trainer), total=run.batches, desc="catp", disable=hidden)
        seen = 0
        for number, arguments in enumerate(batches):
            seen += 1
            end_if_told()
            if number >= done:
                run.step(*arguments)
                self._read_batch(trainer, run, number)
        if seen != run.batches:
            run.partial.forget()
            raise PruningError(
                f"The calibration loader gave {run.batches} batches at first and {seen} when asked again. Calibration "
                "reads its split several times: give a DataLoader over a data set, not an iterator that ends."
            )

    def _save(self, trainer: Trainer, run: _Run, plain: float | None) -> None:
        """The policies and their report."""
        run.lines.now = "writing policies and their report"
        files = [policy.save(self._file(policy.keep)) for policy in self.policies]
        folder, seconds = report_folder(self.path), run.partial.seconds
        self.summary = report(self.policies, files, folder, trainer.loggers, seconds, plain, trainer.global_step)
        rank_zero_info(f"catp: saved to {self.path}, with a report in {folder}.")
        if (self.several or not self.path.suffix) and (left := policies_beside(files)):
            names = ", ".join(sorted(file.name for file in left))
            rank_zero_warn(
                f"{self.path} held {names:.200} before, which this calibration did not measure; what is loaded from "
                "there warns. Delete what is out of date, or give each calibration a folder of its own."
            )

    def _refuse_unwritable(self) -> None:
        """Raise OSError where what is found could not be saved."""
        for file in (*map(self._file, self.budgets), report_folder(self.path) / PAGE):
            check_writable(file)

    def _file(self, keep: int | float) -> Path:
        if self.several:
            return self.path / budget_file_name(keep)
        return self.path if self.path.suffix else self.path / POLICY

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}


def _is_hidden(trainer: Trainer) -> bool:
    """Whether nobody is to be told how far a stage is."""
    return trainer.progress_bar_callback is None or not trainer.is_global_zero


def _check_exit(budgets: Sequence[int | float], args: Mapping[str, Any]) -> None:
    """Raise PolicyError where a calibration of visual exit is told what it is to find, or gets budgets of tokens."""
    if "layer" in args or not all(isinstance(keep, float) for keep in budgets):
        raise PolicyError(
            f"visual-exit is calibrated with keep {list(budgets)} and scorer_args {dict(args)}: its budgets are shares "
            "of the decoder's layers that read visual tokens, floats in (0, 1], and give the layer; leave `layer` out. "
            "max_disagreement finds the first layer at which they may leave."
        )


def _listed(budgets: Sequence[int | float]) -> str:
    return ", ".join(f"keep {keep}" for keep in budgets)
