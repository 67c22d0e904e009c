"""The `catp` command: what each subcommand does, and how its errors reach people."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from jsonargparse import ArgumentError, auto_cli
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from catp_lightning.commands import Calibrate, Predict, Test, Validate
from catp_lightning.data import GRIDS, shipped
from catp_lightning.data.scenes import Split, write_scenes
from catp_lightning.errors import DataError, PolicyError, PruningError
from catp_lightning.safe_text import one_line, printable

SUMMARIES = {
    "calibrate": "Measure, on a calibration split, which visual tokens a model can do without, and save the policy.",
    "validate": "Print the metrics of the validation split, pruned by a policy or not at all.",
    "test": "Print the metrics of the test split, pruned by a policy or not at all.",
    "predict": "Write the answers to the prediction split as JSON Lines, pruned by a policy or not at all.",
    "sweep": "Compare any list of methods on the shipped models or on yours: one table and one plot.",
    "scenes": "Write digit scenes with questions, the data of a shipped model: folders calibration/ and test/.",
    "demo": "Calibrate the shipped model on digit scenes and compare every method at three budgets.",
}

EPILOG = """\
examples:
  catp demo
  catp scenes --output data/digits
  catp calibrate --config digits_blip2.yaml --keep '[0.5, 0.25, 0.125]' --output policies
  catp test --config digits_blip2.yaml --policy policies --keep 0.25 --compare true
  catp predict --config digits_blip2.yaml --policy policies --keep 0.25 --output answers.jsonl
  catp validate --config mine.yaml --model my_package.MyModule --data my_package.MyDataModule
  catp sweep --scorers '[fastervlm, fastv, stride, random]' --keep '[0.5, 0.25]' --output runs/sweep

`catp COMMAND --help` explains a command's options, `catp COMMAND --print_config` prints them as YAML for --config.
A configuration file that is not found is looked for among those shipped: blip2_opt_vqav2.yaml,
digits_blip2.yaml, digits_llava.yaml, digits_mllama.yaml.
With CATP_TRACEBACK=1 in the environment an error shows its traceback.
"""

OURS = (PolicyError, DataError, PruningError)  # their messages say everything
EXPECTED = (*OURS, ValueError, TypeError, OSError, ImportError, MisconfigurationException)

NOISE = (".*does not have many workers", ".*LeafSpec.*is deprecated")  # Lightning's advice, and its own use of torch


def main(args: Sequence[str] | None = None) -> None:
    """Run `catp` with the given arguments; those of the process by default.

    Raises:
        SystemExit: 2 where the arguments are wrong, 1 where the work fails; each with one message on standard error.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    chosen = _parser().parse_args(arguments or ["--help"])
    try:
        with _without_advertisements():
            COMMANDS[chosen.command](chosen.arguments)
    except (ArgumentError, *EXPECTED) as error:
        if os.environ.get("CATP_TRACEBACK") == "1":
            raise
        usage = isinstance(error, ArgumentError)
        help_ = f"\n`catp {chosen.command} --help` lists the options." if usage else ""
        told = printable(f"\ncatp: error: {_message(error)}{help_}")  # a progress bar leaves its line open
        print(told, file=sys.stderr)
        raise SystemExit(2 if usage else 1) from None


def _parser() -> argparse.ArgumentParser:
    """The options before a command; each command reads its own, so that only one parser for a Trainer is built."""
    width = max(map(len, SUMMARIES))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items())
    parser = argparse.ArgumentParser(
        prog="catp",
        usage="catp COMMAND [options]",
        description=f"Calibrated visual-token pruning of vision-language models.\n\ncommands:\n{commands}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"catp-lightning {_version()}")
    parser.add_argument("command", choices=SUMMARIES, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    try:
        return version("catp-lightning")
    except PackageNotFoundError:
        return "(not installed)"


def write_splits(
    output: str = "data/digits",
    questions: int = 1000,
    calibration_questions: int = 512,
    seed: int = 0,
    model: str = "digits_blip2",
) -> None:
    """Write digit scenes of the calibration and the test split; no digit is in both.

    Args:
        output: the folder that gets `calibration` and `test`, in VQAv2's layout.
        questions: how many questions the test split has.
        calibration_questions: how many questions the calibration split has.
        seed: of the scenes and questions.
        model: the shipped model that the scenes are for: digits_blip2, digits_llava or digits_mllama.
    """
    shipped(model)  # raises where it is none
    counts: dict[Split, int] = {"calibration": calibration_questions, "test": questions}
    for split, count in counts.items():
        place = write_scenes(os.path.join(output, split), split, count, seed, grids=GRIDS[model])
        print(one_line(f"{count} questions in {place}"))


def _run_function(name: str, function: Callable[..., None], args: list[str]) -> None:
    auto_cli(
        function,
        args=args,
        as_positional=False,
        prog=f"catp {name}",
        usage=f"catp {name} [options]",
        description=SUMMARIES[name],
        exit_on_error=False,
    )


def _demo(args: list[str]) -> None:
    from catp_lightning.demo import run_demo

    _run_function("demo", run_demo, args)


def _sweep(args: list[str]) -> None:
    from catp_lightning.sweep.command import sweep

    sweep(args, SUMMARIES["sweep"])


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "calibrate": lambda args: Calibrate(args, SUMMARIES["calibrate"]).run(),
    "validate": lambda args: Validate(args, SUMMARIES["validate"]).run(),
    "test": lambda args: Test(args, SUMMARIES["test"]).run(),
    "predict": lambda args: Predict(args, SUMMARIES["predict"]).run(),
    "sweep": _sweep,
    "scenes": lambda args: _run_function("scenes", write_splits, args),
    "demo": _demo,
}


def _message(error: Exception) -> str:
    text, name = str(error), type(error).__name__
    if text.startswith("Caught ") and "Original Traceback" in text:  # from a DataLoader's worker process
        text = re.split(rf"\n[\w.]*\b{name}: ", text)[-1].strip()
    return text if isinstance(error, (ArgumentError, *OURS)) else f"{name}: {text}"


@contextmanager
def _without_advertisements() -> Iterator[None]:
    """Lightning's tips to install other products, and what a user can do nothing about, stay unsaid."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def wanted(record: logging.LogRecord) -> bool:
        return "Tip: For seamless cloud" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.removeFilter(wanted)
