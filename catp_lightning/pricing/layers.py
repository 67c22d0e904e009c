"""FLOPs and cached bytes of the layers of a language model, as functions of the rows that they read."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from catp_lightning.errors import PruningError
from catp_lightning.models import Family
from catp_lightning.models.mllama import Mllama

ENDLESS = 2**62  # most rows that a cache layer without a window holds


@dataclass(frozen=True)
class Work:
    """FLOPs of a layer in which `queries` rows attend to `keys` rows; in self-attention both are the same rows.

    They are `per_query * queries + per_key * keys + per_pair * queries * keys`; a multiplication with its addition is
    two.

    Attributes:
        per_query: products of one row with weights, except those that make keys and values of other rows.
        per_key: products that make one row's keys and values, where these are of other rows.
        per_pair: attention of one query to one key, over all heads.
        per_reading: products that make a query of one row, and the row of what it found, where attention is to other
            rows; else 0.
    """

    per_query: int
    per_key: int
    per_pair: int
    per_reading: int = 0


@dataclass(frozen=True)
class Stored:
    """What a layer caches: `row_bytes` for the keys and values of each row, of `most` rows at most."""

    row_bytes: int
    most: int = ENDLESS


@dataclass(frozen=True)
class Layer:
    """Layer of a language model.

    Attributes:
        counted: module whose work is counted: the layer, or its attention alone.
        attention: its attention module.
        crosses: names in `attention` of what makes keys and values of rows of an image or encoder; (): self-attention.
    """

    counted: nn.Module
    attention: Any
    crosses: tuple[str, ...] = ()


def layers_of(family: Family) -> list[Layer]:
    """Return the layers of a model that read its prompt; behind an encoder's the attention of a decoder to its rows.

    Raises:
        PruningError: a layer has no attention.
    """
    if family.reads == "encoder":
        text: Any = family.language_model
        blocks = [Layer(block, block.layer[0].SelfAttention) for block in text.encoder.block]
        reading = [block.layer[1].EncDecAttention for block in text.decoder.block]
        return [*blocks, *(Layer(attention, attention, ("k", "v")) for attention in reading)]
    found = []
    for layer in family.decoder.get_submodule("layers").children():
        attention = getattr(layer, "self_attn", None)
        if isinstance(family, Mllama) and hasattr(layer, "cross_attn"):
            found.append(Layer(layer, layer.cross_attn, ("k_proj", "v_proj")))
        elif attention is not None:
            found.append(Layer(layer, attention))
        else:
            raise PruningError(
                f"{type(family.decoder).__name__} has layers with a recurrent state, whose FLOPs and bytes are not "
                "known here. Give the budget in tokens or tokens_per_layer."
            )
    return found


def work_of(family: Family) -> list[Work]:
    """Return the FLOPs of each of a family's layers.

    Raises:
        PruningError: there are weights of which it is not known how often a row is multiplied with them.
    """
    found = []
    for layer in layers_of(family):
        heads, query, value = _heads(family, layer.attention)
        made = sum(flops_per_row(getattr(layer.attention, name)) for name in layer.crosses)
        reading = flops_per_row(layer.attention) - made if layer.crosses else 0
        found.append(Work(flops_per_row(layer.counted) - made, made, 2 * heads * (query + value), reading))
    return found


def stored_by(family: Family) -> list[Stored]:
    """Return what each of a family's layers caches; in an encoder they cache nothing, and each of a decoder all of it.

    Raises:
        PruningError: a layer caches something else than keys and values.
    """
    dtype = getattr(family.decoder, "dtype", family.model.dtype)
    element, found = torch.empty(0, dtype=dtype, device="meta").element_size(), list[Stored]()
    empty: list[Any] = [] if family.reads == "encoder" else DynamicCache(config=family.decoder_config).layers
    for at, layer in enumerate(layers_of(family)):
        kind = type(empty[at]) if at < len(empty) else None  # layers that share another's keys may come last, unlisted
        if family.reads == "encoder":
            kind = DynamicLayer if layer.crosses else None
        held = kind in (DynamicLayer, DynamicSlidingWindowLayer)
        most = empty[at].sliding_window - 1 if kind is DynamicSlidingWindowLayer else ENDLESS
        found.append(Stored(element * _held(family, layer.attention) if held else 0, most))
    return found


def _held(family: Family, attention: Any) -> int:
    """Return how many numbers an attention module caches for a row."""
    if hasattr(attention, "expand_kv"):  # keys and values of all heads are made anew of two vectors
        return int(attention.kv_lora_rank) + int(attention.qk_rope_head_dim)
    heads, query, value = _heads(family, attention)
    return heads // int(getattr(attention, "num_key_value_groups", 1)) * (query + value)


def _heads(family: Family, attention: Any) -> tuple[int, int, int]:
    """Return the number of an attention module's heads, and of the numbers in a head's queries and in its values."""
    config = family.decoder_config
    heads = int(getattr(attention, "num_heads", None) or getattr(attention, "n_heads", config.num_attention_heads))
    width = getattr(attention, "head_dim", None) or getattr(
        attention, "key_value_proj_dim", config.hidden_size // heads
    )
    query, value = (int(getattr(attention, name, None) or width) for name in ("qk_head_dim", "v_head_dim"))
    return heads, query, value


def flops_per_row(part: nn.Module) -> int:
    """Return the FLOPs of all products of one row with the weights of a part of a model.

    A row goes through each linear layer once, and through as many experts as the router chooses.

    Raises:
        PruningError: there are weights of which it is not known how often a row is multiplied with them.
    """
    total = 0
    routers, experts = list[Any](), list[Any]()
    for module in part.modules():
        weights = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.dim() > 1}
        if isinstance(module, nn.Linear):
            total += 2 * module.in_features * module.out_features
        elif isinstance(getattr(module, "top_k", None), int) and [*weights] == ["weight"]:
            routers.append(module)
            total += 2 * weights["weight"].numel()
        elif isinstance(getattr(module, "num_experts", None), int) and weights:
            experts.append(module)
        elif weights and not isinstance(module, nn.Embedding):
            raise _unknown(part, f"weights {', '.join(sorted(weights))} in a {type(module).__name__}")
    if len(experts) > 1 or len(routers) != len(experts):
        raise _unknown(part, f"{len(experts)} sets of experts with {len(routers)} routers")
    for router, each in zip(routers, experts, strict=True):
        of_all = sum(weight.numel() for weight in each.parameters(recurse=False) if weight.dim() == 3)
        total += 2 * int(router.top_k) * of_all // int(each.num_experts)
    return total


def _unknown(part: nn.Module, what: str) -> PruningError:
    return PruningError(
        f"{type(part).__name__} has {what}, and it is not known how often a row of the prompt is multiplied with them: "
        "FLOPs cannot be counted exactly. Give the budget in tokens, tokens_per_layer or cache_bytes."
    )
