"""Train the network of `learned` on recorded probes: no labels, and no further run of the model."""

import math
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from catp_lightning.calibration.fit.heads import GATE, gain, rounded
from catp_lightning.calibration.fit.records import Recorded
from catp_lightning.methods.components import Features, Question
from catp_lightning.methods.network import Network, Weights, shapes, worth

HIDDEN = 64
"""Hidden units of a layer. With 32 the networks explain a tenth less of what 512 questions on BLIP-2 show."""

EPOCHS, STEPS, BATCH, RATE, DECAY = 8, 100, 16, 6e-3, 1.0
"""Training by AdamW: epochs, steps at least, samples of a step, highest rate, weight decay.

Out of fold, 6 to 20 epochs, half the rate and a third to twice the decay do about as well."""


class NetworkEvidence(TypedDict):
    """Share of the variance that networks explain on samples they have not seen, its error, and what they learned from.

    `records` counts samples with random sets and with sets around good ones.
    """

    explained: float
    explained_error: float
    records: int


@dataclass(frozen=True)
class Networks:
    """Networks that estimate what a token is worth.

    Attributes:
        whole: trained on all samples.
        by_fold: trained without one fold each.
        explained: share of the answers' variance that these explain on the folds they have not seen.
        explained_error: its standard error over folds.
        records: number of samples that they were trained on, counted once for each kind of sets.
    """

    whole: Network
    by_fold: tuple[Network, ...]
    explained: float
    explained_error: float
    records: int

    def evidence(self) -> NetworkEvidence:
        explained, error = rounded(np.array([self.explained, self.explained_error]))
        return {"explained": explained, "explained_error": error, "records": self.records}


def learn(
    recorded: Recorded, components: tuple[Question, Features], folds: int, slots: int, epochs: int = EPOCHS
) -> Networks | None:
    """Train networks on all samples and without each fold.

    Args:
        recorded: the samples.
        components: those of questions and tokens in which the samples are recorded.
        folds: number of folds.
        slots: number of slots of an image; 0 where places mean nothing.
        epochs: how often each network sees a sample; more often if that makes fewer than `STEPS` steps.

    Returns:
        The networks; None if they explain too little: not more than `GATE` standard errors above nothing.
    """
    with torch.inference_mode(False), torch.enable_grad():
        data = _Data.of(recorded, max(1, slots))
        squares = np.array([float(data.gain[recorded.folds == fold].square().sum()) for fold in range(folds)])
        there = squares > 0
        if there.sum() < 2:
            return None
        by_fold = [data.trained(recorded.folds != fold, epochs) for fold in range(folds)]
        with torch.no_grad():
            saved = np.array([data.saved(weights, recorded.folds == fold) for fold, weights in enumerate(by_fold)])
        explained, error = gain(saved[there], squares[there])
        if not explained > GATE * error:
            return None
        whole = data.trained(torch.ones_like(recorded.folds, dtype=torch.bool), epochs)
    question, features = components
    several = [Network.of(features, question, weights) for weights in (whole, *by_fold)]
    return Networks(several[0], tuple(several[1:]), explained, error, len(recorded.keys))


@dataclass(frozen=True)
class _Data:
    """Samples as training reads them.

    Attributes:
        features: [T, F] of each of N samples.
        kept: [T, S, P] of each.
        question: [N, C].
        gain: [N, S, P], centred by sample and size.
        slots: number of slots.
    """

    features: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    question: Tensor
    gain: Tensor
    slots: int

    @classmethod
    def of(cls, recorded: Recorded, slots: int) -> "_Data":
        counts = recorded.counts.tolist()
        own = {name: value.clone() for name, value in vars(recorded).items()}  # not of inference mode
        centred = own["gain"] - own["gain"].mean(2, keepdim=True)
        features, kept = own["features"].split(counts), own["kept"].split(counts)
        return cls(features, kept, own["question"], centred, slots)

    def trained(self, chosen: Tensor, epochs: int) -> Weights:
        """Return weights trained on the samples where `chosen`, bool [N], by AdamW in one cycle of the rate."""
        draw = torch.Generator("cpu").manual_seed(0)
        numbers = chosen.nonzero()[:, 0]
        weights = self._initial(draw)
        optimiser = torch.optim.AdamW(weights.values(), RATE, weight_decay=DECAY)
        steps = math.ceil(len(numbers) / BATCH)
        epochs = max(epochs, math.ceil(STEPS / steps))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=epochs * steps)
        for _ in range(epochs):
            for batch in numbers[torch.randperm(len(numbers), generator=draw, device="cpu")].split(BATCH):
                optimiser.zero_grad()
                (self._predicted(weights, batch) - self.gain[batch]).square().mean().backward()
                optimiser.step()
                schedule.step()
        return weights

    def saved(self, weights: Weights, chosen: Tensor) -> float:
        """Return the squared error that predictions save on the chosen samples, compared with none."""
        errors = [
            float((self.gain[batch].square() - (self._predicted(weights, batch) - self.gain[batch]).square()).sum())
            for batch in chosen.nonzero()[:, 0].split(BATCH)
            if len(batch)
        ]
        return sum(errors)

    def _predicted(self, weights: Weights, batch: Tensor) -> Tensor:
        """Return what sets are worth, the sum over their tokens, centred by sample and size: [B, S, P]."""
        numbers = batch.tolist()
        features = pad_sequence([self.features[n] for n in numbers], batch_first=True)
        kept = pad_sequence([self.kept[n] for n in numbers], batch_first=True).to(features)
        each = self._worth(weights, features, self.question[batch])
        together = torch.einsum("btsp,bt->bsp", kept, each)
        return together - together.mean(2, keepdim=True)

    def _worth(self, weights: Weights, features: Tensor, question: Tensor) -> Tensor:
        """Return what each token is worth; of a sample of several images slots begin anew with each."""
        if self.slots == 1:
            return worth(weights, features, question)
        images = features.shape[1] // self.slots
        by_image = features.unflatten(1, (images, self.slots)).flatten(0, 1)
        return worth(weights, by_image, question.repeat_interleave(images, 0)).view(len(features), -1)

    def _initial(self, draw: torch.Generator) -> dict[str, Tensor]:
        """Return random weights of the first layers, as torch initialises its own, and 0 where the worth is summed."""
        wanted = shapes(self.features[0].shape[1], self.question.shape[1], self.slots, HIDDEN)
        weights = {name: torch.zeros(shape, dtype=torch.float32, device="cpu") for name, shape in wanted.items()}
        inputs = wanted["features"][1] + wanted["question"][1]
        for name, size in (("features", inputs), ("question", inputs), ("place", inputs), ("hidden", HIDDEN)):
            weights[name].uniform_(-1 / math.sqrt(size), 1 / math.sqrt(size), generator=draw)
        return {name: value.requires_grad_() for name, value in weights.items()}
