"""Checksums of a calibration's model and data, so that it resumes with the same ones or refuses to."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from catp_lightning.calibration.replay.samples import Samples
from catp_lightning.utils.hashing import mix

SAMPLED = 1024  # values of each parameter, at most, whose places its fingerprint depends on


def batch_fingerprints(batch: Sequence[Samples]) -> tuple[int, int]:
    """Return checksums of a batch's images and prompts, and of the unpruned model's answers to them."""
    answers = [samples.replay.answers for samples in batch]
    return _nonnegative(sum(samples.key for samples in batch)), _nonnegative(
        sum(int(mix(mix(mix(a.ids) ^ a.valid.cumsum(1)) * a.valid).sum()) for a in answers)
    )


def model_fingerprint(model: nn.Module) -> str:
    """Return a checksum of a model's names, shapes, dtypes and weights, the same on every device: 16 hex digits.

    All bits of a parameter or buffer are summed, so that no single weight can change unseen; for up to 1,024 evenly
    spaced values the places count too. For quantised weights codes and scales count. Weights that are elsewhere, on the
    meta device, count by name, shape and dtype alone.
    """
    found = hashlib.sha256()
    for name, value in sorted(_tensors(model), key=lambda named: named[0]):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        if value.is_meta or not value.numel():
            continue
        bits = value.detach().view(_INTEGERS[value.element_size()])
        some = bits.flatten()[:: -(-value.numel() // SAMPLED)]
        found.update(str([int(bits.sum(dtype=torch.int64)), *some.tolist()]).encode())
    return found.hexdigest()[:16]


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters, buffers, and the scales that bitsandbytes keeps beside its weights, by name.

    `state_dict` is not used: it lays 4-bit weights out anew, on some CPUs wrongly.
    """
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        yield from _plain(name, value)
    for path, module in model.named_modules():
        weight, state = getattr(module, "weight", None), getattr(module, "state", None)
        quantised = getattr(weight, "quant_state", None)
        for name, holder in (("SCB", weight), ("SCB", state), ("absmax", quantised)):  # 8 bits before a call, after; 4
            scales = getattr(holder, name, None)
            if isinstance(scales, Tensor):
                yield f"{path}.{name}", scales


def _plain(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a tensor consists of: itself, or the inner tensors of a torchao tensor."""
    if not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    for inner in value.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(value, inner))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _nonnegative(number: int) -> int:
    return number % 2**63
