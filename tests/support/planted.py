"""Models of which is known which tokens matter, and calibrations of them without a Trainer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.models import find_family
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.utils.hashing import fingerprint
from tests.support.calibrations import data
from tests.support.models import Shape, random_blip2
from tests.support.modules import Batch, Generating


class Planted(Generating):
    """Answers depend on some tokens alone: `gate` says which, float [I, T], from what leaves the vision part."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__(random_blip2(shape=Shape(text_layers=1), dtype=torch.float64)[0])
        self.net.language_model.model.decoder.embed_positions.weight.data.zero_()
        self.net.language_projection.bias.data.zero_()
        # Norms after a plain LayerNorm would all be about equal.
        self.net.qformer.encoder.layer[-1].output_query.LayerNorm.weight.data.uniform_(0, 3)

        def project(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            return output * gate(args[0])[..., None]

        self.net.language_projection.register_forward_hook(project)


def slot_3(outputs: Tensor) -> Tensor:
    return torch.eye(outputs.shape[1], dtype=outputs.dtype)[3].expand(outputs.shape[:2])


def highest_norm(outputs: Tensor) -> Tensor:
    norm = outputs.norm(dim=-1)
    return (norm == norm.amax(1, keepdim=True)).to(outputs.dtype)


def recorded(module: Generating, batches: list[Batch], needs: Calibrator) -> list[Samples]:
    family = find_family(module)
    recorder, found = Recorder(Plan.of(family), needs.needs), []
    with torch.no_grad(), recorder.recording():
        for batch in batches:
            module.predict_step(batch, 0)
            with recorder.recorded() as pairs:
                found += [Samples.of(*pair) for pair in pairs]
    return found


def finished(
    module: Generating, batches: list[Batch], keep: list[int | float], promise: Promise | None = None
) -> Calibrator:
    """A calibrator that went through all its stages, without a trainer."""
    calibrator = Calibrator(Plan.of(find_family(module)), keep, promise)
    samples = recorded(module, batches, calibrator)
    with torch.no_grad():
        while True:
            for some in samples:
                calibrator.see(some)
            if not calibrator.finish():
                return calibrator


def where(batches: list[Batch], chosen: Callable[[Tensor], Tensor]) -> list[Batch]:
    """The samples with some images."""
    some = [chosen(fingerprint(batch["pixel_values"])) for batch in batches]
    return [{name: value[here] for name, value in batch.items()} for batch, here in zip(batches, some, strict=True)]


def agrees(module: Generating, policy: PruningPolicy, batches: list[Batch]) -> Tensor:
    """By running the model pruned: bool [N]."""
    with torch.no_grad(), prune(module, policy) as pruning, compare_with_unpruned(pruning) as comparison:
        for batch in batches:
            module.predict_step(batch, 0)
    return torch.cat(comparison.same)


def two_questions(images: int, batch: int) -> list[Batch]:
    """Two questions about each image, in different batches."""
    first = data(images, images, torch.float64)[0]
    ids = first["input_ids"].clone()
    ids[:, -4:] = torch.randint(3, 90, (images, 4), generator=torch.Generator().manual_seed(3))
    both = {name: torch.cat([value, value]) for name, value in first.items()}
    both["input_ids"] = torch.cat([first["input_ids"], ids])
    count = len(both["input_ids"])
    return [{name: v[start : start + batch] for name, v in both.items()} for start in range(0, count, batch)]
