"""Subcommands of `catp` that run a Trainer: each a LightningCLI with a few options of its own."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

from jsonargparse import ArgumentError
from lightning.pytorch import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from catp_lightning.calibration.perturbations import PERTURBATIONS
from catp_lightning.calibration.report.report import report_folder
from catp_lightning.calibration.search.promise import Over
from catp_lightning.callbacks.answer_writer import AnswerWriter
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.call_profile import CALLS, profile_table
from catp_lightning.callbacks.context import Stage
from catp_lightning.callbacks.token_pruning import TokenPruning, load_policy
from catp_lightning.callbacks.watch import Watch
from catp_lightning.cli.command import Command
from catp_lightning.cli.options import with_lmms_task
from catp_lightning.policy import UNITS, Budget, PruningPolicy
from catp_lightning.utils.files import require_writable

CONFIDENCE = 0.95
"""Default confidence of a promise (--max_disagreement)."""


class Calibrate(Command):
    stage: ClassVar[Stage] = "predict"

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        help_ = (
            "Budget, or several as '[0.5, 0.25]': 0.5 or 1.0 is a share, 16 or 1 a number of tokens. Without it 0.5; "
            "with --max_disagreement shares from 3/4 down to 1/16."
        )
        parser.add_argument("--keep", type=Budget | list[Budget] | None, help=help_)
        help_ = (
            "Prices in its place, '{prefill_flops: [0.5, 0.25]}': shares of what the unpruned model pays, in one of "
            f"{', '.join(UNITS[:-1])}. Schedules compete then, which drop tokens inside the decoder too."
        )
        parser.add_argument("--budget", type=dict[str, Any] | None, help=help_)
        help_ = (
            "The budget as a promise: take the smallest at which the answers to at most this share of new images "
            "change, 0.02 say. One policy is written."
        )
        parser.add_argument("--max_disagreement", type=float | None, help=help_)
        parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="Of that promise.")
        help_ = "What its share is of: new images, each with one question drawn at random, or new questions."
        parser.add_argument("--over", type=Over, default="images", help=help_)
        help_ = "Make it for each group of questions that this field of the batches names: answer_types, say."
        parser.add_argument("--group_by", type=str | None, help=help_)
        help_ = "The one method whose layers and head weights are calibrated; without it rules compete."
        _add_method(parser, help_)
        help_ = (
            "Perturb the calibration images too, so that the choice survives it: default, or some of "
            f"{', '.join(PERTURBATIONS)} as '[noise, blur]'. Takes as many times longer."
        )
        parser.add_argument("--augment", type=str | list[str] | None, help=help_)
        help_ = (
            "A task of lmms-eval whose training split is calibrated on, through lmms-eval's own model: then --model "
            "and --data are its, --model.pretrained names the model, --data.split a split. See docs/evaluation.md."
        )
        parser.add_argument("--lmms_task", type=str | None, help=help_)
        help_ = "How many questions answered alike, and how many answered otherwise, report.html shows with images."
        parser.add_argument("--examples", type=int, default=4, help=help_)
        help_ = "Where the policy goes: a file, or a folder, which several budgets need. The report goes beside it."
        parser.add_argument("--output", type=str, default="policy", help=help_)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, with_lmms_task(cast(list[str], args)))

    def callbacks(self) -> list[Callback]:
        config = self.config
        if config.max_disagreement is None and config.confidence != CONFIDENCE:
            raise ArgumentError(None, "--confidence is that of a promise: give --max_disagreement as well.")
        self.calibration = CrossAttentionCalibration(
            config.output,
            config.keep,
            budget=config.budget,
            max_disagreement=config.max_disagreement,
            confidence=config.confidence,
            over=config.over,
            group_by=config.group_by,
            scorer=config.scorer,
            scorer_args=config.scorer_args,
            selector=config.selector,
            augment=config.augment,
            examples=config.examples,
        )
        path = self.calibration.path
        require_writable(path, self.calibration.budgets.several or not path.suffix)
        require_writable(report_folder(path), folder=True)
        return [self.calibration]

    @property
    def split(self) -> str:
        return "calibration"

    def watching(self) -> list[Callback]:
        return [Watch(self.preparation, says=False)]  # calibration reports its progress by itself

    def after_instantiate_classes(self) -> None:
        callbacks = cast(Any, self.trainer).callbacks  # after the progress bar: its findings are the last lines
        callbacks.append(callbacks.pop(callbacks.index(self.calibration)))
        if hasattr(self.datamodule, "calibration_dataloader"):
            _predict_calibration(self.datamodule)


class Validate(Command):
    stage: ClassVar[Stage] = "validate"
    budgets: ClassVar[Any] = Budget | None  # type of --keep

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        help_ = (
            "File, folder, wandb://… or hf://… of the policy to prune by; without it and without --scorer the model "
            "runs unpruned."
        )
        parser.add_argument("--policy", type=str | None, help=help_)
        help_ = "A fixed rule to prune by, instead of a policy: the name of a method, `stride` or `fastv`."
        _add_method(parser, help_)
        help_ = (
            "The budget: 0.5 or 1.0 is a share, 16 or 1 a number of tokens. Of a --scorer, by default 0.5; or which of "
            "a folder of policies that holds several."
        )
        parser.add_argument("--keep", type=self.budgets, help=help_)
        help_ = "The price to pay at most, '{cache_bytes: 0.3}': the best policy of a folder calibrated at prices."
        parser.add_argument("--budget", type=dict[str, float] | None, help=help_)
        self.add_figures(parser)

    def add_figures(self, parser: LightningArgumentParser) -> None:
        """Add the options that say what is measured beside the loop's own metrics."""
        help_ = "Run the unpruned model as well and log the share of equal answers, catp/agreement."
        parser.add_argument("--compare", type=bool, default=False, help=help_)

    def callbacks(self) -> list[Callback]:
        config = self.config
        if config.policy is not None and config.scorer is not None:
            raise ArgumentError(None, "--policy and --scorer both say how to prune: give one of them.")
        if config.scorer is None and (config.scorer_args or config.selector):
            raise ArgumentError(None, "--scorer_args and --selector are those of a --scorer: give it as well.")
        if config.budget is not None and config.policy is None:
            raise ArgumentError(None, "--budget chooses among the policies of a folder: give it as --policy.")
        if config.policy is not None or config.scorer is not None:
            return [self.pruning(self.policy_at(config.keep))]
        if config.keep is not None or config.get("compare"):
            raise ArgumentError(None, "--keep and --compare say how to prune: give --policy or --scorer as well.")
        return []

    def policy_at(self, keep: int | float | None) -> PruningPolicy:
        """Return the policy of --policy, or of --scorer and its like, at a budget; None: its own."""
        config = self.config
        if config.policy is not None:
            return load_policy(config.policy, keep, config.budget)
        return PruningPolicy(
            config.scorer, config.scorer_args or {}, config.selector, keep=0.5 if keep is None else keep
        )

    def pruning(self, policy: PruningPolicy) -> TokenPruning:
        """Return the callback that prunes by a policy."""
        return TokenPruning(policy, compare=self.config.compare)


class Test(Validate):
    __test__ = False  # not a test for pytest
    stage: ClassVar[Stage] = "test"


class Predict(Validate):
    stage: ClassVar[Stage] = "predict"

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        help_ = 'File for the answers, a line {"question_id": 42, "answer": "yes"} each: VQAv2\'s result layout.'
        parser.add_argument("--output", type=str | None, help=help_)
        super().add_own_arguments(parser)

    def callbacks(self) -> list[Callback]:
        output = self.config.output
        if output is None and not self.config.trainer.callbacks:
            raise ArgumentError(
                None, "No answer would be kept: give --output, or a callback under trainer.callbacks that keeps them."
            )
        if output is None:
            return super().callbacks()
        require_writable(Path(output), folder=False)
        return [*super().callbacks(), AnswerWriter(output)]


class Profile(Validate):
    stage: ClassVar[Stage] = "predict"

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({"trainer.limit_predict_batches": CALLS + 1})  # no more are timed

    def add_figures(self, parser: LightningArgumentParser) -> None:
        pass  # times are all that is measured

    def callbacks(self) -> list[Callback]:
        if not (found := super().callbacks()):
            raise ArgumentError(None, "What is to be faster? Give --policy or --scorer.")
        return found

    def pruning(self, policy: PruningPolicy) -> TokenPruning:
        self.pruned = TokenPruning(policy, profile=True)
        return self.pruned

    def run(self) -> None:
        super().run()
        if self.trainer.is_global_zero and (table := profile_table(self.pruned.figures)):
            print(table, end="")


def _add_method(parser: LightningArgumentParser, help_: str) -> None:
    """Add the options that name a method; `help_` says what --scorer is for."""
    parser.add_argument("--scorer", type=str | None, help=help_)
    of_arguments = "Its arguments: '{layer: 2}' is where fastv drops."
    parser.add_argument("--scorer_args", type=dict[str, Any] | None, help=of_arguments)
    parser.add_argument("--selector", type=str | None, help="Its selector, instead of its own.")


def _predict_calibration(datamodule: Any) -> None:
    """Make Lightning's predict stage read the calibration loader, as Lightning has no stage for calibration.

    Everything else of the datamodule is used as usual; its `setup` is called with the stage "calibration".
    """
    datamodule.predict_dataloader = datamodule.calibration_dataloader
    datamodule.setup = partial(_set_up_calibration, datamodule.setup)


def _set_up_calibration(setup: Any, stage: str) -> None:
    setup("calibration")
