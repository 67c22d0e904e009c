"""SGL: the attention of a small model of the same kind prunes the large one (2412.03324, small VLM-guided pruning)."""

from dataclasses import dataclass

from torch import Tensor

from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.methods.scorers.base import PaidAttention


@dataclass(frozen=True)
class SGL(PaidAttention):
    """Attention that a visual token gets in a guide model, summed over the guide's layers, heads and text rows.

    The text rows are the prompt's text after the sample's first visual token, and the tokens that the guide generates,
    greedily, up to the end of its answer; the last token it generates has no row. `prune(model, policy,
    guide=small_model)` runs the guide once for each prompt. Tokens are dropped before the large model's decoder; in the
    paper they are dropped inside it, after a few layers. The authors' code reads one sample at a time, and only the
    text that follows its last visual token.

    Attributes:
        layers: layers of the guide, counted from 0, or from -1 for the last; None: all, as in the paper.
        answer_tokens: the most tokens that the guide generates, at least 1; it does not depend on the number asked of
            the large model, so that a prompt always keeps the same tokens.
    """

    answer_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answer_tokens < 1:
            raise ValueError(f"answer_tokens is {self.answer_tokens}; the guide generates at least 1 token.")

    @property
    def needs(self) -> Needs:
        return {Signal.GUIDE_ATTENTION: self.layers}

    def attention(self, seen: Observation) -> Tensor:
        return seen.by_layer(Signal.GUIDE_ATTENTION, self.layers)
