"""Train the small BLIP-2 that ships with the package: about digit scenes, on two cores, from nothing.

    python training/blip2.py            # writes catp_lightning/data/digits_blip2 and training/blip2.jsonl

Three stages, as BLIP-2 itself is trained in stages: the vision tower learns to read the cells, the Q-Former learns to
pass on what the tower reads, then everything learns to answer questions. Heads used on the way are thrown away.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.cache_utils import DynamicCache

from catp_lightning.data.scenes import ASK, CELL, EMPTY, GRID, KINDS, DigitPool, digit_pool, draw_scene

SEED = 0
WIDTH, QUERIES = 96, 32
PAD, EOS, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"
PROMPT = "Question: {} Short answer:"
WORDS = (  # noqa: SIM905, one word a line would be a page
    "question short answer : ? how many digits are there is a what the largest smallest digit which in row column "
    "yes no none 0 1 2 3 4 5 6 7 8 9"
).split()
ASKED = ("how many", "is there", "is there", "is there", "largest or smallest") + 5 * ("which digit",)  # of each scene


def build_processor() -> Blip2Processor:
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, UNKNOWN, IMAGE, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 1)])  # as OPT's
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )
    side = {"height": GRID * CELL, "width": GRID * CELL}
    images = BlipImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Blip2Processor(images, fast, num_query_tokens=QUERIES)


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
    # At the usual 0.02 what a word is drowns in what attention adds to it, and it takes thousands of steps more until
    # the digit, row or column that a question names makes a difference.
    for name, weight in model.language_model.named_parameters():
        if "embed" in name:
            nn.init.normal_(weight, std=0.2)
    nn.init.normal_(model.language_projection.weight, std=WIDTH**-0.5)
    return model


class Reader(nn.Module):
    """Asks any number of tokens what each cell holds and which digits are there, as a language model would have to.

    A cell is asked for by the sum of a row's and a column's embedding, a digit by its own: whatever answers these by
    one attention is within reach of the questions that follow. tokens [B, T, D] -> logits [B, 16, 11], [B, 10, 2].
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.randn(GRID, 1, WIDTH)), nn.Parameter(torch.randn(1, GRID, WIDTH))
        self.digits = nn.Parameter(torch.randn(10, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm, self.cell, self.present = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11), nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        asked = torch.cat([(self.rows + self.columns).flatten(0, 1), self.digits]).expand(len(tokens), -1, -1)
        read = self.norm(self.attention(asked, tokens, tokens, need_weights=False)[0])
        return self.cell(read[:, : GRID * GRID]), self.present(read[:, GRID * GRID :])

    def loss(self, tokens: Tensor, cells: Tensor) -> tuple[Tensor, float]:
        """Cross-entropy of both readings, and the share of digits read right; cells [B, 16], 0 for nothing."""
        cell, present = self(tokens)
        there = torch.zeros(len(cells), 11, dtype=torch.long).scatter(1, cells, 1)[:, 1:]
        loss = F.cross_entropy(cell.flatten(0, 1), cells.flatten()) + F.cross_entropy(
            present.flatten(0, 1), there.flatten()
        )
        return loss, (cell.argmax(-1) == cells)[cells > 0].float().mean().item()


def augmented_pool(copies: int, seed: int) -> DigitPool:
    """The training digits, each shifted, turned and scaled a little in `copies` ways."""
    pool, generator = digit_pool("train"), torch.Generator().manual_seed(seed)
    images = torch.from_numpy(pool.images).repeat(copies, 1, 1)[:, None]
    draw = lambda spread: (torch.rand(len(images), generator=generator) * 2 - 1) * spread  # noqa: E731
    angle, size = draw(0.2), 1 + draw(0.1)
    cos, sin = size * angle.cos(), size * angle.sin()
    theta = torch.stack([cos, -sin, draw(0.12), sin, cos, draw(0.12)], 1).view(-1, 2, 3)
    moved = F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=False), align_corners=False)
    moved[: len(pool.images)] = images[: len(pool.images)]
    return DigitPool(moved[:, 0].numpy(), np.tile(pool.labels, copies))


class Batches:
    """Scenes with `ASKED` questions each, tokenised as the processor does it."""

    def __init__(self, processor: Blip2Processor, pool: DigitPool, seed: int) -> None:
        self.ids, self.pool = processor.tokenizer.get_vocab(), pool
        self.rng = np.random.default_rng(seed)
        self.tokenizer = processor.tokenizer
        self.known: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text).input_ids
        return self.known[text]

    def scenes(self, count: int) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, 64, 64] and what each cell holds, 0 for nothing: [B, 16]."""
        self.drawn = [draw_scene(self.rng, self.pool) for _ in range(count)]
        pixels = torch.from_numpy(np.stack([scene.image for scene in self.drawn])).float() / 127.5 - 1
        cells = torch.from_numpy(np.stack([scene.grid for scene in self.drawn])).flatten(1) - EMPTY
        return pixels[:, None].expand(-1, 3, -1, -1), cells

    def questions(self) -> tuple[Tensor, Tensor]:
        """Text ids [B * asked, T], left padded, and labels of the same shape, -100 but for the answer and the end."""
        rows = []
        for scene in self.drawn:
            for kind in ASKED:
                question = ASK[kind](self.rng, scene.grid)
                rows.append([*self.tokens(PROMPT.format(question.text)), self.ids[question.answer], self.ids[EOS]])
        length = max(map(len, rows))
        ids = torch.tensor([[self.ids[PAD]] * (length - len(row)) + row for row in rows])
        labels = torch.full_like(ids, -100)
        labels[:, -2:] = ids[:, -2:]
        return ids, labels


def answer_loss(model: Blip2ForConditionalGeneration, queries: Tensor, ids: Tensor, labels: Tensor, pad: int) -> Tensor:
    """The image rows of a scene come first and see only themselves, so its questions share their keys and values."""
    image = model.language_projection(queries)
    cache, each = DynamicCache(config=model.language_model.config), len(ids) // len(image)
    model.language_model.model(
        inputs_embeds=image,
        attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(each)
    mask = torch.cat([torch.ones(len(ids), image.shape[1], dtype=torch.long), (ids != pad).long()], 1)
    hidden = model.language_model.model(
        inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, past_key_values=cache, use_cache=True
    ).last_hidden_state
    logits = model.language_model.lm_head(hidden[:, -7:-1]).float()
    answered = F.cross_entropy(logits[:, -2:].flatten(0, 1), labels[:, -2:].flatten())
    # The last words of a question already know enough to answer: asked there too, the language model learns much sooner
    # to use the digit, row or column it was asked about.
    early = F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, -2].repeat_interleave(4))
    return answered + 0.5 * early


def query_outputs(model: Blip2ForConditionalGeneration, pixels: Tensor) -> Tensor:
    image = model.vision_model(pixel_values=pixels).last_hidden_state
    return model.qformer(
        query_embeds=model.query_tokens.expand(len(pixels), -1, -1), encoder_hidden_states=image
    ).last_hidden_state


@torch.no_grad()
def accuracy(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, split: str, questions: int, seed: int
) -> dict[str, float]:
    """Exact answers by the model's own generate, over all questions and by kind."""
    model.eval()
    rng, pool = np.random.default_rng(seed), digit_pool(split)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, questions, 100):
        scenes = [draw_scene(rng, pool) for _ in range(start, min(start + 100, questions))]
        asked = [ASK[KINDS[n % len(KINDS)]](rng, scene.grid) for n, scene in enumerate(scenes)]
        texts = [PROMPT.format(question.text) for question in asked]
        inputs = processor(
            images=[np.stack([s.image] * 3, -1) for s in scenes], text=texts, padding=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for question, answer in zip(
            asked, processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True), strict=True
        ):
            right[question.kind].append(answer.strip() == question.answer)
    model.train()
    return {
        "all": float(np.mean([value for values in right.values() for value in values])),
        **{kind: float(np.mean(values)) for kind, values in right.items()},
    }


def train(output: Path, log_path: Path, tower_steps: int, qformer_steps: int, steps: int) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    processor = build_processor()
    model, start = build_model(processor).train(), time.time()
    tower_reader, query_reader = Reader(), Reader()
    batches, pad = Batches(processor, augmented_pool(24, SEED), SEED), processor.tokenizer.pad_token_id
    log = log_path.open("w")

    def note(**figures: object) -> None:
        print(line := json.dumps({"seconds": round(time.time() - start), **figures}), flush=True)
        log.write(line + "\n")
        log.flush()

    note(seed=SEED, parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__)
    vision = list(model.vision_model.parameters())
    qformer = [*model.qformer.parameters(), model.query_tokens, *query_reader.parameters()]
    matrices = [p for name, p in model.language_model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.language_model.named_parameters() if p.dim() != 2 or "embed" in name]
    adam = torch.optim.AdamW
    groups = {
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
        optimizers = [make(parameters, lr=rate, weight_decay=0.02) for make, parameters, rate in groups[stage]]
        schedules = [get_cosine_schedule_with_warmup(optimizer, 50, count) for optimizer in optimizers]
        trained = [parameter for _, parameters, _ in groups[stage] for parameter in parameters]
        for step in range(count):
            pixels, cells = batches.scenes(size)
            if stage == "tower":
                loss, seen = tower_reader.loss(model.vision_model(pixel_values=pixels).last_hidden_state, cells)
            else:
                queries = query_outputs(model, pixels)
                loss, seen = query_reader.loss(queries, cells)
            if stage == "answers":
                loss = 0.3 * loss + answer_loss(model, queries, *batches.questions(), pad)
            model.zero_grad()
            tower_reader.zero_grad()
            query_reader.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for step_of in (*optimizers, *schedules):
                step_of.step()
            if step % 100 == 99 or step == count - 1:
                note(stage=stage, step=step + 1, loss=round(loss.item(), 4), digits_read=round(seen, 4))
            if stage == "answers" and step % 250 == 249:
                note(stage=stage, step=step + 1, calibration=accuracy(model, processor, "calibration", 400, 1))
                save(model, processor, output)  # a long run that is stopped leaves something to look at
    note(test_questions=2000, test=accuracy(model, processor, "test", 2000, 2))
    save(model, processor, output)


def save(model: Blip2ForConditionalGeneration, processor: Blip2Processor, output: Path) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("catp_lightning/data/digits_blip2"))
    parser.add_argument("--log", type=Path, default=Path("training/blip2.jsonl"))
    parser.add_argument("--tower-steps", type=int, default=500)
    parser.add_argument("--qformer-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=2000)
    a = parser.parse_args()
    train(a.output, a.log, a.tower_steps, a.qformer_steps, a.steps)
