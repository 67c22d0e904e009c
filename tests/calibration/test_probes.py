"""What a probe says is what the model, pruned to that subset, answers; and replays are exact, however they are cut."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration.calibrator import Calibrator
from catp_lightning.calibration.fit import probes as importance
from catp_lightning.calibration.fit.probes import WORST, Columns, head_votes, probe, random_subset, sizes
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.fit.sums import ProbeSums
from catp_lightning.calibration.plan import VOTERS, Plan
from catp_lightning.calibration.replay.base import _distinct
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.calibration.split import fold_of, part_of
from catp_lightning.methods.observation import Signal
from catp_lightning.models import find_family
from catp_lightning.pruning.sites import visual_tokens
from catp_lightning.utils.hashing import fingerprint
from tests.support.models import GREEDY, IMAGE, PAD, SHORT, faint_blip2, greedily
from tests.support.modules import Batch

EOS = 2
Net = Any  # transformers types generate's arguments one by one: no dictionary of tensors fits
ModelCall = Callable[[Net, Batch], Any]


def mixed(images: list[int], dtype: torch.dtype = torch.float64, right: bool = False, seed: int = 5) -> Batch:
    """Samples with different numbers of images, padded after their images, or at the end."""
    torch.manual_seed(seed)
    length = 8 * max(images) + 9
    ids, mask = torch.randint(3, IMAGE - 1, (len(images), length)), torch.ones(len(images), length, dtype=torch.long)
    for row, count in enumerate(images):
        ids[row, : 8 * count] = IMAGE
        pads = 2 * row % 5
        start = length - pads if right else 8 * count
        ids[row, start : start + pads], mask[row, start : start + pads] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(sum(images), 3, 32, 32).to(dtype)}


def model(dtype: torch.dtype = torch.float64) -> Net:
    return faint_blip2(0.1, dtype=dtype)  # so that pruned answers are neither lost nor the same


def greedy(net: Net, batch: Batch) -> Tensor:
    return net.generate(**batch, **greedily(4, 1))


def beams(net: Net, batch: Batch) -> Tensor:
    settings = {**SHORT, "num_beams": 3, "num_return_sequences": 2}
    return net.generate(**batch, **settings)


def forward(net: Net, batch: Batch) -> Any:
    return net(**batch)


def record(net: Net, call: ModelCall, batch: Batch) -> tuple[Any, Samples]:
    family = find_family(net)
    recorder = Recorder(Plan.of(family), Calibrator(Plan.of(family), [0.5]).needs)
    with recorder.recording():
        output = call(net, batch)
        with recorder.recorded() as ((replay, seen, _),):
            return output, Samples.of(replay, seen)


class Explicit:
    """Log-probabilities along the unpruned answer, by running the whole model on prompt and answer: [B, A, V]."""

    def __init__(self, net: Net, batch: Batch, output: Any) -> None:
        self.net, self.batch, rows = net, batch, len(batch["input_ids"])
        if isinstance(output, Tensor):
            new = output.shape[1] - batch["input_ids"].shape[1]
            self.answer = output[:: len(output) // rows, -new:]
            ended = (self.answer == EOS).long()
            self.valid = ended.cumsum(1) - ended == 0
            self.column = torch.full((rows,), batch["input_ids"].shape[1] - 1)
        else:
            last = [max(mask.nonzero()[:, 0].tolist()) for mask in batch["attention_mask"]]
            self.column = torch.tensor(last)
            self.answer = output.logits[range(rows), last].argmax(-1)[:, None]
            self.valid = torch.ones(rows, 1, dtype=torch.bool)

    def run(self, keep: Tensor | None = None) -> Tensor:
        ids, mask = self.batch["input_ids"], self.batch["attention_mask"]
        new = self.answer.shape[1] - 1
        grown = {
            "input_ids": torch.cat([ids, self.answer[:, :new]], 1),
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), new)], 1),
            "pixel_values": self.batch["pixel_values"],
        }
        with prune(self.net, PruningPolicy(), choose=lambda visual: visual if keep is None else keep):
            logits = self.net(**grown).logits
        rows = [logits[n, column : column + new + 1] for n, column in enumerate(self.column.tolist())]
        return torch.stack(rows).double().log_softmax(-1)

    def gain(self, keep: Tensor) -> Tensor:
        each = self.run(keep).gather(2, self.answer[..., None])[..., 0] * self.valid
        return each.sum(1) / self.valid.sum(1)


def subsets(samples: Samples, size: float, number: int) -> Tensor:
    visual = samples.visual
    counts = torch.tensor([max(1, round(count * size)) for count in visual.sum(1).tolist()])
    seeds = samples.images ^ samples.replay.questions
    probes = range(importance.PROBES * number, importance.PROBES * (number + 1))
    return torch.stack([random_subset(seeds, visual, counts, n) & visual for n in probes])


def slow_rows(samples: Samples, keep: Tensor) -> Tensor:
    """A probe's row by loops over kept tokens, voters, layers and heads."""
    columns = Columns.of(Plan.of(samples.replay.family))
    votes = {name: voter.votes(samples.seen).double() for name, voter in VOTERS.items()}
    rows = torch.zeros(*keep.shape[:2], columns.total, dtype=torch.float64)
    starts = (samples.visual.sum(1).cumsum(0) - samples.visual.sum(1)) // columns.slots
    for p, b, t in keep.nonzero().tolist():
        image, slot = int(starts[b]) + t // columns.slots, t % columns.slots
        column = 0
        for name in VOTERS:
            for layer in range(2):
                for head in range(4):
                    assert columns.of_voter(name)[layer][head] == column
                    rows[p, b, column] += votes[name][image, layer, head, slot]
                    column += 1
        assert columns.of_slots[0] == column
        rows[p, b, column + slot] += 1
    return rows


class Calls:
    """Counts forwards of modules."""

    def __init__(self, *modules: nn.Module) -> None:
        self.counts = [0] * len(modules)
        for number, module in enumerate(modules):
            module.register_forward_hook(self._counting(number))

    def _counting(self, number: int) -> Callable[..., None]:
        def count(*args: Any) -> None:
            self.counts[number] += 1

        return count


@pytest.mark.parametrize(
    ("call", "right"),
    [(greedy, False), (beams, False), (forward, False), (forward, True)],
    ids=["greedy", "beams", "forward", "forward, padded right"],
)
def test_a_probe_is_what_the_model_pruned_to_that_subset_says_of_its_own_answer(
    call: ModelCall, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "PROBES", 3)
    monkeypatch.setattr(importance, "WORST", -1000.0)  # or a lost answer could hide anything
    net, batch = model(), mixed([1, 2, 0, 1, 2], right=right)
    calls = Calls(net.vision_model, net.qformer)
    gains = []
    with torch.no_grad():
        output, samples = record(net, call, batch)
        votes = head_votes(VOTERS.values(), samples.seen, samples.visual)
        found = [
            probe(samples.replay, votes, samples.images, size, number, 8)
            for number, size in enumerate(sizes([0.5, 3], 8))
        ]
        assert calls.counts == [1, 1], "vision runs once a batch, however many subsets are probed"
        explicit = Explicit(net, batch, output)
        for number, (size, probes) in enumerate(zip(sizes([0.5, 3], 8), found, strict=True)):
            keep, count = subsets(samples, size, number), round(8 * size)
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


def test_the_gains_of_lost_answers_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "PROBES", 3)
    net, batch = model(), mixed([1, 1, 1])
    net.language_projection.weight.data *= 20
    with torch.no_grad():
        _, samples = record(net, greedy, batch)
        keep = subsets(samples, 1 / 8, 0)
        whole = samples.replay.answer_log_probability(keep)
        found = probe(
            samples.replay, head_votes(VOTERS.values(), samples.seen, samples.visual), samples.images, 1 / 8, 0, 8
        ).gain
    assert whole.min() < WORST - 1 and torch.equal(found, whole.clamp(min=WORST))


def test_inference_mode_changes_nothing_and_half_precision_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "PROBES", 4)

    def probed(net: Net, dtype: torch.dtype) -> tuple[Samples, Any]:
        _, samples = record(net, greedy, mixed([1, 2, 1], dtype))
        votes = head_votes(VOTERS.values(), samples.seen, samples.visual)
        return samples, probe(samples.replay, votes, samples.images, 0.5, 0, 8)

    with torch.no_grad():
        _, plain = probed(model(torch.float32), torch.float32)
    with torch.inference_mode():
        _, inference = probed(model(torch.float32), torch.float32)
    assert torch.equal(plain.gain, inference.gain) and torch.equal(plain.rows, inference.rows)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            samples, half = probed(model(dtype), dtype)
        assert half.rows.dtype == half.gain.dtype == torch.float32
        rows = slow_rows(samples, subsets(samples, 0.5, 0))
        torch.testing.assert_close(half.rows.double(), rows, atol=1e-4, rtol=0)
        assert half.gain.isfinite().all() and (half.gain <= 0).all()
    assert [importance.PROBES, *half.gain.shape] == [4, 4, 3]


def test_one_set_of_probes_serves_all_budgets_and_only_the_learning_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "PROBES", 2)
    assert sizes([0.5, 0.25, 1.0], 8) == [4 / 8, 2 / 8, 1 / 8] and sizes([0.5], 1) == []
    assert sizes([3, 7, 100], 8) == [7 / 8, 3 / 8, 2 / 8, 1 / 8]
    net = model()
    with torch.no_grad():
        _, samples = record(net, forward, mixed([1] * 30))
        family = find_family(net)
        probing = Probing(Plan.of(family), [0.5, 0.25], part_of, None)
        probing.see(samples)
        here = samples.where(part_of(samples.images) == 0)
        assert 15 < len(here.images) < 30
        expected = ProbeSums(probing.columns.total)
        for number, size in enumerate((4, 2, 1)):
            keep = subsets(here, size / 8, number)
            gain = here.replay.answer_log_probability(keep).clamp(min=WORST)
            expected.update(fold_of(here.images), slow_rows(here, keep), gain)
    found, wanted = probing.sums.compute(), expected.compute()
    assert found.gram == pytest.approx(wanted.gram, abs=1e-8) and found.moment == pytest.approx(wanted.moment, abs=1e-8)
    assert found.rows.tolist() == wanted.rows.tolist() and found.rows.sum() == 2 * 3 * len(here.images)
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


def test_probes_of_a_sample_do_not_depend_on_batch_or_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subsets are drawn from image and question: two questions about one image are probed with different subsets."""
    monkeypatch.setattr(importance, "PROBES", 4)
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
            votes = head_votes(VOTERS.values(), samples.seen, samples.visual)
            found.append(probe(samples.replay, votes, samples.images, 0.5, 1, 8))
    together, one = found
    torch.testing.assert_close(together.rows[:, :1], one.rows, atol=1e-10, rtol=0)
    torch.testing.assert_close(together.gain[:, :1], one.gain, atol=1e-10, rtol=0)
    assert not torch.equal(together.slots[:, 0], together.slots[:, 1]), "the same image, another question"


@pytest.mark.parametrize("call", [greedy, beams, forward])
def test_candidates_are_compared_as_if_each_were_run_by_itself(call: ModelCall) -> None:
    net, batch = model(), mixed([2, 1, 0, 1, 2])
    with torch.no_grad():
        output, samples = record(net, call, batch)
        replay, visual = samples.replay, samples.visual
        keep = (torch.rand(9, *visual.shape) < 0.6) & visual
        keep[:3] = visual
        keep[4], keep[7], keep[8, :2] = keep[3], keep[3], keep[5, :2]  # duplicates, of all samples or of some
        explicit = Explicit(net, batch, output)
        full, diverged, agreed = explicit.run(), [], []
        for kept in keep:
            pruned = explicit.run(kept)
            each = (full.exp() * (full - pruned)).sum(-1) * explicit.valid
            diverged.append(each.sum(1) / explicit.valid.sum(1))
            agreed.append(((full.argmax(-1) == pruned.argmax(-1)) | ~explicit.valid).all(1))
        for rows in (1, 2, 3, 5):
            found = replace(replay, rows=rows).compare(keep)
            torch.testing.assert_close(found[0], torch.stack(diverged), atol=1e-10, rtol=0)
            assert torch.equal(found[1], torch.stack(agreed))
        some = replay.of_samples(torch.tensor([3, 1]))  # fewer tokens than the batch they come from
        torch.testing.assert_close(some.compare(keep[:, [3, 1]])[0], torch.stack(diverged)[:, [3, 1]])
    assert torch.stack(diverged).max() > 0.1 and 0 < torch.stack(agreed).double().mean() < 1, "or this proves nothing"


def test_equal_choices_are_answered_once() -> None:
    net, batch = model(), mixed([1, 1, 1])
    with torch.no_grad():
        _, samples = record(net, greedy, batch)
        keep = (torch.arange(8) < torch.tensor([2, 5, 7, 2, 5, 7])[:, None, None]).expand(-1, 3, -1)
        answered = 0

        def count(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal answered
            answered += len(kwargs["inputs_embeds"])

        net.language_model.register_forward_pre_hook(count, with_kwargs=True)
        samples.replay.compare(keep)
    assert answered == 3 + 3 * 3, "the full prompts, and three different choices of each"


def test_two_choices_are_the_same_only_if_sample_and_tokens_are() -> None:
    """All subsets of ten tokens of twelve samples: neither a sample and a token, nor two tokens, stand for another."""
    keep = torch.tensor([[number >> bit & 1 for bit in range(10)] for number in range(1024)]).bool().repeat(12, 1)
    sample = torch.arange(12).repeat_interleave(1024)
    order = torch.cat([torch.randperm(len(keep)), torch.randperm(len(keep))])
    first, where = _distinct(sample[order], keep[order])
    assert len(first) == 12 * 1024
    sample, keep = sample[order], keep[order]
    assert torch.equal(keep[first][where], keep) and torch.equal(sample[first][where], sample)


def test_samples_know_their_images_whatever_their_number() -> None:
    net, batch = model(), mixed([1, 0, 2, 0, 2, 1])
    with torch.no_grad():
        _, samples = record(net, forward, batch)
    prints = fingerprint(batch["pixel_values"])
    assert samples.images.tolist() == [prints[0], 0, prints[1], 0, prints[3], prints[5]]
    some = samples.where(torch.tensor([False, True, True, False, False, True]))
    assert some.images.tolist() == [0, prints[1], prints[5]] and some.seen.images == 3
    assert torch.equal(some.seen[Signal.IMAGE_HASH], prints[[1, 2, 5]])
    assert torch.equal(some.seen[Signal.IMAGE_FEATURES], samples.seen[Signal.IMAGE_FEATURES][[1, 2, 5]])
    assert torch.equal(some.visual, visual_tokens(batch["input_ids"] == IMAGE)[[1, 2, 5]])
    turned = {name: value.flip(0) for name, value in mixed([1, 1, 1]).items()}
    with torch.no_grad():
        keys = {record(net, forward, some)[1].key for some in (mixed([1, 1, 1]), turned)}
        turned["pixel_values"] = turned["pixel_values"].flip(0)
        assert len(keys) == 1 and record(net, forward, turned)[1].key not in keys, "images go with their questions"
