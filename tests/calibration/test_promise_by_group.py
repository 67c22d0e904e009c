"""A promise for each group of questions, and over questions, in a Trainer: from the user's batches to the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import CrossAttentionCalibration, PolicyError, PruningError, PruningPolicy
from catp_lightning.calibration.perturbations import blur
from catp_lightning.calibration.replay.groups import Groups
from catp_lightning.calibration.search.clusters import cluster_bound
from catp_lightning.calibration.search.promise import Over, upper_bound
from catp_lightning.calibration.search.race import Race
from catp_lightning.calibration.split import part_of
from catp_lightning.utils.hashing import mix, uniform
from tests.support.calibrations import QUICK, images_of
from tests.support.models import faint_blip2, greedily
from tests.support.modules import Batch, Generating
from tests.support.planted import agrees, recorded, two_questions
from tests.support.reports import tables, write
from tests.support.several_processes import each
from tests.support.trainers import loading, trainer

KINDS, BUDGETS, BATCH = ("count", "colour"), (6, 4, 2), 20
PROMISE: dict[str, Any] = {"max_disagreement": 0.87, "confidence": 0.9, "group_by": "kind"}


class Taking(Generating):
    """A user's module that takes the kind out of its batch before it asks its model."""

    def __init__(self) -> None:
        super().__init__(faint_blip2(0.2, dtype=torch.float64), greedily(1))

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        batch.pop("kind", None)
        return super().predict_step(batch, batch_idx)


class Breaking(Taking):
    """Raises at its fourth batch."""

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        if batch_idx == 3:
            raise RuntimeError("planted")
        return super().predict_step(batch, batch_idx)


class Halves(Taking):
    """Asks its model about each half of a batch by itself."""

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        batch.pop("kind", None)
        (middle,) = {len(value) // 2 for value in batch.values()}
        for half in (slice(0, middle), slice(middle, None)):
            answer = self.net.generate(**{name: value[half] for name, value in batch.items()}, **self.settings)
        return answer


def questions() -> list[Batch]:
    """One or two questions about each of 70 images."""
    (whole,) = two_questions(70, 140)
    return [{name: value[:110][some] for name, value in whole.items()} for some in torch.arange(110).split(BATCH)]


def kinds(number: int = 110) -> list[str]:
    """Of the second question, another kind or the same."""
    return [KINDS[place % 2] if place < 70 else KINDS[place % 4 // 2] for place in range(number)]


def with_kinds(batches: Sequence[Batch], of: Sequence[str] | None = None) -> list[dict[str, Any]]:
    of = kinds() if of is None else of
    return [{**batch, "kind": of[place : place + BATCH]} for place, batch in zip(range(0, 999, BATCH), batches)]  # noqa: B905


def callback(path: Path, **settings: Any) -> CrossAttentionCalibration:
    given = {"keep": list(BUDGETS), "scorer": "stride", "settings": QUICK, **PROMISE, **settings}
    return CrossAttentionCalibration(path, **given)


def calibrate(path: Path, module: Generating | None = None, batches: Any = None, **settings: Any) -> PruningPolicy:
    calibration = callback(path, **settings)
    batches = with_kinds(questions()) if batches is None else batches
    trainer(calibration, devices=1).predict(Taking() if module is None else module, loading(batches))
    (policy,) = calibration.policies
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("over", ["images", "questions"])
def test_every_group_is_tested_on_its_own_answers(tmp_path: Path, over: Over) -> None:
    policy = calibrate(tmp_path / "p.json", over=over)
    shown, batches, module = policy.evidence["promise"], questions(), Taking()
    images, of = images_of(batches), kinds()
    keys = torch.cat([some.keys for some in recorded(module, batches)]).tolist()
    checked = part_of(images, 0.5) == 1
    assert (shown["over"], shown["group_by"], shown["group_confidence"]) == (over, "kind", 0.95)
    assert [group["name"] for group in shown["groups"]] == sorted(KINDS)
    assert shown["images"] == len(images[checked].unique())
    for number, step in enumerate(shown["steps"]):
        differs = (~agrees(module, PruningPolicy("stride", keep=BUDGETS[number]), batches)).tolist()
        for group, found in zip(shown["groups"], step["groups"], strict=True):
            rows = [row for row in range(110) if checked[row] and of[row] == group["name"]]
            by_image = {image: [r for r in rows if int(images[r]) == image] for image in images[rows].tolist()}
            drawn = {image: differs[min(own, key=lambda row: keys[row])] for image, own in by_image.items()}
            assert (group["images"], group["questions"]) == (len(by_image), len(rows)) and len(rows) > len(by_image)
            assert group["most_questions"] == 2
            if over == "images":
                expected = sum(drawn.values())
                assert found["bound"] == upper_bound(expected, len(by_image), 0.95)
            else:
                expected = sum(differs[row] for row in rows)
                clusters = [(len(own), sum(differs[row] for row in own)) for own in by_image.values()]
                asked, disagreed = torch.tensor(clusters).T.numpy()
                name = Groups.of({"kind": group["name"]}, "kind").keys
                place = uniform(mix(torch.tensor([*by_image])) ^ name, 1)[:, 0].numpy()
                some = torch.tensor([*drawn.values()]).long().numpy()
                assert found["bound"] == pytest.approx(cluster_bound(asked, disagreed, some, place, 2, 0.95), rel=1e-6)
            assert (found["name"], found["disagreed"]) == (group["name"], expected)
        assert step["bound"] == max(found["bound"] for found in step["groups"])
        assert step["disagreed"] == sum(found["disagreed"] for found in step["groups"])
    holding = [step["bound"] <= 0.87 for step in shown["steps"]]
    assert holding[0] and policy.keep == BUDGETS[holding.index(False) - 1 if False in holding else 2]
    assert PruningPolicy.load(tmp_path / "p.json") == policy


@pytest.mark.slow
def test_the_order_of_batches_and_the_number_of_processes_do_not_matter(tmp_path: Path) -> None:
    alone = calibrate(tmp_path / "alone.json", over="questions").evidence["promise"]
    turned = calibrate(tmp_path / "turned.json", batches=with_kinds(questions())[::-1], over="questions")
    assert turned.evidence["promise"] == alone

    def work(rank: int) -> Any:
        """The second process has one batch, of one kind of question."""
        batches = with_kinds(questions())
        few = [{name: value[::2] for name, value in batches[0].items()}]
        assert set(few[0]["kind"]) == {"count"}
        others = [{name: value[1::2] for name, value in batches[0].items()}, *batches[1:]]
        options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
        calibration = callback(tmp_path / "many.json", over="questions")
        trainer(calibration, **options).predict(Taking(), loading(few if rank else others), return_predictions=False)
        return calibration.policies[0].to_dict()["evidence"]["promise"]

    for found in each(tmp_path, work, 2):
        assert found == alone


@pytest.mark.slow
def test_an_interrupted_calibration_by_groups_ends_in_the_same_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catp_lightning.calibration.checkpoint.EVERY", 1)
    calibrate(tmp_path / "whole.json")
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(tmp_path / "p.json", Breaking())
    with pytest.raises(PolicyError, match=r"promise of was \['images', 'kind'\], is \['questions', 'kind'\]"):
        calibrate(tmp_path / "p.json", over="questions")
    with pytest.raises(PolicyError, match="other data: batch 0 had fingerprint"):
        calibrate(tmp_path / "p.json", batches=with_kinds(questions(), kinds()[::-1]))
    calibrate(tmp_path / "p.json")
    assert (tmp_path / "p.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_small_group_is_refused_before_the_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Race, "see", lambda *_: pytest.fail("the race has begun"))
    few = ["rare" if place in (3, 50) else kind for place, kind in enumerate(kinds())]
    with pytest.raises(PolicyError, match=r"each of 3 groups takes 0\.966667: group 'rare' has [012] and takes at"):
        calibrate(tmp_path / "p.json", batches=with_kinds(questions(), few))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_calls_of_a_step_take_their_groups_in_order_and_other_numbers_are_refused(tmp_path: Path) -> None:
    whole, halves = calibrate(tmp_path / "p.json"), calibrate(tmp_path / "h.json", Halves())
    assert whole.evidence["promise"] == halves.evidence["promise"]

    class Twice(Taking):
        def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
            super().predict_step(dict(batch), batch_idx)
            return super().predict_step(batch, batch_idx)

    with pytest.raises(
        PruningError, match="holds 20 values, but the step asked the model about 40 samples, in 2 calls"
    ):
        calibrate(tmp_path / "t.json", Twice())


@pytest.mark.slow
@pytest.mark.parametrize("over", ["images", "questions"])
def test_copies_on_perturbed_images_count_in_no_group(tmp_path: Path, over: Over) -> None:
    plain = calibrate(tmp_path / "a.json", over=over)
    for number, module in enumerate((Taking(), Halves())):
        path = tmp_path / f"{number}.json"
        other = calibrate(path, module, over=over, augment={"black": torch.zeros_like, "blur": blur})
        assert other.evidence["promise"] == plain.evidence["promise"] and other.keep == plain.keep
        agreed = {name: found["stride"]["agreement"] for name, found in other.evidence["perturbed"].items()}
        assert list(agreed) == ["black", "blur"] and agreed["black"] != agreed["blur"], "or this proves nothing"


def test_a_batch_without_the_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"group_by is 'kinds', and a batch \(dict\) has no such field: .* 'kind'\?"):
        calibrate(tmp_path / "p.json", group_by="kinds")


@pytest.mark.parametrize("settings", [{"over": "questions"}, {"group_by": "kind"}])
def test_groups_and_questions_are_those_of_a_promise(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=r"none is asked for\. Give max_disagreement"):
        CrossAttentionCalibration(tmp_path / "p.json", keep=0.5, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["images", "questions"])
def test_the_report_says_what_is_promised_of_which_groups(tmp_path: Path, over: Over) -> None:
    policy = calibrate(tmp_path / "p.json", over=over)
    shown = policy.evidence["promise"]
    lines, page = write([policy], tmp_path)
    last = [step for step in shown["steps"] if step["holds"]][-1]
    worst = max(last["groups"], key=lambda group: group["bound"])
    (group,) = [group for group in shown["groups"] if group["name"] == worst["name"]]
    assert lines[1].endswith(
        f"at most 0.87 of new {over} disagree in each of 2 groups of kind, with confidence 0.9 ({worst['disagreed']} "
        f"of {group[over]} did in group '{worst['name']}', which has the largest bound)"
    )
    assert f"With confidence 0.9, in each group of kind, the policy at keep {policy.keep} answers at most 0.87" in page
    assert "Each of the 2 groups is tested with confidence 0.95, so that the bounds of all hold together" in page
    rows = tables(page, "The promise")
    assert len(rows) == 2 * len(BUDGETS)
    for row, (step, place) in zip(rows, [(s, p) for s in shown["steps"] for p in (0, 1)], strict=True):
        found, of = step["groups"][place], shown["groups"][place]
        assert row[:4] == [
            str(step["keep"]), of["name"], f"{found['disagreed']} of {of[over]} {over}", f"{found['bound']:.2%}"
        ]  # fmt: skip
    assert (f"tested on {shown['questions']} questions about {shown['images']} images" in page) == (over == "questions")
    refused = calibrate(tmp_path / "r.json", max_disagreement=0.2, confidence=0.1, over=over)
    lines, page = write([refused], tmp_path)
    assert refused.keep == 1.0 and f"{over} disagree in group '" in lines[1], "or this proves nothing"
    assert "No budget was found to change at most 0.2 of the answers in each group with confidence 0.1" in page


@pytest.mark.slow
def test_over_questions_without_groups_all_questions_count(tmp_path: Path) -> None:
    policy = calibrate(tmp_path / "p.json", batches=questions(), over="questions", group_by=None)
    shown = policy.evidence["promise"]
    assert shown["over"] == "questions" and "groups" not in shown and shown["most_questions"] == 2
    assert shown["questions"] == policy.evidence["samples"]["check"] > shown["images"]
    for keep, step in zip(BUDGETS, shown["steps"], strict=True):
        same = agrees(Taking(), PruningPolicy("stride", keep=keep), questions())
        assert step["disagreed"] == int((~same)[part_of(images_of(questions()), 0.5) == 1].sum())
    lines, page = write([policy], tmp_path)
    last = [step for step in shown["steps"] if step["holds"]][-1]
    assert (
        f"of new questions disagree, with confidence 0.9 ({last['disagreed']} of {shown['questions']} did)" in lines[1]
    )
    assert "no image is expected to have more than the 2 that were asked about one here." in page
