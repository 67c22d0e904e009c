"""Command line of `catp sweep`, on the model and data of a configuration or on each shipped model with digit scenes."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.text import Text
from torch.utils.data import DataLoader

from catp_lightning.callbacks.context import Stage
from catp_lightning.cli.command import Command
from catp_lightning.cli.lists import budgets, listed
from catp_lightning.cli.sweep_data import loaders, reads
from catp_lightning.cli.trainer_commands import telling_of_scenes
from catp_lightning.data import GRIDS, PROMPTS, SHIPPED, shipped
from catp_lightning.data.scenes import Split, write_scenes
from catp_lightning.evaluation.sweep.figure import figure
from catp_lightning.evaluation.sweep.flow import sweep_model
from catp_lightning.evaluation.sweep.methods import check_names, named
from catp_lightning.evaluation.sweep.page import sweep_page
from catp_lightning.evaluation.sweep.priced import sweep_prices
from catp_lightning.evaluation.sweep.priced_figure import priced_figure
from catp_lightning.evaluation.sweep.priced_table import PricedTable
from catp_lightning.evaluation.sweep.prices import prices_asked
from catp_lightning.evaluation.sweep.reading import Reading
from catp_lightning.evaluation.sweep.table import ModelTable, combined
from catp_lightning.policy import SCHEDULES, Budget
from catp_lightning.pricing import COUNTED
from catp_lightning.safe_text import rich_text
from catp_lightning.utils.files import require_writable, write_bytes, write_json, write_text
from catp_lightning.utils.messages import quiet
from catp_lightning.utils.plots import png
from catp_lightning.utils.progress import Lines, Preparation
from catp_lightning.utils.threads import at_most, processors

KEEP = (0.5, 0.25, 0.125, 0.05)
OUTPUT = "runs/sweep"
SCENES: dict[str, tuple[int, str]] = {
    "questions": (1000, "Test questions about the scenes for each shipped model."),
    "calibration_questions": (512, "Questions about the scenes that `calibrated` is measured on."),
    "seed": (0, "Of those scenes."),
}
UNPRICED = ("digits_mllama",)
"""Shipped models whose prompts have no known price: by default they are not compared at prices."""
DRAWS = 3
"""Default number of calibrations of a shipped model, each on questions of its own."""
QUIET: dict[str, Any] = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
OWN = ("-h", "--help", "--print_config", "--model", "--model.model", "--model.class_path", "--model.init_args.model")
SPLITS: tuple[Split, Split] = ("calibration", "test")


class Sweep(Command):
    """Command that compares methods on one model; `found` is the table, once it has run.

    Args:
        args: the arguments after `sweep`.
        summary: description of the command in its help.
        preparation: set to be over when the first question is read.
        lines: progress lines of the sweep.
    """

    stage: ClassVar[Stage] = "predict"

    def __init__(self, args: list[str], summary: str, preparation: Preparation, lines: Lines) -> None:
        self.lines = lines
        super().__init__(args, summary, preparation)

    def add_own_arguments(self, parser: Any) -> None:
        help_ = f"Shipped models to compare on, each on digit scenes of its own: {', '.join(SHIPPED)}. All by default; "
        help_ += "leave it out beside --config, which names a model and data of your own."
        parser.add_argument("--models", type=list[str] | str | None, help=help_)
        help_ = "Methods by name, '[fastervlm, fastv, random]'; `calibrated` is one, measured on the calibration split."
        help_ += f" With --budget also those of several stages: {', '.join(SCHEDULES)}."
        parser.add_argument("--scorers", type=list[str] | str, default="all", help=help_)
        help_ = f"Budgets, '[0.5, 0.25]': 0.5 or 1.0 is a share, 16 or 1 a number of tokens; by default {list(KEEP)}."
        parser.add_argument("--keep", type=Budget | list[Budget] | None, help=help_)
        help_ = "Prices in place of --keep, '{\"prefill_flops\": [0.5, 0.25]}', shares of what the unpruned model pays "
        help_ += f"in {', '.join(COUNTED)}: every method keeps as many tokens as a price buys."
        parser.add_argument("--budget", type=dict[str, float | list[float]] | None, help=help_)
        help_ = "Ask every attention scorer layer by layer as well."
        parser.add_argument("--layers", type=bool, default=False, help=help_)
        help_ = "The method that others are compared with; by default `calibrated`, where it is compared, or the first."
        parser.add_argument("--reference", type=str | None, help=help_)
        help_ = "Folder for the tables, the plots and every job's answers; the same command again goes on there."
        parser.add_argument("--output", type=str, default=OUTPUT, help=help_)
        help_ = "Parts of the calibration split to calibrate on, each by itself: tables then show how far calibrations "
        help_ += f"differ. Shipped models have {DRAWS}, each of --calibration_questions; by default others have 1."
        parser.add_argument("--calibration_draws", type=int | None, help=help_)
        for name, (default, help_) in SCENES.items():
            parser.add_argument(f"--{name}", type=int, default=default, help=help_)

    def callbacks(self) -> list[Callback]:
        config = self.config
        if config.budget is not None and config.keep is not None:
            raise ArgumentError(None, "--keep are numbers of tokens, --budget prices: give one of them.")
        priced = config.budget is not None
        self.prices = prices_asked(config.budget) if priced else []
        self.names = named(listed(config.scorers), priced)
        self.budgets = budgets(list(KEEP) if config.keep is None else config.keep)
        check_names(listed(config.scorers), priced)
        require_writable(Path(config.output), folder=True)
        self.settings = json.loads(json.dumps(config.model.as_dict(), default=str))
        if config.trainer.limit_predict_batches not in (None, 1.0):
            raise ArgumentError(
                None, "A sweep answers every question of its data: give fewer of them, not limit_predict_batches."
            )
        if config.calibration_draws is not None and config.calibration_draws < 1:
            raise ArgumentError(None, f"calibration_draws is {config.calibration_draws}; it is at least 1.")
        if config.trainer.devices == "auto":
            config.trainer.devices = 1
        return []

    def require_files(self) -> None:
        pass  # scenes for a shipped model are written later, once all arguments are known to be right

    def watching(self) -> list[Callback]:
        return []  # the progress of a sweep is counted in jobs, not in batches

    def run(self) -> None:
        """Run every job that no earlier run has finished, and write the model's table and plot."""
        if self.trainer.world_size > 1:
            raise ArgumentError(None, "A sweep runs on one device: give --trainer.devices 1.")
        test, calibration = loaders(self.datamodule)
        reading = Reading(
            module=cast(Any, self.model),
            test=test,
            calibration=calibration,
            predict=self._predict,
            device=self.trainer.strategy.root_device,
            settings={"module": self.settings, "precision": str(self.trainer.precision)},
        )
        if self.config.ckpt_path is not None:  # predicting once has Lightning load the weights
            first: Any = [next(iter(test()))]
            self._predict(DataLoader(first, batch_size=None), None, ckpt_path=self.config.ckpt_path)
        asked = (self.config.layers, self.config.reference, Path(self.config.output), self.lines, self.preparation)
        draws = self.config.calibration_draws or 1
        self.found: ModelTable
        if self.prices:
            self.found = sweep_prices(reading, self.names, self.prices, *asked, draws)
        else:
            self.found = sweep_model(reading, self.names, self.budgets, *asked, draws)

    def _predict(self, loader: Any, callback: Callback | None, **options: Any) -> Sequence[Any]:
        """Run `trainer.predict` on a loader, through the datamodule's hooks; returns its predictions."""
        callbacks = [] if callback is None else [callback]
        trainer: Trainer = self.instantiate_trainer(callbacks=callbacks, **QUIET, enable_progress_bar=False)
        with reads(self.datamodule, loader):
            return trainer.predict(self.model, datamodule=self.datamodule, **options) or []


def sweep(args: list[str], summary: str, preparation: Preparation) -> list[ModelTable]:
    """Run `catp sweep` and return the table of each model; `args` are the arguments after `sweep`."""
    ahead = ArgumentParser(add_help=False, allow_abbrev=False)
    ahead.add_argument("-c", "--config")
    ahead.add_argument("--models")
    ahead.add_argument("--output", default=OUTPUT)
    ahead.add_argument("--budget")
    known, _ = ahead.parse_known_args(args)
    own = known.config is not None or any(_of_model(arg) for arg in args)
    if own and known.models is not None:
        raise ArgumentError(
            None, "--models names shipped models, --config and --model one of your own: give one of them."
        )
    preparation.lines.close()  # each model has lines of its own
    if own:
        with at_most(processors()), telling_of_scenes():
            return [_run(args, summary, preparation)]
    every = [model for model in SHIPPED if known.budget is None or model not in UNPRICED]
    models = listed(known.models) if known.models else every
    for model in models:
        shipped(model)  # raises where it is not a shipped one
    with at_most(1):  # shipped models are small, see the demo
        tables = [
            _run([*_shipped_args(Path(known.output), model), *args], summary, preparation, model) for model in models
        ]
    if len(tables) > 1:
        save_all(tables, Path(known.output))
    return tables


def _run(args: list[str], summary: str, preparation: Preparation, model: str | None = None) -> ModelTable:
    """Run a sweep on one model; scenes for a shipped model are not written where an argument is wrong."""
    with quiet(), Lines(f"sweep: preparing {model or 'the model'}", sys.stdout) as lines:
        running = Sweep(args, summary, preparation, lines)
        if model is not None:
            _write_scenes(running.config, model)
        running.run()
    return running.found


def _of_model(arg: str) -> bool:
    """True if an option names a model, or depends on none, as --help does; others apply to a shipped model."""
    return arg.partition("=")[0] in OWN


def _shipped_args(output: Path, model: str) -> list[str]:
    """Return the options that name a shipped model and the scenes for it."""
    data: dict[str, Any] = {"processor": model, "prompt": PROMPTS[model], "batch_size": 64}
    for split in SPLITS:
        place = _scenes(output, model, split)
        names = {"questions": "questions.json", "annotations": "annotations.json", "images": "images"}
        files = {key: str(place / name) for key, name in names.items()}
        data[split] = {**files, "image_name": "{image_id:012d}.png"}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in data.items()}
    return [f"--model.model={model}", *(f"--data.{key}={text}" for key, text in texts.items())]


def _scenes(output: Path, model: str, split: Split) -> Path:
    return output / model / "data" / split


def _write_scenes(config: Any, model: str) -> None:
    if config.calibration_draws is None:
        config.calibration_draws = DRAWS
    counts = (config.calibration_questions * config.calibration_draws, config.questions)
    for split, count in zip(SPLITS, counts, strict=True):
        write_scenes(_scenes(Path(config.output), model, split), split, count, config.seed, grids=GRIDS[model])


def save_all(tables: Sequence[ModelTable], folder: Path) -> None:
    """Write one table and one plot of several models: `table.md`, `.json` and `.html`, and `accuracy.png`.

    At prices they are `prices.md`, `.json`, `.html` and `.png`.
    """
    priced = [table for table in tables if isinstance(table, PricedTable)]
    kind, plot = ("prices", "prices") if priced else ("table", "accuracy")
    names = (f"{kind}.md", f"{kind}.json", f"{kind}.html", f"{plot}.png")
    drawn = priced_figure(priced) if priced else figure(tables)
    text, image = combined(tables), png(drawn, dpi=120)
    write_text(folder / names[0], text)
    write_json(folder / names[1], [table.to_json() for table in tables], indent=2)
    write_text(folder / names[2], sweep_page(text, plot, drawn, image, tables))
    write_bytes(folder / names[3], image)
    where = rich_text(folder, "bold")
    Console().print(Text.assemble("All models: ", where, f": {', '.join(names)}"))
