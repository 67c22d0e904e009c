"""Models beside the one that is pruned: those that a scorer's signals come from, a guide or a text encoder."""

from torch import nn

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import BESIDE, Needs, Signal
from catp_lightning.methods.scorers import SCORERS, Scorer
from catp_lightning.models import Family
from catp_lightning.pruning.guide import Guide, refuse_without_rows
from catp_lightning.pruning.refusals import refuse_unprunable
from catp_lightning.pruning.text_tower import TextTower


def reading(family: Family, scorer: Scorer, wanted: Needs, guide: nn.Module | None) -> list[Guide | TextTower]:
    """Return the models that a scorer asks beside the one that is pruned; each adds its signal to those observed.

    Args:
        family: family of the model that is pruned.
        scorer: the scorer, which has their settings.
        wanted: signals that are read.
        guide: the guide that the user gave.

    Raises:
        PruningError: a model is missing, or does not fit the one that is pruned.
    """
    found: list[Guide | TextTower] = []
    if Signal.GUIDE_ATTENTION in wanted:
        found.append(_guide(family, scorer, wanted[Signal.GUIDE_ATTENTION], guide))
    if Signal.TEXT_RELEVANCE in wanted:
        found.append(TextTower(family, getattr(scorer, "text_encoder", "")))  # a scorer that reads it has the field
    return found


def observed(wanted: Needs) -> dict[Signal, tuple[int, ...] | None]:
    """Return the signals that the pruned model itself has to show, so that those that are wanted can be had."""
    own = {signal: layers for signal, layers in wanted.items() if signal not in BESIDE}
    return own | ({Signal.VISION_STATES: None} if Signal.TEXT_RELEVANCE in wanted else {})


def _guide(family: Family, scorer: Scorer, layers: tuple[int, ...] | None, guide: nn.Module | None) -> Guide:
    refuse_without_rows(family)
    if guide is None:
        raise PruningError(
            f"The policy's scorer {SCORERS.name_of(scorer)!r} ranks tokens by the attention of a smaller model of the "
            "same kind: give it, prune(model, policy, guide=small_model). TokenPruning and PrunedModule take it too."
        )
    found = Guide(guide, family, layers, getattr(scorer, "answer_tokens", 1))  # set by the method
    refuse_unprunable(guide, found.family)
    return found
