"""Metrics of pruning: agreement with the unpruned model, visual tokens kept.

Metrics count in int64, so that any number of processes and batches gives the same result to the last bit; results are
float32, because Apple's MPS devices have no float64.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

# Updates make new tensors instead of adding in place: a state that was reset under inference_mode may not be changed in
# place by a later validation inside fit.


class Agreement(Metric):
    """Share of samples whose answer equals the unpruned model's, in [0, 1]; `wilson_interval` gives its interval.

    >>> agreement = Agreement()
    >>> agreement.update(torch.tensor([True, True, False, True]))
    >>> agreement.compute()
    tensor(0.7500)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    same: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("same", torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, same: Tensor) -> None:
        """Add B samples.

        Args:
            same: bool [B], True where the answer equals the unpruned model's.

        Raises:
            ValueError: `same` is not bool.
        """
        if same.dtype != torch.bool:
            raise ValueError(f"same must be a bool tensor, got {same.dtype}: compare the answers first.")
        self.same = self.same + same.sum()
        self.total = self.total + same.numel()

    def compute(self) -> Tensor:
        return self.same.float() / self.total.float()


class TokensKept(Metric):
    """Number of visual tokens kept: mean a sample ("tokens_kept"), and share of all visual tokens ("keep_share").

    >>> kept = TokensKept()
    >>> kept.update(torch.tensor([[True, False, True, True], [True, False, False, False]]), visual=torch.tensor([4, 2]))
    >>> kept.compute()
    {'tokens_kept': tensor(2.), 'keep_share': tensor(0.6667)}
    """

    is_differentiable = False
    full_state_update = False
    kept: Tensor
    visual: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("kept", "visual", "samples"):
            self.add_state(name, torch.tensor(0, dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    def update(self, keep: Tensor, visual: Tensor | None = None) -> None:
        """Add B samples.

        Args:
            keep: bool [B, T], True where a visual token was kept, False where it was dropped or the sample has none.
            visual: int [B], number of visual tokens that each sample had; None: T each.

        Raises:
            ValueError: an argument has another type or shape.
        """
        if keep.dtype != torch.bool or keep.ndim != 2:
            raise ValueError(f"keep must be bool [B, T], got {keep.dtype} {list(keep.shape)}.")
        if visual is not None and visual.shape != keep.shape[:1]:
            raise ValueError(f"visual must be [{len(keep)}], a count a sample, got {list(visual.shape)}.")
        self.kept = self.kept + keep.sum()
        self.visual = self.visual + (keep.numel() if visual is None else visual.sum())
        self.samples = self.samples + len(keep)

    def compute(self) -> dict[str, Tensor]:
        kept = self.kept.float()
        return {"tokens_kept": kept / self.samples.float(), "keep_share": kept / self.visual.float()}
