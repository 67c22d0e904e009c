"""LLaVA models of random weights, and prompts of a number of visual tokens."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)

IMAGE, TEXT = 999, 40
GRIDS = {144: (1, 12), 576: (1, 24), 2880: (5, 24), 6272: (8, 28)}
"""Images, and patches along a side of each, by number of visual tokens."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA.

    Attributes:
        width, layers, heads, inner: of its decoder.
        tower: width, layers, heads and inner width of its vision tower.
        patch: pixels along a side of a patch.
    """

    width: int
    layers: int
    heads: int
    inner: int
    tower: tuple[int, int, int, int]
    patch: int


SHAPES = {
    "tiny": Shape(64, 4, 4, 128, (32, 2, 4, 64), 4),  # for tests
    "small": Shape(512, 12, 8, 1376, (64, 2, 4, 128), 4),  # a prefill of 616 rows takes half a second or more on a core
    "wide": Shape(2048, 6, 16, 5504, (64, 2, 4, 128), 4),  # half as wide as LLaVA-1.5-7B's, a prefill takes ten seconds
    "7b": Shape(4096, 32, 32, 11008, (1024, 24, 16, 4096), 14),  # LLaVA-1.5-7B; 2,880 tokens are LLaVA-NeXT's number
}


def llava(
    name: str, tokens: int, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> LlavaForConditionalGeneration:
    """Return a LLaVA of random weights that reads images of the sizes of `GRIDS[tokens]`."""
    shape = SHAPES[name]
    width, depth, heads, inner = shape.tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=inner,
        image_size=GRIDS[tokens][1] * shape.patch,
        patch_size=shape.patch,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=8192,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return of_random_weights(LlavaForConditionalGeneration, config, device, dtype)


def of_random_weights(kind: type[Model], config: Any, device: torch.device, dtype: torch.dtype) -> Model:
    """Return a model of random weights, made on a device in `dtype`, the same each time."""
    torch.manual_seed(0)
    with device:
        return kind._from_config(config, dtype=dtype).eval()


def prompt(model: LlavaForConditionalGeneration, tokens: int, batch: int, text: int = TEXT) -> dict[str, Any]:
    """Return arguments of the model's call: `batch` samples of so many visual tokens and rows of text."""
    images, _ = GRIDS[tokens]
    side, device = model.config.vision_config.image_size, model.device
    torch.manual_seed(1)
    ids = torch.randint(3, 900, (batch, tokens + text), device=device)
    ids[:, 4 : 4 + tokens] = IMAGE
    pixels = torch.randn(batch * images, 3, side, side, device=device, dtype=model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
