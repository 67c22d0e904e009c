"""Drop visual tokens inside a running model, unnoticed by the code that calls it."""

from collections.abc import Callable
from typing import Any

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Needs, Signal
from catp_lightning.methods.selection import Selection
from catp_lightning.models.base import Family
from catp_lightning.models.mllama import Mllama
from catp_lightning.prompt.kept import KeptSequence, kept_sequence
from catp_lightning.prompt.merging import merged
from catp_lightning.prompt.prompt import CrossAttended, DecoderPrompt, Prompt, columns_kept, visual_tokens
from catp_lightning.pruning.sites.cross_attention import PruneCrossAttention
from catp_lightning.pruning.sites.decoder_input import PruneAtDecoderInput
from catp_lightning.pruning.sites.decoder_layers import NOTHING, PruneAtDecoderLayers, StagePrompt
from catp_lightning.pruning.sites.encoder_input import PruneAtEncoderInput

Entry = PruneAtDecoderInput | PruneAtDecoderLayers | PruneAtEncoderInput | PruneCrossAttention


def entry(
    family: Family,
    decide: Callable[[Any], Selection],
    compact: bool,
    forget: Callable[[], None],
    stages: tuple[int, ...] = (),
    needs: Needs = NOTHING,
) -> Entry:
    """Return the object that drops visual tokens of a family's model at the place where its language model reads them.

    Args:
        family: bound to the model.
        decide, compact, forget: as in `PruneAtDecoderInput`.
        stages: decoder layers at whose entry tokens are dropped; empty: before the first layer.
        needs: signals that scorers and selectors read; prompts have those that are seen inside the language model.

    Raises:
        PruningError: stages are given, but no decoder reads visual tokens as rows of its own.
    """
    if stages and family.reads != "decoder":
        raise PruningError(
            f"The policy's scorer drops tokens inside a decoder (layers {', '.join(map(str, stages))}); "
            f"{type(family.model).__name__} reads them by {family.reads}. Choose another scorer; docs/methods.md lists "
            "them."
        )
    if stages:
        return PruneAtDecoderLayers(family, decide, compact, forget, stages, needs)
    if isinstance(family, Mllama):
        return PruneCrossAttention(family, decide, forget, observe=Signal.CROSS_ATTENTION_TO_IMAGE in needs)
    if family.reads == "encoder":
        return PruneAtEncoderInput(family, decide, compact, forget)
    return PruneAtDecoderInput(family, decide, compact, forget)


__all__ = [
    "CrossAttended",
    "DecoderPrompt",
    "Entry",
    "KeptSequence",
    "Prompt",
    "PruneAtDecoderInput",
    "PruneAtDecoderLayers",
    "PruneAtEncoderInput",
    "PruneCrossAttention",
    "StagePrompt",
    "columns_kept",
    "entry",
    "kept_sequence",
    "merged",
    "visual_tokens",
]
