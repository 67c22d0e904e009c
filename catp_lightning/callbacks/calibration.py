"""`CrossAttentionCalibration`: finds a pruning policy on a calibration split, during `trainer.predict`."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from catp_lightning.calibration.calibrator import calibrate, needs_of
from catp_lightning.calibration.checkpoint import CalibrationCheckpoint
from catp_lightning.calibration.identity import model_fingerprint
from catp_lightning.calibration.perturbations import Augment, perturbations, qualified
from catp_lightning.calibration.plan import Plan, check_exit
from catp_lightning.calibration.replay.memory import Memory
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.report.controls import doubts
from catp_lightning.calibration.report.report import HTML, PAGE, report, report_folder
from catp_lightning.calibration.search.promise import Over, Promise
from catp_lightning.calibration.settings import DEFAULTS, CalibrationSettings
from catp_lightning.callbacks.budgets import Budgets
from catp_lightning.callbacks.calibration_examples import checked_number, examples_of
from catp_lightning.callbacks.calibration_run import CalibrationRun, is_hidden
from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.callbacks.loaders import refuse_unordered
from catp_lightning.callbacks.steps import recorded_steps
from catp_lightning.callbacks.strategies import on_first, refuse_sharded
from catp_lightning.errors import PolicyError
from catp_lightning.models import Family, find_family
from catp_lightning.policy import Budget, PruningPolicy
from catp_lightning.policy.locations import policies_beside
from catp_lightning.pricing import PrefillProfile
from catp_lightning.pruning.refusals import compiled_inside, occupied, refuse_unprunable
from catp_lightning.utils.files import check_writable
from catp_lightning.utils.locks import only_run, refuse_running
from catp_lightning.utils.messages import rank_zero_info, rank_zero_warn
from catp_lightning.utils.progress import Lines

_SHARDED = (
    ": every forward of it waits for all processes, but each answers its own batches again, as often as those need. "
    "Nor can a process that holds a part of the weights tell which model it is. Calibrate where the model is whole, "
    "on one device or under DDP, and give the policy to TokenPruning under this strategy."
)


class CrossAttentionCalibration(LoopContext):
    """Compares candidate policies with the unpruned model's own answers and saves the best for each budget.

    `trainer.predict` returns its usual, unpruned predictions; no labels are needed. The split is divided by image.
    During the loop, random subsets of the visual tokens, on the larger part of the split, measure the worth of each
    visual token, attention head and layer. At its end the split is gone over a few times more (from main memory where
    what was recorded takes at most 2 GiB a process; else the user's step runs again), and candidates, each fitted
    without the images it answers, answer the larger part again at every budget: losers are dropped early, and the one
    that diverges least from the unpruned answers is chosen. Nothing is decided on the other part, so its figures are
    the ones to quote. The vision part of the model runs once a batch for all candidates. Every candidate's figures are
    kept in the policy's evidence; a report with tables and plots is written beside the policy.

    A run that was interrupted, even killed, is resumed when the same run is started again. SIGTERM and SIGINT end it at
    once, with exit code 143 and 130, after its measurements are saved.

    Args:
        path: where the policy is saved: a file, or a folder that gets `policy.json`; with several budgets a folder that
            gets one `keep-<value>.json` each. Written atomically, at the end.
        keep: the budget, or several: a float in (0, 1] is a share, an int >= 1 a number of tokens. None: 0.5; or, with
            `max_disagreement`, a grid of shares from 3/4 to 1/16.
        budget: the budget as a price instead, {"prefill_flops": 0.25}, or several prices of one unit in a list: shares
            of what the unpruned model pays in "tokens" that stay to the end, "tokens_per_layer", "prefill_flops",
            "cache_bytes" or "prefill_time". Schedules then compete too, which drop tokens at the decoder's input and
            inside it. Several policies are saved as `budget-<unit>-<price>.json`. With `max_disagreement` a list, or
            None in its place, {"prefill_flops": None}, for a grid.
        max_disagreement: chooses the budget by a promise: budgets are tried from the largest down, and the last one is
            taken at which the answers to at most this share of new images change, in (0, 1). One policy is saved.
        confidence: confidence of that promise, in (0, 1).
        over: what that share is of: "images", each with one question drawn at random among those asked about it; or
            "questions", so that an image counts as often as it is asked about. Images are taken as independent draws.
        group_by: name of a field of the batches, with a text, whole number or boolean for each sample that the model is
            asked about, in that order. It divides questions into groups, and the promise is made for each of them.
        model: the name of the submodule to calibrate, where the module holds several supported models.
        scorer: the only method to calibrate, with its layers and head weights; None: every method that drops tokens
            before the decoder is a candidate. A method that drops tokens inside the decoder is calibrated only if it is
            named: its first layers read all tokens, so that it is not comparable with the others at the same budget.
        scorer_args: arguments of `scorer`: for "fastv" the layer where tokens are dropped, {"layer": 2}.
        selector: selector of `scorer`; None: its default.
        guide: the smaller model that the scorer "sgl" reads, or a module that holds one, on its device.
        profile: seconds of the model's prefill, for a budget in "prefill_time": catp_lightning.pricing.measure(module,
            batch, policies) finds them on the device, with the methods that may be chosen among `policies`.
        settings: settings that trade time for precision: probes, folds, shares of the split, rounds.
        examples: number of checked questions whose answer a policy keeps, and of those whose answer it changes, that
            the report shows with images; the step runs again on up to four batches a policy. 0: it shows no image.
        augment: perturbations of the calibration images, for a choice that survives them: "default" (noise, blur,
            contrast, crop, resize), names of these, functions of pixels float [N, C, H, W] -> the same (deterministic;
            N pictures of one size, as the processor made them), or a dictionary of functions by name. Candidates are
            fitted and chosen on each image and its perturbed copies alike, against the unpruned answers to the same
            pixels. Checked figures and a promise stay those of the images as they are; agreement on perturbed ones is
            in evidence["perturbed"] and in the report. With P perturbations it takes P + 1 times as long.

    Attributes:
        policies: the policies of the last run, in the order of `keep`; one with `max_disagreement`.

    Raises:
        PolicyError: a budget is not allowed, a file is named for several budgets, the split has too few images or comes
            in another order each time, another calibration is writing to `path`, or an interrupted one there had other
            settings, another model or other data; a perturbation is unknown, fails, or returns other than pixels.
        PruningError: the model cannot be pruned, or its answers are sampled; at setup: its weights are sharded; with
            `augment`: it is not known where the model reads pixels, or the step does not do the same each time.
        OSError: at setup or at the end: `path` cannot be written. In the second case the measurements are still in the
            file beside it, and the same run, started again, only saves.

    Example::

        trainer = Trainer(callbacks=[CrossAttentionCalibration("policy.json", keep=0.25)])
        trainer.predict(module, calibration_loader)
    """

    def __init__(
        self,
        path: str | Path = "policy.json",
        keep: Budget | Sequence[Budget] | None = None,
        *,
        budget: Mapping[str, Any] | None = None,
        max_disagreement: float | None = None,
        confidence: float = 0.95,
        over: Over = "images",
        group_by: str | None = None,
        model: str | None = None,
        scorer: str | None = None,
        scorer_args: Mapping[str, Any] | None = None,
        selector: str | None = None,
        guide: nn.Module | None = None,
        profile: PrefillProfile | None = None,
        settings: CalibrationSettings = DEFAULTS,
        augment: Augment | None = None,
        examples: int = 4,
    ) -> None:
        super().__init__(("predict",))
        self.path, self.model, self.settings = Path(path), model, settings
        self.perturbations, self.examples = perturbations(augment), checked_number(examples)
        self.promise = Promise.asked(max_disagreement, confidence, over, group_by)
        self.budgets = Budgets.of(keep, budget, self.promise is not None)
        self.budgets.check_beside(self.path, profile is not None, settings.counts, scorer)
        self.profile = profile
        if scorer is None and (scorer_args or selector or guide is not None):
            raise PolicyError(
                "scorer_args, selector and guide are those of a scorer: name it, scorer='fastv' for example."
            )
        self.guide = guide
        self.method = None if scorer is None else PruningPolicy(scorer, scorer_args or {}, selector)
        if scorer == "visual-exit":
            check_exit(self.budgets.amounts, scorer_args or {})
        self.policies: list[PruningPolicy] = []
        self.summary: list[str] = []
        self._run: CalibrationRun | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            refuse_sharded(trainer, "CrossAttentionCalibration", _SHARDED)
            on_first(trainer, self._refuse_unwritable)
            on_first(trainer, lambda: refuse_running(self._stem(), PolicyError))

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        family = find_family(pl_module, self.model)
        parts = refuse_unprunable(pl_module, family)
        amount = refuse_unordered(trainer)
        if self.profile is not None:
            self.profile.check(family)
        plan = Plan.of(family, self.method, self.guide, self.settings)
        plan = replace(plan, perturbations=self.perturbations, unit=self.budgets.unit, profile=self.profile)
        budgets = self.budgets.ordered(family, self.promise is not None)
        passes = calibrate(plan, budgets, self.promise, pl_module.device)
        first, recorder = next(passes), Recorder(plan, needs_of(plan))
        settings = self._settings(trainer, family)
        with only_run(self._stem(), trainer.global_rank, PolicyError):
            partial = CalibrationCheckpoint(self._partial_file(trainer), settings)
            lines, memory = Lines(first.title), Memory(sum(trainer.num_predict_batches))
            run = CalibrationRun(
                passes, first, recorder, partial, amount, self.promise, self.settings.promised, lines, memory
            )
            again = f" {done} batches of an interrupted calibration are taken over." if (done := run.begin()) else ""
            rank_zero_info(f"catp: {first.title}, at {self.budgets.listed(budgets)}.{again}")
            if names := ", ".join(self.perturbations):
                times = len(self.perturbations) + 1
                rank_zero_info(f"catp: images as they are and with {names}: {times} times as long as without augment.")
            try:
                with (
                    nullcontext() if is_hidden(trainer) else run.lines,
                    occupied(family),
                    compiled_inside(parts, pl_module, family.model),
                    recorder.recording(),
                    recorded_steps(trainer.strategy, recorder) as (run.step, run.unrecorded),
                ):
                    self._run = run
                    yield
            finally:
                self._run = None

    def _settings(self, trainer: Trainer, family: Family) -> dict[str, Any]:
        """Settings on which the sums of this process depend; an interrupted run is resumed only if they are equal."""
        return {
            "catp-lightning": version("catp-lightning"),
            "keep": [repr(amount) for amount in self.budgets.amounts],
            "unit": self.budgets.unit,
            "profile": None if self.profile is None else self.profile.to_dict(),
            "promise": None if self.promise is None else [self.promise.max_disagreement, self.promise.confidence],
            "promise of": None if self.promise is None else [self.promise.over, self.promise.group_by],
            "process": f"{trainer.global_rank} of {trainer.world_size}",
            "precision": trainer.precision,
            "method": None if self.method is None else self.method.to_dict(),
            "settings": asdict(self.settings),
            "augment": {name: qualified(function) for name, function in self.perturbations.items()} or None,
            "guide": None if self.guide is None else model_fingerprint(self.guide),
            "batches": [str(number) for number in trainer.num_predict_batches],  # "inf" for a loader without a length
            "model": model_fingerprint(family.model),
        }

    def _partial_file(self, trainer: Trainer) -> Path:
        """File beside the policy that holds the sums of this process."""
        stem = self._stem()
        return stem.with_name(f"{stem.name}.partial-{trainer.global_rank}.safetensors")

    def _stem(self) -> Path:
        return self.path if self.path.suffix else self.path / "policy"

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        if self._run is not None:
            self._run.read_groups(batch)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._run is not None:
            before = time.monotonic()
            self._run.read_batch(trainer, self._run.batches)
            self._run.batches += 1
            self._run.replaying += time.monotonic() - before

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None:
            return
        run = self._run
        plain = time.monotonic() - run.started - run.replaying
        while not run.finish():
            run.lines.now = run.now.title
            rank_zero_info(f"catp: {run.lines.now}.")
            run.read_again(trainer, run.begin())
        assert run.found is not None
        self.policies = run.found.policies()
        for doubt in doubts(self.policies):
            rank_zero_warn(doubt)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # its policy must not replace a measured one
            rank_zero_info("catp: nothing is saved by a fast_dev_run.")
        else:
            on_first(trainer, lambda: self._save(trainer, run, plain))
        run.partial.delete()  # after all is written: if writing fails, the next run has nothing left to measure

    @property
    def doing(self) -> str:
        """The stage that a running calibration has come to, and how far it is; empty where none is running."""
        return "" if self._run is None else self._run.lines.now

    def save_what_was_done(self, trainer: Trainer, error: BaseException) -> None:
        if self._run is not None:
            self._run.save(error, trainer.is_global_zero)

    def take_part(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_predict_epoch_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "predict" and trainer.world_size == 1 and not any(trainer.num_predict_batches):
            rank_zero_warn(f"CrossAttentionCalibration read no batch, so {self.path} was not written.")  # no loop ran
        for line in self.summary:  # as late as possible: progress bars write until the loop has ended
            rank_zero_info(line)
        self.summary = []

    def _save(self, trainer: Trainer, run: CalibrationRun, plain: float | None) -> None:
        """Write the policies and their report."""
        run.lines.now = "writing policies and their report"
        files = [policy.save(self.budgets.file(self.path, policy)) for policy in self.policies]
        folder, seconds, step = report_folder(self.path), run.partial.seconds, trainer.global_step
        modules = (trainer.lightning_module, run.recorder.plan.family.model)  # either may have a tokenizer
        examples = examples_of(trainer, run, self.policies, self.examples, self.guide)
        self.summary = report(self.policies, files, folder, trainer.loggers, seconds, plain, step, modules, examples)
        rank_zero_info(f"catp: saved to {self.path}, with a report in {folder}.")
        if (self.budgets.several or not self.path.suffix) and (left := policies_beside(files)):
            rank_zero_warn(
                f"{self.path} held {', '.join(sorted(file.name for file in left)):.200} before, which this calibration "
                "did not measure: loading them warns. Delete what is out of date, or use a folder for each calibration."
            )

    def _refuse_unwritable(self) -> None:
        """Raise OSError if a policy or the report could not be written."""
        for file in (*self.budgets.files(self.path), *(report_folder(self.path) / name for name in (PAGE, HTML))):
            check_writable(file)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}
