"""Small random models of every family, and prompts for them: the rows of the matrix in test_families.py."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from tests.support.oracles import END, IMAGE, PAD, START, VIDEO, CrossAttention, Decoder, EncoderDecoder, Inputs, Oracle

TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,  # answers have the length they are asked for
    "max_position_embeddings": 256,
}
GATED: dict[str, Any] = {**TEXT, "intermediate_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 2}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
TOKENS: dict[str, int] = {"image_token_index": IMAGE}


@dataclass(frozen=True)
class Image:
    """An image or a video: `tokens` placeholders in a prompt, and its tensors without a batch dimension."""

    tokens: int
    tensors: Mapping[str, Tensor]
    placeholder: int = IMAGE


@dataclass(frozen=True)
class Sample:
    """A prompt without padding; `pads_at` is the index at which padding is inserted."""

    ids: list[int]
    images: Sequence[Image]
    pads_at: int = 0


def random_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(
    images: Sequence[Sequence[Image]], before: tuple[int, ...] = (5, 3, 4, 6), wrap: tuple[int, ...] = ()
) -> list[Sample]:
    """Return samples of mixed length, with text before their images, between and after them.

    `before`: words before the first image of each sample; `wrap`: tokens at the start and end of each image.
    """
    generator = torch.Generator().manual_seed(7)
    samples = []
    for row, own in enumerate(images):
        ids = _words(before[row], generator)
        for image in own:
            ids += [*wrap[:1], *[image.placeholder] * image.tokens, *wrap[1:], *_words(2, generator)]
        samples.append(Sample(ids + _words((6, 4, 7, 5)[row], generator), own))
    return samples


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 90, (count,), generator=generator).tolist()


def pictures(tokens: int = 9, shape: tuple[int, ...] = (3, 24, 24), each: tuple[int, ...] = (1, 2, 1, 0)) -> list[Any]:
    """Return images of one size for each sample; `each` is the number of images of the samples."""
    seeds = iter(range(100))
    return [[Image(tokens, {"pixel_values": random_numbers(*shape, seed=next(seeds))}) for _ in range(n)] for n in each]


def text_inputs(samples: Sequence[Sample], pads: int) -> Inputs:
    """Return ids and mask int64 [B, L], padded to the longest sample and by `pads` more columns."""
    length = max(len(sample.ids) for sample in samples) + pads
    ids, mask = [], []
    for sample in samples:
        at, more = sample.pads_at, length - len(sample.ids)
        ids.append(sample.ids[:at] + [PAD] * more + sample.ids[at:])
        mask.append([1] * at + [0] * more + [1] * (len(sample.ids) - at))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors, smaller ones padded with zeros at the end of each dimension."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    fill = [[n for size, own in zip(shape, t.shape, strict=True) for n in (size - own, 0)][::-1] for t in tensors]
    return torch.stack([pad(tensor, gaps) for tensor, gaps in zip(tensors, fill, strict=True)])


def each_image(samples: Sequence[Sample], text: Inputs, join: Callable[..., Tensor] = stacked) -> Inputs:
    """Return the tensors of all images of a batch, one image after the other, whatever their samples."""
    images = [image for sample in samples for image in sample.images]
    names = dict.fromkeys(name for image in images for name in image.tensors)
    found = {name: [image.tensors[name] for image in images if name in image.tensors] for name in names}
    return {name: (join if name.startswith("pixel_values") else stacked)(values) for name, values in found.items()}


def each_sample(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return pixels by sample, as Idefics3 takes them: samples with fewer images are filled up with images of zeros."""
    own = [[image.tensors["pixel_values"] for image in sample.images] for sample in samples]
    size = next((pixels[0].shape for pixels in own if pixels), None)
    if size is None:
        return {}
    return {"pixel_values": stacked([torch.stack(pixels) if pixels else torch.zeros(1, *size) for pixels in own])}


def with_types(samples: Sequence[Sample], text: Inputs, name: str, join: Callable[..., Tensor] = stacked) -> Inputs:
    """Return the tensors of all images, and as `name` the type of each token: 0 text, 1 image, 2 video."""
    types = (text["input_ids"] == IMAGE).long() + 2 * (text["input_ids"] == VIDEO)
    return {**each_image(samples, text, join), name: types}


def with_counts(samples: Sequence[Sample], text: Inputs) -> Inputs:
    images = each_image(samples, text)
    counts = [sum(image.placeholder == IMAGE for image in sample.images) for sample in samples]
    return {**images, "batch_num_images": torch.tensor(counts)} if sum(counts) else images


def all_prefix(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return PaliGemma's tensors: all images, and token types that put every token of a prompt into the prefix."""
    return {**each_image(samples, text), "token_type_ids": torch.zeros_like(text["input_ids"])}


def tiles(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return Mllama's tensors: images [B, 2, 4 tiles, ...], and the tiles each text row sees, int64 [B, L, 2, 4].

    Always two images a sample: text that sees no image attends to every row the plain model has, those of missing
    images included.
    """
    batch, length = text["input_ids"].shape
    pixels, ratio = torch.zeros(batch, 2, 4, 3, 16, 16), torch.zeros(batch, 2, dtype=torch.long)
    present, sees = torch.zeros(batch, 2, 4, dtype=torch.long), torch.zeros(batch, length, 2, 4, dtype=torch.long)
    present[..., 0] = 1  # as the processor marks a missing image
    for row, sample in enumerate(samples):
        for index, image in enumerate(sample.images):
            pixels[row, index], ratio[row, index] = image.tensors["pixel_values"], image.tensors["ratio"]
            present[row, index] = image.tensors["present"]
            sees[row, length - len(sample.ids) :, index] = image.tensors["sees"]
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio,
        "aspect_ratio_mask": present,
        "cross_attention_mask": sees,
    }


def tiled(length: int, start: int, end: int, used: int, seed: int) -> Image:
    """Return an image of `used` tiles that text sees from column `start` to `end`, exclusive, of `length` columns."""
    sees, present = torch.zeros(length, 4, dtype=torch.long), (torch.arange(4) < used).long()
    sees[start:end] = present
    pixels = random_numbers(4, 3, 16, 16, seed=seed) * present[:, None, None, None]
    return Image(1, {"pixel_values": pixels, "ratio": torch.tensor(used), "present": present, "sees": sees})


def mllama_samples(*images: Sequence[tuple[int, int, int]]) -> list[Sample]:
    """Return samples of 10 to 13 tokens; an image is (its column, end of the columns that see it, number of tiles)."""
    generator = torch.Generator().manual_seed(7)
    samples = []
    for row, own in enumerate(images):
        ids = _words(10 + row, generator)
        for start, _, _ in own:
            ids[start] = IMAGE
        found = [tiled(len(ids), *place, seed=10 * row + index) for index, place in enumerate(own)]
        samples.append(Sample(ids, found))
    return samples


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
        lacks: test function's name -> why this family does not have what it tests.
    """

    name: str
    make: Callable[[], PreTrainedModel]
    samples: Callable[[], list[Sample]]
    oracle: Oracle
    join: Callable[[Sequence[Sample], Inputs], Inputs] = each_image
    attention: str = "sdpa"
    rounding: float = 0.0
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
        return max(1e-10 if (attention or self.attention) == "sdpa" else 5e-6, self.rounding * moved)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


@cache
def _model(row: Row, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = row.make().eval()
        _scale_up(model)
        model.to(dtype).set_attn_implementation(attention)
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


# --- LLaVA and its kin


def clip(**changes: Any) -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**{**TOWER, **changes})


def siglip(**changes: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**{**TOWER, "vision_use_head": False, **changes})


def llava() -> PreTrainedModel:
    config = hf.LlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**GATED), **TOKENS)
    return hf.LlavaForConditionalGeneration(config)


def vip_llava() -> PreTrainedModel:
    config = hf.VipLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**GATED), vision_feature_layers=[-1, -2, 1], **TOKENS
    )
    return hf.VipLlavaForConditionalGeneration(config)


SMALL = {"image_size": 16, "patch_size": 8}  # 4 patches a crop
PINPOINTS = [[16, 32], [32, 32]]


def llava_next() -> PreTrainedModel:
    config = hf.LlavaNextConfig(
        vision_config=clip(**SMALL), text_config=hf.LlamaConfig(**GATED), image_grid_pinpoints=PINPOINTS, **TOKENS
    )
    return hf.LlavaNextForConditionalGeneration(config)


def crops(tokens: int, size: tuple[int, int], count: int, seed: int, side: int = 16) -> Image:
    """Return an image of a height and width as `count` crops, the first of them a small picture of the whole."""
    pixels = random_numbers(count, 3, side, side, seed=seed)
    return Image(tokens, {"pixel_values": pixels, "image_sizes": torch.tensor(size)})


def several_crops() -> list[list[Image]]:
    """Return LLaVA-NeXT's images: tokens are patches of the whole, those of crops without padding, a newline a row."""
    wide, tall, large = crops(14, (15, 32), 3, 0), crops(16, (32, 12), 5, 1), crops(24, (30, 30), 5, 2)
    return [[wide], [tall, crops(14, (16, 32), 3, 3)], [large], []]


def video(tokens: int, frames: int, side: int, seed: int) -> Image:
    pixels = random_numbers(frames, 3, side, side, seed=seed)
    return Image(tokens, {"pixel_values_videos": pixels}, VIDEO)


def llava_next_video() -> PreTrainedModel:
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(**SMALL),
        text_config=hf.LlamaConfig(**GATED),
        image_grid_pinpoints=PINPOINTS,
        video_token_index=VIDEO,
        **TOKENS,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config)


def llava_onevision() -> PreTrainedModel:
    config = hf.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=hf.Qwen2Config(**GATED),
        image_grid_pinpoints=[[24, 48], [48, 24]],
        vision_aspect_ratio="anyres_max_2",
        video_token_index=VIDEO,
        **TOKENS,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def onevision_images() -> list[list[Image]]:
    """Return LLaVA-OneVision's images: one of a sample is cut into crops; several are not, and have a newline each."""
    pair = [crops(10, (24, 24), 3, 1, 24), crops(10, (20, 24), 3, 2, 24)]
    return [[crops(30, (24, 48), 3, 0, 24)], pair, [crops(21, (48, 15), 3, 3, 24)], []]


def video_llava() -> PreTrainedModel:
    config = hf.VideoLlavaConfig(
        vision_config=clip(), text_config=hf.LlamaConfig(**GATED), video_token_index=VIDEO, **TOKENS
    )
    return hf.VideoLlavaForConditionalGeneration(config)


def video_llava_inputs(samples: Sequence[Sample], text: Inputs) -> Inputs:
    """Return Video-LLaVA's tensors; images were the argument pixel_values_images before transformers 5.2x."""
    inputs = each_image(samples, text)
    if "pixel_values" not in inspect.signature(hf.VideoLlavaForConditionalGeneration.forward).parameters:
        inputs = {name + "_images" * (name == "pixel_values"): tensor for name, tensor in inputs.items()}
    return inputs


# --- BLIP-2 and InstructBLIP

QFORMER = {**TOWER, "num_hidden_layers": 2, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
OPT = {**TEXT, "ffn_dim": 64, "num_hidden_layers": 3, "word_embed_proj_dim": 32}
T5 = {
    "vocab_size": 120,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "relative_attention_max_distance": 20,
}
QUERIES = 8


def blip(kind: str, text: Any, queries: int = QUERIES) -> PreTrainedModel:
    """Return a model of `kind` Blip2, InstructBlip or InstructBlipVideo."""
    part = partial(getattr, hf)
    qformer = {name: value for name, value in QFORMER.items() if name not in ("image_size", "patch_size")}
    placeholder = {"video_token_index": VIDEO} if kind.endswith("Video") else TOKENS
    config = part(f"{kind}Config")(
        vision_config=part(f"{kind}VisionConfig")(**{**TOWER, "num_hidden_layers": 2}).to_dict(),
        qformer_config=part(f"{kind}QFormerConfig")(**qformer, vocab_size=120).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        **placeholder,
    )
    return part(f"{kind}ForConditionalGeneration")(config)


def blip_samples(asked: bool = False, frames: int = 0, right: bool = False) -> list[Sample]:
    """Return samples as processors of BLIP-2 make them, which pad the text and put the image tokens before it.

    Pads stand between image and text, and where the tokenizer pads on the `right`, as T5's does, at the end.
    """
    generator = torch.Generator().manual_seed(7)
    samples = []
    for row, length in enumerate((6, 9, 7)):
        tensors = {"pixel_values": random_numbers(*([frames] if frames else []), 3, 24, 24, seed=row)}
        if asked:
            question = torch.randint(3, 90, (3 + row,), generator=generator)
            tensors |= {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}
        image = Image(QUERIES, tensors, VIDEO if frames else IMAGE)
        ids = [image.placeholder] * QUERIES + _words(length, generator)
        samples.append(Sample(ids, [image], pads_at=len(ids) if right else QUERIES))
    return samples


# --- Llama-3.2-Vision


def mllama() -> PreTrainedModel:
    vision = MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        image_size=16,
        patch_size=8,
        max_num_tiles=4,
        vision_output_dim=64,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2], [2, 1], [2, 2]],
    )
    text = MllamaTextConfig(
        **{**GATED, "num_hidden_layers": 6},
        cross_attention_layers=[1, 3, 5],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = hf.MllamaConfig(vision_config=vision, text_config=text, **TOKENS)
    return hf.MllamaForConditionalGeneration(config)


# --- Qwen-VL

QWEN: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
PATCHES = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4}


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(text_config={**GATED, "rope_parameters": ROTARY}, vision_config=vision, **QWEN)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> PreTrainedModel:
    vision = {**PATCHES, "depth": 4, "window_size": 16, "fullatt_block_indexes": [1, 3], "out_hidden_size": 32}
    config = hf.Qwen2_5_VLConfig(text_config={**GATED, "rope_parameters": ROTARY}, vision_config=vision, **QWEN)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> PreTrainedModel:
    deep = {"depth": 4, "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    text = {**GATED, "head_dim": 8, "rope_parameters": {**ROTARY, "mrope_interleaved": True}}
    config = hf.Qwen3VLConfig(text_config=text, vision_config={**PATCHES, **deep}, **QWEN)
    return hf.Qwen3VLForConditionalGeneration(config)


def grid(time: int, height: int, width: int, seed: int, patch: tuple[int, ...] = (96,), side: int = 2) -> Image:
    """Return an image, or if `time` is above 1 a video, as rows of patches; `side` squared of them make a token."""
    kind = ("pixel_values_videos", "video_grid_thw") if time > 1 else ("pixel_values", "image_grid_thw")
    patches = random_numbers(time * height * width, *patch, seed=seed)
    tensors = dict(zip(kind, (patches, torch.tensor([time, height, width])), strict=True))
    return Image(time * height * width // side**2, tensors, VIDEO if time > 1 else IMAGE)


def apart(video: Image) -> list[Image]:
    """Return the frames of a video as images, with text between them; the first one has all tensors."""
    frames = int(video.tensors["video_grid_thw"][0])
    own = [video.tensors, *({} for _ in range(frames - 1))]
    return [Image(video.tokens // frames, tensors, video.placeholder) for tensors in own]


def grids(*last: Image, patch: tuple[int, ...] = (96,)) -> list[list[Image]]:
    return [[grid(1, 4, 6, 0, patch)], [grid(1, 4, 4, 1, patch), grid(1, 6, 4, 2, patch)], list(last), []]


# --- Other models with placeholders


def internvl() -> PreTrainedModel:
    vision = {**TOWER, "image_size": [24, 24], "patch_size": [4, 4]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**GATED), image_token_id=IMAGE, image_seq_length=9
    )
    return hf.InternVLForConditionalGeneration(config)


SLIDING = {
    "head_dim": 8,
    "sliding_window": 12,
    "query_pre_attn_scalar": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def gemma3(vocabulary: int = 120) -> PreTrainedModel:
    text = hf.Gemma3TextConfig(**{**GATED, **SLIDING, "vocab_size": vocabulary})
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=siglip(image_size=24, patch_size=4),
        mm_tokens_per_image=9,
        boi_token_index=START if vocabulary > START else 90,
        eoi_token_index=END if vocabulary > END else 91,
        **TOKENS,
    )
    return hf.Gemma3ForConditionalGeneration(config)


def paligemma(text: Any) -> PreTrainedModel:
    config = hf.PaliGemmaConfig(
        vision_config=siglip(projection_dim=32), text_config=text, projection_dim=32, hidden_size=32, **TOKENS
    )
    return hf.PaliGemmaForConditionalGeneration(config)


def idefics(kind: str) -> PreTrainedModel:
    """Return a model of `kind` Idefics3 or SmolVLM."""
    config = getattr(hf, f"{kind}Config")(
        vision_config={**TOWER, "patch_size": 4},
        text_config=hf.LlamaConfig(**GATED),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def mistral3(window: int | None = None) -> PreTrainedModel:
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=hf.MistralConfig(**GATED, head_dim=8, sliding_window=window),
        spatial_merge_size=2,
        **TOKENS,
    )
    return hf.Mistral3ForConditionalGeneration(config)


def pixtral() -> PreTrainedModel:
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**{**TOWER, "image_size": 64, "patch_size": 4}),
        text_config=hf.MistralConfig(**GATED, head_dim=8, sliding_window=None),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        **TOKENS,
    )
    return hf.LlavaForConditionalGeneration(config)


def sized(pixels_of_token: int) -> list[list[Image]]:
    """Return images of different sizes, with a token for each square of so many pixels a side."""

    def image(rows: int, columns: int, seed: int) -> Image:
        size = rows * pixels_of_token, columns * pixels_of_token
        tensors = {"pixel_values": random_numbers(3, *size, seed=seed), "image_sizes": torch.tensor(size)}
        return Image(rows * columns, tensors)

    return [[image(3, 4, 0)], [image(2, 2, 1), image(2, 3, 2)], [image(4, 3, 3)], []]


QWEN_INPUTS = partial(with_types, name="mm_token_type_ids", join=torch.cat)
TYPED = partial(with_types, name="token_type_ids")
WRAP = (START, END)
OPT_STACK = Decoder("language_model.model.decoder", "language_model")
LLAMA_STACK = Decoder("language_model.model", "language_model")
PREFIX = Decoder(first_position=1, first_type=1)
FIRST = (0, 0, 0, 0)  # PaliGemma's images come before all text


NO_POSITIONS = "transformers hands position ids given to forward to the Q-Former, which has no use for them and fails"
VIDEO_LACKS = {
    "a_loop_by_hand_without_a_cache_equals_generate": NO_POSITIONS,
    "a_decoding_loop_by_hand_equals_generate": NO_POSITIONS,
}
QWEN_LACKS = {
    "a_decoding_loop_by_hand_without_position_ids_equals_the_masked_loop": "transformers then makes position ids of "
    "the whole mask for the one new token, and fails unpruned as well",
}
MLLAMA_LACKS = {
    "embeddings_without_ids_are_refused": "its rows are found from cross_attention_mask, not from ids",
    "a_loop_by_hand_without_a_cache_equals_generate": "each call is a prompt of its own, whose first cross-attention "
    "layer reads every row; generated text reads what is cached",
}
OLDEST = hf.__version__.startswith("5.13.")
T5_ATTENTION = "eager" if OLDEST else "sdpa"  # transformers 5.13 knows no other for T5
STATIC = "a_static_cache_is_refused_where_it_would_hold_visual_tokens"
FAILS_BEFORE = "transformers fails before, unpruned as well: it makes masks of a static cache wrongly"
GEMMA3_LACKS = {STATIC: FAILS_BEFORE} if OLDEST else {}
UNCACHED = "in transformers 5.13 what is generated without a cache belongs to the prefix, unpruned as well"
PALIGEMMA_LACKS = {"decoding_without_a_cache_equals_cached_decoding": UNCACHED} if OLDEST else {}
GEMMA2_LACKS = {STATIC: FAILS_BEFORE, **PALIGEMMA_LACKS}
UNKNOWN_LACKS = {
    **GEMMA3_LACKS,
    "embeddings_without_ids_are_refused": "an id outside the vocabulary has no embedding to give",
}


def gemma2() -> Any:
    """Return a configuration of Gemma 2 without its cap on logits, which does not matter for dropping.

    Older transformers forget the cap in PaliGemma.
    """
    return hf.Gemma2Config(**{**GATED, **SLIDING, "final_logit_softcapping": None})


ROWS = [
    Row("Llava", llava, lambda: prompts(pictures()), Decoder()),
    Row("VipLlava", vip_llava, lambda: prompts(pictures()), Decoder()),
    Row("LlavaNext", llava_next, lambda: prompts(several_crops()), Decoder()),
    Row(
        "LlavaNextVideo",
        llava_next_video,
        lambda: prompts([[crops(14, (15, 32), 3, 0)], [video(6, 6, 16, 1)], []]),
        Decoder(),
    ),
    Row("LlavaOnevision", llava_onevision, lambda: prompts(onevision_images()), Decoder(), with_counts),
    Row(
        "LlavaOnevision-video",
        llava_onevision,
        lambda: prompts([[video(9, 2, 24, 0)], [crops(21, (48, 15), 3, 1, 24), video(9, 2, 24, 2)], []]),
        Decoder(),
        with_counts,
    ),
    Row(
        "VideoLlava",
        video_llava,
        lambda: prompts([pictures()[0], [video(20, 2, 24, 7)], [*pictures()[2], video(20, 2, 24, 8)]]),
        Decoder(),
        video_llava_inputs,
    ),
    Row("Blip2-OPT", partial(blip, "Blip2", hf.OPTConfig(**OPT)), blip_samples, OPT_STACK),
    Row(
        "Blip2-T5",
        partial(blip, "Blip2", hf.T5Config(**T5)),
        partial(blip_samples, right=True),
        EncoderDecoder(),
        attention=T5_ATTENTION,
    ),
    Row(
        "InstructBlip",
        partial(blip, "InstructBlip", hf.LlamaConfig(**GATED)),
        partial(blip_samples, asked=True),
        LLAMA_STACK,
    ),
    Row(
        "InstructBlip-T5",
        partial(blip, "InstructBlip", hf.T5Config(**T5)),
        partial(blip_samples, asked=True, right=True),
        EncoderDecoder(),
        attention=T5_ATTENTION,
    ),
    Row(
        "InstructBlipVideo",
        partial(blip, "InstructBlipVideo", hf.LlamaConfig(**GATED), QUERIES // 2),
        partial(blip_samples, asked=True, frames=2),
        LLAMA_STACK,
        lacks=VIDEO_LACKS,
    ),
    Row(
        "Mllama",
        mllama,
        lambda: mllama_samples([(0, 10, 1)], [(4, 11, 2)], [(2, 7, 1), (7, 12, 4)], [(5, 13, 2)]),
        CrossAttention(),
        tiles,
        lacks=MLLAMA_LACKS,
    ),
    Row(
        "Mllama, last text that sees no image",
        mllama,
        lambda: mllama_samples([(3, 10, 1)], [(2, 7, 2)], [(1, 12, 4), (2, 12, 1)], []),
        CrossAttention(),
        tiles,
        lacks=MLLAMA_LACKS,
    ),
    Row(
        "Qwen2-VL",
        qwen2_vl,
        lambda: prompts(grids(grid(2, 4, 4, 3)), wrap=WRAP),
        Decoder(coordinates=True),
        QWEN_INPUTS,
        lacks=QWEN_LACKS,
    ),
    Row(
        "Qwen2.5-VL",
        qwen2_5_vl,
        lambda: prompts(grids(grid(2, 4, 4, 3)), wrap=WRAP),
        Decoder(coordinates=True),
        QWEN_INPUTS,
        lacks=QWEN_LACKS,
    ),
    Row(
        "Qwen3-VL",
        qwen3_vl,
        lambda: prompts(grids(grid(1, 6, 6, 3)), wrap=WRAP),
        Decoder(coordinates=True),
        QWEN_INPUTS,
        lacks=QWEN_LACKS,
    ),
    Row("InternVL", internvl, lambda: prompts(pictures()), Decoder()),
    Row("Gemma3", gemma3, lambda: prompts(pictures(), wrap=WRAP), Decoder(), TYPED, lacks=GEMMA3_LACKS),
    Row(
        "Gemma3, image token outside the vocabulary",
        partial(gemma3, IMAGE),
        lambda: prompts(pictures(), wrap=(90, 91)),
        Decoder(),
        TYPED,
        lacks=UNKNOWN_LACKS,
    ),
    Row(
        "PaliGemma",
        lambda: paligemma(hf.GemmaConfig(**GATED, head_dim=8)),
        lambda: prompts(pictures(), FIRST),
        PREFIX,
        all_prefix,
        lacks=PALIGEMMA_LACKS,
    ),
    Row(
        "PaliGemma2",
        lambda: paligemma(gemma2()),
        lambda: prompts(pictures(), FIRST),
        PREFIX,
        all_prefix,
        attention="eager",  # transformers has Gemma 2's capped attention in no other form
        lacks=GEMMA2_LACKS,
    ),
    Row("SmolVLM", partial(idefics, "SmolVLM"), lambda: prompts(pictures()), Decoder("model.text_model"), each_sample),
    Row(
        "Idefics3", partial(idefics, "Idefics3"), lambda: prompts(pictures()), Decoder("model.text_model"), each_sample
    ),
    Row("Mistral3", mistral3, lambda: prompts(sized(8)), Decoder()),
    Row("Mistral3, sliding window", partial(mistral3, 12), lambda: prompts(sized(8)), Decoder()),
    Row("Pixtral", pixtral, lambda: prompts(sized(4)), Decoder()),
]

BY_NAME = {row.name: row for row in ROWS}
