"""Close calls go to plain rules, and questions are routed only where that is worth it."""

import numpy as np
import pytest
import torch

from catp_lightning.calibration.fit.ties import Tolerance
from catp_lightning.calibration.search.candidate import Candidate, Exit, Routing
from catp_lightning.calibration.search.choice import choose, paired
from catp_lightning.calibration.search.routes import ROUTES, complements, routes, weights
from catp_lightning.calibration.search.standings import Round, Standings
from catp_lightning.calibration.search.sums import CandidateAnswers, Rows
from catp_lightning.calibration.split import fold_of
from tests.support.questions import components

TIES = Tolerance.under(torch.float32)
PLAIN = Candidate("plain", "l2-norm")
SET = Candidate("set", "catp", {"layers": [0]})
FITTED = Candidate("fitted", "catp", {"head_weights": [[1.0]]})
REVERSED = Candidate("reversed", "catp", {}, "dpp", {"relevance": -0.5})
MERGING = Candidate("merging", "visionzip")


def samples(*ahead: float, count: int = 100, seed: int = 0) -> np.ndarray:
    """Divergences of candidates whose paired lead over the first is so many standard errors: [N, A]."""
    draw, common = np.random.default_rng(seed), np.random.default_rng(9).exponential(1, count)
    columns = [common]
    for errors in ahead:
        noise = draw.standard_normal(count)
        noise = 0.1 * (noise - noise.mean()) / noise.std(ddof=1)
        columns.append(common + noise - errors * 0.1 / count**0.5)
    return np.stack(columns, 1)


def each(count: int = 100) -> np.ndarray:
    return np.arange(count)


def test_how_far_candidates_are_fitted() -> None:
    assert [one.fitted for one in (PLAIN, SET, FITTED, REVERSED)] == [0, 1, 2, 1]
    assert Candidate("", "catp", {"network": {}}).fitted == 2 and Candidate("", "l2-norm", {}, "dpp").fitted == 0
    assert [one.reversed for one in (PLAIN, SET, FITTED, REVERSED)] == [False, False, False, True]
    assert [one.routable for one in (PLAIN, MERGING)] == [True, False]


@pytest.mark.parametrize("kind", ["plain", "one layer's exit", "by question"])
def test_the_method_of_a_candidate_is_that_of_its_policy_and_is_built_once(kind: str) -> None:
    routing = Routing.of([PLAIN, SET], components(), np.zeros((components().count + 1, 2)))
    candidate = {"plain": SET, "one layer's exit": Exit("exit", "visual-exit", depth=4), "by question": routing}[kind]
    assert candidate.method == candidate.policy(1.0).method() and candidate.method is candidate.method


@pytest.mark.parametrize(("lead", "chosen"), [(0.5, PLAIN), (0.95, PLAIN), (1.05, FITTED), (3.0, FITTED)])
def test_a_fitted_rule_must_be_ahead_by_a_standard_error(lead: float, chosen: Candidate) -> None:
    assert [PLAIN, FITTED][choose([PLAIN, FITTED], samples(lead), each(), TIES)] is chosen
    flipped = samples(lead)[:, ::-1]
    assert [FITTED, PLAIN][choose([FITTED, PLAIN], flipped, each(), TIES)] is chosen


@pytest.mark.parametrize(("lead", "chosen"), [(1.5, SET), (1.95, SET), (2.05, REVERSED)])
def test_a_rule_that_prefers_low_scores_must_be_ahead_by_two(lead: float, chosen: Candidate) -> None:
    assert [SET, REVERSED][choose([SET, REVERSED], samples(lead), each(), TIES)] is chosen


def test_a_rule_that_prefers_low_scores_wins_no_close_call_against_a_fitted_one() -> None:
    """It is level with the fitted rule, and has fewer fitted parts."""
    assert choose([FITTED, REVERSED], samples(-0.5), each(), TIES) == 0


def test_of_plain_rules_that_are_level_the_best_is_chosen() -> None:
    other = Candidate("other", "random")
    assert choose([FITTED, PLAIN, other], samples(-0.5, -0.2), each(), TIES) == 2
    assert choose([FITTED, SET, PLAIN], samples(-0.2, -0.6), each(), TIES) == 2, "as published before a setting"


def test_differences_within_rounding_decide_nothing() -> None:
    """Another order of batches changes last digits; the first of those that are equal is chosen."""
    divergence = np.repeat(np.random.default_rng(0).exponential(1, (60, 1)), 3, 1)
    several = [Candidate(name, "random") for name in "abc"]
    for seed in range(20):
        noise = 1e-7 * np.random.default_rng(seed).standard_normal(divergence.shape)
        assert choose(several, divergence + noise, each(60), TIES) == 0
        constant = divergence + np.array([0.0, 1e-7, 2e-7])
        assert choose([FITTED, FITTED, PLAIN], constant, each(60), TIES) == 2


def test_questions_about_an_image_are_no_samples_of_their_own() -> None:
    """Ten copies of each: the error is that of the images."""
    single = samples(1.5, count=40)
    copies, images = np.repeat(single, 10, 0), np.repeat(np.arange(40) * 17 - 300, 10)
    alone = paired(single[:, 0] - single[:, 1], each(40))
    assert paired(copies[:, 0] - copies[:, 1], images) == pytest.approx(alone, rel=1e-9)
    weak = np.repeat(samples(0.5, count=40), 10, 0)
    assert choose([PLAIN, FITTED], weak, images, TIES) == 0
    assert choose([PLAIN, FITTED], weak, np.arange(400), TIES) == 1, "as samples of their own they would decide"


def two_kinds(count: int = 300, seed: int = 0, strength: float = 0.4, others: int = 4) -> Rows:
    """Component 1 of a question says whether the first or the second rule does better; others are always worse."""
    draw = np.random.default_rng(seed)
    questions = draw.standard_normal((count, 5))
    kind = np.sign(questions[:, 1])[:, None]
    base = 0.5 + 0.1 * draw.exponential(1, (count, 2 + others))
    base[:, :2] += strength * np.c_[kind, -kind] * 0.5
    base[:, 2:] += 0.3
    return Rows(np.arange(count), questions, base, np.zeros_like(base))


def folds(rows: Rows) -> np.ndarray:
    return np.arange(len(rows.images)) % 5


def test_two_kinds_of_questions_are_routed_to_their_rules_out_of_fold() -> None:
    rows = two_kinds()
    places, taken = routes(rows, folds(rows), 0)
    assert places == [0, 1]
    right = (rows.questions[:, 1] > 0).astype(int)
    assert (taken == right).mean() > 0.9
    fresh = two_kinds(seed=1)
    predicted = np.c_[fresh.questions, np.ones(len(fresh.questions))] @ weights(rows.of(places))
    assert (predicted.argmin(1) == (fresh.questions[:, 1] > 0)).mean() > 0.9
    assert set(complements(rows, 0)[:2]) == {0, 1}


def test_which_rule_a_sample_takes_is_not_learnt_from_itself() -> None:
    """With as many components as samples a regression repeats what it has seen."""
    rows = two_kinds(60, strength=0.0, others=0)
    rows.questions = np.random.default_rng(3).standard_normal((60, 55))
    before = routes(rows, folds(rows), 0)
    here = folds(rows) == 2
    changed = Rows(rows.images, rows.questions, rows.divergence.copy(), rows.agreed)
    changed.divergence[here] = changed.divergence[here][:, ::-1]
    predicted = [np.c_[one.questions, np.ones(60)][here] @ weights(one, ~here) for one in (rows, changed)]
    assert np.array_equal(*predicted) and before[1].shape == (60,)


def noise(seed: int, count: int = 200, candidates: int = 20) -> Rows:
    draw = np.random.default_rng(seed)
    divergence = 0.5 * draw.exponential(0.3, (count, 1)) + draw.exponential(0.3, (count, candidates))
    divergence = divergence[:, divergence.mean(0).argsort()]
    return Rows(np.arange(count), draw.standard_normal((count, 16)), divergence, np.zeros_like(divergence))


def test_questions_that_do_not_matter_are_seldom_routed() -> None:
    """Twenty rules that are equally good: what is best of them for a question is chance."""
    draws = [noise(seed) for seed in range(100)]
    members = [len(routes(rows, folds(rows), 0)[0]) for rows in draws]
    assert sum(number > 1 for number in members) <= 5 and max(members) <= ROUTES


def standings(rows: Rows, candidates: list[Candidate]) -> Standings:
    sums = {
        "divergence": rows.divergence.sum(0)[None],
        "squares": (rows.divergence**2).sum(0)[None],
        "agreed": rows.agreed.sum(0)[None].astype(int),
        "count": np.full((1, len(candidates)), len(rows.images)),
    }
    everyone = [list(range(len(candidates)))]
    return Standings(candidates, TIES, components(5), [Round(everyone, sums, [rows])])


def drawn(rows: Rows) -> Rows:
    """With fingerprints as images have them, by which folds are drawn."""
    rows.images = np.random.default_rng(5).integers(-(2**62), 2**62, len(rows.images))
    return rows


def test_a_routing_is_chosen_where_it_wins_and_carries_its_own_figures() -> None:
    rows, several = drawn(two_kinds(others=1)), [PLAIN, SET, FITTED]
    final = standings(rows, several).final([[0, 1, 2]], 5)
    routing = final.candidates[3]
    assert isinstance(routing, Routing) and final.chosen == [3] and routing.fitted == 2
    assert routing.name.startswith("by question: ") and {"plain", "set"} == set(routing.name[13:].split(" / "))
    policy = routing.policy(0.25)
    assert policy.keep == 0.25 and len(policy.method().rules) == 2
    fold = fold_of(torch.from_numpy(rows.images), 5).numpy()
    _, taken = routes(rows.of([0, 1, 2]), fold, 0)
    own = rows.divergence[np.arange(len(taken)), taken]
    assert final.sums["divergence"][0, 3] == pytest.approx(own.sum(), rel=1e-6)
    assert final.sums["divergence"][0, 3] < 0.8 * final.sums["divergence"][0, :3].min()
    assert final.sums["count"].tolist() == [[300] * 4]


def test_questions_are_not_routed_to_rules_that_merge_and_not_where_they_are_unknown() -> None:
    rows = drawn(two_kinds(others=0))
    final = standings(rows, [PLAIN, MERGING]).final([[0, 1]], 5)
    assert len(final.candidates) == 2, "a policy's routes may not merge"
    unknown = standings(rows, [PLAIN, SET])
    unknown.question = None
    assert len(unknown.final([[0, 1]], 5).candidates) == 2


def test_rules_that_are_best_for_some_questions_go_on() -> None:
    rows = drawn(two_kinds(others=6))
    rows.divergence[:, 1] += 0.35  # by the mean it is last but for its questions it is not
    several = [PLAIN, SET, *(Candidate(f"other {n}", "random", {"seed": n + 1}) for n in range(6))]
    known = standings(rows, several)
    assert 1 in known.survivors(0, list(range(8)), 8) and known.ranking(0, list(range(8)))[-1] == 1
    known.question = None
    assert 1 not in known.survivors(0, list(range(8)), 8)


def test_answers_do_not_depend_on_processes_or_the_order_of_batches() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randperm(40, generator=draw) * 7919 - 2**61
    images, asked = keys // 3, torch.randn(40, 2, generator=draw)
    answers = [(torch.rand(n, 40, generator=draw), torch.rand(n, 40, generator=draw) > 0.5) for n in (3, 1)]

    def found(*parts: torch.Tensor) -> list[Rows]:
        metrics = []
        for part in parts:
            metrics.append(CandidateAnswers([3, 1], 2))
            empty = [(torch.zeros(n, 0), torch.zeros(n, 0)) for n in (3, 1)]
            metrics[-1].update(keys[:0], images[:0], asked[:0], empty)
            if len(part):
                some = [(diverged[:, part], agreed[:, part]) for diverged, agreed in answers]
                metrics[-1].update(keys[part], images[part], asked[part], some)
        whole = CandidateAnswers([3, 1], 2)
        for name in ("ids", "values"):  # as torchmetrics joins the states of processes
            setattr(whole, name, torch.cat([torch.cat(getattr(metric, name)) for metric in metrics]))
        return whole.compute()

    one = found(torch.arange(40))
    for other in (found(torch.arange(40).flip(0)), found(torch.arange(0), torch.arange(13, 40), torch.arange(13))):
        for rows, same in zip(one, other, strict=True):
            for name in ("images", "questions", "divergence", "agreed"):
                assert np.array_equal(getattr(rows, name), getattr(same, name))
    order = keys.argsort()
    assert np.array_equal(one[0].images, images[order].numpy()) and one[1].divergence.shape == (40, 1)
    assert one[0].divergence == pytest.approx(answers[0][0][:, order].T.numpy(), rel=1e-6)
    assert np.array_equal(one[1].agreed[:, 0], answers[1][1][0, order].numpy())
    assert np.array_equal(one[0].of([2, 0]).divergence, one[0].divergence[:, [2, 0]])
    assert Rows.joined([one[0], one[0]]).divergence.shape == (80, 3)
    assert [len(rows.images) for rows in found(torch.arange(0))] == [0, 0], "a process without batches"
