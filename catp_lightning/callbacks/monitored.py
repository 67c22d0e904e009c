"""Which callbacks a trainer has, and which of them monitor metrics of validation inside fit."""

from lightning.pytorch import Callback, Trainer

from catp_lightning.utils.compat import is_lightning_instance
from catp_lightning.utils.messages import rank_zero_warn


def warn_where_monitored(trainer: Trainer, name: str) -> None:
    """Warn if a callback monitors metrics of validation inside fit, which runs pruned; `name` is what prunes it."""
    watched = {
        f"{type(callback).__name__} (monitor={monitor!r})"
        for callback in callbacks_of(trainer)
        if is_lightning_instance(callback, "EarlyStopping", "Checkpoint")
        and (monitor := getattr(callback, "monitor", None))
    }
    if watched:
        rank_zero_warn(
            f"{name} prunes validation inside fit, so the validation metrics watched by {', '.join(sorted(watched))} "
            "are those of the pruned model. To watch the unpruned model, fit without it, or with "
            'TokenPruning(..., stages=("test", "predict")).'
        )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer."""
    return trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it without declaring it
