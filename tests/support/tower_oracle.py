"""What a vision tower shows of one image, or frame, that it reads alone: an oracle that regroups nothing.

Attention maps are computed of the queries and keys that torch itself was given. The patches of a token are those on
which its features depend, by their gradient. Nothing of the package is used here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.oracles import Inputs


@dataclass
class Alone:
    """One image, or frame, T tokens; a token without patches, a [CLS], gets 0.

    Attributes:
        attention: of each block that attends to the whole image, [H, T].
        keys: of each block, [D, T].
    """

    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)


def alone(
    model: PreTrainedModel,
    tower: str,
    blocks: Callable[[Any], Sequence[nn.Module]],
    inputs: Inputs,
    has_class: bool,
    whole: Sequence[int] | None,
) -> Alone:
    """Return what an image's tokens get in each block of a tower when the model's tower reads that image alone.

    Args:
        model: the model, under sdpa.
        tower: name of the tower in the model below the head.
        blocks: returns the blocks of a tower, up to the one whose output is projected.
        inputs: the image's, or frame's, tensors.
        has_class: True if the first row is [CLS].
        whole: the blocks that attend to the whole image; None: all.
    """
    below: Any = model.base_model
    kind = "video" if "pixel_values_videos" in inputs else "image"
    layers = list(blocks(getattr(below, tower)))
    with torch.enable_grad(), ExitStack() as undo:
        states: list[Tensor] = []
        seen = undo.enter_context(attended(layers))
        hook = layers[-1].register_forward_hook(lambda module, args, output: states.append(_first(output)))
        undo.callback(hook.remove)
        (pixels,) = (value for name, value in inputs.items() if name.startswith("pixel_values"))  # names differ
        sizes = {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}
        features = getattr(below, f"get_{kind}_features")(pixels, **sizes).pooler_output
        flat = torch.cat([part.flatten(0, -2) for part in features]) if not isinstance(features, Tensor) else features
        patches = _patches(flat.flatten(0, -2), states[0], has_class)
    found = Alone()
    for number, calls in enumerate(seen):
        keys = torch.cat([key for _, key in calls], 2)[0].mean(0)[int(has_class) :]
        found.keys.append(torch.stack([keys[own].sum(0) / max(1, len(own)) for own in patches], 1))
        if whole is not None and number not in whole:
            continue
        ((maps, _),) = calls
        paid = maps[0, :, 0, 1:] if has_class else maps[0].mean(1)
        found.attention.append(torch.stack([paid[:, own].sum(1) / max(1, len(own)) for own in patches], 1))
    return found


def _first(output: Any) -> Tensor:
    state: Tensor = output if isinstance(output, Tensor) else output[0]
    state.retain_grad()
    return state


@contextmanager
def attended(layers: Sequence[nn.Module]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Yield, for each block, maps [1, H, N, N] and keys [1, H, N, D] of each call of torch's attention in it."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    inside: list[int] = []
    own = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if inside:
            shared = key.detach().repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = query.detach() @ shared.transpose(-1, -2) * kwargs["scale"]
            mask = kwargs.get("attn_mask")
            if mask is not None:
                logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
            seen[inside[-1]].append((logits.softmax(-1), key.detach()))
        return own(query, key, *args, **kwargs)

    with ExitStack() as undo:
        for number, layer in enumerate(layers):
            before = layer.register_forward_pre_hook(lambda module, args, number=number: inside.append(number))
            after = layer.register_forward_hook(lambda module, args, output: inside.clear())
            undo.callback(before.remove)
            undo.callback(after.remove)
        nn.functional.scaled_dot_product_attention = attention
        undo.callback(setattr, nn.functional, "scaled_dot_product_attention", own)
        yield seen


def _patches(features: Tensor, states: Tensor, has_class: bool) -> list[Tensor]:
    """Return the patches that each token is made of: of each int64 [patches]."""
    weights = torch.randn(features.shape[1], dtype=features.dtype, generator=torch.Generator().manual_seed(0))
    found = []
    for feature in features:
        (gradient,) = torch.autograd.grad(feature @ weights, states, retain_graph=True)
        gradient = gradient.flatten(0, -2)[int(has_class) :]
        found.append((gradient.abs().sum(1) > 0).nonzero()[:, 0])
    return found
