"""Images unlike those of a policy's calibration: told once, counted, and pruned by another rule if one is named."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.methods.summary import SUMMARY
from tests.support.families import BY_NAME
from tests.support.modules import Generating
from tests.support.small_calibrations import QUICKEST
from tests.support.trainers import loading, trainer

pytestmark = pytest.mark.usefixtures("no_report")

Batch = dict[str, Tensor]
UNLIKE = "unlike those the policy was calibrated on"


class Asking(Generating):
    """Generates two tokens by a LLaVA; `steps` counts what its model was asked. The second sample has two images."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(BY_NAME["Llava"].model(), {"max_new_tokens": 2, "do_sample": False, **settings})
        self.steps = 0

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        self.steps += 1
        return super().predict_step(batch, batch_idx)


def data(batches: int = 4) -> list[Batch]:
    """Three samples with four images a batch, each time with other pixels."""
    inputs, generator = BY_NAME["Llava"].inputs(), torch.Generator().manual_seed(0)
    shape = inputs["pixel_values"].shape
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(batches)]
    return [{**inputs, "pixel_values": pixels} for pixels in draws]


def calibrated(path: Path, **settings: Any) -> PruningPolicy:
    """By divprune, and without fingerprints: nothing tells that it is tested on its own images."""
    callback = CrossAttentionCalibration(path, keep=0.5, scorer="divprune", settings=QUICKEST, **settings)
    trainer(callback, devices=1).predict(Asking(), loading(data(8)))
    found = PruningPolicy.load(path)
    evidence = {name: value for name, value in found.evidence.items() if name != "images"}
    return PruningPolicy("divprune", keep=0.5, model=found.model, evidence=evidence)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, no_report: None) -> PruningPolicy:
    return calibrated(tmp_path_factory.mktemp("calibrated") / "policy.json")


def flat(pixels: Tensor) -> Tensor:
    return torch.full_like(pixels, 3.0)


def shifted(batch: Batch, *images: int) -> Batch:
    """The batch with flat pixels, in the images that are named or in all."""
    pixels = batch["pixel_values"].clone()
    rows = list(images) or list(range(len(pixels)))
    pixels[rows] = flat(pixels[rows])
    return {**batch, "pixel_values": pixels}


def ran(policy: PruningPolicy, batches: list[Batch], **settings: Any) -> tuple[dict[str, float], list[str]]:
    """Figures and warnings of ours from a prediction."""
    callback = TokenPruning(policy, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callback, devices=1).predict(Asking(), loading(batches))
    return callback.figures, [str(warning.message) for warning in caught if UNLIKE in str(warning.message)]


@pytest.mark.slow
def test_a_policy_says_what_its_images_were_like(policy: PruningPolicy) -> None:
    seen = policy.evidence["seen"]
    assert (seen["images"], seen["tokens"], list(seen["features"])) == (32, 9.0, list(SUMMARY))
    assert all(row["low"] <= row["mean"] <= row["high"] and row["std"] > 0 for row in seen["features"].values())


def test_images_of_the_calibration_are_not_outside(policy: PruningPolicy) -> None:
    figures, told = ran(policy, data())
    assert (figures["catp/outside"], told) == (0.0, [])


def test_other_images_are_counted_and_told_once(policy: PruningPolicy) -> None:
    like, *rest = data()
    figures, told = ran(policy, [like, *map(shifted, rest)])
    assert figures["catp/outside"] == 0.75
    (only,) = told
    assert only.startswith("4 of 8 images so far")
    assert "calibration saw" in only
    assert "fallback='divprune'" in only


def test_a_single_image_is_told_when_the_loop_ends(policy: PruningPolicy) -> None:
    assert ran(policy, [shifted(data()[0], 2)])[1][0].startswith("1 of 4 images so far")


def test_a_policy_that_was_not_calibrated_is_watched_by_nothing() -> None:
    figures, told = ran(PruningPolicy("divprune", keep=0.5), [shifted(data()[0])])
    assert "catp/outside" not in figures
    assert told == []


def kept(policy: PruningPolicy, batch: Batch, module: Asking, **settings: Any) -> Tensor:
    """What the callback keeps of one batch."""
    found: list[Tensor] = []

    class Noting(TokenPruning):
        def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
            assert self._loop is not None
            found.extend(prefill.keep for prefill in self._loop.prefills)
            super().on_predict_batch_end(*args, **kwargs)

    trainer(Noting(policy, **settings), devices=1).predict(module, loading([batch]))
    return found[0]


def by_rule(rule: PruningPolicy, batch: Batch) -> Tensor:
    with torch.no_grad(), prune(module := Asking(), rule) as pruning:
        module.predict_step(batch)
    assert pruning.keep is not None
    return pruning.keep


@pytest.mark.slow
@pytest.mark.filterwarnings(f"ignore:.*{UNLIKE}")
@pytest.mark.parametrize("fallback", ["position", {"scorer": "l2-norm", "selector": "top-k"}], ids=["name", "fields"])
@pytest.mark.parametrize(("images", "samples"), [((0,), [0]), ((2,), [1]), ((1, 3), [1, 2]), ((0, 1, 2, 3), [0, 1, 2])])
def test_the_fallback_prunes_samples_with_an_image_outside_and_the_policy_all_others(
    policy: PruningPolicy, fallback: Any, images: tuple[int, ...], samples: list[int]
) -> None:
    batch = shifted(data()[0], *images)
    fields = {"scorer": fallback} if isinstance(fallback, str) else fallback
    own, other = by_rule(policy, batch), by_rule(PruningPolicy(**fields, keep=policy.keep), batch)
    assert (own != other).any(1).all()
    expected = own.clone()
    expected[samples] = other[samples]
    assert torch.equal(kept(policy, batch, Asking(), fallback=fallback), expected)
    assert torch.equal(kept(policy, batch, Asking(num_beams=2), fallback=fallback), expected)
    assert torch.equal(kept(policy, batch, Asking()), own)


def test_a_batch_without_images_is_neither_counted_nor_pruned(policy: PruningPolicy) -> None:
    first = data()[0]
    text = {name: first[name].clamp(min=1)[:1] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = torch.full_like(text["input_ids"], 5)
    figures, told = ran(policy, [text, first], fallback="position")
    assert (figures["catp/outside"], told) == (0.0, [])


@pytest.mark.parametrize(
    ("fallback", "error", "match"),
    [
        ("fastv", PruningError, "before the decoder"),
        ({"scorer": "divprune", "selector": "context-merge"}, PruningError, "merge none"),
        ("catp", PruningError, "does not show"),
        ("sgl", PruningError, "guide"),
    ],
)
def test_a_fallback_that_cannot_stand_in_is_refused_before_the_first_batch(
    policy: PruningPolicy, fallback: Any, error: type[Exception], match: str
) -> None:
    module = Asking()
    with pytest.raises(error, match=match):
        trainer(TokenPruning(policy, fallback=fallback), devices=1).predict(module, loading(data()))
    assert module.steps == 0


@pytest.mark.parametrize("fallback", ["divprun", 3, {}, {"scorer": "divprune", "keep": 0.5}])
def test_what_is_no_rule_is_refused_at_once(fallback: Any) -> None:
    with pytest.raises(PolicyError, match=r"fallback is|divprun"):
        TokenPruning(fallback=fallback)


def test_a_fallback_needs_a_policy_that_says_what_its_images_were_like(policy: PruningPolicy) -> None:
    evidence = {name: value for name, value in policy.evidence.items() if name != "seen"}
    for without in (
        PruningPolicy("divprune"),
        replace(policy, evidence=evidence),
        replace(policy, evidence={"seen": {}}),
    ):
        with pytest.raises(PolicyError, match="Calibrate again"):
            trainer(TokenPruning(without, fallback="divprune"), devices=1).predict(Asking(), loading(data()))


def test_ranges_that_are_damaged_are_refused(policy: PruningPolicy) -> None:
    seen = policy.to_dict()["evidence"]["seen"]
    features = seen["features"]
    for damage in (
        [1],
        {**seen, "tokens": "many"},
        {**seen, "tokens": 0},
        {**seen, "features": {**features, "norm": {**features["norm"], "std": -1.0}}},
        {**seen, "features": {**features, "norm": 3}},
    ):
        with pytest.raises(PolicyError, match="damaged"):
            trainer(TokenPruning(replace(policy, evidence={"seen": damage}))).predict(Asking(), loading(data()))
    other = {**seen, "features": {"of a later version": features["norm"]}}
    assert "catp/outside" not in ran(replace(policy, evidence={"seen": other}), data())[0]


@pytest.mark.slow
def test_perturbed_copies_widen_the_range(policy: PruningPolicy, tmp_path: Path) -> None:
    wide = calibrated(tmp_path / "p.json", augment={"flat": flat})
    assert wide.evidence["seen"]["images"] == 64
    assert ran(wide, [shifted(data()[0])])[0]["catp/outside"] == 0.0


def test_a_policy_that_prunes_inside_the_decoder_is_watched_too(policy: PruningPolicy) -> None:
    inside = PruningPolicy("fastv", keep=0.5, evidence=policy.evidence)
    assert ran(inside, [shifted(data()[0], 1)])[0]["catp/outside"] == 0.25
    with pytest.raises(PruningError, match="before the decoder"):
        ran(inside, data(), fallback="divprune")


def test_a_policy_that_keeps_everything_watches_nothing(policy: PruningPolicy) -> None:
    assert "catp/outside" not in ran(policy.with_keep(1.0), [shifted(data()[0])], fallback="divprune")[0]
