"""Runs on several processes: strategies that are refused, and actions that all processes take together."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer

from catp_lightning.errors import PruningError
from catp_lightning.utils.compat import is_lightning_instance

_DEEPSPEED = (
    "{name} cannot be used under {strategy}: DeepSpeed runs the model in an engine of its own, whose hooks at ZeRO "
    "stage 3 gather the weights of each submodule in the order that they recorded, and pruning puts hooks on the same "
    "submodules and runs some of them differently. That was never shown to be exact. Use DDP, Trainer(strategy='ddp'), "
    "or for a model too large for one device FSDP2 with TokenPruning, Trainer(strategy=ModelParallelStrategy(...))."
)


def refuse_deepspeed(trainer: Trainer, name: str) -> None:
    """Raise PruningError if DeepSpeed runs the model; `name` is the class that cannot be used with it."""
    if is_lightning_instance(trainer.strategy, "DeepSpeedStrategy"):
        raise PruningError(_DEEPSPEED.format(name=name, strategy=type(trainer.strategy).__name__))


def refuse_sharded(trainer: Trainer, name: str, why: str) -> None:
    """Raise PruningError if no process holds the whole model: under FSDP, FSDP2, tensor parallelism or DeepSpeed.

    Args:
        trainer: the trainer whose strategy is checked.
        name: the class that cannot be used with such a strategy.
        why: end of the message, after "which shards the model": the reason, and what to do instead.
    """
    refuse_deepspeed(trainer, name)
    if is_lightning_instance(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy"):
        strategy = type(trainer.strategy).__name__
        raise PruningError(f"{name} cannot be used under {strategy}, which shards the model{why}")


def on_first(trainer: Trainer, write: Callable[[], object]) -> None:
    """Call `write` in the first process; if it fails, all processes raise its error, so that none waits for it."""
    failed: Exception | None = None
    if trainer.is_global_zero:
        try:
            write()
        except Exception as error:
            failed = error
    failed = trainer.strategy.broadcast(failed)
    if failed is not None:
        raise failed


def on_all(trainer: Trainer, write: Callable[[], object]) -> None:
    """Call `write` in every process; if it fails in one, all processes raise, so that none waits for it.

    Raises:
        Exception: the error of `write` in this process.
        OSError: `write` failed in other processes only.
    """
    failed: Exception | None = None
    try:
        write()
    except Exception as error:
        failed = error
    raised = torch.tensor(float(failed is not None), device=trainer.strategy.root_device, dtype=torch.float32)
    count = round(float(trainer.strategy.reduce(raised, reduce_op="sum")))
    if failed is not None:
        raise failed
    if count:
        raise OSError(f"{count} other processes of this run could not write; their own errors say why.")


def loop_was_skipped(trainer: Trainer, stage: str) -> bool:
    """True if this process, one of several, had no batch in the run of `stage` that now ends.

    Lightning then skips the process's whole loop (`allow_zero_length_dataloader_with_multiple_devices`): no hook of the
    loop is called, and the processes that had batches wait for it at the end of their loops.
    """
    if trainer.world_size == 1 or stage not in ("validate", "test", "predict"):
        return False
    limits = {"test": trainer.limit_test_batches, "predict": trainer.limit_predict_batches}
    if limits.get(stage, trainer.limit_val_batches) == 0:  # no process has any batch
        return False
    batches = {"test": trainer.num_test_batches, "predict": trainer.num_predict_batches}
    counts = batches.get(stage, trainer.num_val_batches)
    return len(counts) > 0 and sum(counts) == 0


def refuse_without_validation(trainer: Trainer, name: str) -> None:
    """Raise PruningError in all processes if, in fit, some have batches to validate and others have none.

    A count over all processes would wait for the processes that go on training. Every process must call this at the
    start of fit.
    """
    if trainer.world_size == 1:
        return
    has = torch.tensor(
        float(sum(trainer.num_val_batches) > 0), device=trainer.strategy.root_device, dtype=torch.float32
    )
    having = round(float(trainer.strategy.reduce(has, reduce_op="sum")))
    if 0 < having < trainer.world_size:
        raise PruningError(
            f"{name} counts over all processes in validation, but only {having} of {trainer.world_size} have batches "
            "to validate, and would wait for the others for ever. Give each process at least one, or leave validation "
            'out: TokenPruning(..., stages=("test", "predict")).'
        )
