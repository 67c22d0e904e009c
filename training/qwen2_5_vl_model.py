"""The small Qwen2.5-VL before it is trained, its processor, and what its language model is trained by."""

import torch
from common import EOS, PAD, Batches, build_tokenizer
from qwen2_5_vl_batches import (
    BEFORE,
    BOS,
    END,
    FRAMES,
    GRIDS,
    IMAGE,
    MERGE,
    PATCH,
    SIDE,
    START,
    VIDEO,
    Packed,
    by_token,
    pack,
    patches,
)
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from catp_lightning.data.scenes import CELL

VISION, TEXT, LAYERS, PLACED = 64, 64, 12, 3  # widths; decoder layers; the one after which tokens know their place
RARE = [0.1] + 10 * [1.0]  # weights: most tokens show no digit


def build_processor() -> PaddleOCRVLProcessor:
    """Return a processor that places images as Qwen2.5-VL's own, which cannot be made without torchvision (videos)."""
    special = {"image_token": IMAGE, "video_token": VIDEO, "vision_start_token": START, "vision_end_token": END}
    tokenizer = build_tokenizer(IMAGE, BOS, ("user", "picture", "10"), **special)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")  # Qwen puts no token first
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES,
        size={"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": (SIDE * CELL) ** 2},  # numbers of pixels
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return PaddleOCRVLProcessor(images, tokenizer)


def build_model(processor: PaddleOCRVLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    ids = processor.tokenizer.get_vocab()
    special = {"pad_token_id": ids[PAD], "bos_token_id": ids[BOS], "eos_token_id": ids[EOS]}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": VISION,
            "intermediate_size": 2 * VISION,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": 4 * PATCH * MERGE,  # four tokens a side, as in the released models
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": TEXT,
        },
        text_config={
            "vocab_size": len(ids),
            "hidden_size": TEXT,
            "intermediate_size": 2 * TEXT,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            # The last frequencies are the columns': at the usual base they would hardly turn over twenty tokens. After
            # 250 steps 93% of visual tokens know their place; at base 100 it was 69%, at 500 21%.
            "rope_parameters": {"rope_type": "default", "rope_theta": 8.0, "mrope_section": [2, 3, 3]},
            **special,
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[START],
        vision_end_token_id=ids[END],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **special)
    # At the usual deviation of 0.02 a word's embedding drowns in the output of attention.
    nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    tower = model.model.visual
    nn.init.normal_(tower.patch_embed.proj.weight, std=(3 * FRAMES * PATCH**2) ** -0.5)
    for layer in (tower.merger.mlp[0], tower.merger.mlp[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model


class PlaceHead(nn.Module):
    """Head that reads rows and columns of cells from hidden states: a visual token's own, and those a question names.

    One head for both puts them where one attention finds the token that was asked for. It reads a token's digit too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(TEXT), nn.Linear(TEXT, 2 * SIDE + 11)

    def loss(self, hidden: Tensor, cells: Tensor, kept: Tensor) -> tuple[Tensor, float]:
        """Return the cross-entropy of all three, and the share of tokens whose row and column are read right.

        hidden [B, K, D] at the tokens `kept` [B, K] of scenes with `cells` [B, R, C].
        """
        rows, columns = cells.shape[1:]
        places = torch.arange(rows * columns).view(1, rows, columns).expand_as(cells)
        place, digit = by_token(places).gather(1, kept), by_token(cells).gather(1, kept)
        row, column, shown = self.read(self.norm(hidden)).flatten(0, 1).split([SIDE, SIDE, 11], -1)
        loss = F.cross_entropy(row, place.flatten() // columns) + F.cross_entropy(column, place.flatten() % columns)
        right = row.argmax(-1) * columns + column.argmax(-1) == place.flatten()
        return loss + digit_loss(shown, digit.flatten()), right.float().mean().item()

    def asked_loss(self, hidden: Tensor, asked: Tensor) -> Tensor:
        """Return the cross-entropy of the row and column that questions name; hidden [B, T, D], asked [B, T, 2]."""
        named = asked[..., 0] >= 0
        row, column, _ = self.read(self.norm(hidden[named])).split([SIDE, SIDE, 11], -1)
        return F.cross_entropy(row, asked[named][:, 0]) + F.cross_entropy(column, asked[named][:, 1])


def digit_loss(read: Tensor, digit: Tensor) -> Tensor:
    return F.cross_entropy(read, digit, weight=torch.tensor(RARE))


def hidden_states(
    model: Qwen2_5_VLForConditionalGeneration, before: list[int], image: Tensor, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states in the middle, of visual tokens [B, K, D] and text [B, T, D], and the text's last ones."""
    embed, count, kept = model.get_input_embeddings(), len(image), image.shape[1]
    start = embed(torch.tensor(before)).expand(count, -1, -1)
    output = model.model.language_model(
        inputs_embeds=torch.cat([start, image, embed(packed.ids)], 1),
        attention_mask={"full_attention": packed.mask},
        position_ids=packed.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    shown = slice(len(before), len(before) + kept)
    middle = output.hidden_states[PLACED]
    return middle[:, shown], middle[:, shown.stop :], output.last_hidden_state[:, shown.stop :]


def answer_loss(model: Qwen2_5_VLForConditionalGeneration, hidden: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of answer and end, and that of the answer at the last words of the question."""
    answered, early = packed.targets >= 0, packed.early >= 0
    return (
        F.cross_entropy(model.lm_head(hidden[answered]), packed.targets[answered]),
        F.cross_entropy(model.lm_head(hidden[early]), packed.early[early]),
    )


@torch.no_grad()
def check_batches(model: Qwen2_5_VLForConditionalGeneration, processor: PaddleOCRVLProcessor, batches: Batches) -> None:
    """Raise RuntimeError unless batches, built by hand for speed, are what processor and model make of the scenes."""
    for rows, columns in GRIDS:
        pixels, cells = batches.scenes(1, rows, columns)
        packed = pack(batches, ["which digit"], torch.arange(by_token(cells).shape[1])[None], rows, columns)
        text = BEFORE + IMAGE + processor.decode(packed.ids[0, :-1])
        image = batches.drawn[0].image[..., None].repeat(3, -1)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        values, grid = patches(pixels)
        places, _ = model.model.get_rope_index(
            inputs.input_ids, inputs.mm_token_type_ids, inputs.image_grid_thw, attention_mask=inputs.attention_mask
        )
        whole = model(**inputs).logits[0, -1]
        features = model.model.visual(values, grid_thw=grid).pooler_output[None]
        *_, hidden = hidden_states(model, batches.tokens(BEFORE), features, packed)
        if not (
            torch.equal(inputs.image_grid_thw, grid)
            and torch.allclose(inputs.pixel_values, values, atol=1e-6)
            and torch.equal(places, packed.positions[:, :, :-1])
            and torch.allclose(whole, model.lm_head(hidden[0, -2]), atol=1e-4)
        ):
            raise RuntimeError(
                f"Processor and model make other batches of {rows} x {columns} cells than those trained on."
            )
