"""Log to every logger; one that raises yields a warning, not a failed run. Which of them are of W&B."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch.loggers import Logger

from catp_lightning.utils.compat import is_lightning_instance
from catp_lightning.utils.messages import rank_zero_warn


def log_safely(loggers: Iterable[Logger], what: str, log: Callable[[Logger], None]) -> None:
    """Call `log` with each logger; those that raise are named in one warning, with the reason.

    A network, a disk or a service may be gone after hours of work, at whose end results are logged.

    Args:
        loggers: loggers of the trainer.
        what: beginning of the warning: the results that could not be logged, and where else they are.
        log: function that logs to one logger.
    """
    failed = []
    for logger in loggers:
        try:
            log(logger)
        except Exception as error:  # any type: loggers are many, and none documents what it raises
            failed.append(f"{type(logger).__name__} ({type(error).__name__}: {error})")
    if failed:
        rank_zero_warn(f"{what} could not be logged, or not all of it, to {', '.join(failed)}.")


def has_wandb_run(logger: Any) -> bool:
    """True if a logger is Lightning's for Weights & Biases, and its run is of W&B: that of a library with the same
    interface, Trackio for example, may be given to it, and takes figures alone.
    """
    return is_lightning_instance(logger, "WandbLogger") and type(logger.experiment).__module__.startswith("wandb.")
