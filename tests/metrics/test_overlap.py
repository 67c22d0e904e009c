"""Evaluating on images that the policy was calibrated on is told, with their number; nothing else is."""

import base64
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import IterableDataset

from catp_lightning.callbacks.token_pruning import TokenPruning
from catp_lightning.errors import PolicyError
from catp_lightning.metrics.overlap import OverlapCheck
from catp_lightning.modules.pruned import PrunedModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import decode_images, encode_images
from catp_lightning.pruning import prune
from catp_lightning.pruning.pruner import applied
from catp_lightning.utils.hashing import fingerprint
from tests.support.calibrations import images_of
from tests.support.families import ROWS
from tests.support.modules import Answering, Batch, same, two_images
from tests.support.overlapping import batches, calibrated_on
from tests.support.policies import HALF
from tests.support.processes import finished
from tests.support.trainers import loading, trainer


def with_callback(policy: Any, stage: str, data: list[Batch], module: LightningModule) -> Any:
    return getattr(trainer(TokenPruning(policy)), stage)(module, loading(data))


def with_wrapper(policy: Any, stage: str, data: list[Batch], module: LightningModule) -> Any:
    return getattr(trainer(), stage)(PrunedModule(module, policy), loading(data))


BOTH = pytest.mark.parametrize("evaluate", [with_callback, with_wrapper])


def told(run: Callable[[], Any]) -> list[str]:
    """What is said about overlap: "<how many> of the <images of the policy>"."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    found = (re.search(r"This split contains (.*?) images that", str(warning.message)) for warning in caught)
    return [match[1] for match in found if match]


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_the_images_of_every_batch_that_calibration_read_are_counted(evaluate: Any, stage: str) -> None:
    data, elsewhere = batches(), batches(3, seed=2)
    known = torch.cat([images_of(data)[[0, 4, 5, 11]], images_of(elsewhere)])
    assert told(lambda: evaluate(calibrated_on(known), stage, data, Answering())) == ["4 of the 13"]


@BOTH
def test_two_questions_about_an_image_count_once_in_a_batch_and_across_batches(evaluate: Any) -> None:
    data = batches(3)
    data[0]["pixel_values"][1] = data[0]["pixel_values"][0]
    data[2]["pixel_values"][2] = data[0]["pixel_values"][0]
    images = images_of(data)
    known = torch.cat([images, images, images_of(batches(1, seed=2))])
    assert encode_images(known)["count"] == 7 + 3
    assert told(lambda: evaluate(calibrated_on(known), "predict", data, Answering())) == ["7 of the 10"]


@BOTH
def test_every_image_of_a_sample_is_seen_not_its_first_alone(evaluate: Any) -> None:
    (batch,) = batches(1)
    second = {**two_images(batch), "pixel_values": batch["pixel_values"][[0, 2]]}
    known = images_of([batch])[2:]
    assert told(lambda: evaluate(calibrated_on(known), "predict", [second], Answering())) == ["1 of the 1"]


@pytest.mark.slow
@BOTH
def test_new_images_or_a_policy_without_evidence_are_not_warned_of(evaluate: Any) -> None:
    data = batches()
    near = torch.cat([images_of(data) + 1, images_of(data) - 1])  # where a search for them ends
    for policy in (calibrated_on(near), HALF, replace(HALF, evidence={"images": None})):
        assert told(lambda policy=policy: evaluate(policy, "test", data, Answering())) == []


@BOTH
def test_what_is_kept_does_not_depend_on_the_evidence(evaluate: Any) -> None:
    data, module = batches(), Answering()
    with pytest.warns(UserWarning, match="12 of the 12"):
        returned = evaluate(calibrated_on(images_of(data)), "predict", data, module)
    assert same(returned, evaluate(HALF, "predict", data, module))


@BOTH
def test_a_saved_policy_keeps_the_images(evaluate: Any, tmp_path: Path) -> None:
    data = batches()
    calibrated_on(images_of(data)[:5]).save(tmp_path / "policies" / "keep-0.5.json")
    assert told(lambda: evaluate(tmp_path / "policies", "test", data, Answering())) == ["5 of the 5"]


class Turns(IterableDataset[Batch]):
    """Other batches each time it is read."""

    def __init__(self, *turns: list[Batch]) -> None:
        self.turns = iter(turns)

    def __iter__(self) -> Iterator[Batch]:
        return iter(next(self.turns))


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["callback", "wrapper"])
def test_each_epoch_counts_anew_with_and_without_inference_mode(wrapped: bool) -> None:
    data, module = batches(), Answering()
    policy = calibrated_on(images_of(data)[:8])
    root = PrunedModule(module, policy) if wrapped else module
    run = trainer(*([] if wrapped else [TokenPruning(policy)]), max_epochs=2, num_sanity_val_steps=0)
    turns = loading(Turns(data[1:], data[:2]))

    def story() -> None:
        run.validate(root, loading(data))  # in inference mode
        run.fit(root, loading(data[:1]), turns)  # outside it
        run.test(root, loading(data[2:]))

    assert told(story) == ["8 of the 8", "5 of the 8", "6 of the 8", "2 of the 8"]


@BOTH
def test_a_run_that_died_is_not_counted_in_the_next(evaluate: Any) -> None:
    data, module = batches(), Answering()
    policy = calibrated_on(images_of(data)[:3])
    root = PrunedModule(module, policy) if evaluate is with_wrapper else module
    run = trainer(*([] if evaluate is with_wrapper else [TokenPruning(policy)]))
    broken = [data[0], {**data[1], "input_ids": data[1]["input_ids"][:, 1:]}]
    with pytest.raises((RuntimeError, ValueError)):
        run.predict(root, loading(broken))
    assert told(lambda: run.predict(root, loading(data[1:]))) == []


def test_steps_of_the_wrapper_called_by_hand_work_in_any_mode() -> None:
    data, module = batches(2), Answering()
    wrapper = PrunedModule(module.eval(), calibrated_on(images_of(data)[:4]))
    with torch.inference_mode():
        wrapper.predict_step(data[0], 0)
    with torch.no_grad():
        wrapper.predict_step(data[1], 1)
    assert told(wrapper.on_predict_epoch_end) == ["4 of the 4"]


@BOTH
def test_a_step_that_reads_no_image_is_not_warned_of_overlap(evaluate: Any) -> None:
    data, module = batches(), Answering()
    module.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(calibrated_on(images_of(data)), "test", data, module)
    assert not [w for w in caught if "_MatchedHashes" in str(w.message) or "This split contains" in str(w.message)]


@pytest.mark.parametrize(
    ("policy", "filled"), [(HALF, False), (calibrated_on(torch.tensor([1])), True)], ids=["without", "with images"]
)
def test_images_are_looked_at_only_for_a_policy_that_knows_some_and_scores(policy: PruningPolicy, filled: bool) -> None:
    module = Answering()
    with torch.no_grad(), prune(module.model, policy) as pruning:
        module.model(**module.inputs)
    found = pruning.last.images
    assert (None if found is None else found.tolist()) == (images_of([module.inputs]).tolist() if filled else None)
    for settings in ({"policy": policy.with_keep(1.0)}, {"policy": policy, "choose": lambda visual: visual}):
        with torch.no_grad(), prune(module.model, **settings) as pruning:
            module.model(**module.inputs)
        assert pruning.last.images is None


GOOD = encode_images(torch.arange(4))
DAMAGED = {
    "not an object": [1, 2],
    "no hashes": {"count": 4},
    "hashes a number": {"count": 4, "hashes": 7},
    "cut off": {"count": 4, "hashes": GOOD["hashes"][:-5]},
    "no base64": {"count": 4, "hashes": "Ä" + GOOD["hashes"][1:]},
    "half a number": {"count": 4, "hashes": base64.b64encode(b"123456789").decode()},
    "more than base64": {"count": 4, "hashes": "****" + GOOD["hashes"]},
    "empty": {"count": 0, "hashes": ""},
    "too few counted": {**GOOD, "count": 3},
    "count a text": {**GOOD, "count": "4"},
    "count true": {"count": True, "hashes": encode_images(torch.tensor([9]))["hashes"]},
    "count a fraction": {**GOOD, "count": 4.5},
}


@pytest.mark.parametrize("entry", DAMAGED.values(), ids=DAMAGED)
def test_damaged_evidence_is_an_error(entry: Any) -> None:
    with pytest.raises(PolicyError, match='Take "images" out of its evidence'):
        decode_images(entry)


@BOTH
def test_damaged_evidence_is_an_error_before_any_step_even_of_fit(evaluate: Any) -> None:
    policy, module = replace(HALF, evidence={"images": DAMAGED["cut off"]}), Answering()
    with pytest.raises(PolicyError, match='Take "images" out of its evidence'):
        evaluate(policy, "validate", batches(1), module)
    root = PrunedModule(module, policy) if evaluate is with_wrapper else module
    callbacks = [] if evaluate is with_wrapper else [TokenPruning(policy)]
    with pytest.raises(PolicyError, match='Take "images" out of its evidence'):
        trainer(*callbacks, max_epochs=1, num_sanity_val_steps=0).fit(root, loading(batches(1)), loading(batches(1)))
    assert module.seen == []


def test_unknown_keys_of_a_newer_version_are_no_damage() -> None:
    images, count = decode_images({**GOOD, "kind": "pixels"})
    assert images.tolist() == [0, 1, 2, 3]
    assert count == 4


def test_all_images_up_to_the_most_come_back_exactly_and_from_numpy_too() -> None:
    found = torch.randint(-(2**63), 2**63 - 1, (1000,))
    images, count = decode_images(encode_images(found.repeat(2)))
    assert images.tolist() == sorted(found.tolist())
    assert count == 1000
    assert encode_images(found.numpy()) == encode_images(found.flip(0))
    for wrong in (found.double(), found[:0]):
        with pytest.raises(ValueError, match="int64, of at least one image"):
            encode_images(wrong)


def test_beyond_the_most_a_sample_is_kept_whatever_the_order_and_the_number_is_an_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("catp_lightning.policy.images.MAX_STORED_HASHES", 1000)
    found = torch.arange(12_000)
    images, count = decode_images(encode_images(found))
    assert (len(images), count) == (1000, 12_000)
    assert encode_images(found.flip(0)) == encode_images(found)
    halves = [decode_images(encode_images(half))[0] for half in (found[::2], found[1::2])]
    assert decode_images(encode_images(torch.cat(halves)))[0].equal(images)  # a sample of samples is the sample
    assert np.histogram(images, 4, (0, 12_000))[0].tolist() == pytest.approx([250] * 4, abs=50)

    check = OverlapCheck(calibrated_on(found), torch.device("cpu"))
    check.see([found[:6000]])  # half of them
    (text,) = told(check.warn)
    number = re.fullmatch(r"about (\d,\d{3}) of the 12,000", text)
    assert number is not None
    assert int(number[1].replace(",", "")) == pytest.approx(6000, rel=0.1)


PROGRAM = """
import torch
from torch.utils.data import DataLoader
from catp_lightning.callbacks import TokenPruning
from catp_lightning.modules.pruned import PrunedModule
from tests.support.calibrations import images_of
from tests.support.modules import Answering
from tests.support.overlapping import batches, calibrated_on
from tests.support.trainers import loading, trainer

if __name__ == "__main__":
    data = batches(5, size=2)  # one process has three batches, the other two
    data[1]["pixel_values"][0] = data[0]["pixel_values"][0]  # an image that both processes read
    images = images_of(data)
    policy = calibrated_on(torch.cat([images[[0, 1, 3, 7, 9]], images_of(batches(2, seed=2))]))
    settings = {"devices": 2, "strategy": "ddp_fork"}
    for stage in ("validate", "predict"):
        options = {"return_predictions": False} if stage == "predict" else {}
        getattr(trainer(TokenPruning(policy), **settings), stage)(Answering(), loading(data), **options)
        getattr(trainer(**settings), stage)(PrunedModule(Answering(), policy), loading(data), **options)
"""


@pytest.mark.slow
def test_two_processes_name_together_the_number_one_would_name(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    assert re.findall("This split contains (.*?) images that", finished(program).stderr) == ["5 of the 11"] * 4


@pytest.mark.parametrize("scorer", ["fastervlm", "fastv"])
def test_images_are_seen_before_the_decoder_and_inside_it(scorer: str) -> None:
    row = next(row for row in ROWS if row.name == "Llava")
    model, inputs = row.model(), row.inputs()
    args = {"layer": 1} if scorer == "fastv" else {}
    known = {"images": encode_images(torch.tensor([1, 2, 3]))}
    policy, prefills = PruningPolicy(scorer, args, keep=0.5, evidence=known), []
    with torch.no_grad(), applied(model, policy, on_prefill=prefills.append):
        model(**inputs)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(prefills) == 2, "once a prompt"
    assert all(torch.equal(prefill.images, fingerprint(inputs["pixel_values"])) for prefill in prefills)
