"""The command `catp show`: pictures of what is kept of the first samples of the predict loop."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from catp_lightning import plots
from catp_lightning.callbacks.context import Stage
from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.cli.commands import Validate
from catp_lightning.errors import PruningError
from catp_lightning.policy import Budget, PruningPolicy
from catp_lightning.pruning.shown import Shown
from catp_lightning.safe_text import one_line
from catp_lightning.utils.files import require_writable

SAMPLES = 8
"""Number of samples that are drawn."""

Found = Sequence[tuple[Shown, str]]
"""What was kept of each sample, and the answer to it, which is empty where it is not known."""


class ShownAnswers(TokenPruning):
    """Notes the answers to the samples that are shown, where the module's step returns a list with one of each.

    Attributes:
        answers: the answer to each of `shown`; empty where the step returns something else.
    """

    def __init__(self, policy: PruningPolicy) -> None:
        super().__init__(policy, log_images=SAMPLES)
        self.answers: list[str] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        samples = [one for prefill in self._loop.prefills for one in prefill.shown] if self._loop is not None else []
        super().on_predict_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        texts = outputs if isinstance(outputs, list) and len(outputs) == len(samples) else [""] * len(samples)
        self.answers += [_answer(text) for one, text in zip(samples, texts, strict=True) if one.drawable]
        del self.answers[len(self.shown) :]


class Show(Validate):
    """Draws what is kept of the first samples, at one budget or at several."""

    stage: ClassVar[Stage] = "predict"
    budgets: ClassVar[Any] = Budget | list[Budget] | None

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({"trainer.limit_predict_batches": 1})

    def add_own_arguments(self, parser: LightningArgumentParser) -> None:
        help_ = (
            f"Folder for the pictures of the first {SAMPLES} samples of the first batch; "
            "`--trainer.limit_predict_batches 4` reads more batches. With several budgets, --keep '[0.5, 0.25]', one "
            "picture of each sample has all of them and the answers."
        )
        parser.add_argument("--output", type=str, default="pictures", help=help_)
        super().add_own_arguments(parser)

    def add_figures(self, parser: LightningArgumentParser) -> None:
        pass  # pictures are all that is made

    def callbacks(self) -> list[Callback]:
        require_writable(Path(self.config.output), folder=True)
        if not (found := super().callbacks()):
            raise ArgumentError(None, "What is kept? Give --policy or --scorer.")
        return found

    def policy_at(self, keep: Any) -> PruningPolicy:
        budgets = keep if isinstance(keep, list) else [keep]
        if not budgets:
            raise ArgumentError(None, "--keep is an empty list: give at least one budget.")
        self.policies: list[PruningPolicy] = []
        for budget in budgets:
            self.policies.append(super().policy_at(budget))
        return self.policies[0]

    def pruning(self, policy: PruningPolicy) -> TokenPruning:
        self.pruned = ShownAnswers(policy)
        return self.pruned

    def run(self) -> None:
        found = [self._shown(policy) for policy in self.policies]
        several = len(found) > 1
        full = self._shown(PruningPolicy(keep=1.0)) if several else []
        if not self.trainer.is_global_zero:
            return
        if not found[0]:
            raise PruningError(
                f"The {self.config.trainer.limit_predict_batches} batches that were read have no image, so there is "
                "nothing to draw. Give data with images, or read more batches: --trainer.limit_predict_batches 4."
            )
        rows = list(zip(full, *found, strict=True)) if several else []
        for same in rows:
            _refuse_others([shown for shown, _ in same])
        folder = Path(self.config.output)
        for policy, samples in zip(self.policies, found, strict=True):
            for number, (shown, _) in enumerate(samples):
                for name, picture in pictures_of(shown).items():
                    budget = f"-{policy.keep}" if several else ""
                    picture.save(folder / f"{number:02d}-{name}{budget}.png")
        for number, same in enumerate(rows):
            plots.by_budget(same).save(folder / f"{number:02d}-budgets.png")
        print(one_line(f"pictures of {len(found[0])} samples in {folder}"), flush=True)

    def _shown(self, policy: PruningPolicy) -> Found:
        """Run the loop pruned by a policy; return what was kept of the first samples, and the answers."""
        self.pruned.policy = policy
        self.pruned.answers.clear()
        super().run()
        return list(zip(self.pruned.shown, self.pruned.answers, strict=True))


def pictures_of(shown: Shown) -> dict[str, plots.Picture]:
    """Return the pictures of a sample at one budget, by name: those that show something under its policy."""
    found = {"kept": plots.kept_tokens(shown)}
    if shown.last.scores is not None:
        found["scores"] = plots.score_map(shown)
    if shown.last.destination is not None:
        found["merged"] = plots.merged_tokens(shown)
    if any(stage.layer for stage in shown.stages):
        found["layers"] = plots.by_layer(shown)
    return found


def _answer(output: Any) -> str:
    """Return the answer in an output of a step: a text, or VQAv2's {"question_id": ..., "answer": ...}; else empty."""
    answer = output.get("answer", "") if isinstance(output, Mapping) else output
    return answer if isinstance(answer, str) else ""


def _refuse_others(samples: Sequence[Shown]) -> None:
    """Raise PruningError if what was shown at several budgets is not the same sample."""
    first, *others = (
        [part.picture for parts in one.images for part in parts if part.picture is not None] for one in samples
    )
    for other in others:
        if len(first) != len(other) or not all(map(torch.equal, first, other)):
            raise PruningError(
                "The predict loop reads other samples each time, and several budgets are drawn of the same ones: give "
                "the data a loader that does not shuffle, or one budget."
            )
