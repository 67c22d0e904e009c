"""Choices of tokens are compared as if each were run by itself, and equal ones answered once."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from catp_lightning.calibration.replay.base import _distinct
from tests.support.recorded_answers import Explicit, ModelCall, beams, forward, greedy, mixed, model, record


@pytest.mark.slow
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
