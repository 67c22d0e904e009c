"""Models of which is known which tokens matter, and calibrations of them without a Trainer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy
from catp_lightning.calibration.calibrator import calibrate as passes_of
from catp_lightning.calibration.calibrator import needs_of
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.report.result import CalibrationResult
from catp_lightning.calibration.search.promise import Promise
from catp_lightning.calibration.search.race import Check, Race
from catp_lightning.calibration.search.standings import Round, Standings
from catp_lightning.calibration.settings import DEFAULTS, CalibrationSettings
from catp_lightning.models import find_family
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.pruning.pruner import applied
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


class AskedPlanted(Planted):
    """A question that ends with the word 50 is answered from one token, any other from another."""

    def __init__(self, one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> None:
        self.asked = torch.zeros(0, dtype=torch.bool)

        def gate(outputs: Tensor) -> Tensor:
            return one(outputs).where(self.asked[:, None], other(outputs))

        super().__init__(gate)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        self.asked = batch["input_ids"][:, -1] == 50
        return super().predict_step(batch, batch_idx)


def asking(count: int, batch: int) -> tuple[list[Batch], list[Batch]]:
    """Two kinds of questions, about images to calibrate on and about as many others."""
    (everything,) = data(2 * count, 2 * count, torch.float64)
    everything["input_ids"][:, -4:] = torch.tensor([10, 11, 12, 13])
    everything["input_ids"][::2, -4:] = torch.tensor([53, 52, 51, 50])
    starts = range(0, 2 * count, batch)
    batches = [{name: value[start : start + batch] for name, value in everything.items()} for start in starts]
    return batches[: len(batches) // 2], batches[len(batches) // 2 :]


def recorded(module: Generating, batches: list[Batch]) -> list[Samples]:
    plan = Plan.of(find_family(module))
    recorder, found = Recorder(plan, needs_of(plan)), []
    with torch.no_grad(), recorder.recording():
        for batch in batches:
            module.predict_step(batch, 0)
            with recorder.recorded() as pairs:
                found += [Samples.of(*pair) for pair in pairs]
    return found


@dataclass
class Finished:
    """A calibration that went through all its passes, without a trainer."""

    plan: Plan
    samples: list[Samples]
    probing: Probing
    rounds: list[Race]
    result: CalibrationResult

    @property
    def standings(self) -> Standings:
        ties = Tolerance.under(self.plan.family.model.dtype)
        rounds = [Round(race.alive, race.sums.compute(), race.answers.compute()) for race in self.rounds]
        return Standings(self.result.candidates, ties, self.rounds[0].question, rounds)

    def policies(self) -> list[PruningPolicy]:
        return self.result.policies()


def finished(
    module: Generating,
    batches: list[Batch],
    keep: list[int | float],
    promise: Promise | None = None,
    settings: CalibrationSettings = DEFAULTS,
) -> Finished:
    plan = Plan.of(find_family(module), settings=settings)
    passes: list[Pass] = []
    flow, samples = passes_of(plan, keep, promise), recorded(module, batches)
    with torch.no_grad():
        while True:
            try:
                passes.append(next(flow))
            except StopIteration as end:
                (probing,) = (one for one in passes if isinstance(one, Probing))
                rounds = [one for one in passes if isinstance(one, Race) and not isinstance(one, Check)]
                return Finished(plan, samples, probing, rounds, end.value)
            for some in samples:
                passes[-1].see(some)


def where(batches: list[Batch], chosen: Callable[[Tensor], Tensor]) -> list[Batch]:
    """The samples with some images."""
    some = [chosen(fingerprint(batch["pixel_values"])) for batch in batches]
    return [{name: value[here] for name, value in batch.items()} for batch, here in zip(batches, some, strict=True)]


def agrees(module: Generating, policy: PruningPolicy, batches: list[Batch]) -> Tensor:
    """By running the model pruned: bool [N]."""
    with torch.no_grad(), applied(module, policy) as pruner, compare_with_unpruned(pruner) as comparison:
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
