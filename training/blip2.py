"""Train the small BLIP-2 that ships with the package: about digit scenes, on one core, from nothing.

    python training/blip2.py            # writes catp_lightning/data/digits_blip2 and training/blip2.jsonl

Three stages, as BLIP-2 itself is trained in stages: the vision tower learns to read the cells, the Q-Former learns to
pass on what the tower reads, then everything learns to answer questions. Heads used on the way are thrown away.
"""

from pathlib import Path

import torch
from common import (
    EOS,
    IMAGE,
    PAD,
    SEED,
    Batches,
    Group,
    Log,
    Reader,
    accuracy,
    arguments,
    augmented_pool,
    build_tokenizer,
    minimise,
    question_and_answer_loss,
    save,
    split_language_model,
)
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
)
from transformers.cache_utils import DynamicCache

from catp_lightning.data.scenes import CELL, GRID
from catp_lightning.prompt.caches import cache_name

WIDTH, QUERIES = 96, 32
PROMPT = "Question: {} Short answer:"


def build_processor() -> Blip2Processor:
    side = {"height": GRID * CELL, "width": GRID * CELL}
    images = BlipImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Blip2Processor(images, build_tokenizer(), num_query_tokens=QUERIES)


def build_model(processor: Blip2Processor) -> Blip2ForConditionalGeneration:
    ids = processor.tokenizer.get_vocab()
    vision = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=GRID * CELL,
        patch_size=CELL,
        initializer_range=0.02,  # the default, 1e-10, never gets going
    )
    qformer = Blip2QFormerConfig(
        vocab_size=len(ids),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=8,
        num_attention_heads=4,
        cross_attention_frequency=2,
        encoder_hidden_size=WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
    )
    text = OPTConfig(
        vocab_size=len(ids),
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=ids[PAD],
        bos_token_id=ids[EOS],
        eos_token_id=ids[EOS],
    )
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=vision.to_dict(),
            qformer_config=qformer.to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=QUERIES,
            image_token_index=ids[IMAGE],
        )
    )
    nn.init.normal_(model.query_tokens, std=0.5)  # zeros by default: all queries would stay alike
    # At the usual deviation of 0.02 a word's embedding drowns in the output of attention, and it takes thousands of
    # steps more until the digit, row or column that a question names makes a difference.
    for name, weight in model.language_model.named_parameters():
        if "embed" in name:
            nn.init.normal_(weight, std=0.2)
    nn.init.normal_(model.language_projection.weight, std=WIDTH**-0.5)
    return model


def answer_loss(model: Blip2ForConditionalGeneration, queries: Tensor, ids: Tensor, labels: Tensor, pad: int) -> Tensor:
    """Return the loss of several questions a scene, in one pass over the scene's image tokens.

    Image tokens come first and see only themselves, so the questions of a scene share their keys and values.
    """
    image = model.language_projection(queries)
    cache, each = DynamicCache(config=model.language_model.config), len(ids) // len(image)
    decoder = model.language_model.model
    held = {cache_name(decoder.forward): cache}
    decoder(
        inputs_embeds=image,
        attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
        use_cache=True,
        **held,
    )
    cache.batch_repeat_interleave(each)
    mask = torch.cat([torch.ones(len(ids), image.shape[1], dtype=torch.long), (ids != pad).long()], 1)
    hidden = decoder(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, use_cache=True, **held
    ).last_hidden_state
    return question_and_answer_loss(model.language_model.lm_head(hidden[:, -7:-1]).float(), labels)


def query_outputs(model: Blip2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    image = model.vision_model(pixel_values=pixels).last_hidden_state
    return model.qformer(
        query_embeds=model.query_tokens.expand(len(pixels), -1, -1), encoder_hidden_states=image
    ).last_hidden_state


def train(output: Path, log_path: Path, tower_steps: int, qformer_steps: int, steps: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    processor = build_processor()
    model = build_model(processor).train()
    tower_reader, query_reader = Reader(WIDTH), Reader(WIDTH)
    batches = Batches(processor.tokenizer, PROMPT, augmented_pool(24, SEED), SEED)
    pad, log = processor.tokenizer.pad_token_id, Log(log_path)
    log.note(seed=SEED, parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__)
    vision = list(model.vision_model.parameters())
    qformer = [*model.qformer.parameters(), model.query_tokens, *query_reader.parameters()]
    matrices, others = split_language_model(model.language_model)
    adam = torch.optim.AdamW
    groups: dict[str, list[Group]] = {
        "tower": [(adam, vision, 2e-3), (adam, list(tower_reader.parameters()), 2e-3)],
        "qformer": [(adam, vision, 3e-4), (adam, qformer, 1.5e-3)],
        "answers": [
            (adam, vision, 1e-4),
            (adam, qformer, 3e-4),
            (adam, [*others, *model.language_projection.parameters()], 2e-3),
            (torch.optim.Muon, matrices, 2e-2),
        ],
    }
    for stage, count, size in (("tower", tower_steps, 64), ("qformer", qformer_steps, 64), ("answers", steps, 32)):

        def loss_of(step: int, stage: str = stage, count: int = count, size: int = size) -> Tensor:
            pixels, cells = batches.scenes(size)
            if stage == "tower":
                loss, seen = tower_reader.loss(model.vision_model(pixel_values=pixels).last_hidden_state, cells)
            else:
                queries = query_outputs(model, pixels)
                loss, seen = query_reader.loss(queries, cells)
            if stage == "answers":
                loss = 0.3 * loss + answer_loss(model, queries, *batches.questions(), pad)
            if step % 100 == 0 or step == count:
                log.note(stage=stage, step=step, loss=round(loss.item(), 4), digits_read=round(seen, 4))
            return loss

        def after(step: int, stage: str = stage) -> None:
            if stage == "answers" and step % 250 == 0:
                log.note(stage=stage, step=step, calibration=accuracy(model, processor, PROMPT, "calibration", 400, 1))
                save(model, processor, output)  # a long run that is stopped leaves something to look at

        minimise(loss_of, groups[stage], count, after)
    log.note(test_questions=2000, test=accuracy(model, processor, PROMPT, "test", 2000, 2))
    save(model, processor, output)


if __name__ == "__main__":
    a = arguments(__doc__, "blip2", tower_steps=500, qformer_steps=800, steps=2000)
    train(a.output, a.log, a.tower_steps, a.qformer_steps, a.steps)
