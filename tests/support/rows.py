"""What a row of the matrix is: a family with a model, samples for it, and its oracle."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import PreTrainedModel

from tests.support.decoder_oracle import Decoder
from tests.support.oracles import PAD, Inputs, Oracle
from tests.support.samples import Sample, each_image, text_inputs


@dataclass(frozen=True)
class Row:
    """Row of the matrix: a family with a model, samples for it, and its masked oracle.

    Attributes:
        name: name of the row.
        make: makes the model.
        samples: makes up to four samples; one without an image comes last.
        oracle: runs the unpruned model with tokens hidden.
        join: makes the tensors of a batch beside ids and mask.
        attention: the implementation its tests run under unless they name one.
        rounding: how far logits of the unpruned model in float64 are apart, relative to their scale, where padding
            moves positions: some models compute rotary angles, or the weights of experts, in float32.
        coarse: how far they are apart wherever rows lie otherwise: recurrent states that are kept in float32.
        lacks: test function's name -> why this family does not have what it tests.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    samples: Callable[[], list[Sample]] = field(compare=False)  # the model is the same, whatever it reads
    oracle: Oracle
    join: Callable[[Sequence[Sample], Inputs], Inputs] = each_image
    attention: str = "sdpa"
    rounding: float = 0.0
    coarse: float = 0.0
    lacks: Mapping[str, str] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float64, attention: str | None = None) -> PreTrainedModel:
        """Return the model, one object for all tests: whatever pruning leaves behind in it, a later test meets."""
        return _model(self, dtype, attention or self.attention)

    def inputs(self, rows: Sequence[int] | None = None, pads: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
        """Return a batch of the samples `rows` with their own images; by default of the samples that have one.

        In Llama-3.2-Vision a sample without an image makes its batch store all rows, and nothing would be left to
        shorten.
        """
        samples = self.samples()
        chosen = [sample for sample in samples if sample.images] if rows is None else [samples[row] for row in rows]
        text = text_inputs(chosen, pads)
        inputs = {**text, **self.join(chosen, text)}
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}

    @property
    def coordinates(self) -> bool:
        """True if position ids have axes (multimodal rotary positions)."""
        return isinstance(self.oracle, Decoder) and self.oracle.coordinates

    def tolerance(self, dtype: torch.dtype = torch.float64, attention: str | None = None, moved: bool = False) -> float:
        """Return how far logits may be apart, relative to their scale; `moved`: the same tokens have other positions.

        Eager attention takes its softmax in float32.
        """
        if dtype is torch.float32:
            return 2e-5
        return max(1e-10 if (attention or self.attention) == "sdpa" else 6e-6, self.rounding * moved, self.coarse)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


@cache
def _model(row: Row, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    model = deepcopy(_made(row)).to(dtype)  # quicker than to make another
    model.set_attn_implementation(attention)
    return model


@cache
def _made(row: Row) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = row.make().eval()
        _scale_up(model)
    model.generation_config.pad_token_id = PAD
    return model


def _scale_up(model: PreTrainedModel, gain: float = 1.5) -> None:
    """Make weights so large that dropping a token moves the logits, or a test of dropping proves nothing."""
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:  # Mllama's cross-attention starts closed
            weight.data.fill_(1.0)
        elif name.endswith(("query_tokens", "image_newline", "embed_positions.weight")):
            weight.data.normal_(0, 0.5)
        elif name.endswith(("cross_attn.q_norm.weight", "cross_attn.k_norm.weight")):
            weight.data.fill_(1.5)
        elif weight.dim() >= 2:
            weight.data.normal_(0, gain * weight[0].numel() ** -0.5)
        elif weight.numel() > 1 and "norm" not in name.lower():
            weight.data.normal_(0, 0.1)
