"""Scores and selections of observed tokens: pure functions of tensors, shared by pruning and calibration."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.methods.budget import keep_count, multiplied
from catp_lightning.methods.observation import Needs, Observation, join
from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.scorers import SCORERS, Compressor, Scorer
from catp_lightning.methods.selection import Selection, images_to_samples, own_destination, sample_of_images
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device_of


@dataclass(frozen=True)
class Method:
    """Way to choose visual tokens, whatever the budget.

    Attributes:
        scorer: scores tokens.
        selector: turns scores into a set of tokens.
    """

    scorer: Scorer
    selector: Selector

    @property
    def needs(self) -> Needs:
        """Signals that scorer and selector read, with their layers."""
        return join([self.scorer.needs, self.selector.needs])

    @property
    def rules(self) -> tuple["Method", ...]:
        """The methods that this one may take: itself."""
        return (self,)

    @property
    def rewrites(self) -> bool:
        """True if rows are written in the place of tokens that stay: means of merged tokens, or a compressor's."""
        return self.selector.merges or isinstance(self.scorer, Compressor)

    @property
    def nested(self) -> bool:
        """True if one ranking of each image's tokens determines what stays at every budget."""
        return self.selector.nested and self.selector.per == "image"

    def select(self, seen: Observation, keep: int | float, visual: Tensor) -> Selection:
        """Return the visual tokens that stay.

        Args:
            seen: signals of the images.
            keep: the budget, of each image or of the whole sample as the selector's `per` says.
            visual: bool [B, T], the visual tokens that each sample has.
        """
        found = select_tokens(score_tokens(self.scorer, seen, visual), self.selector, keep, seen, visual)
        if not isinstance(self.scorer, Compressor):
            return found
        return replace(found, rows=images_to_samples(self.scorer.written(seen), seen.valid, visual, 0.0))


def select_tokens(
    scores: Tensor, selector: Selector, keep: int | float, seen: Observation, visual: Tensor
) -> Selection:
    """Return the visual tokens that stay; I images, T' tokens of the largest image.

    Args:
        scores: float [I, T'], a scorer's.
        selector: turns scores into a set of tokens.
        keep: the budget, of each image or of the whole sample as the selector's `per` says.
        seen: signals that the selector compares tokens by.
        visual: bool [B, T], the visual tokens that each sample has.
    """
    vectors = selector.vectors(seen)
    by_sample = images_to_samples(scores, seen.valid, visual, -torch.inf)
    if selector.per == "sample":
        droppable = images_to_samples(seen.droppable, seen.valid, visual, False)
        vectors = None if vectors is None else images_to_samples(vectors, seen.valid, visual, 0.0)
        found = selected(selector, by_sample, droppable, _budget(keep, droppable, _of_samples(seen, visual)), vectors)
        return replace(found.with_protected(visual & ~droppable), scores=by_sample)
    kept = seen.valid & ~seen.droppable
    destination = own_destination(kept)
    for part in _parts(seen, selector.per):
        found = selected(selector, scores, part, _budget(keep, part, seen.factors), vectors)
        kept = kept | found.keep
        destination = destination if found.destination is None else found.destination.where(part, destination)
    return Selection(
        images_to_samples(kept, seen.valid, visual, False),
        _to_sample_index(destination, seen.valid, visual) if selector.merges else None,
        by_sample,
    )


def selected(
    selector: Selector, scores: Tensor, droppable: Tensor, counts: Tensor, vectors: Tensor | None
) -> Selection:
    """Return a selector's selection, after a check of what another package's gives.

    Args:
        selector: the selector.
        scores: float [R, T].
        droppable: bool [R, T], tokens that may be chosen.
        counts: int64 [R], number of tokens to keep.
        vectors: float [R, T, F], as from the selector's `vectors`, or None.

    Raises:
        PruningError: what it gives is not a selection of these tokens, or another package's selector fails.
    """
    try:
        found = selector.select(scores, droppable, counts, vectors)
    except Exception as error:
        if SELECTORS.is_own(selector) or isinstance(error, torch.OutOfMemoryError | PolicyError | PruningError):
            raise
        raise PruningError(
            f"The selector {SELECTORS.name_of(selector)!r} ({type(selector).__module__}) failed on "
            f"{list(droppable.shape)} tokens: {type(error).__name__}: {error!s:.500}. {_REPAIR}"
        ) from error
    if not isinstance(found, Selection):
        raise PruningError(
            f"The selector {type(selector).__name__} gives a {type(found).__name__}; `select` returns a Selection. "
            f"{_REPAIR}"
        )
    kept = found.keep
    if (kept.dtype, kept.shape, kept.device) != (torch.bool, droppable.shape, droppable.device):
        raise PruningError(
            f"The selector {type(selector).__name__} gives {kept.dtype} of shape {tuple(kept.shape)} on {kept.device}; "
            f"which tokens stay is bool of shape {tuple(droppable.shape)} on {droppable.device}."
        )
    return found


def _to_sample_index(destination: Tensor, valid: Tensor, visual: Tensor) -> Tensor:
    """Convert destinations from indices within an image, int64 [I, T'], to indices within a sample, int64 [B, T]."""
    numbers = (valid.flatten().cumsum(0) - 1).view_as(valid)  # index among all visual tokens, in placeholder order
    placed_numbers = images_to_samples(numbers.gather(1, destination.clamp(min=0)), valid, visual, 0)
    first = visual.sum(1).cumsum(0) - visual.sum(1)
    return (placed_numbers - first[:, None]).masked_fill(images_to_samples(destination, valid, visual, -1) < 0, -1)


def _parts(seen: Observation, per: str) -> Iterator[Tensor]:
    """Yield tokens that share a budget, bool [I, T]: all droppable tokens of each image, or of one crop of each."""
    if per != "crop" or seen.crops is None:
        yield seen.droppable
        return
    for crop in range(int(on_cpu(seen.crops)[0].max()) + 1):
        yield of_known(partial(_of_crop, crop), seen.droppable, seen.crops)


def _of_crop(crop: int, droppable: Tensor, crops: Tensor) -> Tensor:
    return droppable & (crops == crop)


def score_tokens(scorer: Scorer, seen: Observation, visual: Tensor) -> Tensor:
    """Return the scorer's scores, float [I, T'], after a check that every image's tokens are where they should be.

    Raises:
        PruningError: the samples' placeholders do not match the images (transformers would put one sample's features
            into another), or another package's scorer fails.
    """
    own, images = (part.sum(1) for part in on_cpu(visual, seen.valid))
    ends = torch.isin(own.cumsum(0), torch.cat([images.new_zeros(1), images.cumsum(0)]))
    if int(own.sum()) != int(images.sum()) or not bool(ends.all()):
        wrong = "" if bool(ends.all()) else f" (sample {int((~ends).nonzero()[0])} does not end where an image ends)"
        raise PruningError(
            f"{seen.images} images with {_counts(images)} visual tokens were read, but the samples have "
            f"{own.tolist()} placeholders{wrong}: features would reach the wrong sample. Give each sample as many "
            "image tokens as its images need."
        )
    try:
        with without_autocast(visual):
            scores = scorer.score(seen)
    except Exception as error:
        if SCORERS.is_own(scorer) or isinstance(error, torch.OutOfMemoryError | PolicyError | PruningError):
            raise
        raise PruningError(
            f"The scorer {SCORERS.name_of(scorer)!r} ({type(scorer).__module__}) failed on {seen.images} images with "
            f"{_counts(images)} visual tokens: {type(error).__name__}: {error!s:.500}. {_REPAIR}"
        ) from error
    _check_scores(scorer, scores, seen)
    return scores.detach()


def _check_scores(scorer: Scorer, scores: Tensor, seen: Observation) -> None:
    """Raise PruningError if another package's scorer gives what would fail, or go unnoticed, later on."""
    expected = f"a tensor of real numbers of shape {tuple(seen.valid.shape)} on {seen.valid.device}"
    if not isinstance(scores, Tensor):
        found = f"a {type(scores).__name__}"
    elif scores.shape != seen.valid.shape or scores.device != seen.valid.device:
        found = f"one of shape {tuple(scores.shape)} on {scores.device}"
    elif not scores.is_floating_point() or scores.layout != torch.strided:
        found = f"one of {scores.dtype}, {scores.layout}"
    else:
        return
    raise PruningError(
        f"The scorer {SCORERS.name_of(scorer)!r} ({type(scorer).__module__}) gives {found}; scores are {expected}, a "
        f"number for each token of each image. {_REPAIR}"
    )


_REPAIR = "Repair or uninstall the package that brings it; CONTRIBUTING.md says what scorers and selectors are."


def _counts(images: Tensor) -> str:
    distinct = images.unique().tolist()
    return str(distinct[0]) if len(distinct) == 1 else str(images.tolist())


def _budget(keep: int | float, visual: Tensor, factors: Tensor | None) -> Tensor:
    """Return how many of each row's tokens stay: bool [R, T], and multiples of the budget or None -> int64 [R]."""
    sizes = on_cpu(visual)[0].sum(1).tolist()
    counts = on_device_of(visual, [keep_count(keep, size) for size in sizes])
    return counts if factors is None else multiplied(counts, factors, visual.sum(1))


def _of_samples(seen: Observation, visual: Tensor) -> Tensor | None:
    """Return the multiple of the budget that each sample keeps, that of its first image: float [B]."""
    if seen.factors is None:
        return None
    found = seen.factors.new_ones(len(visual))
    # Backwards, so that of several images of a sample the first is written last.
    found[sample_of_images(seen.valid, visual).flip(0)] = seen.factors.flip(0)
    return found
