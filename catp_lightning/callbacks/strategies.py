"""Several processes: which strategies are refused, and what all processes do together."""

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer

from catp_lightning.either import is_a
from catp_lightning.errors import PruningError

_DEEPSPEED = (
    "{name} cannot be used under {strategy}: DeepSpeed runs the model in an engine of its own, whose hooks at ZeRO "
    "stage 3 gather the weights of each submodule in the order that they recorded, and pruning puts hooks on the same "
    "submodules and runs some of them differently. That was never shown to be exact. Use DDP, Trainer(strategy='ddp'), "
    "or for a model too large for one device FSDP2 with TokenPruning, Trainer(strategy=ModelParallelStrategy(...))."
)


def refuse_deepspeed(trainer: Trainer, name: str) -> None:
    """Raise PruningError where DeepSpeed runs the model; `name` is who cannot work there."""
    if is_a(trainer.strategy, "DeepSpeedStrategy"):
        raise PruningError(_DEEPSPEED.format(name=name, strategy=type(trainer.strategy).__name__))


def refuse_sharded(trainer: Trainer, name: str, why: str) -> None:
    """Raise PruningError where no process holds the whole model: under FSDP, FSDP2 or tensor parallelism, or DeepSpeed.

    Args:
        trainer: its strategy is asked.
        name: who cannot work there.
        why: what follows "which shards the model": the reason, and what to do instead.
    """
    refuse_deepspeed(trainer, name)
    if is_a(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy"):
        strategy = type(trainer.strategy).__name__
        raise PruningError(f"{name} cannot be used under {strategy}, which shards the model{why}")


def on_first(trainer: Trainer, write: Callable[[], object]) -> None:
    """The first process writes; where it cannot, all of them raise its error: none is left waiting for it."""
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
    """Every process writes; where one cannot, all of them raise: none is left waiting for it."""
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
    """Whether this process, one of several, had no batch in the run of `stage` that now ends.

    Lightning then skips its whole loop (`allow_zero_length_dataloader_with_multiple_devices`): no hook of the loop is
    called, and processes that had batches wait for it at the end of theirs.
    """
    if trainer.world_size == 1 or stage not in ("validate", "test", "predict"):
        return False
    limits = {"test": trainer.limit_test_batches, "predict": trainer.limit_predict_batches}
    if limits.get(stage, trainer.limit_val_batches) == 0:  # nobody has any
        return False
    batches = {"test": trainer.num_test_batches, "predict": trainer.num_predict_batches}
    counts = batches.get(stage, trainer.num_val_batches)
    return len(counts) > 0 and sum(counts) == 0


def refuse_without_validation(trainer: Trainer, name: str) -> None:
    """Raise PruningError in all processes where, in fit, some have batches to validate and others have none.

    What is counted over all processes would wait there for those that train on; all must ask, as fit starts.
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
