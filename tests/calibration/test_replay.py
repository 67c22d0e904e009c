"""Recorded prompts answered again: what calibration measures is what a pruned run of the same answer computes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from catp_lightning import PolicyError, PruningError, PruningPolicy, Stage, prune
from catp_lightning.calibration.fit.probing import Probing
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Replay, Variants
from catp_lightning.calibration.replay.cross_attention import CrossAttentionReplay
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selection import Selection, images_to_samples
from catp_lightning.models import find_family
from catp_lightning.pruning.pruner import Pruner
from tests.support.families import BY_NAME
from tests.support.matrix import rows_where, uneven
from tests.support.oracles import IMAGE, VIDEO, Inputs
from tests.support.rows import Row
from tests.support.rules import early

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 4


class Forced(LogitsProcessor):
    """Generates the answers it is given, whatever the model says; the logits it saw are kept in full precision."""

    def __init__(self, answers: Tensor, prompt: int) -> None:
        self.answers, self.prompt, self.step = answers, prompt, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(forced)), self.answers[:, self.step]] = 0
        self.step += 1
        return forced


def settings() -> dict[str, Any]:
    return {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}


def forced_logits(model: PreTrainedModel, inputs: Inputs, answers: Tensor) -> Tensor:
    """What the model itself computes at every step when it generates `answers`: [B, STEPS, V]."""
    steps: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: steps.append(output[:, -1]))
    try:
        processor = Forced(answers, inputs["input_ids"].shape[1])
        model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, logits_processor=[processor])
    finally:
        hook.remove()
    return torch.stack(steps, 1).log_softmax(-1)


def recorded(
    row: Row, inputs: Inputs, method: PruningPolicy | None = None, **more: Any
) -> tuple[Replay, Observation, Observation | None, Tensor]:
    model = row.model()
    plan = Plan.of(find_family(model), method)
    recorder = Recorder(plan, {Signal.IMAGE_HASH: None, Signal.IMAGE_FEATURES: None, **plan.needs})
    with recorder.recording():
        answers = model.generate(**inputs, **settings(), **more)[:, -STEPS:]
        with recorder.recorded() as [(replay, seen, inside, _)]:
            return replay, seen, inside, answers


def close(found: Tensor, expected: Tensor, rounding: float = 0.0) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=max(1e-8, rounding * float(expected.abs().max())))


@rows_where(lambda row: row.name != "Janus")  # whose generate leaves out the processor of logits it is given
def test_a_replay_is_the_pruned_run_of_the_same_answer(row: Row) -> None:
    model, inputs = row.model(), row.inputs(range(len(row.samples())), pads=2)
    rounding = row.tolerance(moved=True)
    replay, _, _, answers = recorded(row, inputs)
    keep = uneven()(replay.tokens)
    assert (keep.sum(1) < replay.tokens.sum(1)).sum() >= 2, "or nothing is dropped"
    everything = replay.log_probabilities(replay.tokens)
    close(everything, forced_logits(model, inputs, answers), rounding)
    with prune(model, PruningPolicy(), choose=lambda tokens: keep):
        expected = forced_logits(model, inputs, answers)
    close(replay.log_probabilities(keep), expected, rounding)
    assert (expected - everything).abs().max() > 0.01, "dropping matters"
    some = torch.tensor([2, 0])
    close(replay.of_samples(some).log_probabilities(keep[some]), expected[some], rounding)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *(("Llava", 1), ("InternVL", 1), ("Blip2-OPT", 1), ("Qwen2.5-VL", 1), ("PaliGemma", 1), ("PaliGemma2", 1)),
        *(("Gemma3", 2), ("Mistral3, sliding window", 1), ("Blip2-T5", 1), ("InstructBlip-T5", 2)),
    ],
)
def test_a_replay_at_a_layer_is_the_pruned_run_whose_tokens_leave_there(name: str, layer: int) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs(pads=2)
    policy = PruningPolicy("fastv", {"layer": layer}, keep=0.3)
    replay, _, inside, answers = recorded(row, inputs, policy)
    with prune(model, policy) as pruning:
        expected = forced_logits(model, inputs, answers)
    assert inside is not None and not torch.equal(pruning.keep, replay.tokens)
    close(replay.log_probabilities(pruning.keep), expected, row.tolerance(moved=True))
    close(replay.pruned_log_probabilities(Pruner(find_family(model), policy)), expected, row.tolerance(moved=True))
    assert (expected - replay.log_probabilities(replay.tokens)).abs().max() > 1e-3, "dropping matters"


@pytest.mark.slow
@pytest.mark.parametrize("scorer", [name for name in SCORERS if early(name)])
def test_a_method_that_chooses_inside_the_decoder_is_replayed_as_it_prunes(scorer: str) -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs(pads=1)
    policy = PruningPolicy(scorer, early(scorer), keep=0.4)
    replay, _, _, answers = recorded(row, inputs, policy)
    with prune(model, policy):
        expected = forced_logits(model, inputs, answers)
    pruner = Pruner(find_family(model), policy)
    diverged, agreed = replay.compare_each([Variants(replay.tokens[None], inside=[(pruner, None)])])[0]
    close(replay.pruned_log_probabilities(Pruner(find_family(model), policy)), expected)
    assert (diverged[0] < 1e-12).all() and agreed[0].all() and (diverged[1] > 1e-6).all()


@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL", "Blip2-T5"])
def test_a_schedule_is_replayed_as_it_prunes_from_the_selection_before_the_language_model(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs(pads=2)
    later = [Stage("fastv", {"layer": 1}, keep=0.4), Stage("visual-exit", {"layer": 2})]
    policy = PruningPolicy("l2-norm", keep=0.7, then=later)
    replay, _, _, answers = recorded(row, inputs)
    with prune(model, PruningPolicy("l2-norm", keep=0.7)) as pruning:
        entry = forced_logits(model, inputs, answers)
    with prune(model, policy):
        expected = forced_logits(model, inputs, answers)
    pruner = Pruner(find_family(model), policy)
    with pruner.knowing(Selection(pruning.keep)):
        close(replay.pruned_log_probabilities(pruner), expected)
    assert (expected - entry).abs().max() > 1e-3, "the later stages matter"


def test_merged_tokens_are_replayed_as_they_are_read() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs(pads=1)
    replay, _, _, answers = recorded(row, inputs)
    with prune(model, PruningPolicy("visionzip", keep=0.4)) as pruning:
        expected = forced_logits(model, inputs, answers)
    close(replay.log_probabilities(pruning.keep, pruning.destination), expected)
    assert (replay.log_probabilities(pruning.keep) - expected).abs().max() > 1e-4, "merging matters"


@pytest.mark.parametrize("name", ["Llava", "Qwen2.5-VL", "Qwen3-VL", "Gemma3", "Blip2-T5", "Mllama"])
def test_of_beams_the_first_is_replayed(name: str) -> None:
    row = BY_NAME[name]
    model, inputs = row.model(), row.inputs([0, 2])
    replay, *_, answers = recorded(row, inputs, num_beams=2)
    keep = uneven()(replay.tokens)
    with prune(model, PruningPolicy(), choose=lambda tokens: keep):
        expected = forced_logits(model, inputs, answers)
    close(replay.log_probabilities(keep), expected)


def test_keys_and_values_of_images_are_made_once_for_all_candidates_and_change_no_answer() -> None:
    row = BY_NAME["Mllama"]
    layers: list[Any] = find_family(row.model()).cross_attention  # type: ignore[attr-defined]
    replay, *_ = recorded(row, row.inputs(range(len(row.samples())), pads=2))
    turned = uneven()(replay.tokens.flip(1)).flip(1)
    keep = torch.stack([uneven()(replay.tokens), replay.tokens, turned])
    expected = [replay.log_probabilities(kept) for kept in keep]
    made: list[int] = []
    hooks = [layer.k_proj.register_forward_hook(lambda _, args, output: made.append(len(args[0]))) for layer in layers]
    try:
        found = replay.answer_log_probability(keep)
        assert made == [len(replay.tokens)] * len(layers) and len(layers) > 1
        prepared = replay.prepared()
        for kept, by_prompt in zip(keep, expected, strict=True):
            close(prepared.log_probabilities(kept), by_prompt)
            close(prepared.of_samples(torch.tensor([2, 0, 2])).log_probabilities(kept[[2, 0, 2]]), by_prompt[[2, 0, 2]])
        assert len(made) == 2 * len(layers)
    finally:
        for hook in hooks:
            hook.remove()
    ids = replay.answers.ids[..., None]
    close(found, torch.stack([each.gather(2, ids)[..., 0].mean(1) for each in expected]))
    assert (found[0] - found[1]).abs().max() > 1e-3, "dropping matters"


def test_padding_of_all_prompts_together_is_not_read_again() -> None:
    row = BY_NAME["Mllama"]
    replay, *_ = recorded(row, row.inputs([0, 1], pads=2))
    assert isinstance(replay, CrossAttentionReplay)
    lengths, columns = replay.arguments["attention_mask"].sum(1), replay.arguments["attention_mask"].shape[1]
    short = replay.of_samples(lengths == lengths.min())
    read: list[int] = []
    decoder: Any = replay.family.decoder
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        short.log_probabilities(short.tokens)
    finally:
        hook.remove()
    assert read == [int(lengths.min()) + STEPS - 1] and lengths.min() < columns


@pytest.mark.parametrize("name", ["LlavaNext", "Mllama"])
def test_samples_know_their_images_and_take_them_along(name: str) -> None:
    row = BY_NAME[name]
    inputs = row.inputs(range(len(row.samples())))
    replay, seen, inside, _ = recorded(row, inputs)
    samples = Samples.of(replay, seen, inside)
    counts = [len(sample.images) for sample in row.samples()]
    fingerprints = seen[Signal.IMAGE_HASH].tolist()
    first = [fingerprints[sum(counts[:n])] if count else 0 for n, count in enumerate(counts)]
    assert samples.images.tolist() == first and max(counts) > 1
    some = samples.where(torch.tensor([False, True, False, True]))
    ends = [sum(counts[: n + 1]) for n in range(4)]
    expected = [fingerprints[image] for n in (1, 3) for image in range(ends[n] - counts[n], ends[n])]
    assert some.seen[Signal.IMAGE_HASH].tolist() == expected


def test_a_method_that_does_not_run_here_cannot_be_calibrated_here() -> None:
    family = find_family(BY_NAME["Llava"].model())
    for method, why in (("catp", "cross-attention"), ("trimmed-llama", "cross-attention-to-image")):
        with pytest.raises(PruningError, match=f"'{method}' cannot be calibrated here.*{why}"):
            Plan.of(family, PruningPolicy(method, keep=0.5))
    with pytest.raises(PolicyError, match=r"no scorer 'fastw'.*'fastv'"):
        Plan.of(family, PruningPolicy("fastw"))


@pytest.mark.parametrize("name", ["LlavaNext", "Mllama"])
def test_probes_drop_what_pruning_may_drop_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, kept = BY_NAME[name], []

    def noting(replay: Replay, keep: Tensor) -> Tensor:
        kept.append(keep)
        return torch.zeros(keep.shape[:2], dtype=torch.float64)

    monkeypatch.setattr(Replay, "answer_log_probability", noting)
    inputs = row.inputs()
    replay, seen, inside, _ = recorded(row, inputs)
    samples = Samples.of(replay, seen, inside)
    plan = Plan.of(find_family(row.model()))
    probing = Probing(plan, [0.25, 1.0], torch.zeros_like, None)
    probing.see(samples)
    stay = images_to_samples(seen.valid & ~seen.droppable, seen.valid, samples.visual, False)
    droppable = samples.visual & ~stay
    assert stay.any() == (name == "LlavaNext") and probing.sizes[0] == 0.25
    assert kept[0][:, stay].all() and not kept[0][:, ~samples.visual].any()
    if name == "LlavaNext":
        expected = [max(1, round(0.25 * count)) for count in droppable.sum(1).tolist()]
        assert (kept[0] & droppable).sum(2).tolist() == [expected] * len(kept[0])
        return
    ends = seen.valid.sum(1).cumsum(0).tolist()
    flat = kept[-1][:, samples.visual]  # of the smallest size, image after image
    assert all(flat[:, start:end].any(1).all() for start, end in zip([0, *ends], ends, strict=False))


@rows_where(lambda row: row.name != "Mllama, last text that sees no image")
def test_text_ids_are_those_of_the_text_after_an_image_whatever_the_padding(row: Row) -> None:
    found = []
    for pads in (0, 2):
        inputs = row.inputs(pads=pads)
        replay, *_ = recorded(row, inputs)
        found.append([[token for token in ids if token >= 0] for ids in replay.text_ids.tolist()])
        assert replay.text_ids.shape[1] == max(map(len, found[-1]))
    expected = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        own = ids[mask == 1].tolist()
        first = next(place for place, token in enumerate(own) if token in (IMAGE, VIDEO))
        after = [token for token in own[first:] if token not in (IMAGE, VIDEO)]
        expected.append(after or [token for token in own if token not in (IMAGE, VIDEO)])
    assert found[0] == found[1] == expected and all(expected)
