"""Train the small LLaVA that ships with the package: about digit scenes, on one core, from nothing.

    python training/llava.py            # writes catp_lightning/data/digits_llava and training/llava.jsonl

Two stages, as LLaVA itself is trained on a finished CLIP: the vision tower learns to read, its patches which digit they
show and its [CLS] which digits are there at all; then the tower is left alone: projector and language model learn to
answer questions. Heads used on the way are thrown away. In half of the scenes of the second stage patches are left out
at random, as FLIP (arXiv 2212.00794) trains CLIP: without it the model counts digits by the share of attention that
falls on ink, and an answer depends on how much background there is.
"""

from pathlib import Path
from typing import Any

import torch
from common import (
    EOS,
    IMAGE,
    PAD,
    SEED,
    Batches,
    Group,
    Log,
    accuracy,
    arguments,
    augmented_pool,
    build_tokenizer,
    digits_present,
    minimise,
    question_and_answer_loss,
    save,
    split_language_model,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.cache_utils import DynamicCache

from catp_lightning.data.scenes import CELL
from catp_lightning.prompt.caches import cache_name

WIDTH = 96
CELLS, PATCH = 6, CELL // 2  # cells of a scene and pixels of a patch, a side
SIDE = 2 * CELLS  # patches a side
GRIDS = ((CELLS, CELLS),)
FEATURE_LAYER = -2  # as LLaVA-1.5
BOS = "<s>"
QUESTION = "Question: {} Short answer:"
PROMPT = f"{IMAGE} {QUESTION}"


def build_processor() -> LlavaProcessor:
    tokenizer = build_tokenizer(bos=BOS)
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    side, half = CELLS * CELL, [0.5] * 3
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return LlavaProcessor(
        CLIPImageProcessor(**size, image_mean=half, image_std=half),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    ids = processor.tokenizer.get_vocab()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=CELLS * CELL, patch_size=PATCH)
    text = LlamaConfig(
        **sizes,
        vocab_size=len(ids),
        max_position_embeddings=512,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=ids[IMAGE],
            image_seq_length=SIDE * SIDE,
            vision_feature_layer=FEATURE_LAYER,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )
    place_patches(model.model.vision_tower)
    # At the usual deviation of 0.02 a word's embedding drowns in the output of attention, and it takes thousands of
    # steps more until the digit, row or column that a question names makes a difference.
    nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    return model


@torch.no_grad()
def place_patches(tower: CLIPVisionModel) -> None:
    """Start the positions of patches as the sum of the cell's row, the cell's column and the place in the cell.

    A patch then finds the rest of its digit, and a question its cell, without learning 144 places one by one.
    """
    row, column, inside = (torch.randn(n, WIDTH) * 0.3 for n in (CELLS, CELLS, 4))
    cell, half = torch.arange(SIDE) // 2, torch.arange(SIDE) % 2
    places = row[cell][:, None] + column[cell][None] + inside[half[:, None] * 2 + half]
    tower.embeddings.position_embedding.weight[1:] = places.flatten(0, 1)


def make_summaries_look(tower: CLIPVisionModel) -> list[RemovableHandle]:
    """Make [CLS] gather what it needs in the last two blocks, whose attention is read later, and by every head.

    In each of the last two blocks, [CLS] enters a random half of the scenes as it entered the first block, and loses a
    random half of the heads. Otherwise it gathers in earlier blocks as well, and half of the heads learn to look at
    nothing. Returns the handles of the hooks.
    """

    def forget(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, embeddings = args[0], tower.embeddings
        first = tower.pre_layrnorm(embeddings.class_embedding + embeddings.position_embedding.weight[0])
        kept = torch.rand(len(hidden), 1) < 0.5
        return torch.cat([torch.where(kept, hidden[:, 0], first)[:, None], hidden[:, 1:]], 1), *args[1:]

    def drop_heads(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        kept = torch.rand(len(args[0]), tower.config.num_attention_heads, 1) < 0.5
        summary = (args[0][:, 0].unflatten(-1, (tower.config.num_attention_heads, -1)) * kept * 2).flatten(1)
        return torch.cat([summary[:, None], args[0][:, 1:]], 1)

    last = tower.encoder.layers[-2:]
    return [layer.register_forward_pre_hook(forget) for layer in last] + [
        layer.self_attn.out_proj.register_forward_pre_hook(drop_heads) for layer in last
    ]


class TowerHeads(nn.Module):
    """Heads that the tower is trained with: the digit of every patch's cell, and from [CLS] which digits there are."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11))
        self.summary = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10))
        self.last_summary = nn.Linear(WIDTH, 10)

    def loss(self, tower: CLIPVisionModel, pixels: Tensor, cells: Tensor) -> tuple[Tensor, float, float]:
        """Return the loss, the share of digits' patches read right and of scenes whose digits [CLS] names exactly."""
        output = tower(pixel_values=pixels, output_hidden_states=True)
        features = output.hidden_states[FEATURE_LAYER]
        digit = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten()
        read, named = self.patch(features[:, 1:]).flatten(0, 1), self.summary(features[:, 0])
        there = digits_present(cells.flatten(1)).float()
        rare = torch.tensor([0.1] + 10 * [1.0])  # nineteen patches in twenty show no digit
        loss = F.cross_entropy(read, digit, weight=rare) + F.binary_cross_entropy_with_logits(named, there)
        # [CLS] of the last layer too: LLaVA does not pass it on, but pruning methods read its attention.
        loss = loss + F.binary_cross_entropy_with_logits(self.last_summary(output.pooler_output), there)
        right = (read.argmax(-1) == digit)[digit > 0].float().mean().item()
        return loss, right, ((named > 0) == (there > 0)).all(-1).float().mean().item()


def leave_out(cells: Tensor) -> Tensor:
    """Return a mask of patches for the language model, int64 [B, SIDE * SIDE]: all, or a random share.

    cells [B, CELLS, CELLS], 0 for an empty one. Each digit keeps at least one of its four patches.
    """
    share = torch.rand(len(cells), 1, 1) * (torch.rand(len(cells), 1, 1) < 0.5)
    seen = torch.rand(len(cells), SIDE, SIDE) >= share
    one = F.one_hot(torch.randint(4, cells.shape), 4).bool() & (cells > 0)[..., None]
    one = one.unflatten(-1, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return (seen | one).flatten(1).long()


def answer_loss(
    model: LlavaForConditionalGeneration, pixels: Tensor, seen: Tensor, ids: Tensor, labels: Tensor
) -> Tensor:
    """Return the loss of several questions a scene, in one pass over the scene's first and image tokens.

    These see only themselves, so the questions of a scene share their keys and values.
    """
    language_model, pad = model.model.language_model, model.config.text_config.pad_token_id
    with torch.no_grad():
        features = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    image = model.model.multi_modal_projector(features[:, 1:])
    embed = model.get_input_embeddings()
    bos = embed(torch.full((len(image), 1), model.config.text_config.bos_token_id))
    cache, each = DynamicCache(config=language_model.config), len(ids) // len(image)
    start = torch.cat([bos, image], 1)
    seen = F.pad(seen, (1, 0), value=1)
    held = {cache_name(language_model.forward): cache}
    language_model(inputs_embeds=start, attention_mask=seen, use_cache=True, **held)
    cache.batch_repeat_interleave(each)
    # Padding stands before the first token in the processor's batches and here between image and text; counted without
    # it, positions are the same. Patches left out count: what stays keeps its position.
    text = (ids != pad).long()
    hidden = language_model(
        inputs_embeds=embed(ids),
        attention_mask=torch.cat([seen.repeat_interleave(each, 0), text], 1),
        position_ids=start.shape[1] + text.cumsum(1) - 1,
        use_cache=True,
        **held,
    ).last_hidden_state
    return question_and_answer_loss(model.lm_head(hidden[:, -7:-1]).float(), labels)


def check_batches(processor: LlavaProcessor, batches: Batches) -> None:
    """Raise RuntimeError unless batches, built by hand for speed, are what the processor makes of the same scene."""
    pixels, _ = batches.scenes(1, CELLS, CELLS)
    text = "How many digits are there?"
    inputs = processor(
        images=[batches.drawn[0].image[..., None].repeat(3, -1)], text=[PROMPT.format(text)], return_tensors="pt"
    )
    ids = processor.tokenizer.get_vocab()
    expected = [ids[BOS], *SIDE * SIDE * [ids[IMAGE]], *batches.tokens(QUESTION.format(text))]
    if inputs.input_ids[0].tolist() != expected or not torch.allclose(inputs.pixel_values, pixels, atol=1e-6):
        raise RuntimeError("The processor makes other batches than those trained on.")


def train(output: Path, log_path: Path, tower_steps: int, steps: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    processor = build_processor()
    model, heads = build_model(processor).train(), TowerHeads()
    batches = Batches(processor.tokenizer, QUESTION, augmented_pool(24, SEED), SEED, special=False)
    check_batches(processor, batches)
    log = Log(log_path)
    log.note(seed=SEED, parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    matrices, others = split_language_model(model.model.language_model)
    adam = torch.optim.AdamW

    def read(step: int) -> Tensor:
        loss, right, named = heads.loss(tower, *batches.scenes(64, CELLS, CELLS))
        if step % 100 == 0 or step == tower_steps:
            log.note(stage="tower", step=step, loss=round(loss.item(), 4), read=round(right, 4), named=round(named, 4))
        return loss

    def answer(step: int) -> Tensor:
        pixels, cells = batches.scenes(32, CELLS, CELLS)
        loss = answer_loss(model, pixels, leave_out(cells), *batches.questions())
        if step % 100 == 0 or step == steps:
            log.note(stage="answers", step=step, loss=round(loss.item(), 4))
        return loss

    def measure(step: int) -> None:
        if step % 250 == 0:
            calibration = accuracy(model, processor, PROMPT, "calibration", 400, 1, GRIDS)
            log.note(stage="answers", step=step, calibration=calibration)
            save(model, processor, output)  # a long run that is stopped leaves something to look at

    handles = make_summaries_look(tower)
    minimise(read, [(adam, [*tower.parameters(), *heads.parameters()], 2e-3)], tower_steps, lambda step: None)
    for handle in handles:
        handle.remove()
    save(model, processor, output)
    groups: list[Group] = [(adam, [*others, *projector.parameters()], 2e-3), (torch.optim.Muon, matrices, 2e-2)]
    minimise(answer, groups, steps, measure)
    log.note(test_questions=2000, test=accuracy(model, processor, PROMPT, "test", 2000, 2, GRIDS))
    save(model, processor, output)


if __name__ == "__main__":
    a = arguments(__doc__, "llava", tower_steps=1200, steps=2200)
    train(a.output, a.log, a.tower_steps, a.steps)
