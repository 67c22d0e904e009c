"""The table's figures and intervals are what they say, by hand and against a slow bootstrap."""

import numpy as np
import pytest

from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.table import ModelTable, over_draws

IMAGES = [1, 1, 2, 3, 3, 3, 4, 5]


def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, 2, len(IMAGES)).astype(float)  # noqa: E731
    full = Result("no pruning", None, draw(), np.ones(len(IMAGES)), 32.0)
    rival = [
        Result("random", keep, draw(), draw(), tokens) for keep, tokens in ((0.5, 16.0), (4, 4.0)) for _ in range(3)
    ]
    ours = [Result("ours", keep, draw(), draw(), tokens) for keep, tokens in ((0.5, 16.0), (4, 4.0))]
    return Comparison(IMAGES, "ours", [full, *rival, *ours])


def test_seeds_are_averaged_and_differences_are_paired() -> None:
    given = comparison()
    rows = {(row["method"], row["keep"]): row for row in given.rows()}
    assert len(rows) == 5
    random = [r.same for r in given.results if r.method == "random" and r.keep == 4]
    (ours,) = (r.same for r in given.results if r.method == "ours" and r.keep == 4)
    assert rows["random", 4]["agreement"] == pytest.approx(np.mean(random))
    assert rows["random", 4]["reference_ahead"] == pytest.approx(ours.mean() - np.mean(random))
    assert "reference_ahead" not in rows["ours", 4] and "reference_ahead" not in rows["no pruning", None]
    assert rows["no pruning", None]["agreement_interval"] == pytest.approx([1.0, 1.0])


def test_intervals_resample_images_not_questions() -> None:
    given = comparison()
    row = next(row for row in given.rows() if row["method"] == "ours" and row["keep"] == 0.5)
    (same,) = (r.same for r in given.results if r.method == "ours" and r.keep == 0.5)
    rng, by_image, by_question = np.random.default_rng(1), [], []
    for _ in range(5_000):
        drawn = rng.choice([1, 2, 3, 4, 5], 5)
        chosen = [question for image in drawn for question in range(8) if IMAGES[question] == image]
        by_image.append(same[chosen].mean())
        by_question.append(same[rng.integers(0, 8, 8)].mean())
    slow, naive = np.quantile(by_image, [0.025, 0.975]), np.quantile(by_question, [0.025, 0.975])
    assert row["agreement_interval"] == pytest.approx(list(slow), abs=0.03)
    assert abs(np.subtract(row["agreement_interval"], naive)).max() > 0.03, (
        "the two must differ, or this proves nothing"
    )


def test_a_table_holds_every_method_at_every_budget() -> None:
    table = ModelTable.of("m", "8 questions.", comparison(), {"random": False}, {})
    for keep in (0.5, 4):
        part = table.markdown().partition(f"## keep {keep}\n\n")[2].partition("##")[0]
        lines = [line.split(" | ") for line in part.splitlines() if line.startswith("|")][2:]
        assert {line[0] for line in lines} == {"| no pruning", "| random (control)", "| **ours**"}
        assert all(len(line) == 7 for line in lines), "a name and six figures"
        assert [bool(line[-1].strip("| ")) for line in lines if "ours" in line[0]] == [False], "not ahead of itself"


def test_draws_of_a_method_widen_its_interval_by_how_far_they_differ() -> None:
    images, questions = 400, 800
    rng = np.random.default_rng(0)
    draws = [(rng.random(questions) < share).astype(float) for share in (0.80, 0.88, 0.96)]
    about = np.arange(questions) % images
    (row,) = Comparison(about, "ours", [Result("ours", 0.5, None, same, 4.0) for same in draws]).rows()
    means = [same.mean() for same in draws]
    assert row["agreement_draws"] == pytest.approx(means) and row["agreement"] == pytest.approx(np.mean(means))
    within = [Comparison(about, "ours", [Result("ours", 0.5, None, same, 4.0)]).rows()[0] for same in draws]
    low, high = row["agreement_interval"]
    assert "agreement_draws" not in within[0]
    assert all(high - low > 1.5 * np.ptp(one["agreement_interval"]) for one in within), "images alone say less"
    error = np.std(means, ddof=1) / 3**0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.35), "as of the mean of three draws"
    assert over_draws(row, "agreement").startswith("± 0.0")


def test_a_rival_is_paired_with_every_draw_of_the_reference() -> None:
    rng = np.random.default_rng(1)
    same = rng.integers(0, 2, 60).astype(float)
    ours = [Result("ours", 0.5, None, same, 4.0) for _ in range(3)]
    rows = Comparison(list(range(60)), "ours", [*ours, Result("rival", 0.5, None, same, 4.0)]).rows()
    (rival,) = [row for row in rows if row["method"] == "rival"]
    assert rival["reference_ahead_interval"] == pytest.approx([0.0, 0.0]), "equal answers differ in no resample"
