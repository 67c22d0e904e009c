"""Pictures and questions."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .model import IMAGE_WORD, PAD, QUERIES, SIZE


class Pictures(Dataset[dict[str, Any]]):
    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(count, 3, SIZE, SIZE, generator=draw)
        self.words = [
            torch.randint(3, IMAGE_WORD, (int(length),), generator=draw)
            for length in torch.randint(3, 8, (count,), generator=draw)
        ]
        self.answers = torch.randint(3, IMAGE_WORD, (count,), generator=draw)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "id": index,
            "pixels": self.pixels[index],
            "words": self.words[index],
            "answer": self.answers[index],
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Questions padded on the left, pictures in front of them."""
    longest = max(len(sample["words"]) for sample in samples)
    words = torch.full((len(samples), longest + QUERIES), PAD)
    for row, sample in zip(words, samples, strict=True):
        start = longest - len(sample["words"])
        row[start : start + QUERIES] = IMAGE_WORD
        row[start + QUERIES :] = sample["words"]
    return {
        "id": torch.tensor([sample["id"] for sample in samples]),
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "words": words,
        "mask": (words != PAD).long(),
        "answer": torch.stack([sample["answer"] for sample in samples]),
    }


class ReadingData(LightningDataModule):
    def __init__(self, batch_size: int = 5) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.train, self.held_out = Pictures(10, 0), Pictures(24, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.held_out)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.held_out)

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.held_out)

    def _loader(self, pictures: Pictures, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(pictures, batch_size=self.batch_size, shuffle=shuffle, collate_fn=collate)
