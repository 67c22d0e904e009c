"""A promise is tested in every group of questions, each at its share of the risk."""

import numpy as np
import pytest

from catp_lightning.calibration.asked import AskedImages
from catp_lightning.calibration.search.clusters import cluster_bound
from catp_lightning.calibration.search.promise import Over, Promise, upper_bound
from catp_lightning.calibration.search.promised import PromisedGroups
from catp_lightning.errors import PolicyError

NAMES = {11: "colour", 5: "how many", 9: "yes/no"}


def asked(sizes: dict[int, int], questions: int, share: float, budgets: int = 2) -> AskedImages:
    """Groups of so many images with as many questions each; `share` disagree, and twice that at the second budget."""
    groups = np.repeat([*sizes], [*sizes.values()])
    count, rng = len(groups), np.random.default_rng(0)
    disagreed = np.stack([rng.binomial(questions, share * (k + 1), count) for k in range(budgets)], 1)
    drawn = (rng.random((count, 1)) * questions < disagreed).astype(int)
    place = rng.random(count).astype(np.float32)
    return AskedImages(np.arange(count), groups, np.full(count, questions), disagreed, drawn, place)


@pytest.mark.parametrize("over", ["images", "questions"])
def test_each_group_has_its_own_test_at_its_share_of_the_risk(over: Over) -> None:
    answers = asked({11: 80, 5: 120, 9: 300}, 3, 0.02)
    promised = PromisedGroups(Promise(0.1, 0.94, over, "kind"), answers, NAMES)
    results = promised.results(answers)
    assert promised.each.confidence == pytest.approx(0.98)
    assert [(of.name, of.images, of.questions, of.most) for of in results] == [
        ("colour", 80, 240, 3), ("how many", 120, 360, 3), ("yes/no", 300, 900, 3)
    ]  # fmt: skip
    for key, found in zip((11, 5, 9), results, strict=True):
        here = answers.where(answers.groups == key)
        for k in range(2):
            if over == "images":
                counted, bound = here.drawn[:, k].sum(), upper_bound(int(here.drawn[:, k].sum()), found.images, 0.98)
            else:
                counted = here.disagreed[:, k].sum()
                bound = cluster_bound(here.questions, here.disagreed[:, k], here.drawn[:, k], here.place, 3, 0.98)
            assert found.disagreed[k] == counted and found.bounds[k] == pytest.approx(bound, rel=1e-9)


def test_a_budget_holds_where_every_group_does() -> None:
    answers = asked({11: 200, 5: 200, 9: 200}, 1, 0.0)
    answers.drawn[:20, 1] = 1  # of one group, at the second budget
    promised = PromisedGroups(Promise(0.05, 0.95, group_by="kind"), answers, NAMES)
    results = promised.results(answers)
    walked = promised.walk(results)
    assert [of.bounds[1] <= 0.05 for of in results] == [False, True, True]
    assert walked.chosen == 0 and [step.holds for step in walked.steps] == [True, False]
    assert [step.disagreed for step in walked.steps] == [0, 20]
    assert walked.steps[1].bound == max(of.bounds[1] for of in results)
    everything = AskedImages(**{**vars(answers), "groups": np.zeros_like(answers.groups)})  # 20 of 600 are few enough
    alone = PromisedGroups(Promise(0.05, 0.95), everything, {})
    assert alone.walk(alone.results(everything)).chosen == 1


def test_a_group_that_is_too_small_is_refused_by_name() -> None:
    split = asked({11: 30, 5: 200, 9: 200}, 1, 0.0)
    promised = PromisedGroups(Promise(0.05, 0.95, group_by="kind"), split, NAMES)
    needed = Promise(0.05, 1 - 0.05 / 3).images_needed
    said = (
        "over images in each group of 'kind' with confidence 0.95, for which each of 3 groups takes 0.983333: group "
        rf"'colour' has 30 and takes at least {needed}\. That is without .* Take more images, join small groups,"
    )
    with pytest.raises(PolicyError, match=said):
        promised.refuse_too_few(np.ones(430, dtype=bool))
    checked = np.arange(430) >= 230  # no image of two groups is there to be checked
    with pytest.raises(PolicyError, match=r"group 'colour' has 0 .*; group 'how many' has 0 "):
        promised.refuse_too_few(checked)
    enough = asked({11: needed, 5: needed, 9: needed}, 1, 0.0)
    PromisedGroups(promised.promise, enough, NAMES).refuse_too_few(np.ones(3 * needed, dtype=bool))
    with pytest.raises(PolicyError, match=rf"has {needed - 1} and takes at least {needed}"):
        PromisedGroups(promised.promise, enough, NAMES).refuse_too_few(np.arange(3 * needed) > 0)


def test_many_small_groups_are_counted_and_three_are_named() -> None:
    split = asked(dict.fromkeys(range(1, 9), 2), 1, 0.0)
    with pytest.raises(PolicyError, match=r"(group 'g\d' has 2 and takes at least \d+(; |, and )){3}5 more groups"):
        PromisedGroups(Promise(0.05, group_by="kind"), split, {k: f"g{k}" for k in range(9)}).refuse_too_few(
            np.ones(16, dtype=bool)
        )


def test_over_questions_more_images_are_needed_where_some_have_many_questions() -> None:
    split = asked({0: 149}, 1, 0.0)
    everything = np.ones(149, dtype=bool)
    promised = PromisedGroups(Promise(0.02, 0.95, "questions"), split, {})
    promised.refuse_too_few(everything)
    split.questions[0] = 8
    with pytest.raises(
        PolicyError, match=r"over questions .*: there are 149 and takes about \d{4}, as up to 8 questions"
    ):
        promised = PromisedGroups(Promise(0.02, 0.95, "questions"), split, {})
        promised.refuse_too_few(everything)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"over": "answers"}, "over is 'answers'; a promise is over 'images' or over 'questions'"),
        ({"group_by": ""}, "group_by is ''; it is the name of a field"),
        ({"group_by": 3}, "group_by is 3; it is the name of a field"),
    ],
)
def test_what_a_promise_is_of_is_checked(given: dict[str, str], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Promise(0.1, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"over": "questions"}, {"group_by": "kind"}])
def test_what_a_promise_is_of_needs_a_promise(given: dict[str, str]) -> None:
    with pytest.raises(PolicyError, match=r"none is asked for\. Give max_disagreement"):
        Promise.asked(None, 0.95, **{"over": "images", "group_by": None, **given})  # type: ignore[arg-type]
    assert Promise.asked(None, 0.95, "images", None) is None
