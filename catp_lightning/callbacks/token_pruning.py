"""`TokenPruning`: validation, test and prediction on a share of the visual tokens."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torchmetrics import MeanMetric

from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.callbacks.call_profile import CallProfile
from catp_lightning.callbacks.context import LoopContext, Stage
from catp_lightning.callbacks.loop_figures import LoopFigures
from catp_lightning.callbacks.loop_pictures import LoopPictures, log_pictures
from catp_lightning.callbacks.monitored import callbacks_of, warn_where_monitored
from catp_lightning.callbacks.strategies import refuse_deepspeed, refuse_without_validation
from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.metrics import Agreement, TokensKept
from catp_lightning.metrics.outside import outside_check
from catp_lightning.metrics.overlap import overlap_check
from catp_lightning.models import find_family
from catp_lightning.policy import Budget, PruningPolicy, check_keep, check_price
from catp_lightning.policy.checkpoints import POLICY_KEY, missing_policy, stored_policy, warn_where_another
from catp_lightning.policy.images import decode_images, has_images
from catp_lightning.policy.seen import Fallback, build_fallback, guard_of
from catp_lightning.policy.sources import Source, policy_or_path
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.pruning.pruner import applied
from catp_lightning.pruning.record import Prefill
from catp_lightning.pruning.shown import Shown
from catp_lightning.utils.loggers import log_safely
from catp_lightning.utils.messages import rank_zero_info


class TokenPruning(LoopContext):
    """Prunes visual tokens in the validation, test and predict loops; training is not changed.

    Logs, once an epoch, `catp/tokens_kept` (mean number of visual tokens kept a sample) and `catp/keep_share` (in
    (0, 1]), and, where tokens are dropped inside the decoder, `catp/tokens_per_layer`, the mean number of visual tokens
    that a decoder layer reads. In predict, where Lightning forbids `log`, they go directly to the trainer's loggers,
    and to the console if there are none. The model is restored after each loop and after any exception. If the split
    shares images with the one that the policy was calibrated on, a warning at the end of each epoch gives their number.
    If the policy says what its calibration's images were like, `catp/outside` is the share of images far outside of
    that, and one warning a loop says in what, once they are more than 1%.
    With `profile=True` the first calls of the model with an image are made twice more, unpruned and pruned in turn, and
    timed: one to warm up and eight that count. Logged are medians over calls, of several processes their mean:
    `catp/seconds_vision`, `_choosing`, `_prefill` (choosing included), `_step` (a decoding step, if there were any) and
    `_call`; the same of the unpruned model as `catp/unpruned_seconds_…`; the ratios `catp/speedup_prefill`,
    `catp/speedup_step` and `catp/speedup` (of whole calls, whose answers may differ in length);
    `catp/samples_per_second`, `catp/unpruned_samples_per_second` and `catp/profiled_calls`. A line on the console says
    the same. On one GPU, CUDA events measure.
    Checkpoints of a fit whose validation is pruned hold the policy, as plain JSON types under "catp_policy", and
    nothing else of the callback: they load without it.

    Args:
        policy: a `PruningPolicy`, or a path or address for `PruningPolicy.load`, read when a stage is set up; in a
            configuration file also the fields of one, {scorer: catp, keep: 0.25}. None: the policy in the checkpoint
            that `ckpt_path=` names. A given policy wins over the checkpoint's, with a warning of the differences.
        keep: the budget, in place of that of a `PruningPolicy`; with a path, which budget of a folder, or the one that
            a single policy must be for. A float in (0, 1] is a share, an int >= 1 a number of tokens.
        budget: with a folder that a calibration at prices saved, the price to pay at most, {"prefill_flops": 0.25}, as
            in `PruningPolicy.load`.
        stages: the loops to prune in; "validate" includes validation inside fit.
        compare: run the unpruned model on each batch as well and log `catp/agreement`, the share of equal answers.
        profile: True to measure how much faster the first batches run than unpruned.
        log_images: number of samples, the first of each loop that have an image, of which `catp/kept_tokens` is logged
            at the end of the epoch: a picture of the kept tokens over the image, as `catp_lightning.plots.kept_tokens`
            draws it. W&B and TensorBoard take pictures; other loggers are skipped. Of several processes the first one
            draws its own.
        sanity_check: True to prune in the sanity check before fit as well.
        model: the name of the submodule to prune, where the module holds several supported models.
        guide: the smaller model that the scorer `sgl` reads, as in `prune`; it stays on its device.
        fallback: rule for samples with an image unlike those of the policy's calibration, at the same budget: the name
            of a scorer, "divprune", or a dictionary with `scorer`, `scorer_args`, `selector` and `selector_args`. None:
            the policy prunes them too.

    Attributes:
        figures: the figures logged at the end of the last epoch, by name.
        shown: what the last loop kept of its first `log_images` samples, for the functions of `catp_lightning.plots`.

    Raises:
        ValueError: a stage is unknown, `log_images` is below 0, or `compare` and `profile` are both asked for.
        PolicyError: `keep` or `fallback` is not allowed; at setup: the policy cannot be read, or there is a `fallback`
            and the policy does not say what its calibration's images were like; at the start of the loop: it was made
            for another model, or none was given and no checkpoint with one was loaded.
        PruningError: at setup: `CrossAttentionCalibration` is in the same trainer and both would act in predict, or
            DeepSpeed runs the model; at the start of the loop: the model cannot be pruned.

    Example::

        trainer = Trainer(callbacks=[TokenPruning("policy.json")])
        trainer.validate(module, loader)
    """

    def __init__(
        self,
        policy: Source | None = None,
        *,
        keep: Budget | None = None,
        budget: Mapping[str, float] | None = None,
        stages: tuple[Stage, ...] = ("validate", "test", "predict"),
        compare: bool = False,
        profile: bool = False,
        log_images: int = 0,
        sanity_check: bool = False,
        model: str | None = None,
        guide: nn.Module | None = None,
        fallback: Fallback | None = None,
    ) -> None:
        super().__init__(stages, sanity_check)
        if compare and profile:
            raise ValueError(
                "compare=True and profile=True both make the model's calls again, and times would be those of several. "
                "Measure agreement in one run and times in another."
            )
        if log_images < 0:
            raise ValueError(f"log_images is {log_images}; it is a number of samples, 0 or more.")
        if keep is not None:
            check_keep(keep)
        if budget is not None:
            check_price(budget)
        self.policy, self.keep, self.budget = policy_or_path(policy), keep, budget
        self.compare, self.profile, self.model, self.guide = compare, profile, model, guide
        self.fallback = build_fallback(fallback)
        self.log_images, self.shown = log_images, list[Shown]()
        self.figures: dict[str, float] = {}
        self._loaded: PruningPolicy | None = None
        self._loop: LoopFigures | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if "validate" not in self.stages or not trainer.enable_validation:
                return
            warn_where_monitored(trainer, "TokenPruning")
        elif stage not in self.stages:
            return
        refuse_deepspeed(trainer, "TokenPruning")
        if stage == "predict":
            _refuse_beside_calibration(trainer)
        if self.policy is not None:  # otherwise the last checkpoint's policy stays, as its weights do
            self._use(self.policy)

    def _use(self, source: str | Path | PruningPolicy) -> PruningPolicy:
        policy = load_policy(source, self.keep, self.budget)
        guard_of(policy, self.fallback)  # raises now, not when a loop starts
        self._loaded = policy
        return policy

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._loaded is not None:  # under the callback's own key Lightning would ask for the callback at every load
            checkpoint[POLICY_KEY] = self._loaded.to_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.policy is None:
            stored = stored_policy(checkpoint)
            self._loaded = None if stored is None else self._use(stored)
        elif self._loaded is not None:
            warn_where_another("TokenPruning", self._loaded, checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "validate" in self.stages and trainer.enable_validation:
            self._current_policy()  # raises now, not after the first epoch
            refuse_without_validation(trainer, "TokenPruning")

    def _current_policy(self) -> PruningPolicy:
        if self._loaded is None:
            if self.policy is None:
                raise missing_policy("TokenPruning", 'TokenPruning("policy.json")')
            return self._use(self.policy)
        return self._loaded

    @contextmanager
    def loop_context(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> Iterator[None]:
        policy = self._current_policy()
        guard = guard_of(policy, self.fallback)
        prefills: list[Prefill] = []
        device = trainer.strategy.root_device  # a metric outside the module is not moved by Lightning
        with ExitStack() as stack:
            profile = CallProfile(find_family(pl_module, self.model), device) if self.profile else None
            if profile is not None:
                stack.enter_context(profile.outside())
            pruner = stack.enter_context(
                applied(
                    pl_module,
                    policy,
                    model=self.model,
                    guide=self.guide,
                    on_prefill=prefills.append,
                    guard=guard,
                    show=self.log_images > 0 and trainer.is_global_zero,
                )
            )
            pictures = None if pruner.viewer is None else LoopPictures(self.log_images, pruner.viewer)
            self.shown = [] if pictures is None else pictures.shown
            comparison = stack.enter_context(compare_with_unpruned(pruner)) if self.compare else None
            if profile is not None:
                stack.enter_context(profile.inside(pruner))
            tokens, agreement = TokensKept().to(device), Agreement().to(device)
            inside, overlap, per_layer = bool(pruner.leave_at), overlap_check(policy, device), MeanMetric().to(device)
            outside = outside_check(guard, device)
            self._loop = LoopFigures(
                prefills, inside, tokens, comparison, agreement, overlap, outside, per_layer, profile, pictures
            )
            try:
                yield
            finally:
                self._loop = None

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._read_batch()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._read_batch()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._read_batch()

    def _read_batch(self) -> None:
        if self._loop is not None:
            self._loop.read_batch()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loop is not None:
            log_pictures(trainer, self.shown)
            self.figures = self._loop.figures()
            # The figures are equal on all processes: sync_dist keeps Lightning from warning, and rank_zero_only from
            # waiting for processes that have no batch.
            pl_module.log_dict(self.figures, sync_dist=True, rank_zero_only=True)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loop is not None:
            self.figures = self._loop.figures()
            said = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
            log_safely(trainer.loggers, said, lambda logger: logger.log_metrics(self.figures, step=trainer.global_step))
            log_pictures(trainer, self.shown)
            if not trainer.loggers:  # otherwise nobody would see the figures
                rank_zero_info(said)

    def take_part(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loop is not None:
            self.figures = self._loop.figures()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loop": None}


def load_policy(
    policy: str | Path | PruningPolicy, keep: int | float | None, budget: Mapping[str, float] | None = None
) -> PruningPolicy:
    """Return the policy that is given, or load the one at a path; with `keep` or `budget`, at that budget.

    Raises:
        PolicyError: no policy can be read at the path, there is none for the budget, or the images in the policy's
            evidence are damaged (raised here, not when a loop starts after hours of training).
    """
    if not isinstance(policy, PruningPolicy):
        policy = PruningPolicy.load(policy, keep=keep, budget=budget)
    elif budget is not None and policy.budget != budget:
        raise PolicyError(
            f"The policy was given as an object, of budget {policy.budget!r:.100}; {budget!r:.100} chooses among the "
            "policies of a folder. Give the folder, or leave budget out."
        )
    if has_images(policy):
        decode_images(policy.evidence["images"])
    return policy if keep is None else policy.with_keep(keep)


def _refuse_beside_calibration(trainer: Trainer) -> None:
    if any(isinstance(callback, CrossAttentionCalibration) for callback in callbacks_of(trainer)):
        raise PruningError(
            "TokenPruning and CrossAttentionCalibration would both act in predict, but calibration needs the unpruned "
            "model. Calibrate with one Trainer and predict with another, or leave predict out: "
            'TokenPruning(..., stages=("validate", "test")).'
        )
