"""Integer arithmetic on the device: checksums of images, and pseudo-random numbers drawn from them."""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014); int64 wraps as uint64 does.
_GOLDEN, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def mix(state: Tensor) -> Tensor:
    """SplitMix64's output function: int64 of any shape -> int64 of the same shape, every bit depending on every bit."""
    state = state + _GOLDEN  # a new tensor; the rest is done in place, which takes a quarter of the time
    state ^= _shift(state, 30)
    state *= _MIX1
    state ^= _shift(state, 27)
    state *= _MIX2
    state ^= _shift(state, 31)
    return state


MOST = 2**15
"""Most values of an image that its checksum reads; of all 338,688 values of a 336 x 336 image one would take 8 ms."""

TOGETHER = 2**18
"""Most values of which checksums are taken together: int64 tensors of them, 2 MiB each, are few and soon used again."""


def fingerprint(pixels: Tensor) -> Tensor:
    """Return a 64-bit checksum of each image: pixels [I, ...] of any float dtype -> int64 [I].

    It depends on the image alone, not on its place in the batch, the device or the order of summation. Of an image of
    more than `MOST` values every second, third, ... value is read, so that at most `MOST` are.
    """
    values = pixels.detach().flatten(1)
    values = values[:, :: max(1, -(-values.shape[1] // MOST))]
    place = mix(torch.arange(values.shape[1], device=values.device))
    some = values.split(max(1, TOGETHER // max(1, values.shape[1])))
    return torch.cat([mix(mix(_bits(images) ^ place).sum(1)) for images in some])


def _bits(values: Tensor) -> Tensor:
    """Return the bits of each value in float32: float of any dtype -> int64 of the same shape."""
    return values.float().contiguous().view(torch.int32).long()


def uniform(seeds: Tensor, count: int) -> Tensor:
    """Draw `count` numbers in [0, 1) from each seed, the same on every device: int64 [I] -> float32 [I, count]."""
    draws = mix(seeds[:, None] + _GOLDEN * torch.arange(1, count + 1, device=seeds.device))
    return _shift(draws, 40).float() / 2**24


def _shift(value: Tensor, by: int) -> Tensor:
    """Shift int64 values logically to the right; torch's own shift keeps the sign."""
    return (value >> by).bitwise_and_((1 << (64 - by)) - 1)
