"""Questions that were asked about each image, by group, and the answers that a promise is tested on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from catp_lightning.calibration.sums import Sums
from catp_lightning.utils.hashing import mix, uniform


@dataclass  # not frozen: torchmetrics copies what a metric computes field by field
class AskedImages:
    """Questions about images; M pairs of an image and a group of the questions about it, K budgets.

    Attributes:
        images: int64 [M], fingerprint of the image.
        groups: int64 [M], checksum of the group's name; 0 for all where questions have no groups.
        questions: int64 [M], number of questions of that group about that image.
        disagreed: int64 [M, K], number of them to which the pruned answer is not the unpruned one.
        drawn: int64 [M, K], 1 where this is so for the one question that was drawn at random among them.
        place: float32 [M], a number in [0, 1) drawn for each pair, independent of the answers.
    """

    images: np.ndarray
    groups: np.ndarray
    questions: np.ndarray
    disagreed: np.ndarray
    drawn: np.ndarray
    place: np.ndarray

    def where(self, chosen: np.ndarray) -> "AskedImages":
        """Return the pairs where `chosen`, bool [M], is True."""
        return AskedImages(
            self.images[chosen],
            self.groups[chosen],
            self.questions[chosen],
            self.disagreed[chosen],
            self.drawn[chosen],
            self.place[chosen],
        )


class Asked(Sums):
    """Number of questions of each group about each image, and the answers to them.

    One question of each image and group is drawn at random, from all processes. The draw is by a checksum of image and
    question together, so that each of an image's questions is equally likely, whatever its text; by a checksum of the
    text alone the same kind of question would be drawn for nearly every image.

    Args:
        budgets: number of budgets, K; 0: questions are counted, without answers.
    """

    rows: list[Tensor]

    def __init__(self, budgets: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.budgets = budgets
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, groups: Tensor, draws: Tensor, agreed: Tensor) -> None:
        """Add B samples.

        Args:
            images: int64 [B], checksum of each sample's image.
            groups: int64 [B], checksum of the name of each sample's group.
            draws: int64 [B], checksum of image and question together; the smallest of an image and group is drawn.
            agreed: bool [K, B], True if the answer at a budget is the unpruned one.
        """
        differs = (~agreed).T.long()
        head = torch.stack([images, groups, draws, torch.ones_like(images)], 1)
        self.rows = [self._merged(torch.cat([*self.rows, torch.cat([head, differs, differs], 1)]))]

    def _merged(self, rows: Tensor) -> Tensor:
        """Merge rows of one image and group: [N, 4 + 2 K] -> [M, 4 + 2 K], sorted.

        Columns are image, group, draw, number of questions, the drawn question's K differences, and K sums of
        differences.
        """
        for column in (2, 1, 0):
            rows = rows[rows[:, column].argsort(dim=0, stable=True)]
        new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        new[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)
        place, merged, sums = new.cumsum(0) - 1, rows[new], [3, *range(4 + self.budgets, 4 + 2 * self.budgets)]
        merged[:, sums] = merged.new_zeros(len(merged), len(sums)).index_add_(0, place, rows[:, sums])
        return merged

    def compute(self) -> AskedImages:
        """Return what was asked and answered over all processes."""
        rows = self._merged(torch.cat(self.rows) if isinstance(self.rows, list) else self.rows)
        images, groups, _, questions = rows[:, :4].unbind(1)
        drawn, disagreed = rows[:, 4:].split(self.budgets, 1) if self.budgets else (rows[:, 4:], rows[:, 4:])
        place = uniform(mix(images) ^ groups, 1)[:, 0]
        found = (images, groups, questions, disagreed, drawn, place)
        return AskedImages(*(column.cpu().numpy() for column in found))


class GroupNames(Sums):
    """Names of the groups that were met, whole, by their checksums."""

    letters: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("letters", [], dist_reduce_fx="cat")

    def update(self, names: Mapping[int, str]) -> None:
        """Add the names of some groups, by checksum."""
        letters = [
            (key, place, letter)
            for key, name in names.items()
            for place, letter in enumerate([*map(ord, name), -1])  # -1 ends a name, and is all of an empty one
        ]
        rows = torch.tensor(letters, dtype=torch.int64, device=self.device).view(-1, 3)
        self.letters = [torch.cat([*self.letters, rows]).unique(dim=0)]

    def compute(self) -> dict[int, str]:
        """Return the names over all processes, by checksum."""
        rows = torch.cat(self.letters) if isinstance(self.letters, list) else self.letters
        names: dict[int, str] = {}
        for key, _, letter in rows.unique(dim=0).tolist():  # sorted: a name's letters follow each other
            names[key] = names.get(key, "") + (chr(letter) if letter >= 0 else "")
        return names
