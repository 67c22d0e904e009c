"""`CompressorTraining`: trains a small network that compresses a frozen model's visual tokens, on its own answers."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.decoder import DecoderReplay
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.errors import PolicyError, PruningError, did_you_mean
from catp_lightning.methods.observation import Observation
from catp_lightning.methods.scorers import SCORERS, Compressor, Trained
from catp_lightning.methods.scorers.trained import HEADS
from catp_lightning.models import Family, find_family
from catp_lightning.modules.objectives import Compressing, Exiting, Objective
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.frozen import LARGEST
from catp_lightning.pruning.refusals import occupied, refuse_unprunable

WIDTH = 64
"""Default `width`: weights for a model of 4,096 dimensions then take 2.1 MB of a policy's 4 MiB."""


class CompressorTraining(LightningModule):
    """Trains a compressor of visual tokens on a model that stays what it is, without labels.

    In each step the inner module's `predict_step` answers the batch, unpruned; the same answers are then read with the
    compressor's rows in the place of the visual tokens, and the loss is the mean divergence of what is predicted along
    them, KL(unpruned || compressed). For "dyvte" it is the cross-entropy of the likelihood, layer by layer, that the
    answer stays if all visual tokens leave there. Only these weights are trained and saved in checkpoints. Afterwards
    `policy()` is a policy like any other.

    Logs `train/loss`, and in validation `val/loss` and, of a compressor, `val/agreement`, the share of answers whose
    every token stays the most likely one; of "dyvte" `val/told_apart`, the share of samples for which most layers'
    likelihoods are on the right side of a half.

    Args:
        module: LightningModule around a supported Hugging Face model, whose `predict_step` answers a batch. It is put
            in evaluation mode and not trained.
        compressor: "quecc" or "flashsloth", which compress visual tokens to a few; "dyvte", which lets all of them
            leave at a layer of each sample's own.
        tokens: number of tokens that each image is compressed to; not for "dyvte", which compresses none.
        width: dimensions in which the compressor computes, a multiple of 4.
        learning_rate: of AdamW; it falls to 0 along a cosine where the number of steps is known.
        seed: seed of the initial weights.
        model: name of the submodule to compress for, where `module` holds several supported models.

    Raises:
        PolicyError: there is no such compressor, or its settings are not allowed.
        PruningError: no decoder of the model reads visual tokens as rows of its own.

    Example::

        training = CompressorTraining(module, compressor="quecc", tokens=16)
        Trainer(max_epochs=10).fit(training, loader)
        training.policy().save("policy.json")
    """

    def __init__(
        self,
        module: LightningModule,
        compressor: str = "quecc",
        tokens: int | None = None,
        *,
        width: int = WIDTH,
        learning_rate: float = 3e-3,
        seed: int = 0,
        model: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["module"])
        self.module, self.learning_rate = module, learning_rate
        self._family = find_family(module, model)
        self._objective = _objective(compressor, self._family, tokens, width)
        scorer, sizes = self._objective.scorer, self._objective.sizes
        numbers = sum(math.prod(sizes[one] for one in names) for names in scorer.shapes.values())
        if (text := numbers * 2 * 4 // 3 + 2**16) > LARGEST:  # float16, in base64
            raise PolicyError(
                f"The weights would take {text / 2**20:.1f} MiB, and a policy has at most {LARGEST // 2**20}. Give a "
                f"smaller width than {width}."
            )
        generator = torch.Generator(device="cpu").manual_seed(seed)
        self.network = nn.ParameterDict(scorer.initial(sizes, generator))
        self._required: dict[nn.Parameter, bool] = {}

    def policy(self, keep: float | None = None) -> PruningPolicy:
        """Return the policy that prunes by the weights as they are now, rounded to float16.

        Args:
            keep: for "dyvte" the share of the visual tokens that the decoder's layers read on average, which sets the
                likelihood of the same answer at which they leave, by the samples of the last epoch in this process;
                None: 0.9 is that likelihood. A compressor has `tokens` instead.

        Raises:
            PolicyError: `keep` is not what was trained for, or no epoch has been trained in this process.
        """
        scorer, budget = self._objective.decided(keep)
        with torch.no_grad():
            scorer = scorer.with_weights(dict(self.network.items()))
        return PruningPolicy.of(scorer, keep=budget, model=self._family.describe())

    # ---- the model stays what it is

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the compressor's weights alone."""
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the compressor's weights."""
        return self.network.load_state_dict(state_dict, strict, assign)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this module; the model inside stays in evaluation mode."""
        super().train(mode)
        self.module.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit":
            refuse_unprunable(self.module, self._family)
            self._required = {part: part.requires_grad for part in self.module.parameters()}
            self.module.requires_grad_(False)

    def configure_callbacks(self) -> list[Callback]:
        return [_GivesBack()]

    def teardown(self, stage: str) -> None:
        for part, required in self._required.items():
            part.requires_grad_(required)
        self._required = {}

    # ---- steps

    def on_train_epoch_start(self) -> None:
        self._objective.begin_epoch()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self._compared(batch, batch_idx)
        self.log("train/loss", loss.mean().detach(), prog_bar=True, batch_size=len(loss))
        return loss.mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, well = self._compared(batch, batch_idx)
        for name, value in (("loss", loss), (self._objective.quality, well.float())):
            self.log(f"val/{name}", value.mean(), batch_size=len(loss))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=0.01)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _compared(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample of a batch, float [B], and which went well, bool [B]."""
        with self._recorded(batch, batch_idx) as found:
            each = [self._objective.compare(dict(self.network.items()), replay, seen) for replay, seen in found]
        if not each:
            raise PruningError("The batch's predict_step asked the model nothing about images: nothing can be learned.")
        return torch.cat([loss for loss, _ in each]), torch.cat([well for _, well in each])

    @contextmanager
    def _recorded(self, batch: Any, batch_idx: int) -> Iterator[list[tuple[DecoderReplay, Observation]]]:
        """Answer a batch, unpruned, and yield its prompts with their answers, and the signals of their images."""
        recorder = Recorder(Plan(self._family, {}), self._objective.before)
        with occupied(self._family):
            with torch.no_grad(), recorder.recording():
                self.module.predict_step(batch, batch_idx)
            with recorder.recorded() as found:
                yield [(replay, seen) for replay, seen, _, _ in found if isinstance(replay, DecoderReplay)]


class _GivesBack(Callback):
    """Gives the model back as it was where a training fails: Lightning then tears down no module."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        pl_module.teardown("fit")


def _objective(name: str, family: Family, tokens: int | None, width: int) -> Objective:
    """Return what a name stands for, for a model.

    Raises:
        PolicyError, PruningError: as in `CompressorTraining`.
    """
    known = {key: scorer for key, scorer in SCORERS.usable() if issubclass(scorer, Trained)}
    if name not in known:
        raise PolicyError(
            f"There is no compressor {name!r}; known are {', '.join(sorted(known))}.{did_you_mean(name, known)}"
        )
    if width < HEADS or width % HEADS:
        raise PolicyError(f"width is {width}; it is a multiple of {HEADS}.")
    if family.reads != "decoder":
        raise PruningError(
            f"{name!r} is trained for decoders that read visual tokens as rows; {type(family.model).__name__} reads "
            f"them by {family.reads}. Prune it by another method; docs/methods.md lists them."
        )
    scorer: Any = known[name]
    kind: Any = Compressing if issubclass(scorer, Compressor) else Exiting
    found: Objective = kind.of(scorer, name, family, tokens, width)
    return found
