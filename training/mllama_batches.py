"""Batches for the small Llama-3.2-Vision: scenes in tiles and packed questions, as its processor makes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from common import Batches
from torch import Tensor

from catp_lightning.data.scenes import ASK, CELL, Scene

TILE, PATCH, TILES = 48, 8, 4
SIDE = TILE // PATCH  # patches a tile side
GRIDS = ((3, 3), (3, 6), (6, 3), (6, 6))  # rows and columns of cells: 1, 2, 2 and 4 tiles
IMAGE, BOS = "<|image|>", "<|begin_of_text|>"
PROMPT = IMAGE + "Question: {} Short answer:"
SHARED = 5  # tokens that all prompts start with: bos, image, the processor's second bos, question, colon
RATIOS = [
    [high, wide] for high in range(1, 5) for wide in range(1, 5) if high * wide <= TILES
]  # in transformers' order


def patch_places(tile: int, wide: int) -> tuple[Tensor, Tensor]:
    """Return row and column in the whole image, in patches, of each patch of a tile; the image is `wide` tiles wide."""
    patch = torch.arange(SIDE * SIDE)
    return tile // wide * SIDE + patch // SIDE, tile % wide * SIDE + patch % SIDE


@dataclass
class Scenes:
    """B scenes, as many of each of the four sizes.

    Attributes:
        drawn: the scenes.
        vision: inputs of the vision tower.
        cells: by size [B / 4, R, C], a digit plus one or 0 for an empty cell.
        patches: [B, 148], the value in `cells` of each patch's cell, -100 for rows that show no patch of the image.
        text: prompts and answers, as `pack` takes them.
    """

    drawn: list[Scene]
    vision: dict[str, Tensor]
    cells: list[Tensor]
    patches: Tensor
    text: list[list[list[int]]]


def draw(batches: Batches, each: int, kinds: Sequence[str]) -> Scenes:
    """Draw `each` scenes of every size, tiled as the processor does it, with a question of each of `kinds`."""
    vision: tuple[list[Tensor], ...] = ([], [], [])
    drawn: list[Scene] = []
    cells: list[Tensor] = []
    patches: list[Tensor] = []
    text: list[list[list[int]]] = []
    for rows, columns in GRIDS:
        pixels, content = batches.scenes(each, rows, columns)
        high, wide = rows * CELL // TILE, columns * CELL // TILE
        tiles = torch.zeros(each, 1, TILES, 3, TILE, TILE)
        cut = pixels.view(each, 3, high, TILE, wide, TILE).permute(0, 2, 4, 1, 3, 5)
        tiles[:, 0, : high * wide] = cut.flatten(1, 2)
        real = torch.zeros(each, 1, TILES, dtype=torch.long)
        real[:, :, : high * wide] = 1
        ratio = torch.full((each, 1), RATIOS.index([high, wide]) + 1)
        shown = torch.full((each, TILES, SIDE * SIDE + 1), -100)
        for tile in range(high * wide):
            row, column = patch_places(tile, wide)
            shown[:, tile, 1:] = content[:, row // 2, column // 2]
        for values, value in zip(vision, (tiles, ratio, real), strict=True):
            values.append(value)
        cells.append(content)
        patches.append(shown.flatten(1))
        drawn += batches.drawn
        for scene in batches.drawn:
            questions = [ASK[kind](batches.rng, scene.grid) for kind in kinds]
            text.append([[*batches.tokens(batches.prompt.format(q.text)), batches.ids[q.answer]] for q in questions])
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    return Scenes(drawn, dict(zip(names, map(torch.cat, vision), strict=True)), cells, torch.cat(patches), text)


@dataclass
class Packed:
    """Questions about each of B images in one sequence of L tokens: all see the shared start, none sees another.

    Attributes:
        ids: [B, L].
        places: [1, L], positions.
        mask: bool [1, 1, L, L].
        targets: [B, L], the answer or the end where it is to be generated, -100 elsewhere.
        early: [B, L], the answer at the last words of its question, -100 elsewhere.
    """

    ids: Tensor
    places: Tensor
    mask: Tensor
    targets: Tensor
    early: Tensor


def pack(text: list[list[list[int]]], pad: int, end: int) -> Packed:
    """Pack the questions of each image into one sequence; `text`: by image and question, ids of prompt and answer."""
    length = max(len(row) for rows in text for row in rows) - SHARED
    total = SHARED + len(text[0]) * length
    ids = torch.full((len(text), total), pad)
    targets, early = torch.full_like(ids, -100), torch.full_like(ids, -100)
    for n, rows in enumerate(text):
        ids[n, :SHARED] = torch.tensor(rows[0][:SHARED])
        for m, row in enumerate(rows):
            start = SHARED + m * length
            stop = start + len(row) - SHARED
            ids[n, start:stop] = torch.tensor(row[SHARED:])
            targets[n, stop - 2], targets[n, stop - 1] = row[-1], end
            early[n, stop - 6 : stop - 2] = row[-1]
    index = torch.arange(total) - SHARED
    question = index.div(length, rounding_mode="floor").where(index >= 0, -1)
    places = torch.where(index >= 0, SHARED + index % length, index + SHARED)
    mask = ((question[None] == question[:, None]) | (question == -1)[None]) & (index[None] <= index[:, None])
    return Packed(ids, places[None], mask[None, None], targets, early)
