"""Shared parts of the scripts that train the shipped models: words, questions, a throw-away head, steps, accuracy."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from catp_lightning.data.scenes import AS_TRAINED, ASK, EMPTY, GRID, KINDS, DigitPool, Drawing, digit_pool, draw_scene

SEED = 0
PAD, EOS, UNKNOWN, IMAGE = "<pad>", "</s>", "<unk>", "<image>"
WORDS = (  # noqa: SIM905, one word a line would be a page
    "question short answer : ? how many digits are there is a what the largest smallest digit which in row column "
    "yes no none 0 1 2 3 4 5 6 7 8 9"
).split()
ASKED = ("how many", "is there", "is there", "is there", "largest or smallest") + 5 * ("which digit",)  # per scene

Group = tuple[Callable[..., torch.optim.Optimizer], Sequence[nn.Parameter], float]  # optimizer, parameters, rate


def build_tokenizer(
    image: str = IMAGE, bos: str = EOS, more: Sequence[str] = (), **named: str
) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a word; `bos` comes first in every text, `more` are further words.

    The image token is in the vocabulary, but not special unless it is among `named`, special tokens by attribute:
    processors make it so in their own ways.
    """
    words = dict.fromkeys([PAD, EOS, UNKNOWN, image, bos, *WORDS, *more])
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    special = {"pad_token": PAD, "eos_token": EOS, "bos_token": bos, "unk_token": UNKNOWN}
    if named:
        special["extra_special_tokens"] = named
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, padding_side="left")


class Reader(nn.Module):
    """Head that reads from any number of tokens what each cell holds and which digits are there.

    A language model would have to read the same. The query for a cell is the sum of a row's and a column's embedding,
    that for a digit its own embedding: what one attention reads by these is within reach of the questions that follow.
    Scenes may be smaller than the `rows` and `columns` that the head is built for.
    """

    def __init__(self, width: int, rows: int = GRID, columns: int = GRID) -> None:
        super().__init__()
        self.rows, self.columns = (
            nn.Parameter(torch.randn(rows, 1, width)),
            nn.Parameter(torch.randn(1, columns, width)),
        )
        self.digits = nn.Parameter(torch.randn(10, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.cell, self.present = nn.LayerNorm(width), nn.Linear(width, 11), nn.Linear(width, 2)

    def forward(self, tokens: Tensor, rows: int, columns: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits of cells [B, rows * columns, 11] and digits [B, 10, 2].

        tokens [B, T, D], hidden bool [B, T], True for tokens that are not read, or None.
        """
        cells = (self.rows[:rows] + self.columns[:, :columns]).flatten(0, 1)
        asked = torch.cat([cells, self.digits]).expand(len(tokens), -1, -1)
        read = self.norm(self.attention(asked, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0])
        return self.cell(read[:, : rows * columns]), self.present(read[:, rows * columns :])

    def loss(self, tokens: Tensor, cells: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, float]:
        """Return cross-entropy of both readings and the share of digits read right.

        cells int64 [B, R, C], a digit plus one or 0 for an empty cell.
        """
        cell, present = self(tokens, cells.shape[1], cells.shape[2], hidden)
        cells = cells.flatten(1)
        loss = F.cross_entropy(cell.flatten(0, 1), cells.flatten()) + F.cross_entropy(
            present.flatten(0, 1), digits_present(cells).flatten()
        )
        return loss, (cell.argmax(-1) == cells)[cells > 0].float().mean().item()


def digits_present(cells: Tensor) -> Tensor:
    """Return int64 [B, 10], 1 for each digit in cells int64 [B, R * C], a digit plus one or 0 for an empty cell."""
    return torch.zeros(len(cells), 11, dtype=torch.long).scatter(1, cells, 1)[:, 1:]


def augmented_pool(copies: int, seed: int) -> DigitPool:
    """Return `copies` of the training digits, the first as they are, others shifted, turned and scaled a little."""
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
    """Scenes with several questions each, tokenised as the processor does it.

    `prompt` has `{}` where the question goes; `special`: True if the tokenizer puts its first token before it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, prompt: str, pool: DigitPool, seed: int, special: bool = True
    ) -> None:
        self.ids, self.pool = tokenizer.get_vocab(), pool
        self.rng = np.random.default_rng(seed)
        self.tokenizer, self.prompt, self.special = tokenizer, prompt, special
        self.known: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=self.special).input_ids
        return self.known[text]

    def scenes(
        self, count: int, rows: int = GRID, columns: int = GRID, drawing: Drawing = AS_TRAINED
    ) -> tuple[Tensor, Tensor]:
        """Draw scenes: pixels [B, 3, 16 R, 16 C] in [-1, 1]; cells [B, R, C], a digit plus one, 0 for an empty one."""
        self.drawn = [draw_scene(self.rng, self.pool, rows, columns, drawing) for _ in range(count)]
        pixels = torch.from_numpy(np.stack([scene.image for scene in self.drawn])).float() / 127.5 - 1
        cells = torch.from_numpy(np.stack([scene.grid for scene in self.drawn])) - EMPTY
        return pixels[:, None].expand(-1, 3, -1, -1), cells

    def questions(self, asked: Sequence[str] = ASKED) -> tuple[Tensor, Tensor]:
        """Return text ids [B * asked, T], left padded, and labels like them, -100 but for the answer and the end."""
        rows = []
        for scene in self.drawn:
            for kind in asked:
                question = ASK[kind](self.rng, scene.grid)
                text = self.tokens(self.prompt.format(question.text))
                rows.append([*text, self.ids[question.answer], self.ids[EOS]])
        length = max(map(len, rows))
        ids = torch.tensor([[self.ids[PAD]] * (length - len(row)) + row for row in rows])
        labels = torch.full_like(ids, -100)
        labels[:, -2:] = ids[:, -2:]
        return ids, labels


def question_and_answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of answer and end, plus half that of the answer at the last words of the question.

    logits [N, 6, V] are those of the last seven tokens but the very last, labels [N, T] as from `Batches.questions`.
    """
    answered = F.cross_entropy(logits[:, -2:].flatten(0, 1), labels[:, -2:].flatten())
    # The last words of a question already know enough to answer: asked there too, the language model learns much sooner
    # to use the digit, row or column it was asked about.
    early = F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, -2].repeat_interleave(4))
    return answered + 0.5 * early


def split_language_model(language_model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return a language model's matrices, which Muon trains, and the rest: embeddings, the output layer, vectors."""
    matrices, others = [], []
    for name, parameter in language_model.named_parameters():
        is_matrix = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def minimise(
    loss_of: Callable[[int], Tensor], groups: Sequence[Group], steps: int, after: Callable[[int], None]
) -> None:
    """Make `steps` updates of all groups on `loss_of(step)`: warm-up, cosine to zero, gradients clipped together.

    `step` counts from 1; `after(step)` is called when the update is made.
    """
    optimizers = [make(parameters, lr=rate, weight_decay=0.02) for make, parameters, rate in groups]
    schedules = [get_cosine_schedule_with_warmup(optimizer, 50, steps) for optimizer in optimizers]
    trained = [parameter for _, parameters, _ in groups for parameter in parameters]
    for step in range(1, steps + 1):
        loss = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for step_of in (*optimizers, *schedules):
            step_of.step()
        after(step)


@torch.no_grad()
def accuracy(
    model: Any,
    processor: Any,
    prompt: str,
    split: str,
    questions: int,
    seed: int,
    grids: Sequence[tuple[int, int]] = ((GRID, GRID),),
) -> dict[str, float]:
    """Return the share of exact answers by `generate`, in all and by kind; each kind meets all grids in turn."""
    model.eval()
    rng, pool = np.random.default_rng(seed), digit_pool(split)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, questions, 100):
        numbers = range(start, min(start + 100, questions))
        scenes = [draw_scene(rng, pool, *grids[n // len(KINDS) % len(grids)]) for n in numbers]
        asked = [ASK[KINDS[n % len(KINDS)]](rng, scene.grid) for n, scene in enumerate(scenes)]
        inputs = processor(
            images=[[np.stack([scene.image] * 3, -1)] for scene in scenes],
            text=[prompt.format(question.text) for question in asked],
            padding=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        texts = processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for question, answer in zip(asked, texts, strict=True):
            right[question.kind].append(answer.strip() == question.answer)
    model.train()
    return {
        "all": float(np.mean([value for values in right.values() for value in values])),
        **{kind: float(np.mean(values)) for kind, values in right.items()},
    }


class Log:
    """Log of JSON lines, in a file and on the screen, each with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self.file, self.start = path.open("w"), time.monotonic()

    def note(self, **figures: object) -> None:
        print(line := json.dumps({"seconds": round(time.monotonic() - self.start), **figures}), flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def save(model: Any, processor: Any, output: Path) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)


def arguments(description: str | None, name: str, **steps: int) -> argparse.Namespace:
    """Parse the command line of a script that trains `digits_{name}`; `steps`: the stages' options and defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(f"catp_lightning/data/digits_{name}"))
    parser.add_argument("--log", type=Path, default=Path(f"training/{name}.jsonl"))
    for option, default in steps.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=default)
    return parser.parse_args()
