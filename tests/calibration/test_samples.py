"""Samples of a calibration know their images."""

import torch

from catp_lightning.methods.observation import Signal
from catp_lightning.prompt.prompt import visual_tokens
from catp_lightning.utils.hashing import fingerprint
from tests.support.models import IMAGE
from tests.support.recorded_answers import forward, mixed, model, record


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
