"""The command `catp`: it runs a subcommand and shows errors as one message on standard error."""

import argparse
import os
import re
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from catp_lightning.errors import DataError, PolicyError, PruningError, did_you_mean
from catp_lightning.safe_text import printable
from catp_lightning.utils.progress import Lines, Preparation

# Modules that need torch are imported where they are used: help, versions and misspelt commands need none of them.

SUMMARIES = {
    "calibrate": "Measure, on a calibration split, which visual tokens a model can do without, and save the policy.",
    "validate": "Print the metrics of the validation split, pruned by a policy or not at all.",
    "test": "Print the metrics of the test split, pruned by a policy or not at all.",
    "predict": "Write the answers to the prediction split as JSON Lines, pruned by a policy or not at all.",
    "profile": "Print how long vision, prefill and decoding take, unpruned and pruned, on a few batches.",
    "show": "Draw which visual tokens are kept of the first samples, over their images: PNG files in a folder.",
    "sweep": "Compare any list of methods on the shipped models or on yours: one table and one plot.",
    "recipe": "List published settings, show one with its figures, or run it: model, data sets, budgets and prompts.",
    "league": "Run all methods over recipes, or write the page of all submissions, docs/league.md.",
    "scenes": "Write digit scenes with questions, the data of a shipped model: folders calibration/ and test/.",
    "demo": "Calibrate the shipped model on digit scenes and compare every method at three budgets.",
    "completion": "Print a script by which a shell, bash, zsh or fish, completes commands, options and names.",
}

EPILOG = """\
examples:
  catp demo
  catp scenes
  catp calibrate --config digits_blip2.yaml --keep '[0.5, 0.25, 0.125]' --output policies
  catp test --config digits_blip2.yaml --policy policies --keep 0.25 --compare true
  catp validate --config digits_blip2.yaml --scorer stride --keep 0.25
  catp predict --config digits_blip2.yaml --policy policies --keep 0.25 --output answers.jsonl
  catp profile --config digits_llava.yaml --scorer fastervlm --keep 0.25
  catp show --config digits_llava.yaml --scorer fastervlm --keep '[0.5, 0.25]' --output pictures
  catp validate --config mine.yaml --model my_package.MyModule --data my_package.MyDataModule
  catp sweep --scorers '[fastervlm, fastv, stride, random]' --keep '[0.5, 0.25]' --output runs/sweep
  catp recipe list
  catp recipe run fastervlm-llava-1.5-7b --dry-run
  catp league --run '[digits-blip2]'
  catp completion bash > ~/.local/share/bash-completion/completions/catp

`catp COMMAND --help` explains a command's options, `catp COMMAND --print_config` prints them as YAML for --config.
A configuration file that is not found is looked for among those shipped: blip2_opt_vqav2.yaml,
digits_blip2.yaml, digits_llava.yaml, digits_mllama.yaml, digits_qwen2_5_vl.yaml.
It exits with 2 where what was asked for is wrong, a name, a value, a file that is not there or a policy for another
model, and has then not begun; with 1 where the work itself fails. CATP_TRACEBACK=1 shows an error's traceback.
"""

OURS = (PolicyError, DataError, PruningError)  # their messages say everything
EXPECTED = (*OURS, ValueError, TypeError, OSError, ImportError)

NOISE = (".*does not have many workers", ".*LeafSpec.*is deprecated")  # Lightning's advice, and its own use of torch

TO_STDOUT = ("demo", "sweep", "recipe", "league", "scenes")
"""Commands whose progress lines go to standard output; others, whose output programs may read, use standard error."""


def main(args: Sequence[str] | None = None) -> None:
    """Run `catp` with the given arguments, by default with those of the process.

    Raises:
        SystemExit: 2 if the request is wrong, which is noticed before the work begins; 1 if the work fails; each with
            one message on standard error.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    chosen = _parse(arguments or ["--help"])
    if args is None and "torch" not in sys.modules:  # run as a program, not called by another
        # Threads that wait for each other sleep. Beside other work on all processors they would burn most of the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stream = sys.stdout if chosen.command in TO_STDOUT else sys.stderr
    with Lines(f"{chosen.command}: preparing", stream) as lines:
        preparation = Preparation(lines)
        try:
            with _without_advertisements():
                _run(chosen.command, chosen.arguments, preparation)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():  # as in `catp recipe list | head -3`
                raise SystemExit(1) from None
            if os.environ.get("CATP_TRACEBACK") == "1" or not _is_expected(error):
                raise
            help_ = f"\n`catp {chosen.command} --help` lists the options." if _is_of_arguments(error) else ""
            told = printable(f"\ncatp: error: {_message(error)}{help_}")  # a progress bar leaves its line open
            print(told, file=sys.stderr)
            raise SystemExit(1 if preparation.over else 2) from None


def _nobody_reads() -> bool:
    """True if standard output is a pipe whose reader has ended; it is replaced then, as its flush would fail."""
    asked = select.poll()
    asked.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in asked.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command not in SUMMARIES:
        hint = did_you_mean(chosen.command, SUMMARIES)
        parser.error(f"there is no command {chosen.command!r}; there are {', '.join(SUMMARIES)}.{hint}")
    return chosen


def _parser() -> argparse.ArgumentParser:
    """Return the parser of what precedes a command; commands parse their own, so only one Trainer parser is built."""
    width = max(map(len, SUMMARIES))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items())
    parser = argparse.ArgumentParser(
        prog="catp",
        usage="catp COMMAND [options]",
        description=f"Calibrated visual-token pruning of vision-language models.\n\ncommands:\n{commands}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


class _Version(argparse.Action):
    """Action of --version that reads the version only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help="Print the version and exit.")

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("catp-lightning")
        except PackageNotFoundError:
            found = "(not installed)"
        print("catp-lightning", found)
        parser.exit()


def _run(name: str, args: list[str], preparation: Preparation) -> None:
    if name in ("demo", "scenes"):
        from catp_lightning.cli.scenes import demo, scenes

        (demo if name == "demo" else scenes)(args, SUMMARIES[name], preparation)
    elif name == "sweep":
        from catp_lightning.cli.sweep import sweep

        sweep(args, SUMMARIES[name], preparation)
    elif name == "recipe":
        from catp_lightning.cli.recipe import recipe

        recipe(args, SUMMARIES[name], preparation)
    elif name == "league":
        from catp_lightning.cli.league import league

        league(args, SUMMARIES[name], preparation)
    elif name == "completion":
        from catp_lightning.cli.completion import completion

        completion(args, SUMMARIES, partial(_run, args=[], preparation=preparation))
    else:
        from catp_lightning.cli.trainer_commands import run_trainer

        run_trainer(name, args, SUMMARIES[name], preparation)


def _is_of_arguments(error: Exception) -> bool:
    from jsonargparse import ArgumentError

    return isinstance(error, ArgumentError)


def _is_expected(error: Exception) -> bool:
    """True if an error's message is enough without a traceback.

    Lightning's own error is told by its name, or help would import Lightning.
    """
    of_lightning = any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)
    return isinstance(error, EXPECTED) or of_lightning or _is_of_arguments(error)


def _message(error: Exception) -> str:
    text, name = str(error), type(error).__name__
    if text.startswith("Caught ") and "Original Traceback" in text:  # from a DataLoader's worker process
        text = re.split(rf"\n[\w.]*\b{name}: ", text)[-1].strip()
    return text if isinstance(error, OURS) or _is_of_arguments(error) else f"{name}: {text}"


@contextmanager
def _without_advertisements() -> Iterator[None]:
    """Context without Lightning's tips to install other products and without warnings a user can do nothing about."""
    import logging

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
