"""Precision of scores and selections."""

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> torch.autocast:
    """Context without autocast on the device of `like`.

    Autocast would round weighted sums and similarities to half precision, and ties would then decide the choice.
    """
    return torch.autocast(like.device.type, enabled=False)
