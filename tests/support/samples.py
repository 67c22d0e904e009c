"""Samples for models of every family: prompts, images, and the tensors that batches are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.support.oracles import IMAGE, PAD, VIDEO, Inputs


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
