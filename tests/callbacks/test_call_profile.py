"""TokenPruning(profile=True): times of parts beside the unpruned model's, and answers that it leaves alone."""

import time
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from catp_lightning import PruningPolicy, TokenPruning
from catp_lightning.callbacks.call_profile import CALLS, profile_table
from catp_lightning.models import find_family
from tests.support.footprints import footprint
from tests.support.models import random_blip2
from tests.support.modules import Answering, Forwarding, Generating, two_images
from tests.support.policies import HALF
from tests.support.trainers import loading, trainer

SLEEP = 0.2


def slow(module: torch.nn.Module) -> None:
    """Let each call of a module take so much longer."""
    module.register_forward_pre_hook(lambda *_: time.sleep(SLEEP))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vision", "prefill"])
def test_what_takes_long_is_what_is_said_to_take_long(part: str) -> None:
    module, callback = Forwarding(), TokenPruning(HALF, profile=True)
    family = find_family(module)
    slow(family.decoder.layers[0] if part == "prefill" else module.net.vision_model)
    trainer(callback).predict(module, loading([random_blip2()[1]] * 3))
    other = "vision" if part == "prefill" else "prefill"
    for kind in ("", "unpruned_"):
        assert SLEEP <= callback.figures[f"catp/{kind}seconds_{part}"] <= callback.figures[f"catp/{kind}seconds_call"]
        assert callback.figures[f"catp/{kind}seconds_{other}"] < SLEEP
    assert callback.figures["catp/profiled_calls"] == 2, "the first warms up"
    assert "catp/seconds_step" not in callback.figures, "a forward has no decoding step"


@pytest.mark.slow
def test_steps_of_a_generation_are_timed_each() -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    module, callback = Generating(settings=settings), TokenPruning(HALF, profile=True)
    slow(find_family(module).decoder.layers[0])
    trainer(callback).predict(module, loading([random_blip2()[1]] * 2))
    assert SLEEP <= callback.figures["catp/seconds_step"] < 1.5 * SLEEP
    assert callback.figures["catp/seconds_call"] >= 4 * SLEEP


@pytest.mark.slow
def test_sampled_answers_and_counts_are_those_of_a_run_without_a_profile() -> None:
    settings = {"max_new_tokens": 2, "do_sample": True}
    inputs = random_blip2()[1]
    batches = [inputs] * (CALLS + 1) + [two_images(inputs)] * 3  # twice the tokens, in batches that are not timed
    found: list[Any] = []
    for profile in (False, True):
        module, callback = Generating(settings=settings), TokenPruning(HALF, profile=profile)
        torch.manual_seed(3)
        before = footprint(module)
        answers = trainer(callback).predict(module, loading(batches))
        assert footprint(module) == before
        found.append((answers, callback.figures["catp/tokens_kept"]))
    assert all(map(torch.equal, found[0][0], found[1][0])) and found[0][1] == found[1][1]


@pytest.mark.slow
def test_times_reach_loggers_and_are_not_more_than_eight_calls(tmp_path: Any) -> None:
    module, callback = Answering(), TokenPruning(HALF, profile=True)
    run = trainer(callback, logger=CSVLogger(tmp_path))
    run.validate(module, loading([random_blip2()[1]] * (CALLS + 3)))
    assert run.callback_metrics["catp/profiled_calls"] == CALLS
    assert run.callback_metrics["catp/seconds_prefill"] > 0
    run.predict(module, loading([random_blip2()[1]] * 2))
    assert "catp/unpruned_seconds_prefill" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_nothing_timed_is_a_warning_and_comparing_beside_it_is_refused() -> None:
    module, callback = Answering(), TokenPruning(HALF, profile=True)
    with pytest.warns(UserWarning, match="at least two batches"):
        trainer(callback).validate(module, loading([random_blip2()[1]]))
    assert not profile_table(callback.figures)
    with pytest.raises(ValueError, match="one run and times in another"):
        TokenPruning(PruningPolicy(), profile=True, compare=True)
