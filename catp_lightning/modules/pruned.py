"""`PrunedModule`: wraps a LightningModule so that its validation, test and predict steps run with pruned tokens."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import nn

from catp_lightning.callbacks.monitored import warn_where_monitored
from catp_lightning.callbacks.strategies import loop_was_skipped, refuse_sharded
from catp_lightning.callbacks.token_pruning import load_policy
from catp_lightning.errors import PolicyError
from catp_lightning.metrics.overlap import OverlapCheck, overlap_check
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.checkpoints import POLICY_KEY, missing_policy, stored_policy, warn_where_another
from catp_lightning.policy.sources import Source, policy_or_path
from catp_lightning.pruning.pruner import applied
from catp_lightning.pruning.record import Prefill
from catp_lightning.utils.compat import is_lightning_instance

_STEPS = frozenset({"validation_step", "test_step", "predict_step"})
_EPOCH_ENDS = frozenset({"on_validation_epoch_end", "on_test_epoch_end", "on_predict_epoch_end"})
_STATE = frozenset(  # attributes that Lightning reads and writes on the root module directly
    {
        "_current_fx_name",
        "_log_hyperparams",
        "_metric_attributes",
        "allow_zero_length_dataloader_with_multiple_devices",
        "prepare_data_per_node",
    }
)
_HOOKS = frozenset(
    name
    for klass in (LightningModule, HyperparametersMixin, ModelHooks, DataHooks, CheckpointHooks)
    for name, value in vars(klass).items()
    if not name.startswith("_") and (callable(value) or isinstance(value, property))
)
_OWN = frozenset(
    {
        "forward",
        "setup",
        "on_save_checkpoint",
        "on_load_checkpoint",
        "load_from_checkpoint",
        "trainer",
        "fabric",
        "device_mesh",
    }
)
_INNER = (_HOOKS | _STATE | {"state_dict", "load_state_dict"}) - _OWN
_SHARDED = (
    " and could not save it under the names of the module inside. Use the callback with the module itself: "
    "Trainer(callbacks=[TokenPruning(policy)])."
)


class PrunedModule(LightningModule):
    """Wraps a LightningModule to prune visual tokens in its validation, test and predict steps, and only there.

    Every hook, property and logging call of Lightning reaches `inner`: a hook that `inner` overrides is called once,
    and one that it does not override does not look overridden. Hyperparameters, optimizers and checkpoints are those of
    `inner`, and either class reads the other's checkpoints; those of the wrapper also hold the policy, as plain JSON
    types under "catp_policy". If an evaluated split shares images with the one that the policy was calibrated on, a
    warning at the end of each epoch gives their number.

    Args:
        inner: the module around a supported Hugging Face model.
        policy: a `PruningPolicy`, or a path or address for `PruningPolicy.load`, read when a stage is set up; in a
            configuration file also the fields of one, {scorer: catp, keep: 0.25}. None: the policy in the checkpoint
            that `ckpt_path=` names. A given policy wins over the checkpoint's, with a warning of the differences.
        keep: the budget, as in `TokenPruning`.
        model: the name of the submodule to prune, where `inner` holds several supported models.
        guide: smaller model that the scorer `sgl` reads, as in `TokenPruning`; not a submodule of the wrapper.

    Raises:
        TypeError: `inner` is not a `lightning.pytorch.LightningModule`.
        PolicyError: the policy cannot be read, or was made for another model; in a step: none was given and no
            checkpoint with one was loaded.
        PruningError: at setup: the strategy shards the model; in a step: the model cannot be pruned.

    Example::

        trainer.predict(PrunedModule(module, PruningPolicy(scorer="catp", keep=0.5)), loader)
        trainer.test(PrunedModule(module), loader, ckpt_path="best")  # the policy in the checkpoint
    """

    def __init__(
        self,
        inner: LightningModule,
        policy: Source | None = None,
        *,
        keep: int | float | None = None,
        model: str | None = None,
        guide: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(inner, LightningModule):
            if is_lightning_instance(inner, "LightningModule"):
                raise TypeError(
                    f"PrunedModule is a lightning.pytorch.LightningModule and {type(inner).__name__} one of "
                    "pytorch_lightning; modules of the two packages do not mix. Import lightning.pytorch where "
                    f"{type(inner).__name__} is defined, or prune it in its own Trainer: "
                    "pytorch_lightning.Trainer(callbacks=[TokenPruning(policy)])."
                )
            raise TypeError(
                f"PrunedModule wraps a lightning.pytorch.LightningModule, not {type(inner).__module__}."
                f"{type(inner).__name__}. For a Hugging Face model alone use `with prune(model, policy):`."
            )
        self.policy, self.keep, self.pruned_model = policy_or_path(policy), keep, model
        self.__dict__["pruning_guide"] = guide  # no submodule: neither trained nor saved with the module inside
        self._loaded: PruningPolicy | None = None  # the policy in use, given or from a checkpoint
        self._overlap: OverlapCheck | None = None  # check of the running loop
        self.inner = inner  # last: from here on attributes are looked up on `inner` too

    # ---- attribute access: Lightning gets from the wrapper what it would get from the inner module

    def __getattribute__(self, name: str) -> Any:
        if name not in _INNER or (inner := _inner_of(self)) is None:
            return super().__getattribute__(name)
        value = getattr(inner, name)
        if name in _STEPS and callable(value):
            return self._pruned(value)
        if name == "teardown":
            return self._after_taking_part(value)
        return self._then_warning(value) if name in _EPOCH_ENDS else value

    def __getattr__(self, name: str) -> Any:
        inner = None if name.startswith("__") else _inner_of(self)
        if inner is None or name in self._modules:
            return super().__getattr__(name)
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = _inner_of(self)
        if inner is not None and (name in _INNER or (not self._has(name) and hasattr(inner, name))):
            setattr(inner, name, value)  # where its steps will read it
        else:
            super().__setattr__(name, value)

    def _has(self, name: str) -> bool:
        return name in self.__dict__ or name in self._modules or hasattr(type(self), name)

    def _pruned(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def pruned_step(*args: Any, **kwargs: Any) -> Any:
            prefills: list[Prefill] = []
            policy, model, guide = self._current_policy(), self.pruned_model, self.pruning_guide
            with applied(self.inner, policy, model=model, guide=guide, on_prefill=prefills.append):
                output = step(*args, **kwargs)
            if (overlap := self._current_overlap()) is not None:
                overlap.see(prefill.images for prefill in prefills if prefill.images is not None)
            return output

        return _seen_as(step, pruned_step)

    def _then_warning(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def epoch_end(*args: Any, **kwargs: Any) -> Any:
            output = hook(*args, **kwargs)
            overlap, self._overlap = self._current_overlap(), None
            if overlap is not None:
                overlap.warn()
            return output

        return _seen_as(hook, epoch_end)

    def _after_taking_part(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def teardown(stage: str) -> Any:
            if loop_was_skipped(self.trainer, stage) and (overlap := self._current_overlap()) is not None:
                overlap.warn()
            self._overlap = None
            return hook(stage)

        return _seen_as(hook, teardown)

    def _current_overlap(self) -> OverlapCheck | None:
        if self._trainer is not None and self.trainer.world_size > 1 and self.trainer.state.fn == "fit":
            return None  # the count over all processes would wait for one that has no batch to validate
        if self._overlap is None:  # the loop's first step
            device = self.device if self._trainer is None else self.trainer.strategy.root_device
            self._overlap = overlap_check(self._current_policy(), device)
        return self._overlap

    def _current_policy(self) -> PruningPolicy:
        if self._loaded is None:  # a step called by hand, without a Trainer
            if self.policy is None:
                raise missing_policy("PrunedModule", 'PrunedModule(module, "policy.json")')
            self._loaded = load_policy(self.policy, self.keep)
        return self._loaded

    # ---- methods of the wrapper itself

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the inner module's forward, unpruned."""
        return self.inner(*args, **kwargs)

    def setup(self, stage: str) -> None:
        refuse_sharded(self.trainer, "PrunedModule", _SHARDED)
        if stage == "fit" and self.trainer.enable_validation:
            warn_where_monitored(self.trainer, "PrunedModule")
        self._overlap = None
        if self.policy is not None:  # otherwise the last checkpoint's policy stays, as its weights do
            self._loaded = load_policy(self.policy, self.keep)
        self.inner.setup(stage)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.inner.on_save_checkpoint(checkpoint)
        if self.policy is not None or self._loaded is not None:
            checkpoint[POLICY_KEY] = self._current_policy().to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy is not None:
            warn_where_another("PrunedModule", self._current_policy(), checkpoint)
        else:
            stored = stored_policy(checkpoint)
            self._loaded = None if stored is None else load_policy(stored, self.keep)
        self.inner.on_load_checkpoint(checkpoint)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        *,
        inner: LightningModule,
        policy: Source | None = None,
        keep: int | float | None = None,
        model: str | None = None,
        guide: nn.Module | None = None,
        map_location: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
    ) -> Self:
        """Wrap `inner` and load a checkpoint of the wrapper or of the inner class into it.

        Args:
            checkpoint_path: a file that `Trainer.save_checkpoint` or `ModelCheckpoint` wrote.
            inner: a module of the class that was trained; its hyperparameters are not read from the checkpoint.
            policy: as in the constructor; None: the policy in the checkpoint.
            keep: as in the constructor.
            model: as in the constructor.
            guide: as in the constructor.
            map_location: as in `torch.load`.
            strict: True if the names of the parameters must match; None: `inner.strict_loading`.
            weights_only: as in `torch.load`.

        Returns:
            The wrapper.

        Raises:
            PolicyError: `policy` is None and the checkpoint holds none, or a damaged one.
        """
        checkpoint = torch.load(checkpoint_path, map_location=map_location, weights_only=weights_only)
        given = policy is not None
        if policy is None and (policy := stored_policy(checkpoint)) is None:
            raise PolicyError(
                f"{checkpoint_path} holds no policy: it was written without PrunedModule. Give one: "
                f"{cls.__name__}.load_from_checkpoint(path, inner=module, policy=...)."
            )
        wrapper = cls(inner, policy, keep=keep, model=model, guide=guide)
        wrapper.configure_model()
        (wrapper if given else inner).on_load_checkpoint(checkpoint)
        wrapper.load_state_dict(checkpoint["state_dict"], strict=wrapper.strict_loading if strict is None else strict)
        return wrapper


def _seen_as(own: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Return `replacement`, with `__wrapped__` set to the module's own function.

    Lightning unwraps one decorator to read signatures and to detect overrides.
    """
    replacement.__wrapped__ = getattr(own, "__wrapped__", own)  # type: ignore[attr-defined]
    return replacement


def _inner_of(wrapper: PrunedModule) -> LightningModule | None:
    """Return the wrapped module; None while the wrapper is being built or unpickled."""
    modules: dict[str, Any] = object.__getattribute__(wrapper, "__dict__").get("_modules", {})
    return modules.get("inner")
