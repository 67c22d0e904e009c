"""A calibration that perturbs measures copies of its images too: the same samples, other pixels."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningError, PruningPolicy
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.passes import Pass
from catp_lightning.calibration.perturbations import PERTURBATIONS, noise
from catp_lightning.calibration.replay.perturber import perturbed
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.search.race import Check, Race
from catp_lightning.calibration.split import part_of
from catp_lightning.methods.observation import Signal
from catp_lightning.policy.images import decode_images
from catp_lightning.pruning.answers import compare_with_unpruned
from catp_lightning.pruning.pruner import applied
from tests.support.calibrations import data, figures, images_of
from tests.support.families import BY_NAME
from tests.support.footprints import footprint
from tests.support.interrupted_calibrations import PARTIAL
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Generating
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = [pytest.mark.usefixtures("no_report"), pytest.mark.slow]

Batches = list[dict[str, Tensor]]
SETTINGS = {"max_new_tokens": 2, "do_sample": False}
NAMES = ("Blip2-OPT", "Llava", "Mllama")
"""One model for each kind of prompt; images of the last are padded with tiles of zeros."""


def calibrate(module: Generating, batches: Batches, path: Path, keep: Any = 0.5, **options: Any) -> PruningPolicy:
    """With as few probes as can be, all images in one round, and every other image to check on."""
    callback = CrossAttentionCalibration(path, keep=keep, **{"settings": QUICKEST, "examples": 0, **options})
    trainer(callback, devices=1).predict(module, loading(batches))
    return callback.policies[0]


def batches_of(name: str, count: int = 4) -> Batches:
    """Batches of a family's samples, each time with other pixels."""
    found, row = [], BY_NAME[name]
    for number in range(count):
        inputs, generator = row.inputs(), torch.Generator().manual_seed(number)
        other = torch.randn(inputs["pixel_values"].shape, generator=generator, dtype=torch.float64)
        found.append({**inputs, "pixel_values": other * (inputs["pixel_values"] != 0)})
    return found


def with_noise(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "pixel_values": perturbed(batch["pixel_values"], "noise", noise)}


@contextmanager
def noting() -> Iterator[list[tuple[Pass, Samples, Sequence[Samples]]]]:
    """Collect what every pass is given, and what a race compares, while they do what they do."""
    seen: list[tuple[Pass, Samples, Sequence[Samples]]] = []

    def noted(original: Any) -> Any:
        def call(own: Pass, samples: Samples, copies: Sequence[Samples] = ()) -> Any:
            seen.append((own, samples, copies))
            return original(own, samples, copies)

        return call

    with (
        patch.object(Probing, "see", noted(Probing.see)),
        patch.object(Race, "compare", noted(Race.compare)),
        patch.object(Check, "compare", noted(Check.compare)),
    ):
        yield seen


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_same_sample_answered_by_the_unpruned_model_on_other_pixels(name: str, tmp_path: Path) -> None:
    row, batches = BY_NAME[name], batches_of(name)
    model = row.model()
    expected = [[model.generate(**some, **SETTINGS) for some in (batch, with_noise(batch))] for batch in batches]
    before = footprint(model)
    with noting() as seen:
        policy = calibrate(Generating(model, SETTINGS), batches, tmp_path / "p.json", augment="noise")
    assert footprint(model) == before
    probed = [(samples, copies) for own, samples, copies in seen if isinstance(own, Probing)]
    assert len(probed) == len(batches)
    for (samples, (copy,)), answers in zip(probed, expected, strict=True):
        assert torch.equal(copy.keys, samples.keys) and torch.equal(copy.visual, samples.visual)
        assert torch.equal(copy.seen[Signal.IMAGE_HASH], samples.seen[Signal.IMAGE_HASH])
        assert not torch.equal(copy.seen[Signal.IMAGE_FEATURES], samples.seen[Signal.IMAGE_FEATURES])
        for some, answer in zip((samples, copy), answers, strict=True):
            own = some.replay.answers
            assert torch.equal(own.ids[own.valid], answer[:, -own.ids.shape[1] :][own.valid])
    assert any(not torch.equal(*answers) for answers in expected), "noise changes answers, or this proves nothing"
    compared = [(own, samples, copies) for own, samples, copies in seen if isinstance(own, Race)]
    for own, samples, copies in compared:
        part = part_of(samples.images, QUICKEST.checked)
        assert (part == int(isinstance(own, Check))).all(), "an image is in one part, and so are its copies"
        assert all(torch.equal(copy.keys, samples.keys) for copy in copies)
    assert sum(isinstance(own, Check) and len(copies) == 1 for own, _, copies in compared) > 0
    hashes = torch.cat([samples.seen[Signal.IMAGE_HASH] for samples, _ in probed]).unique()
    assert torch.equal(decode_images(policy.evidence["images"])[0].unique(), hashes), "originals alone are remembered"


@pytest.mark.parametrize("name", NAMES)
def test_agreement_on_perturbed_images_is_that_of_pruning_on_them(name: str, tmp_path: Path) -> None:
    row, batches = BY_NAME[name], batches_of(name, 5)
    with noting() as seen:
        options = {"augment": "noise", "scorer": "l2-norm"}  # without probes
        policy = calibrate(Generating(row.model(), SETTINGS), batches, tmp_path / "p.json", **options)
    images = torch.cat([samples.images for own, samples, _ in seen if isinstance(own, Probing)])
    check = part_of(images, QUICKEST.checked) == 1
    found: set[tuple[float, float]] = set()
    for rule in (policy, PruningPolicy("stride", keep=0.5)):
        checked, perturbed_too = figures(policy, rule.scorer)["check"], policy.evidence["perturbed"]["noise"]
        for change, measured in ((lambda batch: batch, checked), (with_noise, perturbed_too[rule.scorer])):
            with torch.no_grad(), applied(row.model(), rule) as pruner, compare_with_unpruned(pruner) as comparison:
                for batch in batches:
                    row.model().generate(**change(batch), **SETTINGS)
            same = torch.cat(comparison.same)[check]
            assert measured["samples"] == len(same) and measured["agreement"] == same.double().mean().item()
        found.add((checked["agreement"], measured["agreement"]))
    assert len({share for pair in found for share in pair}) > 1, "or this proves nothing"


def test_perturbations_that_change_nothing_change_no_figure(tmp_path: Path) -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(32, 8, torch.float64)
    options: dict[str, Any] = {"scorer": "stride"}  # without probes, whose random subsets are more with copies
    plain = calibrate(module, batches, tmp_path / "a.json", **options)
    same = calibrate(module, batches, tmp_path / "b.json", augment={"a": torch.clone, "b": torch.clone}, **options)
    assert "perturbed" not in plain.evidence and list(same.evidence["perturbed"]) == ["a", "b"]
    for row in plain.evidence["candidates"]:
        own = figures(same, row["name"])
        for kind in ("choose", "check"):
            assert own[kind]["divergence"] == pytest.approx(row[kind]["divergence"], abs=1e-12)
            assert own[kind]["divergence_error"] == pytest.approx(row[kind]["divergence_error"], rel=1e-6, abs=1e-9)
            assert (own[kind]["samples"], own[kind]["agreement"]) == (row[kind]["samples"], row[kind]["agreement"])
        assert same.evidence["perturbed"]["b"][row["name"]]["agreement"] == row["check"]["agreement"]
    assert same.evidence["samples"] == plain.evidence["samples"] and same.evidence["images"] == plain.evidence["images"]
    assert same.evidence["retention"] == plain.evidence["retention"], "a copy is no further question, image or control"


def test_batches_and_order_do_not_matter_under_perturbations(tmp_path: Path) -> None:
    module, options = Generating(faint_blip2(dtype=torch.float64)), {"augment": ["noise", "crop"]}
    one = calibrate(module, data(24, 24, torch.float64), tmp_path / "a.json", **options)
    many = calibrate(module, data(24, 5, torch.float64)[::-1], tmp_path / "b.json", **options)
    assert one.evidence["chosen"] == many.evidence["chosen"] and one.scorer_args == many.scorer_args
    for name in one.evidence["fitted"].keys() - {"slots"}:
        fits = [found.evidence["fitted"][name] for found in (one, many)]
        assert fits[0]["layers"] == fits[1]["layers"] and fits[0].get("head_weights") == fits[1].get("head_weights")
    assert one.evidence["fitted"]["slots"] == many.evidence["fitted"]["slots"]
    for name, found in one.evidence["perturbed"].items():
        for candidate, own in found.items():
            other = many.evidence["perturbed"][name][candidate]
            assert own["divergence"] == pytest.approx(other["divergence"], rel=1e-9)
            assert own["agreement"] == other["agreement"]
    for row in one.evidence["candidates"]:
        other = figures(many, row["name"])["choose"]
        assert row["choose"]["divergence"] == pytest.approx(other["divergence"], rel=1e-9)


def test_what_is_fitted_depends_on_the_copies(tmp_path: Path) -> None:
    module, batches = Generating(), data(24, 24)
    slots = [
        calibrate(module, batches, tmp_path / f"{number}.json", scorer="catp", augment=augment).evidence["fitted"]
        for number, augment in enumerate((None, {"a": torch.clone}, {"a": torch.zeros_like}))
    ]
    assert slots[0]["slots"] != slots[1]["slots"] != slots[2]["slots"]


class Stopping(Generating):
    """Raises at the n-th run of its step, copies included; None: never."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self.stop, self.runs = stop, 0

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        self.runs += 1
        if self.runs == self.stop:
            raise RuntimeError("planted")
        return super().predict_step(batch, batch_idx)


def test_a_calibration_that_ends_among_the_copies_of_a_batch_goes_on_from_the_batch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catp_lightning.calibration.checkpoint.EVERY", 1)
    monkeypatch.setattr("catp_lightning.calibration.replay.memory.LIMIT", 0)  # every pass reads the split again
    options: dict[str, Any] = {"augment": ["blur", "noise"], "scorer": "catp"}
    batches, undisturbed = data(32, 8), Stopping()
    expected = calibrate(undisturbed, batches, tmp_path / "undisturbed.json", **options)
    passes = undisturbed.runs // (3 * 4)
    assert undisturbed.runs == passes * 3 * 4, "each batch once and once for each perturbation, in every pass"
    for stop in (6, 3 * 4 + 8):  # the second copy of the second batch, in the first pass, and the first of the third
        path = tmp_path / f"{stop}" / "p.json"
        with pytest.raises(RuntimeError, match="planted"):
            calibrate(Stopping(stop), batches, path, **options)
        with pytest.raises(
            PolicyError, match=r"augment was \{'blur': .*noise'\}, is \{'blur': 'catp_lightning.*blur'\}"
        ):
            calibrate(Generating(), batches, path, **{**options, "augment": "blur"})
        resumed = Stopping()
        policy = calibrate(resumed, batches, path, **options)
        assert policy == expected
        done = (stop - 1) // 3  # in the loop all steps run for the predictions, as ever
        assert resumed.runs == undisturbed.runs - 2 * min(done, 4) - 3 * max(done - 4, 0)
        assert not (path.parent / PARTIAL).exists()


class Taking(Generating):
    """Takes what its batch brings beside tensors out of it, as many steps do; `harm` does more."""

    def __init__(self, harm: str = "") -> None:
        super().__init__()
        self.harm = harm

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> Tensor:
        batch["notes"].pop("id")
        del batch["notes"]
        if self.harm == "pixels":
            batch["pixel_values"] += 1
        if self.harm == "prompt":
            batch = {**batch, "input_ids": batch["input_ids"].roll(torch.seed() % 7 + 1, 0)}
        return super().predict_step(batch, batch_idx)


def test_a_step_may_empty_its_batch_but_must_send_the_same_prompts_again(tmp_path: Path) -> None:
    def noted() -> list[dict[str, Any]]:
        return [{**batch, "notes": {"id": 3}} for batch in data(24, 8)]

    assert "perturbed" in calibrate(Taking(), noted(), tmp_path / "p.json", augment="blur", scorer="stride").evidence
    for harm in ("pixels", "prompt"):
        with pytest.raises(PruningError, match=r"other prompts or images .*'blur' cannot be told whose they are"):
            calibrate(Taking(harm), noted(), tmp_path / "q.json", augment="blur", scorer="stride")
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_a_function_that_returns_no_pixels_ends_a_calibration_before_anything_is_measured(tmp_path: Path) -> None:
    module, asked = Generating(), []
    before = footprint(module.net)
    with (
        noting() as seen,
        pytest.raises(PolicyError, match=r"The perturbation 'cut' was given .* and returned torch.float32"),
    ):
        calibrate(
            module,
            data(24, 8),
            tmp_path / "p.json",
            augment={"kept": lambda pixels: asked.append(len(pixels)) or pixels, "cut": lambda pixels: pixels[..., 1:]},
        )
    assert asked == [8] and not seen
    assert not list(tmp_path.iterdir()) and footprint(module.net) == before


def test_copies_to_which_the_model_gives_no_number_leave_their_sample_out(tmp_path: Path) -> None:
    batches = data(24, 8)
    lost = images_of(batches)[[2, 13]]

    def overflowing(pixels: Tensor) -> Tensor:
        own = torch.isin(images_of([{"pixel_values": pixels}]), lost)
        return torch.where(own[:, None, None, None], torch.finfo(pixels.dtype).max, pixels)

    with pytest.warns(UserWarning, match=r"2 samples were left out, to which the unpruned model's own answer is not a"):
        policy = calibrate(Generating(), batches, tmp_path / "p.json", augment=overflowing)
    assert sum(policy.evidence["samples"].values()) == 22
    for row in (*policy.evidence["candidates"], *policy.evidence["perturbed"]["overflowing"].values()):
        for found in (row["choose"], row["check"] or row["choose"]) if "choose" in row else (row,):
            assert 0 <= found["divergence"] < 3 and found["samples"] <= 22


def test_what_it_costs_is_said_and_mixed_precision_is_that_of_the_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = CrossAttentionCalibration(tmp_path / "p.json", augment="default", settings=QUICKEST, scorer="catp")
    with caplog.at_level(logging.INFO):
        trainer(callback, precision="bf16-mixed", devices=1).predict(Generating(), loading(data(16, 8)))
    said = "catp: images as they are and with noise, blur, contrast, crop, resize: 6 times as long as without augment."
    assert said in caplog.messages
    assert list(callback.policies[0].evidence["perturbed"]) == list(PERTURBATIONS)


def test_a_promise_is_tested_on_images_as_they_are(tmp_path: Path) -> None:
    module, batches = Generating(faint_blip2(0.02), greedily(1)), data(200, 50)
    options: dict[str, Any] = {"keep": [0.75, 0.5], "max_disagreement": 0.9, "confidence": 0.9, "scorer": "stride"}
    plain = calibrate(module, batches, tmp_path / "a.json", **options)
    other = calibrate(module, batches, tmp_path / "b.json", augment={"black": torch.zeros_like}, **options)
    assert plain.keep == other.keep == 0.75, "it holds at one budget, and not at the next"
    assert other.evidence["promise"] == plain.evidence["promise"]
    found = other.evidence["perturbed"]["black"]["stride"]
    assert found["agreement"] != figures(other, "stride")["check"]["agreement"]
