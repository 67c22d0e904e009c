"""Batches for the small Qwen2.5-VL: patches, M-RoPE positions and packed questions, as processor and model do it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import EOS, PAD, Batches
from torch import Tensor
from torch.nn import functional as F

from catp_lightning.data.scenes import ASK, CELL

PATCH, MERGE, FRAMES = 4, 2, 2  # pixels of a patch and patches of a token, a side; an image is two equal frames
TOKENS = CELL // (PATCH * MERGE)  # visual tokens of a cell, a side
GRIDS = ((3, 3), (3, 6), (6, 4), (6, 6), (5, 10), (10, 10))  # rows and columns of cells: 36 to 400 tokens
SIDE = 10  # cells of the largest grid, a side
START, IMAGE, END, VIDEO, BOS = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>", "<|im_start|>"
BEFORE, QUESTION = f"{BOS} user Picture 1: {START}", END + " Question: {} Short answer:"
PROMPT = BEFORE + IMAGE + QUESTION


def patches(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the image processor makes of pixels [B, 3, H, W]: patches [B * N, 96] and grids [B, 3]."""
    count, channels, height, width = pixels.shape
    high, wide = height // (PATCH * MERGE), width // (PATCH * MERGE)
    cut = pixels.reshape(count, channels, high, MERGE, PATCH, wide, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    cut = cut[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    grid = torch.tensor([1, high * MERGE, wide * MERGE]).repeat(count, 1)
    return cut.reshape(-1, channels * FRAMES * PATCH * PATCH), grid


def by_token(cells: Tensor) -> Tensor:
    """Return the value of each visual token's cell, [B, T]; cells [B, R, C]."""
    return cells.repeat_interleave(TOKENS, 1).repeat_interleave(TOKENS, 2).flatten(1)


def leave_out(cells: Tensor) -> Tensor:
    """Return the visual tokens that the language model gets, int64 [B, K] in order: in a batch in four all of them.

    Otherwise the same random share of every scene in the batch. Each digit keeps at least one of its four tokens.
    cells [B, R, C], 0 for an empty one.
    """
    rows, columns = cells.shape[1:]
    total = rows * columns * TOKENS**2
    share = torch.rand(()).item() if torch.rand(()).item() < 0.75 else 1.0
    one = F.one_hot(torch.randint(4, cells.shape), 4).bool() & (cells > 0)[..., None]
    one = one.unflatten(-1, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    order = torch.rand(len(cells), total) + one.flatten(1)
    return order.topk(max(12, round(share * total))).indices.sort(1).values


@dataclass
class Packed:
    """Questions about each of B images, packed in one sequence of L tokens behind what they share.

    The shared part is the text before the image and K visual tokens. No question sees another.

    Attributes:
        ids: [B, L - shared], the questions' tokens.
        positions: [3, B, L], M-RoPE: time, row and column.
        mask: bool [B, 1, L, L].
        targets: [B, L - shared], the answer or the end where it is to be generated, -100 elsewhere.
        early: like `targets`, the answer at the last words of its question.
        asked: [B, L - shared, 2], row and column at the last words of a question that names them, -100 elsewhere.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    early: Tensor
    asked: Tensor


def pack(batches: Batches, asked: Sequence[str], kept: Tensor, rows: int, columns: int) -> Packed:
    """Ask about the scenes drawn last, of `rows` x `columns` cells; kept [B, K] as from `leave_out`."""
    end, first = batches.ids[EOS], len(batches.tokens(BEFORE))
    text, place, part, targets, early, asked_row, asked_column = (list[list[int]]() for _ in range(7))
    for scene in batches.drawn:
        for values in (text, place, part, targets, early, asked_row, asked_column):
            values.append([])
        for number, kind in enumerate(asked):
            question = ASK[kind](batches.rng, scene.grid)
            answer = batches.ids[question.answer]
            ids = [*batches.tokens(QUESTION.format(question.text)), answer]
            text[-1] += ids
            place[-1] += range(len(ids))
            part[-1] += [number] * len(ids)
            targets[-1] += [-100] * (len(ids) - 2) + [answer, end]
            # The last words of a question already know enough to answer: asked there too, the language model learns
            # much sooner to use the digit, row or column it was asked about.
            early[-1] += [-100] * (len(ids) - 6) + [answer] * 4 + [-100] * 2
            cell = [int(word) - 1 for word in re.findall(r"(?:row|column) (\d+)", question.text)] or [-100, -100]
            for values, value in zip((asked_row, asked_column), cell, strict=True):
                values[-1] += [-100] * (len(ids) - 5) + [value] * 4 + [-100]
    ids, place_ids, parts = padded(text, batches.ids[PAD]), padded(place, 0), padded(part, -2)
    asked_cells = torch.stack([padded(asked_row, -100), padded(asked_column, -100)], -1)
    high, wide = rows * TOKENS, columns * TOKENS
    shown = first + torch.stack([torch.zeros_like(kept), kept // wide, kept % wide])
    before = torch.arange(first).expand(3, len(kept), -1)
    after = (first + max(high, wide) + place_ids).expand(3, -1, -1)
    parts = F.pad(parts, (first + kept.shape[1], 0), value=-1)
    same = (parts[:, None] == parts[:, :, None]) | (parts == -1)[:, None]
    mask = (same & torch.ones(same.shape[1:]).tril().bool())[:, None]
    positions = torch.cat([before, shown, after], 2)
    return Packed(ids, positions, mask, padded(targets, -100), padded(early, -100), asked_cells)


def padded(rows: list[list[int]], fill: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])
