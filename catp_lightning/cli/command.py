"""Base of the subcommands that run a Trainer: model, data and Trainer from the command line and YAML."""

import os
import signal
from abc import abstractmethod
from argparse import Action
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, ClassVar, cast

from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from catp_lightning.callbacks.context import Stage
from catp_lightning.callbacks.watch import Watch
from catp_lightning.cli.options import parsed
from catp_lightning.data import SHIPPED, shipped
from catp_lightning.data.vqa import VQADataModule
from catp_lightning.errors import DataError
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.utils.progress import Preparation

SHOWN = ("accelerator", "devices", "precision", "logger")
"""Options of the Trainer that --help explains; the others are accepted all the same."""


TITLES = {
    "trainer": "Lightning's Trainer: all its options are taken, callbacks too",
    "model": "the model: any LightningModule; `--model.help VQAModule` explains the default's options",
    "data": "data: any LightningDataModule; `--data.help VQADataModule` explains the default's options",
}


SPLITS = {"validate": "val", "test": "test", "predict": "test"}
"""Split of `VQADataModule` that a loop reads."""


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


def model_folder(name: str) -> str:
    """Return a shipped model's folder for its name, and any other name as it is.

    Raises:
        FileNotFoundError: the name is an absolute path where nothing is.
    """
    if os.path.exists(name):
        return name
    if os.path.isabs(name):  # the error of transformers would be about names on the hub
        raise FileNotFoundError(f"There is no model in {name}.")
    return str(shipped(name)) if name in SHIPPED else name


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
        self.require_files()
        for key in MODELS:
            if isinstance(name := self.config.get(key), str):
                self.config[key] = model_folder(name)

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

    @property
    def split(self) -> str:
        """Name of the split of `VQADataModule` that is read."""
        return SPLITS[self.stage]

    def require_files(self) -> None:
        """Raise DataError, before the model is loaded, if a file or folder of the split that is read is not there."""
        split = self.split
        given = self.config.get(f"data.init_args.{split}") or {}
        for key in ("questions", "annotations", "images"):
            path = given.get(key)
            if isinstance(path, str) and not os.path.exists(path):
                raise DataError(
                    f"{path}: there is no such {'folder' if key == 'images' else 'file'} (data.{split}.{key})."
                )

    @abstractmethod
    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        """Add the options of this subcommand alone to the parser."""

    @abstractmethod
    def callbacks(self) -> list[Callback]:
        """Return the callbacks that the Trainer gets beside the configured ones."""

    def watching(self) -> list[Callback]:
        """Return the callbacks that write the progress of a loop as lines, in place of a progress bar."""
        return [Watch(self.preparation, says=self.config.trainer.enable_progress_bar is not False)]
