"""CDPruner: similarity of a token to the text of the prompt (2506.10967, section 3.3)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import Scorer

CONSTANT = 1e-6
"""Range of an image's relevances up to which they count as equal, so that rounding errors are not scaled up to 0..1."""


@dataclass(frozen=True)
class CDPruner(Scorer):
    """Cosine similarity of the token and the mean of the prompt's text rows, scaled to 0..1 over each image's tokens.

    Its selector, `conditional-dpp`, adds diversity. The authors compare in the space of CLIP's text encoder, which
    Hugging Face's LLaVA does not have: here tokens and text are compared as the language model reads them. Their code
    takes the negative of the cosine, the paper the cosine itself, as here. Without text, or where all tokens are
    equally relevant, all scores are 1.
    """

    selector: ClassVar[str] = "conditional-dpp"

    @property
    def needs(self) -> Needs:
        return {Signal.IMAGE_EMBEDS: None, Signal.TEXT_EMBEDS: None}

    def score(self, seen: Observation) -> Tensor:
        assert seen.text is not None  # it comes with Signal.TEXT_EMBEDS
        read, words = (_wide(seen[signal]) for signal in (Signal.IMAGE_EMBEDS, Signal.TEXT_EMBEDS))
        own = seen.text.to(words.dtype)
        text = (words * own[..., None]).sum(1) / own.sum(1, keepdim=True).clamp(min=1)
        relevance = F.cosine_similarity(read, text[:, None], dim=-1)
        droppable = seen.droppable & ~relevance.isnan()
        least = relevance.masked_fill(~droppable, torch.inf).amin(1, keepdim=True)
        most = relevance.masked_fill(~droppable, -torch.inf).amax(1, keepdim=True)
        tells = most - least > CONSTANT  # without text all relevances are 0
        scaled = torch.where(tells, (relevance - least) / (most - least).where(tells, 1), 1)
        return scaled.clamp(0, 1).masked_fill(relevance.isnan(), torch.nan)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
