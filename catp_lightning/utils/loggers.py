"""Log to every logger; one that raises yields a warning, not a failed run."""

from collections.abc import Callable, Iterable

from lightning.pytorch.loggers import Logger

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
