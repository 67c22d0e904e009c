"""The figures of a candidate are what running it pruned gives."""

from pathlib import Path

import pytest
import torch

from catp_lightning import PruningPolicy, prune
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import agreement, divergence
from catp_lightning.calibration.search.candidates import default_candidates
from catp_lightning.calibration.split import part_of
from catp_lightning.models import find_family
from tests.support.calibrations import QUICK, calibrate, data, figures, images_of
from tests.support.models import SHORT, faint_blip2
from tests.support.modules import Generating
from tests.support.planted import agrees


@pytest.mark.slow
def test_the_figures_are_what_running_each_candidate_pruned_gives(tmp_path: Path) -> None:
    """Agreement comes from teacher-forced replays; generating again under the policy must say the same."""
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(48, 24, torch.float64)
    policy = calibrate(module, batches, tmp_path / "p.json", keep=7, calibration=QUICK).policies[0]
    candidates = {candidate.name: candidate for candidate in default_candidates(Plan.of(find_family(module)))}
    part, rates = part_of(images_of(batches)), set()
    for name in (
        *("catp", "cross-attention layer 1", "l2-norm"),
        *("dpp of outputs, catp x +0.5", "diversity of cross-attention"),
    ):
        together = agrees(module, candidates[name].policy(7), batches).double()
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
    checked = agrees(module, policy, batches)[part == 1].double().mean().item()
    chosen = figures(policy, policy.evidence["chosen"])
    assert chosen["check"]["agreement"] == pytest.approx(checked, abs=1e-12), "the policy is what was checked"
    assert policy.evidence["samples"] == {"learn": int((part == 0).sum()), "check": int((part == 1).sum())}


@pytest.mark.slow
def test_divergence_is_the_mean_kl_from_the_unpruned_model_along_its_answer(tmp_path: Path) -> None:
    module, batches = Generating(faint_blip2(dtype=torch.float64)), data(16, 16, torch.float64)
    policy = calibrate(module, batches, tmp_path / "p.json", keep=3, calibration=QUICK).policies[0]
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
