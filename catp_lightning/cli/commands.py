"""Subcommands of `catp` that run a Trainer: each a LightningCLI with a few options of its own."""

import os
import re
import signal
from abc import abstractmethod
from argparse import Action
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

from jsonargparse import ActionConfigFile, ArgumentError, DefaultHelpFormatter
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from catp_lightning.calibration.report.report import report_folder
from catp_lightning.callbacks.answer_writer import AnswerWriter
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.context import Stage
from catp_lightning.callbacks.token_pruning import TokenPruning, load_policy
from catp_lightning.callbacks.watch import Watch
from catp_lightning.cli.options import parsed
from catp_lightning.data import SHIPPED, shipped
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import Budget, PruningPolicy
from catp_lightning.utils.files import require_writable
from catp_lightning.utils.progress import Preparation
from catp_lightning.utils.threads import at_most, processors

SHOWN = ("accelerator", "devices", "precision", "logger")
"""Options of the Trainer that --help explains; the others are accepted all the same."""

TITLES = {
    "trainer": "Lightning's Trainer: all its options are taken, callbacks too",
    "model": "the model: any LightningModule; `--model.help VQAModule` explains the default's options",
    "data": "data: any LightningDataModule; `--data.help VQADataModule` explains the default's options",
}

CONFIDENCE = 0.95
"""Default confidence of a promise (--max_disagreement)."""

MODELS = ("model.init_args.model", "model.init_args.processor", "data.init_args.processor")


class Formatter(DefaultHelpFormatter):
    """Help formatter that leaves out most options of the Trainer: nearly all of them are about training."""

    def add_argument(self, action: Action) -> None:
        kind, _, name = action.dest.partition(".")
        if kind != "trainer" or name in SHOWN:
            super().add_argument(action)


class ConfigFile(ActionConfigFile):
    """Action of --config that takes a file, or the name of a configuration that comes with the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, _config_file(values), option_string)


def _config_file(name: str) -> str:
    if os.path.exists(name) or find_spec("catp_lightning.configs") is None:
        return name
    configuration = files("catp_lightning.configs").joinpath(name)
    return str(configuration) if configuration.is_file() else name


class Command(LightningCLI):
    """Base of subcommands: model, data and Trainer from the command line and YAML, with early checks first.

    Args:
        args: the arguments after the subcommand.
        summary: description of the subcommand in its help.
        preparation: ended when the Trainer's loop begins.

    Raises:
        ArgumentError: an argument is unknown, missing or of another type.
        PolicyError, OSError: raised by `callbacks`, before the model is loaded.
    """

    stage: ClassVar[Stage]

    def __init__(self, args: list[str], summary: str, preparation: Preparation) -> None:
        name, self.preparation = type(self).__name__.lower(), preparation
        super().__init__(
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={
                "prog": f"catp {name}",
                "usage": f"catp {name} [options]",
                "description": summary,
                "formatter_class": Formatter,
                "exit_on_error": False,
            },
            args=args,
            run=False,
            auto_configure_optimizers=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = self.parser_class(**kwargs)
        help_ = "A YAML file, or the name of a shipped one; options after it win over what it says."
        parser.add_argument("-c", "--config", action=ConfigFile, help=help_)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.add_own_arguments(parser)
        help_ = "Lightning checkpoint whose weights the module is given before it runs."
        parser.add_argument("--ckpt_path", type=str | None, help=help_)
        super().add_default_arguments_to_parser(parser)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({"trainer.logger": False})  # nothing is written that was not asked for
        # Defaults given here, not by set_defaults, keep None out of the type: errors then say at once what is wrong.
        for key, base, default in (("model", LightningModule, VQAModule), ("data", LightningDataModule, VQADataModule)):
            class_path = {"class_path": f"{default.__module__}.{default.__qualname__}"}
            parser.add_subclass_arguments(base, key, default=class_path, fail_untyped=False)
        for key, title in TITLES.items():
            cast(dict[str, Any], parser.groups)[key].title = title

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parsed(parser, cast(list[str], args))

    def before_instantiate_classes(self) -> None:
        self.trainer_defaults["callbacks"] = [*self.callbacks(), *self.watching()]
        for key in MODELS:
            if isinstance(name := self.config.get(key), str):
                self.config[key] = _model_folder(name)

    def run(self) -> None:
        """Run the Trainer's loop of `stage`; a signal ends it with exit code 128 + the signal's number."""
        options = {"return_predictions": False} if self.stage == "predict" else {}
        run = getattr(self.trainer, self.stage)
        try:
            run(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path, **options)
        except SIGTERMException:  # Lightning's, without a code: it would look like success
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit as ended:
            if isinstance(ended.__context__, KeyboardInterrupt):  # which Lightning turns into exit code 1
                raise SystemExit(128 + signal.SIGINT) from None
            raise

    @abstractmethod
    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the options of this subcommand alone to the parser."""

    @abstractmethod
    def callbacks(self) -> list[Callback]:
        """Return the callbacks that the Trainer gets beside the configured ones."""

    def watching(self) -> list[Callback]:
        """Return the callbacks that write the progress of a loop as lines, in place of a progress bar."""
        return [Watch(self.preparation, says=self.config.trainer.enable_progress_bar is not False)]


class Calibrate(Command):
    stage: ClassVar[Stage] = "predict"

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        help_ = (
            "Budget, or several as '[0.5, 0.25]': 0.5 or 1.0 is a share, 16 or 1 a number of tokens. Without it 0.5; "
            "with --max_disagreement shares from 3/4 down to 1/16."
        )
        parser.add_argument("--keep", type=Budget | list[Budget] | None, help=help_)
        help_ = (
            "The budget as a promise: take the smallest at which the answers to at most this share of new images "
            "change, 0.02 say. One policy is written."
        )
        parser.add_argument("--max_disagreement", type=float | None, help=help_)
        parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="Of that promise.")
        help_ = "The one method whose layers and head weights are calibrated; without it rules compete."
        _add_method(parser, help_)
        help_ = "Where the policy goes: a file, or a folder, which several budgets need. The report goes beside it."
        parser.add_argument("--output", type=str, default="policy", help=help_)

    def callbacks(self) -> list[Callback]:
        config = self.config
        if config.max_disagreement is None and config.confidence != CONFIDENCE:
            raise ArgumentError(None, "--confidence is that of a promise: give --max_disagreement as well.")
        self.calibration = CrossAttentionCalibration(
            config.output,
            config.keep,
            max_disagreement=config.max_disagreement,
            confidence=config.confidence,
            scorer=config.scorer,
            scorer_args=config.scorer_args,
            selector=config.selector,
        )
        path = self.calibration.path
        require_writable(path, self.calibration.several or not path.suffix)
        require_writable(report_folder(path), folder=True)
        return [self.calibration]

    def watching(self) -> list[Callback]:
        return [Watch(self.preparation, says=False)]  # calibration reports its progress by itself

    def after_instantiate_classes(self) -> None:
        callbacks = cast(Any, self.trainer).callbacks  # after the progress bar: its findings are the last lines
        callbacks.append(callbacks.pop(callbacks.index(self.calibration)))
        if hasattr(self.datamodule, "calibration_dataloader"):
            _predict_calibration(self.datamodule)


class Validate(Command):
    stage: ClassVar[Stage] = "validate"

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
        parser.add_argument("--keep", type=Budget | None, help=help_)
        help_ = "Run the unpruned model as well and log the share of equal answers, catp/agreement."
        parser.add_argument("--compare", type=bool, default=False, help=help_)

    def callbacks(self) -> list[Callback]:
        config = self.config
        if config.policy is not None and config.scorer is not None:
            raise ArgumentError(None, "--policy and --scorer both say how to prune: give one of them.")
        if config.scorer is None and (config.scorer_args or config.selector):
            raise ArgumentError(None, "--scorer_args and --selector are those of a --scorer: give it as well.")
        if config.policy is not None:
            return [TokenPruning(load_policy(config.policy, config.keep), compare=config.compare)]
        if config.scorer is not None:
            keep = 0.5 if config.keep is None else config.keep
            rule = PruningPolicy(config.scorer, config.scorer_args or {}, config.selector, keep=keep)
            return [TokenPruning(rule, compare=config.compare)]
        if config.keep is not None or config.compare:
            raise ArgumentError(None, "--keep and --compare say how to prune: give --policy or --scorer as well.")
        return []


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


def _add_method(parser: LightningArgumentParser, help_: str) -> None:
    """Add the options that name a method; `help_` says what --scorer is for."""
    parser.add_argument("--scorer", type=str | None, help=help_)
    of_arguments = "Its arguments: '{layer: 2}' is where fastv drops."
    parser.add_argument("--scorer_args", type=dict[str, Any] | None, help=of_arguments)
    parser.add_argument("--selector", type=str | None, help="Its selector, instead of its own.")


COMMANDS: dict[str, type[Command]] = {"calibrate": Calibrate, "validate": Validate, "test": Test, "predict": Predict}


def run_trainer(name: str, args: list[str], summary: str, preparation: Preparation) -> None:
    """Run a command of `COMMANDS`; `args` are the arguments after its name."""
    with at_most(processors()), telling_of_scenes():
        COMMANDS[name](args, summary, preparation).run()


@contextmanager
def telling_of_scenes() -> Iterator[None]:
    """Context that adds `catp scenes` to the error for a missing scenes file that a shipped configuration reads."""
    try:
        yield
    except DataError as error:
        missing = re.match(r"data/(digits\w*)/.*no such file", str(error))
        if missing is None:
            raise
        own = missing[1] != "digits"  # the folder of the first shipped model, and the default of `catp scenes`
        options = f" --model {missing[1]} --output data/{missing[1]}" if own else ""
        raise DataError(f"{error} `catp scenes{options}` writes it.") from error


def _model_folder(name: str) -> str:
    """Return a shipped model's folder for its name, and any other name as it is.

    Raises:
        FileNotFoundError: the name is an absolute path where nothing is.
    """
    if os.path.exists(name):
        return name
    if os.path.isabs(name):  # the error of transformers would be about names on the hub
        raise FileNotFoundError(f"There is no model in {name}.")
    return str(shipped(name)) if name in SHIPPED else name


def _predict_calibration(datamodule: Any) -> None:
    """Make Lightning's predict stage read the calibration loader, as Lightning has no stage for calibration.

    Everything else of the datamodule is used as usual; its `setup` is called with the stage "calibration".
    """
    datamodule.predict_dataloader = datamodule.calibration_dataloader
    datamodule.setup = partial(_set_up_calibration, datamodule.setup)


def _set_up_calibration(setup: Any, stage: str) -> None:
    setup("calibration")
