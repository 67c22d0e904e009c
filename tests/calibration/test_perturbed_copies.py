"""Copies of samples on perturbed images: recorded of every family, counted beside their originals."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy
from catp_lightning.calibration.calibrator import needs_of
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.perturbations import PERTURBATIONS, noise
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.perturber import Perturber
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.candidate import Candidate
from catp_lightning.calibration.search.race import Check, Race
from catp_lightning.calibration.split import part_of
from catp_lightning.methods.observation import Signal
from catp_lightning.models import find_family
from tests.support.calibrations import QUICK, data
from tests.support.families import BY_NAME, ROWS
from tests.support.guides import guide
from tests.support.models import faint_blip2
from tests.support.modules import Batch, Generating

pytestmark = pytest.mark.usefixtures("no_grad")

KINDS = (
    *("Llava", "LlavaNext", "LlavaOnevision", "VideoLlava", "Blip2-OPT", "InstructBlip", "InstructBlipVideo", "Mllama"),
    *("InternVL", "SmolVLM", "Gemma3", "PaliGemma", "Mistral3"),
)
"""A model of each class whose vision part reads pictures; further models of these classes are slow."""
PATCHED = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL")
"""Models that are given patches."""


def samples_of(recorder: Recorder) -> Samples:
    with recorder.recorded() as (pair,):
        return Samples.of(*pair)


@pytest.mark.slow
def test_every_kind_of_model_whose_vision_part_reads_pictures_is_there() -> None:
    reads = {row.name: type(family) for row in ROWS if (family := find_family(row.model())).pixel_readers}
    assert reads.keys() == {row.name for row in ROWS} - set(PATCHED)
    assert {reads[name] for name in KINDS} == set(reads.values()) and len(set(reads.values())) == len(KINDS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(row.name, marks=[] if row.name in KINDS else pytest.mark.slow)
        for row in ROWS
        if row.name not in PATCHED
    ],
)
def test_perturbed_pixels_reach_the_vision_part_and_nothing_else(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs()
    before = {name: value.clone() for name, value in inputs.items()}
    plan = replace(Plan.of(find_family(model)), perturbations={"noise": noise})
    recorder = Recorder(plan, {Signal.IMAGE_HASH: None, Signal.IMAGE_FEATURES: None})
    with recorder.recording():
        found = []
        for context in (nullcontext(), recorder.perturber.perturbing("noise"), nullcontext()):
            with context:
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
            found.append(samples_of(recorder))
    original, copy, again = found
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert torch.equal(copy.keys, original.keys) and torch.equal(copy.visual, original.visual)
    assert torch.equal(copy.seen[Signal.IMAGE_HASH], original.seen[Signal.IMAGE_HASH])
    features = [one.seen[Signal.IMAGE_FEATURES] for one in found]
    assert torch.equal(features[0], features[2]), "what is run afterwards is as it was before"
    moved = (features[1] - features[0]).abs().amax(-1) > 1e-3
    dropped = original.seen.droppable
    assert moved[dropped].double().mean() > 0.9, "nearly every token of a patch is another"
    assert torch.equal(again.keys, original.keys)


def test_perturbed_pixels_reach_the_guide_too() -> None:
    row, small = BY_NAME["Llava"], guide("Llava")
    plan = Plan.of(find_family(row.model()), PruningPolicy("sgl", {}), small)
    plan = replace(plan, perturbations={"noise": noise})
    recorder = Recorder(plan, needs_of(plan))
    with recorder.recording():
        found = []
        for context in (nullcontext(), nullcontext(), recorder.perturber.perturbing("noise")):
            with context:
                row.model().generate(**row.inputs(), max_new_tokens=1, do_sample=False)
            found.append(samples_of(recorder))
    attention = [one.seen.values[Signal.GUIDE_ATTENTION, 0] for one in found]
    assert torch.equal(attention[0], attention[1]) and not torch.allclose(attention[0], attention[2], atol=1e-3)


def test_a_model_whose_pixels_are_not_pictures_is_refused() -> None:
    plan = Plan(find_family(BY_NAME["Qwen2-VL"].model()), {})
    assert Perturber(plan).perturbations == {}, "without perturbations nothing is asked"
    with pytest.raises(PruningError, match=r"Qwen2VL\w+ is not known to read such.*without augment"):
        Perturber(replace(plan, perturbations=PERTURBATIONS))


def test_a_tower_that_is_given_patches_or_is_not_run_is_refused() -> None:
    model, batch = faint_blip2(), data(2, 2)[0]
    perturber = Perturber(replace(Plan.of(find_family(model)), perturbations=PERTURBATIONS))
    reader: Any = model.vision_model.embeddings
    with perturber.watching():
        with (
            pytest.raises(PruningError, match=r"the vision part was not. Calibrate without augment="),
            perturber.perturbing("blur"),
        ):
            pass
        for wrong in (torch.zeros(4, 588), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
            with (
                pytest.raises(PruningError, match=rf"is not known to read such: it reads {wrong.dtype}"),
                perturber.perturbing("blur"),
            ):
                reader(wrong)
        first, named = reader(batch["pixel_values"]), reader(pixel_values=batch["pixel_values"])
        with perturber.perturbing("contrast"):
            others = reader(batch["pixel_values"]), reader(pixel_values=batch["pixel_values"])
    assert torch.equal(first, named) and torch.equal(*others) and not torch.allclose(first, others[0], atol=1e-3)


def recorded(model: Any, batches: list[Batch]) -> tuple[Plan, list[tuple[Samples, list[Samples]]]]:
    """A plan with two perturbations, and samples with their copies."""
    chosen = {name: PERTURBATIONS[name] for name in ("noise", "contrast")}
    plan = replace(Plan.of(find_family(model), settings=QUICK), perturbations=chosen)
    module, recorder, found = Generating(model), Recorder(plan, needs_of(plan)), []
    with recorder.recording():
        for batch in batches:
            module.predict_step(batch)
            own, copies = samples_of(recorder), []
            for name in chosen:
                with recorder.perturber.perturbing(name):
                    module.predict_step(batch)
                copies.append(samples_of(recorder))
            found.append((own, copies))
    return plan, found


@pytest.fixture(scope="module")
def some() -> tuple[Plan, list[tuple[Samples, list[Samples]]]]:
    with torch.no_grad():
        return recorded(faint_blip2(0.3, dtype=torch.float64), data(24, 12, torch.float64))


CANDIDATES = [Candidate("stride", "stride"), Candidate("norm", "l2-norm"), Candidate("pool", "position")]


def race(plan: Plan, kind: type[Race] = Race) -> Race:
    belongs = lambda samples: part_of(samples.images) == 0  # noqa: E731
    if kind is Check:
        return Check(plan, CANDIDATES, [3, 5], [[1, 0], [0, 2]], belongs, {}, None)
    return Race("", plan, [CANDIDATES], [3, 5], [[1, 0], [0, 2]], belongs, {}, None)


def of_each(race: Race, samples: Samples) -> list[tuple[Tensor, Tensor]]:
    return race._answers(samples.where(race.belongs(samples)), 0)


@pytest.mark.slow
def test_in_a_race_the_mean_of_a_sample_and_its_copies_counts_and_answers_are_those_of_the_sample(some: Any) -> None:
    plan, batches = some
    together = race(plan)
    for samples, copies in batches:
        together.see(samples, copies)
    found = together.sums.compute()
    for budget, alive in enumerate(together.alive):
        variants = [
            torch.cat([of_each(together, (own, *copies)[number])[budget][0] for own, copies in batches], 1)
            for number in range(3)
        ]
        mean = torch.stack(variants).mean(0)
        assert not torch.allclose(variants[0], variants[1], rtol=0.1), "or this proves nothing"
        agreed = torch.cat([of_each(together, own)[budget][1] for own, _ in batches], 1)
        for place, number in enumerate(alive):
            assert found["divergence"][budget, number] == pytest.approx(mean[place].sum().item())
            assert found["squares"][budget, number] == pytest.approx(mean[place].square().sum().item())
            assert found["agreed"][budget, number] == agreed[place].sum()
            assert found["count"][budget, number] == mean.shape[1], "a copy is no further sample"


@pytest.mark.slow
def test_a_check_counts_copies_apart_and_samples_as_without_them(some: Any) -> None:
    plan, batches = some
    plain, together = race(replace(plan, perturbations={}), Check), race(plan, Check)
    assert isinstance(plain, Check) and isinstance(together, Check)
    for samples, copies in batches:
        plain.see(samples)
        together.see(samples, copies)
    for name, metric in plain.metrics.items():
        for state, value in metric.metric_state.items():
            other = together.metrics[name].metric_state[state]
            assert all(map(torch.equal, [*value], [*other])), (name, state)
    assert together.metrics.keys() - plain.metrics.keys() == {"perturbed 0", "perturbed 1"}
    for number, (name, sums) in enumerate(together.perturbed.items()):
        found = sums.compute()
        for budget, alive in enumerate(together.alive):
            each = [of_each(together, copies[number])[budget] for _, copies in batches]
            diverged, agreed = (torch.cat([pair[part] for pair in each], 1) for part in range(2))
            assert found["divergence"][budget, alive] == pytest.approx(diverged.sum(1).numpy()), name
            assert found["agreed"][budget, alive].tolist() == agreed.sum(1).tolist()


def test_probes_of_copies_are_further_subsets_and_everything_else_counts_samples(some: Any) -> None:
    plan, batches = some
    plain, together = (Probing(plan, [0.5], part_of, None) for _ in range(2))
    for samples, copies in batches:
        plain.see(samples)
        together.see(samples, copies)
    one, three = plain.learned(), together.learned()
    sums, three_times = plain.sums.compute(), together.sums.compute()
    assert (three_times.rows == 3 * sums.rows).all()
    assert sums.rows.sum() == QUICK.probes * len(together.sizes) * one.parts["learn"], "none is of the other part"
    slots = together.columns.of_slots
    own, all_ = (found.gram[:, slots][:, :, slots].sum(0) for found in (sums, three_times))
    assert not torch.allclose(torch.tensor(all_), torch.tensor(3 * own), rtol=1e-3), "the same subsets say less"
    assert (three.parts, three.tokens) == (one.parts, one.tokens) and torch.equal(three.images, one.images)
    assert three.statistics["rank_correlation"] == one.statistics["rank_correlation"]
    assert three.statistics["seen"] != one.statistics["seen"], "copies are images that the policy has seen"
