"""Tensors of which a copy is kept on the CPU, so that what depends on their values need not wait for a GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COPY = "_catp_on_cpu"  # attribute of tensors that this package made: a copy on the CPU


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting; `on_cpu` gives `value` back without waiting, too.

    Neither may be changed in place.
    """
    return with_copy(value.to(device, non_blocking=True).detach(), value)


def with_copy(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `tensor`, of which `value` is known to be a copy on the CPU; neither may be changed in place."""
    setattr(tensor, COPY, value)
    return tensor


def known(tensor: Tensor) -> bool:
    """Return True if `on_cpu` need not wait for a tensor."""
    return hasattr(tensor, COPY)


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    """Return copies of tensors, of integers and bool, on the CPU; those that are not kept there come in one transfer.

    Nothing is kept: a tensor that a user changes in place is read anew. The copies may not be changed.
    """
    found: list[Tensor | None] = [getattr(tensor, COPY, None) for tensor in tensors]
    asked = [place for place, copy in enumerate(found) if copy is None]
    for device in {tensors[place].device: None for place in asked}:  # a model may lie on several
        own = [place for place in asked if tensors[place].device == device]
        if len(own) == 1:
            found[own[0]] = tensors[own[0]].detach().cpu()
            continue
        flat = torch.cat([tensors[place].detach().reshape(-1).long() for place in own]).cpu()
        parts = flat.split([tensors[place].numel() for place in own])
        for place, part in zip(own, parts, strict=True):
            found[place] = part.view(tensors[place].shape).to(tensors[place].dtype)
    return [copy for copy in found if copy is not None]


def on_device_of(like: Tensor, values: Sequence[int]) -> Tensor:
    """Return whole numbers that Python knows on the device of `like`, int64 [N], without waiting."""
    return on_device(torch.tensor(values, device="cpu", dtype=torch.int64), like.device)


def places(there: Tensor, like: Tensor) -> Tensor:
    """Return the places, counted row by row, where `there`, bool [...], is True: int64 [N], on the device of `like`."""
    return on_device(on_cpu(there)[0].flatten().nonzero()[:, 0], like.device)


def on_device_as(like: Tensor, values: Tensor) -> Tensor:
    """Return numbers of the CPU in the dtype and on the device of `like`, without waiting."""
    return values.to(like.dtype).to(like.device, non_blocking=True)


def taken(values: Tensor, there: Tensor) -> Tensor:
    """Return `values[there]` of values [*S, ...], `there` bool [*S]: [N, ...], with a copy where `values` have one."""
    if known(values):
        return on_device(on_cpu(values)[0][on_cpu(there)[0]], values.device)
    return values.flatten(0, there.dim() - 1)[places(there, values)]


def read_once(tensor: Tensor) -> Tensor:
    """Return a tensor with a copy on the CPU, which is read now if there is none; it may not be changed in place."""
    return tensor if known(tensor) else with_copy(tensor.detach(), on_cpu(tensor)[0])


def of_known(change: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `change` of tensors on one device, computed on the CPU if copies of all are there, without waiting."""
    if all(known(tensor) for tensor in tensors):
        return on_device(change(*on_cpu(*tensors)), tensors[0].device)
    return change(*tensors)


def for_numpy(like: Tensor) -> bool:
    """Return True if `like` is on the CPU, where many small operations in turn take a fraction of the time in NumPy."""
    return like.device.type == "cpu"
