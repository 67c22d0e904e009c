"""A budget that is more tokens than images have: nothing is pruned, which is told once."""

from torch import Tensor

from catp_lightning.utils.messages import warn
from catp_lightning.utils.on_cpu import on_cpu


class BudgetCheck:
    """Check of the first stage's budget at the first prefill."""

    def __init__(self) -> None:
        self._checked = False

    def check(self, keep: int | float, tokens: Tensor) -> None:
        """Warn, at the first prefill, if a budget is more tokens than any image has.

        Args:
            keep: the budget.
            tokens: int64 [I], number of tokens of each image.
        """
        first, self._checked = not self._checked, True
        if not first or not isinstance(keep, int) or not len(tokens):
            return
        most = int(on_cpu(tokens)[0].max())
        if keep > most:
            warn(
                f"keep is {keep} tokens and the largest of these images has {most}: nothing is pruned. "
                "Give a smaller number, or a share, a float in (0, 1].",
                stacklevel=3,
            )
