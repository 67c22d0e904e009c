"""Runs in threads that begin at the same time."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from catp_lightning import PruningPolicy, prune


def together(*runs: Callable[[], Any]) -> list[Any]:
    """What each found, or raised, in a thread of its own, begun at the same time."""
    ready = threading.Barrier(len(runs))
    found: list[Any] = [None] * len(runs)

    def one(number: int) -> None:
        ready.wait(60)
        try:
            found[number] = runs[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(len(runs))]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive(), "a thread waits for ever"
    finally:
        sys.setswitchinterval(before)
    return found


def by_policy(model: nn.Module, inputs: dict[str, Tensor], policy: PruningPolicy, **settings: Any) -> Tensor:
    with torch.no_grad(), prune(model, policy, **settings):
        return model(**inputs).logits
