"""Answers of a model that are recorded, and the same answers by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration.calibrator import needs_of
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.models import find_family
from tests.support.models import IMAGE, PAD, SHORT, faint_blip2, greedily
from tests.support.modules import Batch

EOS = 2
Net = Any  # transformers types generate's arguments one by one: no dictionary of tensors fits
ModelCall = Callable[[Net, Batch], Any]


def mixed(images: list[int], dtype: torch.dtype = torch.float64, right: bool = False, seed: int = 5) -> Batch:
    """Samples with different numbers of images, padded after their images, or at the end."""
    torch.manual_seed(seed)
    length = 8 * max(images) + 9
    ids, mask = torch.randint(3, IMAGE - 1, (len(images), length)), torch.ones(len(images), length, dtype=torch.long)
    for row, count in enumerate(images):
        ids[row, : 8 * count] = IMAGE
        pads = 2 * row % 5
        start = length - pads if right else 8 * count
        ids[row, start : start + pads], mask[row, start : start + pads] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(sum(images), 3, 32, 32).to(dtype)}


def model(dtype: torch.dtype = torch.float64) -> Net:
    return faint_blip2(0.1, dtype=dtype)  # so that pruned answers are neither lost nor the same


def greedy(net: Net, batch: Batch) -> Tensor:
    return net.generate(**batch, **greedily(4, 1))


def beams(net: Net, batch: Batch) -> Tensor:
    settings = {**SHORT, "num_beams": 3, "num_return_sequences": 2}
    return net.generate(**batch, **settings)


def forward(net: Net, batch: Batch) -> Any:
    return net(**batch)


def record(net: Net, call: ModelCall, batch: Batch) -> tuple[Any, Samples]:
    family = find_family(net)
    recorder = Recorder(Plan.of(family), needs_of(Plan.of(family)))
    with recorder.recording():
        output = call(net, batch)
        with recorder.recorded() as ((replay, seen, *_),):
            return output, Samples.of(replay, seen)


class Explicit:
    """Log-probabilities along the unpruned answer, by running the whole model on prompt and answer: [B, A, V]."""

    def __init__(self, net: Net, batch: Batch, output: Any) -> None:
        self.net, self.batch, rows = net, batch, len(batch["input_ids"])
        if isinstance(output, Tensor):
            new = output.shape[1] - batch["input_ids"].shape[1]
            self.answer = output[:: len(output) // rows, -new:]
            ended = (self.answer == EOS).long()
            self.valid = ended.cumsum(1) - ended == 0
            self.column = torch.full((rows,), batch["input_ids"].shape[1] - 1)
        else:
            last = [max(mask.nonzero()[:, 0].tolist()) for mask in batch["attention_mask"]]
            self.column = torch.tensor(last)
            self.answer = output.logits[range(rows), last].argmax(-1)[:, None]
            self.valid = torch.ones(rows, 1, dtype=torch.bool)

    def run(self, keep: Tensor | None = None) -> Tensor:
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        new = self.answer.shape[1] - 1
        grown = {
            "input_ids": torch.cat([ids, self.answer[:, :new]], 1),
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), new)], 1),
            "pixel_values": self.batch["pixel_values"],
        }
        with prune(self.net, PruningPolicy(), choose=lambda visual: visual if keep is None else keep):
            logits = self.net(**grown).logits
        rows = [logits[n, column : column + new + 1] for n, column in enumerate(self.column.tolist())]
        return torch.stack(rows).double().log_softmax(-1)

    def gain(self, keep: Tensor) -> Tensor:
        each = self.run(keep).gather(2, self.answer[..., None])[..., 0] * self.valid
        return each.sum(1) / self.valid.sum(1)
