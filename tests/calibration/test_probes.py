"""What a probe says is what the model, pruned to that subset, answers; and probes are exact, however they are cut."""

from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.fit.around import ProbingAround
from catp_lightning.calibration.fit.learning import Networks
from catp_lightning.calibration.fit.probes import WORST, Columns, probe, random_subset, scores_of_heads, sizes
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.fit.sums import ProbeSums
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.settings import CalibrationSettings
from catp_lightning.calibration.split import fold_of, part_of
from catp_lightning.methods.scorers import CrossAttention, RegionAttention
from catp_lightning.models import find_family
from catp_lightning.utils.hashing import mix
from tests.support.models import GREEDY, PAD
from tests.support.modules import Batch
from tests.support.questions import network
from tests.support.recorded_answers import Explicit, ModelCall, Net, beams, forward, greedy, mixed, model, record

SCORERS_FITTED = {"cross-attention": CrossAttention(), "region-attention": RegionAttention()}
"""Scorers of models with a Q-Former whose heads are fitted."""


def subsets(samples: Samples, size: float, number: int, count: int) -> Tensor:
    visual = samples.visual
    counts = torch.tensor([max(1, round(count * size)) for count in visual.sum(1).tolist()])
    seeds = samples.images ^ samples.replay.questions
    probes = range(count * number, count * (number + 1))
    return torch.stack([random_subset(seeds, visual, counts, n) & visual for n in probes])


def slow_rows(samples: Samples, keep: Tensor) -> Tensor:
    """A probe's row by loops over kept tokens, scorers, layers and heads."""
    columns = Columns.of(Plan.of(samples.replay.family))
    head_scores = {name: scorer.head_scores(samples.seen).double() for name, scorer in SCORERS_FITTED.items()}
    rows = torch.zeros(*keep.shape[:2], columns.total, dtype=torch.float64)
    starts = (samples.visual.sum(1).cumsum(0) - samples.visual.sum(1)) // columns.slots
    for p, b, t in keep.nonzero().tolist():
        image, slot = int(starts[b]) + t // columns.slots, t % columns.slots
        column = 0
        for name in SCORERS_FITTED:
            for layer in range(2):
                for head in range(4):
                    assert columns.of_scorer(name)[layer][head] == column
                    rows[p, b, column] += head_scores[name][image, layer, head, slot]
                    column += 1
        assert columns.of_slots[0] == column
        rows[p, b, column + slot] += 1
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "right"),
    [(greedy, False), (beams, False), (forward, False), (forward, True)],
    ids=["greedy", "beams", "forward", "forward, padded right"],
)
def test_a_probe_is_what_the_model_pruned_to_that_subset_says_of_its_own_answer(
    call: ModelCall, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catp_lightning.calibration.fit.probes.WORST", -1000.0)  # or a lost answer could hide anything
    net, batch = model(), mixed([1, 2, 0, 1, 2], right=right)
    seeing, calls, gains = [net.vision_model, net.qformer], [], []
    for part in seeing:
        part.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        output, samples = record(net, call, batch)
        head_scores = scores_of_heads(SCORERS_FITTED.values(), samples.seen, samples.visual)
        found = [
            probe(samples.replay, head_scores, samples.images, size, number, 8, probes=3)
            for number, size in enumerate(sizes([0.5, 3], 8))
        ]
        assert calls == seeing, "vision runs once a batch, however many subsets are probed"
        explicit = Explicit(net, batch, output)
        for number, (size, probes) in enumerate(zip(sizes([0.5, 3], 8), found, strict=True)):
            keep, count = subsets(samples, size, number, 3), round(8 * size)
            assert keep[:, :4].sum(2).tolist() == [[count, 2 * count, 0, count]] * 3
            expected = torch.stack([explicit.gain(kept) for kept in keep])
            torch.testing.assert_close(probes.gain, expected, atol=1e-10, rtol=0)
            rows = slow_rows(samples, keep)
            there = samples.visual.any(1)  # where there is no image nothing can be kept
            torch.testing.assert_close(probes.rows[:, there], rows[:, there], atol=1e-10, rtol=0)
            assert torch.equal(probes.slots, probes.rows[..., -8:])
            centred = (probes.rows - probes.rows.mean(0))[:, ~there]
            assert not centred.any(), "a sample without an image teaches nothing"
            gains.append(expected[:, there])
    assert torch.cat(gains).std(0).min() > 0.1, "what is kept matters, or this proves nothing"


def test_after_padding_on_the_right_the_first_token_comes_from_where_generate_takes_it() -> None:
    """From the padding; transformers advises against it, and numbers the later tokens as if padding were text."""

    def with_logits(net: Net, batch: Batch) -> Any:
        return net.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)

    with torch.no_grad():
        output, samples = record(model(), with_logits, mixed([1, 2, 0, 1, 2], right=True))
        for rows in ([0, 1, 2, 3, 4], [1, 2, 4], [3]):
            replay = samples.replay.of_samples(torch.tensor(rows))
            first = replay.log_probabilities(replay.tokens)[:, 0].float()
            torch.testing.assert_close(first, output.logits[0][rows].log_softmax(-1), atol=1e-5, rtol=0)


def test_the_gains_of_lost_answers_are_cut_off() -> None:
    net, batch = model(), mixed([1, 1, 1])
    net.language_projection.weight.data *= 20
    with torch.no_grad():
        _, samples = record(net, greedy, batch)
        keep = subsets(samples, 1 / 8, 0, 3)
        whole = samples.replay.answer_log_probability(keep)
        head_scores = scores_of_heads(SCORERS_FITTED.values(), samples.seen, samples.visual)
        found = probe(samples.replay, head_scores, samples.images, 1 / 8, 0, 8, probes=3).gain
    assert whole.min() < WORST - 1 and torch.equal(found, whole.clamp(min=WORST))


def test_inference_mode_changes_nothing_and_half_precision_little() -> None:
    def probed(net: Net, dtype: torch.dtype) -> tuple[Samples, Any]:
        _, samples = record(net, greedy, mixed([1, 2, 1], dtype))
        head_scores = scores_of_heads(SCORERS_FITTED.values(), samples.seen, samples.visual)
        return samples, probe(samples.replay, head_scores, samples.images, 0.5, 0, 8, probes=4)

    with torch.no_grad():
        _, plain = probed(model(torch.float32), torch.float32)
    with torch.inference_mode():
        _, inference = probed(model(torch.float32), torch.float32)
    assert torch.equal(plain.gain, inference.gain) and torch.equal(plain.rows, inference.rows)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            samples, half = probed(model(dtype), dtype)
        assert half.rows.dtype == half.gain.dtype == torch.float32
        rows = slow_rows(samples, subsets(samples, 0.5, 0, 4))
        torch.testing.assert_close(half.rows.double(), rows, atol=1e-4, rtol=0)
        assert half.gain.isfinite().all() and (half.gain <= 0).all()
    assert half.gain.shape == (4, 3)


def test_one_set_of_probes_serves_all_budgets_and_only_the_learning_part() -> None:
    assert sizes([0.5, 0.25, 1.0], 8) == [2 / 8, 1 / 8] and sizes([0.5], 1) == [] and sizes([0.5, 4], 8, ()) == [4 / 8]
    assert sizes([3, 7, 100], 8, (0.5, 0.125)) == [4 / 8, 3 / 8, 1 / 8]
    net = model()
    with torch.no_grad():
        _, samples = record(net, forward, mixed([1] * 30))
        plan = Plan.of(find_family(net), settings=CalibrationSettings(probes=2))
        probing = Probing(plan, [0.5, 0.25], part_of, None)
        probing.see(samples)
        here = samples.where(part_of(samples.images) == 0)
        assert 15 < len(here.images) < 30
        expected = ProbeSums(probing.columns.total)
        for number, size in enumerate((2, 1)):
            keep = subsets(here, size / 8, number, 2)
            gain = here.replay.answer_log_probability(keep).clamp(min=WORST)
            expected.update(fold_of(here.images), slow_rows(here, keep), gain)
    found, wanted = probing.sums.compute(), expected.compute()
    assert found.gram == pytest.approx(wanted.gram, abs=1e-8) and found.moment == pytest.approx(wanted.moment, abs=1e-8)
    assert found.rows.tolist() == wanted.rows.tolist() and found.rows.sum() == 2 * 2 * len(here.images)
    assert probing.parts.compute() == {"learn": len(here.images), "check": 30 - len(here.images)}
    assert torch.equal(probing.images.compute(), samples.images.unique())
    assert probing.pairs is not None and probing.pairs.compute().gram.shape[1] == 36


def test_random_subsets_are_fair_and_depend_on_seed_and_number_alone() -> None:
    seeds, visual = torch.arange(4000) * 7919, torch.ones(4000, 8, dtype=torch.bool)
    counts = torch.full((4000,), 3)
    subset = random_subset(seeds, visual, counts, 5)
    assert subset.sum(1).eq(3).all()
    assert torch.equal(random_subset(seeds[10:20], visual[10:20], counts[10:20], 5), subset[10:20])
    assert not torch.equal(random_subset(seeds, visual, counts, 6), subset)
    assert (subset.double().mean(0) - 3 / 8).abs().max() < 0.03
    pairs = subset.double().T @ subset.double() / 4000
    off = pairs[~torch.eye(8, dtype=torch.bool)]
    assert (off - 3 / 8 * 2 / 7).abs().max() < 0.03, "slots are drawn independently of each other"
    visual = torch.arange(8) < torch.tensor([8, 4])[:, None]
    shorter = random_subset(torch.tensor([1, 2]), visual, torch.tensor([3, 3]), 0)
    assert shorter.sum(1).tolist() == [3, 3] and not (shorter & ~visual).any()


def test_subsets_are_drawn_one_token_after_the_other_in_proportion_to_the_exponential_of_their_scores() -> None:
    seeds, visual = torch.arange(20000) * 7919, torch.ones(20000, 4, dtype=torch.bool)
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64).expand(20000, -1)
    chance = scores[0].softmax(0)
    one = random_subset(seeds, visual, torch.ones(20000, dtype=torch.int64), 3, scores=scores)
    assert (one.double().mean(0) - chance).abs().max() < 0.015
    two = random_subset(seeds, visual, torch.full((20000,), 2), 3, scores=scores)
    pairs = chance[:, None] * chance / (1 - chance[:, None])  # the first token, then the second
    expected = (pairs - pairs.diag().diag()).sum(0) + chance
    assert (two.double().mean(0) - expected).abs().max() < 0.015 and (one & ~two).sum() == 0
    equal = torch.zeros_like(scores)
    assert torch.equal(random_subset(seeds, visual, torch.full((20000,), 2), 3, scores=equal).sum(1), two.sum(1))
    hidden = visual & (torch.arange(4) > 0)
    assert not random_subset(seeds, hidden, torch.full((20000,), 3), 3, scores=scores)[:, 0].any()


def test_good_sets_are_probed_around_what_a_network_prefers_that_never_saw_the_fold() -> None:
    net = model()
    with torch.no_grad():
        _, samples = record(net, forward, mixed([1] * 30))
        plan = Plan.of(find_family(net), settings=CalibrationSettings(probes=6))
        by_fold = tuple(network(8, seed, width=64) for seed in range(plan.settings.folds))
        around = ProbingAround(plan, Networks(network(8, 9, width=64), by_fold, 0.1, 0.01, 30), learning, None)
        around.see(samples)
        found, here = around.recorder.records.compute(), samples.where(learning(samples))
        order = mix(here.keys - 1).argsort()
        own = here.where(order)
        assert torch.equal(found.keys, mix(own.keys - 1)) and torch.equal(found.folds, fold_of(own.images))
        kept = found.kept.view(len(own.images), 8, 2, 6)
        assert kept.sum(1).unique(dim=0).tolist() == [[[2] * 6, [1] * 6]]
        for size in range(2):
            gain = own.replay.answer_log_probability(kept[:, :, size].permute(2, 0, 1)).clamp(min=WORST)
            torch.testing.assert_close(found.gain[:, size], gain.T.float(), rtol=0, atol=1e-6)
        worth = torch.stack([one.worth(own.seen) for one in by_fold])  # [fold, sample, token]
        worth = (worth - worth.mean(2, keepdim=True)) / worth.std(2, keepdim=True)
        of_sets = torch.einsum("fbt,btsp->fb", worth, kept.to(worth)) / 18
        mine = of_sets[found.folds, torch.arange(len(own.images))]
        others = of_sets.sum(0) - mine
        assert mine.mean() > 0.4
        assert others.mean() / (len(by_fold) - 1) < 0.2
        probing = Probing(plan, [0.5], part_of, None, False, (by_fold[0].question, by_fold[0].features))
        probing.see(samples)
        assert probing.recorder is not None
        random = probing.recorder.records.compute()
        assert len(random.keys) == len(found.keys)
        assert not set(random.keys.tolist()) & set(found.keys.tolist())


def learning(samples: Samples) -> Tensor:
    return part_of(samples.images) == 0


def test_probes_of_a_sample_do_not_depend_on_batch_or_padding() -> None:
    """Subsets are drawn from image and question: two questions about one image are probed with different subsets."""
    net, batch = model(), mixed([1, 1, 1])
    batch["pixel_values"][1] = batch["pixel_values"][0]
    alone = {
        name: torch.cat([value[:1, :8], value[:1, :8] * 0 + fill, value[:1, 8:]], 1)
        for (name, value), fill in zip(batch.items(), (PAD, 0), strict=False)
    }
    alone["pixel_values"] = batch["pixel_values"][:1]
    with torch.no_grad():
        found = []
        for some in (batch, alone):
            _, samples = record(net, greedy, some)
            head_scores = scores_of_heads(SCORERS_FITTED.values(), samples.seen, samples.visual)
            found.append(probe(samples.replay, head_scores, samples.images, 0.5, 1, 8, probes=4))
    together, one = found
    torch.testing.assert_close(together.rows[:, :1], one.rows, atol=1e-10, rtol=0)
    torch.testing.assert_close(together.gain[:, :1], one.gain, atol=1e-10, rtol=0)
    assert not torch.equal(together.slots[:, 0], together.slots[:, 1]), "the same image, another question"
