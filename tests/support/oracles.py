"""Oracles of dropping: the unpruned model with the same tokens hidden, or run on a prompt physically shortened.

Nothing of the package is used here: an oracle that shares code with what it judges shares its faults.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"  # before 5.24
PAD, IMAGE, VIDEO, START, END = 0, 110, 111, 112, 113
Inputs = dict[str, Tensor]


def visual_columns(inputs: Inputs) -> Tensor:
    """Return the columns of placeholders, bool [B, L]."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def columns_kept(inputs: Inputs, keep: Tensor) -> Tensor:
    """Return the columns of a prompt that stay, bool [B, L]: visual tokens by keep, bool [B, T], and all text."""
    columns = ~visual_columns(inputs)
    for row, visual in enumerate(visual_columns(inputs)):
        columns[row, visual] = keep[row, : visual.sum()]
    return columns


def hidden_in(mask: Tensor, hidden: Tensor) -> Tensor:
    """Return an attention mask, boolean or additive, under which `hidden` keys are not seen either."""
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def of_rows(values: Tensor, rows: int) -> Tensor:
    """Repeat values of samples for `rows` rows, in which the beams of a sample lie next to each other."""
    return values.repeat_interleave(rows // len(values), 0)


def cache_of(output: Any) -> Any:
    """Return the cache in a model's or generate's output."""
    return getattr(output.get("language_model_outputs", output), CACHE)


@contextmanager
def hooked(modules: list[nn.Module], change: Any) -> Iterator[None]:
    """Context in which `change(module, args, kwargs)` may return other keyword arguments for a call of `modules`."""
    with ExitStack() as undo:
        for module in modules:

            def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return args, {**kwargs, **change(module, args, kwargs)}

            undo.callback(module.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
        yield


class Oracle(ABC):
    """Reference for a kind of model, which is run with tokens hidden, step by step, and on a shortened prompt.

    Shapes: B samples, L columns of a prompt, T visual tokens, n generated tokens, V vocabulary.
    """

    first_type = 0  # type of a generated token, where tokens have types

    @abstractmethod
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Any:
        """Context in which `model` reads its prompt (`inputs`, or the result of `grow`) with dropped tokens hidden."""

    @abstractmethod
    def compact(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, keep: Tensor) -> Tensor:
        """Return logits [n, V] that predict `tokens`, int64 [1, n], of one unpadded sample, physically shortened."""

    @abstractmethod
    def loop(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, with_positions: bool) -> Iterator[Tensor]:
        """Decode by hand with a cache and yield at each step logits [B, V] that predict `tokens`, int64 [B, n]."""

    def positions(self, mask: Tensor) -> Inputs:
        """Return position ids as generate makes them from the mask, int64 [B, L], of a prompt and tokens after it."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    @abstractmethod
    def cached(self, output: Any) -> int:
        """Return the number of rows of a prompt in the cache of a model's output, where visual tokens are cached."""

    def stored(self, inputs: Inputs, keep: Tensor) -> int:
        """Return the number of a prompt's rows that the cache should hold.

        Padding on the left counts by its last column only, or the longest sample would decide.
        """
        lengths = []
        for columns, mask in zip(columns_kept(inputs, keep), inputs["attention_mask"], strict=True):
            lengths.append(int(columns[max(int(mask.argmax()) - 1, 0) :].sum()))
        return max(lengths)

    @abstractmethod
    def inside(self, model: PreTrainedModel) -> nn.Module:
        """Return a layer of the language model, after the place where tokens leave."""

    def tokens(self, inputs: Inputs) -> Tensor:
        """Return the visual tokens that each sample has: bool [B, T]."""
        counts = visual_columns(inputs).sum(1, keepdim=True)
        return torch.arange(int(counts.max())) < counts

    def forward_inputs(self, inputs: Inputs) -> Inputs:
        """Return the arguments that the model's forward takes for the same prompt."""
        return inputs

    def compared(self, inputs: Inputs, keep: Tensor) -> Tensor:
        """Return the rows of logits that dropping must not change: bool [B, rows]."""
        return columns_kept(inputs, keep) & inputs["attention_mask"].bool()

    def left_out(self, inputs: Inputs, labels: Tensor, keep: Tensor) -> Tensor:
        """Return the labels that are predicted from dropped rows: bool, of the shape of `labels`."""
        gone = torch.zeros_like(labels, dtype=torch.bool)
        gone[:, 1:] = ~columns_kept(inputs, keep)[:, :-1] & (labels[:, 1:] != -100)
        return gone

    def labels(self, inputs: Inputs) -> Tensor:
        """Return random labels over text and images alike, and -100 over padding."""
        words = torch.randint(3, 90, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(5))
        return words.masked_fill(inputs["attention_mask"] == 0, -100)

    def grow(self, inputs: Inputs, tokens: Tensor) -> Inputs:
        """Return the prompt with generated tokens, int64 [B, n], after it, to be read without a cache."""
        ones = torch.ones_like(tokens)
        more = {
            "input_ids": tokens,
            "attention_mask": ones,
            "token_type_ids": self.first_type * ones,
            "mm_token_type_ids": 0 * ones,
            "moe_mm_token_type_ids": 0 * ones,
        }
        grown = {name: torch.cat([inputs[name], last], 1) for name, last in more.items() if name in inputs}
        return {**inputs, **grown}
