"""Components of questions and of tokens, from sums alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.fit.reading import MOST, EmbeddingSums, principal_components
from catp_lightning.methods.components import HASHED, Features, Question, hashed
from catp_lightning.methods.observation import Observation, Signal


def found(questions: Tensor, *parts: slice) -> Question | None:
    """Components of questions, added up as the sums of several processes are."""
    whole = EmbeddingSums()
    for part in parts or (slice(None),):
        own = EmbeddingSums()
        own.update(questions[part])
        for name in ("count", "total", "products"):
            setattr(whole, name, getattr(whole, name) + getattr(own, name))
        whole.width = torch.maximum(whole.width, own.width)
    return principal_components(Question, *whole.compute())


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


def test_of_rows_that_are_not_finite_nothing_is_learnt() -> None:
    questions, _ = planted(60)
    damaged = torch.cat([questions, questions[:1] * torch.nan, questions[:1] + torch.inf])
    one, other = found(questions), found(damaged)
    assert one is not None and one == other


def test_components_of_tokens_are_those_of_their_hashed_embeddings() -> None:
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randn(3, 7, 300, generator=draw, dtype=torch.float64)
    features = Features.of(torch.randn(2, HASHED, generator=draw).numpy(), np.array([1.0, -1.0]))
    seen = Observation(torch.ones(3, 7, dtype=torch.bool), {}, {Signal.IMAGE_FEATURES: tokens})
    expected = hashed(tokens.flatten(0, 1)) @ torch.tensor(features.rows()).double().T + torch.tensor([1.0, -1.0])
    torch.testing.assert_close(features.components(seen), expected.view(3, 7, 2), rtol=1e-6, atol=1e-6)
    half = Observation(seen.valid, {}, {Signal.IMAGE_FEATURES: tokens.bfloat16()})
    assert features.components(half).dtype == torch.float32
