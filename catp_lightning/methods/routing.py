"""Routing: several methods in one, of which the question chooses one for each sample."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from catp_lightning.methods.components import Question
from catp_lightning.methods.method import Method
from catp_lightning.methods.observation import Needs, Observation, Signal, join
from catp_lightning.methods.selection import Selection, sample_of_images
from catp_lightning.utils.on_cpu import on_cpu, on_device, on_device_as, places, taken


@dataclass(frozen=True)
class Router:
    """Expected divergence of each of R methods, as a linear function of the question's components.

    Attributes:
        question: the C components of a question.
        divergence: [R, C + 1], for each method the weights of the components and a constant, in nats.

    Raises:
        ValueError: a method has another number of weights.
    """

    question: Question
    divergence: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if {len(row) for row in self.divergence} != {self.question.count + 1}:
            raise ValueError(f"divergence needs {self.question.count + 1} numbers for each method.")

    def routes(self, seen: Observation) -> Tensor:
        """Return the index of the method with the least expected divergence for each image: int64 [I]."""
        components = self.question.components(seen)
        weights = on_device_as(components, torch.tensor(self.divergence, dtype=torch.float64, device="cpu"))
        return (components @ weights[:, :-1].T + weights[:, -1]).argmin(1)


@dataclass(frozen=True)
class Routed(Method):
    """Several methods, of which each sample takes the one that its question makes the best.

    Attributes:
        scorer, selector: those of the first method.
        others: the other methods.
        router: says which method a question takes.
    """

    others: tuple[Method, ...]
    router: Router

    @property
    def rules(self) -> tuple[Method, ...]:
        return (Method(self.scorer, self.selector), *self.others)

    @property
    def needs(self) -> Needs:
        return join([{Signal.QUESTION: None}, *(rule.needs for rule in self.rules)])

    @property
    def nested(self) -> bool:
        return all(rule.nested for rule in self.rules)

    def taken(self, seen: Observation, visual: Tensor) -> Iterator[tuple[Method, Tensor, Observation]]:
        """Yield each method that a question takes, the samples that take it, bool [B], and the signals of their images.

        All images of a sample come with the same question. A sample without images takes none.
        """
        routes, samples = on_cpu(self.router.routes(seen), sample_of_images(seen.valid, visual))
        of_samples = torch.full((len(visual),), -1, dtype=torch.int64, device="cpu")
        of_samples[samples] = routes
        for number in routes.unique().tolist():
            here = of_samples == number
            own = seen.of_images(on_device(here[samples], visual.device))
            yield self.rules[number], on_device(here, visual.device), own

    def select(self, seen: Observation, keep: int | float, visual: Tensor) -> Selection:
        return select_each(self.taken(seen, visual), keep, visual)


def select_each(parts: Iterable[tuple[Method, Tensor, Observation]], keep: int | float, visual: Tensor) -> Selection:
    """Return the visual tokens that stay where samples take different methods, none of which merges tokens.

    Args:
        parts: each method, the samples that take it, bool [B], and the signals of their images.
        keep: the budget.
        visual: bool [B, T], the visual tokens that each sample has.
    """
    kept = torch.zeros_like(visual)
    scores: Tensor | None = None
    for rule, here, own in parts:
        found, rows = rule.select(own, keep, taken(visual, here)), places(here, visual)
        kept[rows] = found.keep
        if found.scores is not None:
            own_scores = found.scores.float()  # of one type, whatever rules the batch takes
            scores = own_scores.new_full(visual.shape, -torch.inf) if scores is None else scores
            scores[rows] = own_scores
    return Selection(kept, scores=scores)
