"""CDPruner: similarity of a token to the text of the prompt (2506.10967, section 3.3)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import Scorer

CONSTANT = 1e-6
"""Range of an image's relevances up to which they count as equal, so that rounding errors are not scaled up to 0..1."""

EPSILON = 1e-8
"""Least length of a vector whose direction is told, as in torch's cosine_similarity."""


@dataclass(frozen=True)
class CDPruner(Scorer):
    """Relevance of the token to the prompt's text, scaled to 0..1 over each image's tokens.

    Its selector, `conditional-dpp`, adds diversity. Without text, or where all tokens are equally relevant, all scores
    are 1.

    Without `text_encoder` relevance is the cosine similarity of the token and the mean of the prompt's text rows, both
    as the language model reads them. This runs on every model whose decoder reads visual tokens as rows.

    With `text_encoder` it is the authors' own on LLaVA: the cosine of the patch and the text in CLIP's space, mean over
    segments of 77 tokens where the text is longer. The paper has the cosine; the authors' code, which their figures
    come from, its negative: they found that patches of CLIP that show what a text names are the less similar to it.
    This runs on LLaVA-1.5 and LLaVA-NeXT with a CLIP tower; the authors choose in each crop of LLaVA-NeXT apart,
    `selector_args={"per": "crop"}`. Two things differ: they encode the bare question, and here it is the prompt's text
    after the first visual token with the words of the chat template ("ASSISTANT:"); and they add 1e-6 to relevances
    before these are scaled, here to the kernel's diagonal more than that.

    Attributes:
        text_encoder: folder, or name on the Hugging Face hub, of the CLIP that the model's vision tower was taken from,
            with its tokenizer: "openai/clip-vit-large-patch14-336" for LLaVA-1.5. It is loaded when the pruning begins,
            and so is the model's own tokenizer, from `model.name_or_path`. None: word embeddings are compared.
        formula: sign of the cosine with `text_encoder`: "code", minus; "paper", plus.
    """

    selector: ClassVar[str] = "conditional-dpp"

    text_encoder: str | None = None
    formula: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        if self.text_encoder == "":
            raise ValueError("text_encoder is empty: name a folder or a model on the hub, or leave it out.")
        if self.formula == "paper" and self.text_encoder is None:
            raise ValueError(
                'formula="paper" is a setting of text_encoder; word embeddings are compared as in the paper.'
            )

    @property
    def needs(self) -> Needs:
        if self.text_encoder is not None:
            return {Signal.TEXT_RELEVANCE: None}
        return {Signal.IMAGE_EMBEDS: None, Signal.TEXT_EMBEDS: None}

    def score(self, seen: Observation) -> Tensor:
        relevance = self._in_words(seen) if self.text_encoder is None else self._in_clip(seen)
        droppable = seen.droppable & ~relevance.isnan()
        least = relevance.masked_fill(~droppable, torch.inf).amin(1, keepdim=True)
        most = relevance.masked_fill(~droppable, -torch.inf).amax(1, keepdim=True)
        tells = most - least > CONSTANT  # without text all relevances are 0
        scaled = torch.where(tells, (relevance - least) / (most - least).where(tells, 1), 1)
        return scaled.clamp(0, 1).masked_fill(relevance.isnan(), torch.nan)

    def _in_clip(self, seen: Observation) -> Tensor:
        cosine = seen[Signal.TEXT_RELEVANCE]
        return cosine if self.formula == "paper" else -cosine

    def _in_words(self, seen: Observation) -> Tensor:
        assert seen.text is not None  # it comes with Signal.TEXT_EMBEDS
        read, words = (_wide(seen[signal]) for signal in (Signal.IMAGE_EMBEDS, Signal.TEXT_EMBEDS))
        own = seen.text.to(words.dtype)
        text = (words * own[..., None]).sum(1) / own.sum(1, keepdim=True).clamp(min=1)
        lengths = torch.linalg.vector_norm(read, dim=-1).clamp(min=EPSILON)  # cosine_similarity would copy all of it
        return (read * F.normalize(text, dim=-1, eps=EPSILON)[:, None]).sum(-1) / lengths


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
