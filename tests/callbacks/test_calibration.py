"""A calibration finds what is there, by figures that are what they say, whatever way the batches fall."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import GenerationConfig

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.calibration import split
from catp_lightning.calibration.fit.sums import CandidateSums, DrawnQuestions, ImageSet, ProbeSums, RankCorrelation
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import agreement, divergence
from catp_lightning.calibration.search.candidates import default_candidates
from catp_lightning.calibration.split import FOLDS, fold_of, part_of, round_bounds, round_of
from catp_lightning.callbacks.calibration import CrossAttentionCalibration
from catp_lightning.models import find_family
from catp_lightning.pruning.answers import compare_with_unpruned
from tests.support.calibrations import calibrate, data, figures, images_of
from tests.support.footprints import footprint
from tests.support.models import SHORT, faint_blip2
from tests.support.modules import Forwarding, Generating
from tests.support.trainers import loading


@pytest.mark.parametrize("settings", [SHORT, {**SHORT, "num_beams": 2}], ids=["greedy", "beams"])
def test_predictions_stay_the_usual_ones_and_the_model_what_it_was(tmp_path: Path, settings: dict[str, Any]) -> None:
    module, batches = Generating(settings=settings), data(24, 8)
    before = footprint(module.net)
    expected = [module.net.generate(**batch, **settings) for batch in batches]
    callback = CrossAttentionCalibration(tmp_path / "policy.json")
    trainer = L.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False)
    predictions = trainer.predict(module, loading(batches))
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected, strict=True))
    assert footprint(module.net) == before
    policy = PruningPolicy.load(tmp_path / "policy.json")
    assert policy == callback.policies[0] and policy.model["visual_tokens"] == 8
    with prune(module, policy) as pruning:
        module.net(**batches[0])
    assert pruning.keep.sum(1).tolist() == [4] * 8


def test_the_figures_are_what_running_each_candidate_pruned_gives(tmp_path: Path) -> None:
    """Agreement comes from teacher-forced replays; generating again under the policy must say the same."""
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(48, 12, torch.float64)
    policy = calibrate(module, batches, tmp_path / "p.json", keep=7).policies[0]
    candidates = {candidate.name: candidate for candidate in default_candidates(Plan.of(find_family(module)))}
    rates = set()
    for name in (
        "catp",
        "cross-attention layer 1",
        "l2-norm",
        "dpp of outputs, catp x +0.5",
        "diversity of cross-attention",
    ):
        same, parts = [], []
        with torch.no_grad(), prune(module, candidates[name].policy(7)) as pruning:  # noqa: SIM117
            with compare_with_unpruned(pruning) as comparison:
                for batch in batches:
                    module.net.generate(**batch, **SHORT)
                    same.append(comparison.same.pop())
                    parts.append(part_of(images_of([batch])))
        together, part = torch.cat(same).double(), torch.cat(parts)
        row = figures(policy, name)
        assert row["choose"]["agreement"] == pytest.approx(together[part == 0].mean().item(), abs=1e-12)
        assert row["choose"]["samples"] == (part == 0).sum()
        if candidates[name].reference or name == policy.evidence["chosen"]:
            assert row["check"]["agreement"] == pytest.approx(together[part == 1].mean().item(), abs=1e-12)
            low, high = row["check"]["interval"]
            assert low <= row["check"]["agreement"] <= high
        else:
            assert row["check"] is None
        rates.add(row["choose"]["agreement"])
    assert len(rates) > 2 and max(rates) > 0, "candidates must differ, or this proves nothing"
    assert policy.evidence["samples"] == {
        "learn": int((part == 0).sum()),
        "check": int((part == 1).sum()),
    }


def test_divergence_is_the_mean_kl_from_the_unpruned_model_along_its_answer(tmp_path: Path) -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(16, 16, torch.float64)
    policy = calibrate(module, batches, tmp_path / "p.json", keep=3).policies[0]
    batch, net = batches[0], module.net
    sequences = net.generate(**batch, **SHORT)
    new = sequences.shape[1] - batch["input_ids"].shape[1]
    grown = {
        "input_ids": sequences,
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(16, new, dtype=torch.long)], 1),
        "pixel_values": batch["pixel_values"],
    }
    with torch.no_grad():
        full = net(**grown).logits[:, -new - 1 : -1].log_softmax(-1)
        with prune(net, PruningPolicy(scorer="stride", keep=3)):
            pruned = net(**grown).logits[:, -new - 1 : -1].log_softmax(-1)
    answer = sequences[:, -new:]
    valid = (answer == 2).long().cumsum(1) - (answer == 2).long() == 0
    each = ((full.exp() * (full - pruned)).sum(-1) * valid).sum(1) / valid.sum(1)
    part = part_of(images_of([batch]))
    row = figures(policy, "stride")
    for index, name in enumerate(("choose", "check")):
        assert row[name]["divergence"] == pytest.approx(each[part == index].clamp(max=3).mean().item(), rel=1e-9)
        error = each[part == index].clamp(max=3).std(correction=0) / (part == index).sum() ** 0.5
        assert row[name]["divergence_error"] == pytest.approx(error.item(), rel=1e-6)


def test_what_follows_the_end_of_an_answer_counts_for_nothing() -> None:
    full, pruned = torch.eye(4).log_softmax(-1)[None], torch.eye(4).roll(1, 1).log_softmax(-1)[None]
    pruned = torch.cat([full[:, :2], pruned[:, 2:]], 1)  # another next token in the last two places
    ended = torch.tensor([[True, True, False, False]])
    assert agreement(full, pruned, ended).tolist() == [True] and divergence(full, pruned, ended).item() == 0
    longer = torch.tensor([[True, True, True, False]])
    assert agreement(full, pruned, longer).tolist() == [False]
    expected = (full.exp() * (full - pruned)).sum(-1)[0, 2] / 3
    assert divergence(full, pruned, longer).item() == pytest.approx(expected.item())


@pytest.mark.slow
def test_an_answer_ended_by_its_call_calibrates_as_one_ended_by_the_config(tmp_path: Path) -> None:
    """Answers are the same; whether pads that fill a batch up take part must not depend on who named their end."""
    ends, chosen = list(range(3, 99, 4)), []
    for where in ("config", "call"):
        named = {"eos_token_id": ends} if where == "call" else {}
        module = Generating(settings={"max_new_tokens": 6, "do_sample": False, **named})
        module.net.language_model.generation_config.eos_token_id = ends if where == "config" else None
        policy = calibrate(module, data(40, 8), tmp_path / f"{where}.json").policies[0]
        chosen.append(policy.evidence["candidates"])
    assert chosen[0] == chosen[1] and 0 < chosen[0][0]["choose"]["agreement"] < 1


def test_the_policy_is_the_candidate_with_the_least_divergence_and_says_if_it_is_a_control(tmp_path: Path) -> None:
    callback = calibrate(Generating(), data(32, 16), tmp_path, keep=[0.5, 0.25, 2])
    assert [policy.keep for policy in callback.policies] == [0.5, 0.25, 2]
    for policy in callback.policies:
        rows = policy.evidence["candidates"]
        assert rows == sorted(
            rows, key=lambda row: (-row["choose"]["samples"], row["choose"]["divergence"], row["name"])
        )
        assert policy.evidence["chosen"] == rows[0]["name"] and policy.evidence["control"] == rows[0]["control"]
        assert PruningPolicy.load(tmp_path, keep=policy.keep) == policy
        controls = {row["name"] for row in rows if row["control"]}
        assert controls >= {
            "random",
            "stride",
            "l2-norm",
            "position",
            "diversity of outputs",
            "diversity of cross-attention",
        }
        assert {"catp", "catp layer 0", "catp layer 1", "self-attention"} <= {row["name"] for row in rows} - controls
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["keep-0.25.json", "keep-0.5.json", "keep-2.json"]
    assert not list(tmp_path.parent.glob("*.safetensors")), "nothing is left to resume"


def test_batches_and_order_do_not_matter(tmp_path: Path) -> None:
    module = Generating(faint_blip2(dtype=torch.float64))
    one = calibrate(module, data(24, 24, torch.float64), tmp_path / "a.json").policies[0]
    many = calibrate(module, data(24, 5, torch.float64)[::-1], tmp_path / "b.json").policies[0]
    assert one.evidence["chosen"] == many.evidence["chosen"]
    for row in one.evidence["candidates"]:
        other = figures(many, row["name"])
        assert row["choose"]["divergence"] == pytest.approx(other["choose"]["divergence"], rel=1e-9)
        assert row["choose"]["agreement"] == other["choose"]["agreement"]
        assert (row["check"] or {}).get("agreement") == (other["check"] or {}).get("agreement")
    assert one.evidence["fitted"] == many.evidence["fitted"] and one.scorer_args == many.scorer_args


def test_a_step_that_only_calls_forward_is_calibrated_by_its_next_token(tmp_path: Path) -> None:
    module, batches = Forwarding(faint_blip2(dtype=torch.float64)), data(24, 8, torch.float64)
    policy = calibrate(module, batches, tmp_path / "p.json").policies[0]
    same, part = [], []
    with torch.no_grad():
        for batch in batches:
            full = module.net(**batch).logits[:, -1].argmax(-1)
            with prune(module, PruningPolicy(scorer="l2-norm", keep=0.5)):
                same.append(module.net(**batch).logits[:, -1].argmax(-1) == full)
            part.append(part_of(images_of([batch])))
    expected = torch.cat(same)[torch.cat(part) == 0].double().mean().item()
    assert figures(policy, "l2-norm")["choose"]["agreement"] == pytest.approx(expected)


def test_sums_of_parts_are_the_sum_of_all() -> None:
    torch.manual_seed(0)
    diverged, agreed = torch.rand(2, 30), torch.rand(2, 30) > 0.4
    whole, left, right = CandidateSums(2, 3), CandidateSums(2, 3), CandidateSums(2, 3)
    who = torch.tensor([2, 0])
    whole.update(1, who, diverged, agreed)
    left.update(1, who, diverged[:, :11], agreed[:, :11])
    right.update(1, who, diverged[:, 11:], agreed[:, 11:])
    for name, value in whole.compute().items():
        assert left.compute()[name] + right.compute()[name] == pytest.approx(value, rel=1e-12)
    assert whole.compute()["agreed"].tolist() == [[0, 0, 0], [int(agreed[1].sum()), 0, int(agreed[0].sum())]]
    assert whole.compute()["count"].tolist() == [[0, 0, 0], [30, 0, 30]]


def test_probe_sums_are_those_of_rows_centred_by_sample_whatever_the_batches() -> None:
    torch.manual_seed(0)
    fold, rows, gain = torch.randint(0, FOLDS, (9,)), torch.randn(4, 9, 3), torch.randn(4, 9)
    whole, parts = ProbeSums(3), ProbeSums(3)
    whole.update(fold, rows, gain)
    for some in (slice(0, 2), slice(2, 9)):
        parts.update(fold[some], rows[:, some], gain[:, some])
    found, other = whole.compute(), parts.compute()
    for number in range(FOLDS):
        here = (rows - rows.mean(0)).double()[:, fold == number].flatten(0, 1).numpy()
        y = (gain - gain.mean(0)).double()[:, fold == number].flatten().numpy()
        assert found.gram[number] == pytest.approx(here.T @ here, abs=1e-6)
        assert found.moment[number] == pytest.approx(here.T @ y, abs=1e-6)
        assert found.squares[number] == pytest.approx(y @ y, abs=1e-6) and found.rows[number] == len(y)
    assert other.gram == pytest.approx(found.gram, rel=1e-12) and other.moment == pytest.approx(found.moment, rel=1e-12)


def test_one_question_of_each_image_counts_whatever_the_order_and_the_batches() -> None:
    images, questions = torch.tensor([5, 7, 5, 9, 7, 5]), torch.tensor([3, 1, 2, 8, 4, 9])
    agreed = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1]]).bool()
    one, many = DrawnQuestions(2), DrawnQuestions(2)
    one.update(images, questions, agreed)
    for index in (5, 0, 4, 3, 2, 1):
        many.update(images[[index]], questions[[index]], agreed[:, [index]])
    assert one.compute() == many.compute() == (3, [1, 1]), "question 2 of image 5, 1 of image 7, 8 of image 9"


def test_images_are_counted_once_and_layers_are_correlated_by_rank() -> None:
    images = ImageSet()
    images.update(torch.tensor([3, -1, 3]))
    images.update(torch.tensor([-1, 8]))
    assert images.compute().tolist() == [-1, 3, 8]
    torch.manual_seed(1)
    scores = torch.randn(6, 3, 9)
    alike = RankCorrelation(3)
    alike.update(scores[:2])
    alike.update(scores[2:])
    expected = [spearmanr(image.T.numpy()).statistic for image in scores]
    assert alike.compute() == pytest.approx(sum(expected) / 6, abs=1e-12)


def test_parts_folds_and_rounds_follow_the_image_and_are_drawn_apart() -> None:
    images = torch.randint(-(2**62), 2**62, (20_000,))
    part, fold, turn = part_of(images), fold_of(images), round_of(images, round_bounds(1000))
    assert torch.equal(part.flip(0), part_of(images.flip(0)))
    shares = torch.bincount(part) / len(part)
    assert shares.tolist() == pytest.approx([0.8, 0.2], abs=0.02)
    for number in range(2):
        inside = part == number
        assert (torch.bincount(fold[inside]) / inside.sum()).tolist() == pytest.approx([0.2] * FOLDS, abs=0.02)
        assert (torch.bincount(turn[inside]) / inside.sum()).tolist() == pytest.approx([0.125, 0.25, 0.625], abs=0.02)


def test_losers_leave_early_and_controls_are_checked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "FIRST_ROUND", 4)
    policy = calibrate(Generating(), data(64, 16), tmp_path / "p.json").policies[0]
    rows = policy.evidence["candidates"]
    counts = sorted({row["choose"]["samples"] for row in rows})
    assert len(counts) == len(round_bounds(policy.evidence["samples"]["learn"])) == 3
    full = [row for row in rows if row["choose"]["samples"] == counts[-1]]
    assert counts[-1] == policy.evidence["samples"]["learn"]
    assert len([row for row in rows if row["choose"]["samples"] == counts[0]]) > len(rows) / 2
    assert all(row["check"] for row in rows if row["control"]), "however they do, controls are in the table"
    assert policy.evidence["chosen"] == min(full, key=lambda row: row["choose"]["divergence"])["name"]


def test_what_cannot_be_calibrated_is_refused_and_no_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"samples in every part of its split, got \{'learn': "):
        calibrate(Generating(), data(1, 1), tmp_path / "p.json")
    with pytest.raises(PruningError, match="do_sample=True"):
        calibrate(Generating(settings={**SHORT, "do_sample": True}), data(4, 4), tmp_path / "p.json")
    sampling = Generating(settings={"generation_config": GenerationConfig(max_new_tokens=4)})
    sampling.net.language_model.generation_config.do_sample = True  # as many checkpoints have it
    with pytest.raises(PruningError, match="do_sample=True"):
        calibrate(sampling, data(4, 4), tmp_path / "p.json")
    with pytest.raises(PolicyError, match="a file, but several budgets"):
        CrossAttentionCalibration("policy.json", keep=[0.5, 0.25])
    with pytest.raises(PolicyError, match=r"keep is 1\.5"):
        CrossAttentionCalibration("policy.json", keep=1.5)
    with pytest.raises(PolicyError, match="several different ones"):
        calibrate(Generating(), data(4, 4), tmp_path, keep=[0.5, 0.5])

    class Inner(Generating):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            embeds = self.net.get_input_embeddings()(batch["input_ids"])
            self.net.vision_model(batch["pixel_values"])
            features = self.net.get_image_features(batch["pixel_values"], return_dict=True)
            return self.net.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits * bool(
                features
            )

    with pytest.raises(PruningError, match="1 prompts to the language model but got 0 answers"):
        calibrate(Inner(), data(4, 4), tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_calibration_leaves_the_model_and_the_old_policy(tmp_path: Path) -> None:
    class Failing(Generating):
        def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise RuntimeError("planted")
            return super().predict_step(batch, batch_idx)

    module = Failing()
    before, old = footprint(module.net), PruningPolicy(keep=3).save(tmp_path / "p.json").read_text()
    with pytest.raises(RuntimeError, match="planted"):
        calibrate(module, data(24, 8), tmp_path / "p.json")
    assert footprint(module.net) == before and (tmp_path / "p.json").read_text() == old


def test_bfloat16_calibrates_with_finite_figures(tmp_path: Path) -> None:
    policy = calibrate(Generating(), data(24, 8), tmp_path / "p.json", precision="bf16-mixed").policies[0]
    assert policy.evidence["candidates"][-1]["choose"]["divergence"] < float("inf")
    true = calibrate(
        Generating(faint_blip2(dtype=torch.bfloat16)), data(24, 8, torch.bfloat16), tmp_path / "q.json"
    ).policies[0]
    assert true.evidence["candidates"][0]["choose"]["divergence"] >= -1e-3
