"""Components of questions, and weights that change with them, from sums alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.fit.by_question import fit_by_question
from catp_lightning.calibration.fit.probes import Columns, random_subset
from catp_lightning.calibration.fit.questions import MOST, QuestionSums, principal_components
from catp_lightning.calibration.fit.sums import FoldSums, ProbeSums
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.methods.question import HASHED, Question, hashed
from tests.support.questions import components

FOLDS = DEFAULTS.folds


def found(questions: Tensor, *parts: slice) -> Question | None:
    """Components of questions, added up as the sums of several processes are."""
    whole = QuestionSums(questions.shape[1])
    for part in parts or (slice(None),):
        own = QuestionSums(questions.shape[1])
        own.update(questions[part])
        for name in ("count", "total", "products"):
            setattr(whole, name, getattr(whole, name) + getattr(own, name))
    return principal_components(*whole.compute())


def planted(count: int = 400, rank: int = 3, width: int = 40) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, rank, generator=draw, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0])[:rank]
    basis = torch.linalg.qr(torch.randn(width, rank, generator=draw, dtype=torch.float64))[0]
    return hidden @ basis.T + 5, hidden


def test_as_many_components_are_found_as_questions_differ_in() -> None:
    questions, hidden = planted()
    question = found(questions)
    assert question is not None and question.count == 3
    values = questions.numpy() @ question.rows().T.astype(float) + np.array(question.offset)
    assert values.mean(0) == pytest.approx(np.zeros(3), abs=1e-4) and values.std(0) == pytest.approx(
        np.ones(3), rel=1e-4
    )
    correlations = np.corrcoef(values.T, hidden.numpy().T)[:3, 3:]
    assert (np.abs(correlations).argmax(1) == [0, 1, 2]).all() and (np.abs(correlations).max(1) > 0.95).all()
    largest = question.rows()[np.arange(3), np.abs(question.rows()).argmax(1)]
    assert (largest > 0).all(), "the sign is settled"


def test_components_do_not_depend_on_processes_or_on_the_order_of_questions() -> None:
    questions, _ = planted(60)
    one, three = found(questions), found(questions.flip(0), slice(0, 0), slice(0, 11), slice(11, None))
    assert one is not None and three is not None
    assert three.rows() == pytest.approx(one.rows(), rel=1e-5, abs=1e-6)
    assert three.offset == pytest.approx(one.offset, rel=1e-5, abs=1e-5)


def test_questions_that_are_all_alike_have_no_components() -> None:
    one = torch.randn(1, 40, dtype=torch.float32, generator=torch.Generator().manual_seed(1)) * 30
    assert found(one.expand(50, -1)) is None
    assert found(one) is None and found(one[:0]) is None and found(torch.zeros(9, 0)) is None
    assert found(one + 1e-6 * torch.randn(50, 40)) is None, "rounding is no question"


def test_no_more_components_than_are_of_use() -> None:
    question = found(torch.randn(300, 40, generator=torch.Generator().manual_seed(2)))
    assert question is not None and question.count == MOST


def test_long_embeddings_are_hashed_as_a_loop_does_it_and_keep_inner_products() -> None:
    draw = torch.Generator().manual_seed(3)
    rows = torch.randn(8, 3 * HASHED + 50, generator=draw, dtype=torch.float64)
    short = hashed(rows)
    assert short.shape == (8, HASHED) and torch.equal(hashed(rows[:, :HASHED]), rows[:, :HASHED])
    signs = hashed(torch.eye(rows.shape[1], dtype=torch.float64))
    expected = torch.zeros(8, HASHED, dtype=torch.float64)
    for place in range(rows.shape[1]):
        (bucket,) = signs[place].nonzero()[:, 0].tolist()
        assert bucket == place % HASHED and abs(signs[place, bucket]) == 1
        expected[:, bucket] += signs[place, bucket] * rows[:, place]
    torch.testing.assert_close(short, expected, rtol=0, atol=1e-12)
    assert 0.4 < (signs.sum(1) > 0).double().mean() < 0.6
    inner = (rows @ rows.T, short @ short.T)
    assert np.corrcoef(inner[0].flatten(), inner[1].flatten())[0, 1] > 0.9


COLUMNS = Columns({"a": ((0, 1), 3), "b": ((2,), 2)}, 4, components(3))


def test_products_with_the_question_lie_where_a_loop_puts_them() -> None:
    draw = torch.Generator().manual_seed(4)
    plain, asked = torch.randn(COLUMNS.plain, generator=draw), torch.randn(3, generator=draw)
    row, names = plain.tolist(), [("plain", n, -1) for n in range(COLUMNS.plain)]
    for number in range(COLUMNS.plain):
        for component in range(3):
            row.append(float(plain[number] * asked[component]))
            names.append(("product", number, component))
    together = torch.cat([plain, (plain[:, None] * asked).flatten()])
    assert together.tolist() == pytest.approx(row) and len(row) == COLUMNS.total == 12 + 36
    assert COLUMNS.of_scorer("b") == [[6, 7]] and COLUMNS.of_slots == [8, 9, 10, 11]
    wanted = [1, 7, 11]
    assert [names[place] for place in COLUMNS.of_question(wanted)] == [
        ("product", number, component) for number in wanted for component in range(3)
    ]
    assert Columns({}, 4).of_question([0, 1]) == []


def sums(
    seed: int, interaction: float, samples: int = 60, noise: float = 1.0, count: int = 4
) -> tuple[FoldSums, Columns]:
    """Sums of probes of 8 heads and 8 slots; head 5 with the last component and slot 3 with the first may matter.

    Tokens also have a worth of their own in every sample, which nothing predicts.
    """
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    columns = Columns({"a": ((0, 1), 4)}, 8, components(count))
    whole, visual = ProbeSums(columns.total), torch.ones(samples, 8, dtype=torch.bool)
    head_scores, asked, own = normal(samples, 8, 8), normal(samples, count), 0.5 * normal(samples, 8)
    fold = torch.randint(0, FOLDS, (samples,), generator=draw)
    for size in (4, 2):
        counts, seeds = torch.full((samples,), size), torch.arange(samples) * 7919 + seed * 1000003
        kept = torch.stack([random_subset(seeds, visual, counts, 24 * size + n) for n in range(8)]).double()
        rows = torch.cat([torch.einsum("pbt,btv->pbv", kept, head_scores), kept], 2)
        gain = 0.8 * rows[..., 2] + 1.5 * rows[..., 9] + (kept * own).sum(2) + noise * normal(8, samples)
        gain += interaction * (rows[..., 5] * asked[:, -1] + rows[..., 8 + 3] * asked[:, 0])
        whole.update(fold, torch.cat([rows, (rows[..., None] * asked[:, None]).flatten(2)], 2), gain)
    return whole.compute(), columns


def plain(columns: Columns) -> list[int]:
    return [*(column for layer in columns.of_scorer("a") for column in layer), *columns.of_slots]


def test_a_planted_change_with_the_question_is_found() -> None:
    known, columns = sums(0, 1.0, samples=150, noise=0.3)
    fit = fit_by_question(known, plain(columns), columns.of_question(plain(columns)))
    assert fit is not None and fit.explained > 2 * fit.explained_error > 0
    others = fit.changes.copy()
    for place in ((5, 3), (8 + 3, 0)):
        assert fit.changes[place] == pytest.approx(0.85, abs=0.2), "shrunk by the ridge"
        others[place] = 0
    assert np.abs(others).max() < 0.3
    assert fit.weights[2] == pytest.approx(0.8, abs=0.25)


def test_without_products_or_with_one_fold_nothing_is_fitted() -> None:
    known, columns = sums(0, 1.0)
    assert fit_by_question(known, plain(columns), []) is None
    for _ in range(1, FOLDS):
        known = known.without(0)
    assert fit_by_question(known, plain(columns), columns.of_question(plain(columns))) is None


def test_questions_that_do_not_matter_are_seldom_found_to() -> None:
    draws = [sums(seed, 0.0, samples=(12, 40)[seed % 2], count=1) for seed in range(100)]
    wrong = [
        seed for seed, (known, columns) in enumerate(draws)
        if fit_by_question(known, plain(columns), columns.of_question(plain(columns))) is not None
    ]  # fmt: skip
    assert len(wrong) <= 3, wrong
