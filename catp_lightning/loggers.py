"""Loggers are told what was found; where one fails, nothing is lost but that."""

from collections.abc import Callable, Iterable

from lightning.pytorch.loggers import Logger

from catp_lightning.saying import rank_zero_warn


def tell(loggers: Iterable[Logger], what: str, log: Callable[[Logger], None]) -> None:
    """Call `log` with each logger; those that raise are named in one warning, with the reason.

    A network, a disk or a service may be gone after hours of work, at whose end loggers are told.

    Args:
        loggers: of the trainer.
        what: begins the warning: what could not be logged, and where else it is.
        log: what to do with one.
    """
    failed = []
    for logger in loggers:
        try:
            log(logger)
        except Exception as error:  # any type: loggers are many, and what they raise is documented by none
            failed.append(f"{type(logger).__name__} ({type(error).__name__}: {error})")
    if failed:
        rank_zero_warn(f"{what} could not be logged, or not all of it, to {', '.join(failed)}.")
