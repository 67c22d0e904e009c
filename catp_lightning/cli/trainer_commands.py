"""Running of the subcommands of `catp` that have a Trainer."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from catp_lightning.cli.command import Command
from catp_lightning.cli.commands import Calibrate, Predict, Profile, Test, Validate
from catp_lightning.cli.show import Show
from catp_lightning.errors import DataError
from catp_lightning.utils.progress import Preparation
from catp_lightning.utils.threads import at_most, processors

COMMANDS: dict[str, type[Command]] = {
    "calibrate": Calibrate,
    "validate": Validate,
    "test": Test,
    "predict": Predict,
    "profile": Profile,
    "show": Show,
}


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
