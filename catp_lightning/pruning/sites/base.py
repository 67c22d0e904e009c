"""Base class of the places in a language model where visual tokens leave."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from catp_lightning.methods.observation import Needs
from catp_lightning.methods.selection import Selection
from catp_lightning.models.base import Family, Reads
from catp_lightning.prompt.call import CallTracker

Decide = Callable[[Any], Selection]
"""Function that returns the selection of a prompt's visual tokens, [B, T]: B samples, T tokens of the largest."""


@dataclass(frozen=True)
class SiteSettings:
    """Settings of a place where tokens leave.

    Attributes:
        stages: layers at whose entry tokens leave, ascending; 0 is the input of the decoder; empty: only there.
        needs: signals that the methods read; prompts have those of them that are seen inside the language model.
        compact: True to number the kept rows anew, False to leave them their position ids.
        by_stage: signals that the method of each stage reads; empty: all stages read `needs`.
    """

    stages: tuple[int, ...] = ()
    needs: Needs = field(default_factory=dict)
    compact: bool = False
    by_stage: tuple[Needs, ...] = ()


PLAIN = SiteSettings()
Report = Callable[[int], None]


def ignored(count: int) -> None:
    """Ignore what is reported."""


class PruningSite(ABC):
    """Place where visual tokens leave one model; hooks are in place only inside `installed`.

    Args:
        family: the model's family, which knows its parts.
        decide: called with each prompt that comes, returns which of its visual tokens stay; text always stays.
        settings: settings of the place.
        report: called with the number of labels of a call that are predicted from dropped rows and do not count in its
            loss; 0 as each call with or without labels begins. Never called where no label can be.

    Attributes:
        reads: part of a language model that reads visual tokens at this place, as `Family.reads`.
        inside: True if tokens leave at layers of that part, False if before it or in its cross-attention.
        active: False if the model is to run unpruned.
        calls: tracker of the model's running calls; what is known of a call lives there.

    Raises:
        PruningError: the model cannot be pruned here with these settings.
    """

    reads: ClassVar[Reads]
    inside: ClassVar[bool] = False

    def __init__(
        self, family: Family, decide: Decide, settings: SiteSettings = PLAIN, report: Report = ignored
    ) -> None:
        self.family, self.decide, self.settings, self.report = family, decide, settings, report
        self.active = True
        self.calls = CallTracker(family.model, self.outer(family))

    @staticmethod
    def outer(family: Family) -> nn.Module:
        """Return the module whose arguments are those of a call, beside generate's."""
        return family.outer or family.model

    @abstractmethod
    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prune the model while inside."""
        yield

    @contextmanager
    def replaying(self, prompt: Any) -> Iterator[None]:
        """Prune the model while inside, where its decoder is called again on a prompt that is known already.

        Raises:
            NotImplementedError: prompts of this place are answered again without it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prompt to be called on")
        yield
