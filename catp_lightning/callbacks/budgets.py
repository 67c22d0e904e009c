"""Budgets that a calibration is asked for: numbers of tokens, or prices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catp_lightning.calibration.search.promise import GRID, descending
from catp_lightning.errors import PolicyError
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy, check_keep, check_price
from catp_lightning.policy.locations import budget_file_name, policy_file
from catp_lightning.utils.messages import rank_zero_warn

ASSUMED_TOKENS = 2**20
"""Tokens of an image where images differ in size; budgets in shares are then sorted before budgets in tokens."""


@dataclass(frozen=True)
class Budgets:
    """Budgets of one calibration.

    Attributes:
        amounts: shares or numbers of tokens; or prices, shares of what the unpruned model pays.
        several: True if a policy is saved for each in a folder.
        unit: what prices are paid in, one of `policy.UNITS`; None: budgets are tokens.
    """

    amounts: tuple[int | float, ...]
    several: bool
    unit: str | None = None

    @classmethod
    def of(cls, keep: Any, budget: Any, promised: bool) -> "Budgets":
        """Return the budgets that a user's arguments `keep` and `budget` mean.

        Args:
            keep: one or several; None: 0.5, or a grid for a promise.
            budget: a price, or several of one unit in a list; None: `keep` is meant.
            promised: True if a promise chooses among them; one policy is then saved.

        Raises:
            PolicyError: a budget is not allowed, or both are given.
        """
        if budget is None:
            keep = (list(GRID) if promised else 0.5) if keep is None else keep
            several = isinstance(keep, Sequence) and not isinstance(keep, str)
            amounts = tuple(keep) if isinstance(keep, Sequence) else (keep,)
            for amount in amounts:
                check_keep(amount)
            return cls(amounts, several and not promised)
        if keep is not None:
            raise PolicyError(f"keep is {keep!r:.100} and budget {budget!r:.100}: one calibration has one of them.")
        if hasattr(budget, "as_dict"):  # a Namespace of jsonargparse
            budget = budget.as_dict()
        if not isinstance(budget, Mapping) or len(budget) != 1:
            check_price(budget)
        ((unit, given),) = budget.items()
        given = list(GRID) if given is None and promised else given
        several = isinstance(given, list | tuple)
        shares = tuple(check_price({unit: share})[1] for share in (given if several else [given]))
        if len(set(shares)) < len(shares) or not shares:
            raise PolicyError(f"budget is {budget!r:.200}; give one price or several different ones.")
        return cls(tuple(sorted(shares, reverse=True)) if promised else shares, several and not promised, unit)

    def check_beside(self, path: Path, profiled: bool, counts: bool, scorer: str | None) -> None:
        """Raise PolicyError if the budgets do not go with a calibration's other arguments.

        Args:
            path: where policies are saved.
            profiled: True if seconds of the prefill are known.
            counts: True if a budget may be spent unevenly over questions.
            scorer: the only method to calibrate; None: there are several.
        """
        if self.unit is not None and scorer == "visual-exit":
            raise PolicyError(
                "What visual-exit costs is its layer. At a price it competes among schedules, CrossAttentionCalibration"
                "(path, budget=...) without a scorer; alone it is calibrated for shares of the layers, with keep."
            )
        if self.several and path.suffix:
            raise PolicyError(f"path is {str(path)!r}, a file, but several budgets are asked for: give a folder.")
        if (self.unit == "prefill_time") != profiled:
            raise PolicyError(
                "A budget of prefill_time needs the seconds that the model takes on this device, and no other budget "
                "does: profile=catp_lightning.pricing.measure(module, batch, policies)."
            )
        if counts and self.unit is not None:
            raise PolicyError("settings.counts divides a budget of tokens between questions: give keep, not budget.")

    def ordered(self, family: Family, promised: bool) -> tuple[int | float, ...]:
        """Return the budgets in the order in which they are tried, each number of tokens once if `promised`.

        Warns of budgets that are more tokens than an image of the family's model has.
        """
        tokens = family.tokens_per_image or ASSUMED_TOKENS
        plain = self.unit is not None or not promised
        amounts = self.amounts if plain else tuple(descending(self.amounts, tokens))
        if more := [keep for keep in amounts if isinstance(keep, int) and keep > tokens]:
            rank_zero_warn(
                f"keep is {', '.join(map(str, more))} tokens, and every image of {type(family.model).__name__} has "
                f"{tokens}: a policy at that budget prunes nothing. Give a smaller number, or a share."
            )
        return amounts

    def listed(self, amounts: Sequence[int | float]) -> str:
        """Return budgets in words."""
        return ", ".join(f"{self.unit or 'keep'} {amount}" for amount in amounts)

    def file(self, path: Path, policy: PruningPolicy) -> Path:
        """Return the file that a policy is saved to."""
        if self.several:
            return path / budget_file_name(policy.keep, policy.budget)
        return policy_file(path)

    def files(self, path: Path) -> list[Path]:
        """Return the files that policies may be saved to."""
        if not self.several:
            return [policy_file(path)]
        priced = [None if self.unit is None else {self.unit: float(amount)} for amount in self.amounts]
        return [path / budget_file_name(amount, price) for amount, price in zip(self.amounts, priced, strict=True)]
