"""`prune(model, policy)`: the context in which a model reads fewer visual tokens."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.methods.guard import Guard, Summaries
from catp_lightning.methods.method import score_tokens, selected
from catp_lightning.methods.observation import BESIDE, Signal, join
from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.schedule import places
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selection import Selection, images_to_samples, protected_tokens
from catp_lightning.models import Family, find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import has_images
from catp_lightning.prompt.prompt import Prompt
from catp_lightning.pruning.beside import observed, reading
from catp_lightning.pruning.budget_check import BudgetCheck
from catp_lightning.pruning.guide import Guide
from catp_lightning.pruning.observer import Observer
from catp_lightning.pruning.record import OnPrefill, Prefill, Pruning
from catp_lightning.pruning.refusals import (
    check_model,
    compiled_inside,
    occupied,
    refuse_methods,
    refuse_unprunable,
)
from catp_lightning.pruning.shown import Viewer
from catp_lightning.pruning.sites import SiteSettings, site_of
from catp_lightning.pruning.text_tower import TextTower
from catp_lightning.utils.on_cpu import of_known, on_cpu, read_once

Choose = Callable[[Tensor], Tensor]
"""Function that is given the visual tokens that exist, bool [B, T], and returns those that stay, bool [B, T]."""


class Pruner:
    """Pruning of one model by a policy.

    Args:
        family: family of the model.
        policy: the policy.
        choose: decides instead of the policy's scorer, as in `prune`.
        guide: a smaller model, or a module that holds one, for a scorer that reads its attention.
        on_prefill: called with what each prefill kept.
        guard: watches over the images; None: nothing does.
        show: True to note where the tokens of each prefill lie in their images.

    Attributes:
        record: what users see.
        viewer: notes where tokens lie; None without `show`.
        places: where each stage of the policy drops tokens, in order; empty: nothing is dropped.
        leave_at: decoder layers at whose entry tokens are dropped, 0 for the decoder's input; empty: only there.
        site: place where tokens leave.
        entry: selection at the decoder's input, where it is known already: a recorded prompt is answered again.

    Raises:
        PruningError: the model cannot be pruned by this policy.
    """

    def __init__(
        self,
        family: Family,
        policy: PruningPolicy,
        choose: Choose | None = None,
        guide: nn.Module | None = None,
        on_prefill: OnPrefill | None = None,
        guard: Guard | None = None,
        show: bool = False,
    ) -> None:
        self.family, self.policy, self.on_prefill = family, policy, on_prefill
        self.record = Pruning(type(family.model).__name__, policy)
        self._choose, self._everything = choose, policy.everything
        self.entry: Selection | None = None
        steps = [step for step in policy.steps() if choose is not None or not step.everything]
        self.places = places(steps, family.depth)
        layers = tuple(place.layer for place in self.places)
        self.leave_at = layers if any(layers) else ()
        self._budget, self._read = BudgetCheck(), torch.zeros(0, dtype=torch.int64, device="cpu")
        self._images: Tensor | None = None
        self._summaries: Summaries | None = None
        scored = choose is None and not self._everything
        self._known, self._guard = scored and has_images(policy), guard if scored else None
        first = join([{Signal.IMAGE_HASH: None} if self._known else {}, {} if guard is None else guard.needs])
        by_stage = tuple(place.step.method.needs if scored else {} for place in self.places)
        if layers[:1] == (0,):
            first = join([first, by_stage[0]]) if scored else {}
        if scored:
            refuse_methods(policy, family, None if self._guard is None else self._guard.fallback)
        self.viewer = Viewer(family) if show else None
        if scored or choose is not None or show:
            by_image = show or (scored and bool(first or not self.leave_at))
            family.check_use(by_image, tuple(at for at in self.leave_at if at), policy.positions == "compact")
        self._beside: Sequence[Guide | TextTower] = ()
        if layers[:1] == (0,):
            self._beside = reading(family, self.places[0].step.method.scorer, first, guide)
        inside = observed(join(by_stage) if self.leave_at else first)
        by_stage = tuple(map(observed, by_stage)) if self.leave_at else ()
        settings = SiteSettings(self.leave_at, inside, policy.positions == "compact", by_stage)
        # No reference cycle: the model's memory is freed with its last reference.
        own, record = weakref.proxy(self), self.record
        self.site = site_of(family, partial(Pruner._decide, own), settings, partial(setattr, record, "labels_left_out"))
        watched = observed(first) if self.viewer is None else join([observed(first), self.viewer.needs])
        self._observer = Observer(family, watched, self.site.calls)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model run unpruned while inside."""
        self._observer.active = self.site.active = False
        try:
            yield
        finally:
            self._observer.active = self.site.active = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Prune the model while inside; hooks are in place only there."""
        with self._observer.watching(), self.site.installed():
            yield

    @contextmanager
    def knowing(self, entry: Selection) -> Iterator[None]:
        """Take a selection at the decoder's input while inside, instead of choosing one: [B, T] of recorded prompts."""
        self.entry = entry
        try:
            yield
        finally:
            self.entry = None

    def _decide(self, prompt: Prompt) -> Selection:
        """Return the selection of a prompt's visual tokens, [B, T], and record it."""
        visual, images = prompt.tokens, None
        if prompt.stage == 0:
            self._summaries = None
        if self._choose is not None:
            selection = Selection(self._choose(visual) & visual)
        elif self._everything or not on_cpu(visual)[0].any():
            selection = Selection(visual)
        elif self.entry is not None and prompt.stage == 0:
            selection = self.entry
        else:
            selection, images = self._select(prompt)
        selection = replace(selection, keep=read_once(selection.keep))  # all that follows depends on it
        record = self.record
        record.keep, record.scores, record.destination = selection.keep, selection.scores, selection.destination
        if self.viewer is not None and self.viewer.active:
            layer = self.places[prompt.stage].layer if self.places else 0
            self.viewer.see(prompt, selection, layer, self._observer.take)
        self._note(prompt, selection.keep, images)
        return selection

    def _note(self, prompt: Prompt, keep: Tensor, images: Tensor | None) -> None:
        """Record what a prefill keeps, once it has come to its last stage."""
        counts, stage, depth, stages = prompt.counts, prompt.stage, self.family.depth, self.leave_at or (0,)
        if stage == 0:
            self._read, self._images = counts[:, None].repeat(1, depth), images
        self._read[:, stages[stage] :] = keep.sum(1, keepdim=True)
        if stage + 1 == len(stages):
            shown = () if self.viewer is None else self.viewer.taken()
            last = Prefill(keep, counts, self._read, self._images, self._summaries, prompt.text_rows, shown)
            self.record.last, self.record.prefills = last, self.record.prefills + 1
            if self.on_prefill is not None:
                self.on_prefill(last)

    def _select(self, prompt: Prompt) -> tuple[Selection, Tensor | None]:
        """Return the selection of a prompt by the method of its stage, and fingerprints of its images."""
        visual, inside, images, place = prompt.tokens, prompt.observation(), None, self.places[prompt.stage]
        method, keep = place.step.method, place.step.keep
        if ((self._known or self._guard is not None) and prompt.stage == 0) or inside is None:
            seen = self._observer.take(prompt)
            images = seen[Signal.IMAGE_HASH] if self._known else None
            if self._guard is not None:
                self._summaries = self._guard.summaries(seen)
        if inside is None:
            for model in self._beside:
                seen = model.add(seen, prompt)
            self._budget.check(self.places[0].step.keep, of_known(lambda part: part.sum(1), seen.droppable))
            if self._guard is not None and self._summaries is not None:
                return self._guard.select(method, self._summaries, seen, keep, visual), images
            return method.select(seen, keep, visual), images
        if prompt.stage == 0:
            self._budget.check(self.places[0].step.keep, prompt.counts)
        scores = images_to_samples(score_tokens(method.scorer, inside, visual), inside.valid, visual, -torch.inf)
        stay = protected_tokens(inside, visual)
        counts = place.counts(prompt.counts, inside)
        with without_autocast(visual):
            free = of_known(lambda own, kept: own & ~kept, visual, stay)
            counts = of_known(lambda asked, own: asked.minimum(own.sum(1)), counts, free)
            found = selected(method.selector, scores, free, counts, method.selector.vectors(inside))
        return replace(found.with_protected(stay), scores=scores), images


@contextmanager
def prune(
    module: nn.Module,
    policy: PruningPolicy,
    *,
    model: str | None = None,
    choose: Choose | None = None,
    guide: nn.Module | None = None,
    show: bool = False,
) -> Iterator[Pruning]:
    """Prune a model while inside: it reads only the visual tokens that the policy keeps; afterwards it is what it was.

    Args:
        module: a supported Hugging Face model, or any module that holds one, a LightningModule for example.
        policy: the policy, which says what to keep.
        model: attribute path of the model, if `module` holds several.
        choose: decides instead of the policy's scorer: given the visual tokens that exist, bool [B, T], returns those
            that stay, bool [B, T].
        guide: a smaller model of the same kind, tokeniser and grid of visual tokens, or a module that holds one. Only
            the scorer `sgl` asks for it: it is run on every prompt, unpruned, on the device it is on.
        show: True to record in `.shown` where each token lies in its image, with a copy of the images' pixels on the
            CPU, for the pictures of `catp_lightning.plots`.

    Yields:
        A record of what is kept: `.keep` and `.scores` of the last prefill.

    Raises:
        PolicyError: the policy was made for another architecture.
        PruningError: the model, or a call inside, cannot be pruned exactly; nested use on one model.

    Example::

        with prune(model, PruningPolicy(scorer="catp", keep=0.5)) as pruning:
            model.generate(**batch)
        pruning.keep.sum(1)  # 16 of 32 query tokens, for each sample
    """
    with applied(module, policy, model=model, choose=choose, guide=guide, show=show) as pruner:
        yield pruner.record


@contextmanager
def applied(
    module: nn.Module,
    policy: PruningPolicy,
    *,
    model: str | None = None,
    choose: Choose | None = None,
    guide: nn.Module | None = None,
    on_prefill: OnPrefill | None = None,
    guard: Guard | None = None,
    show: bool = False,
) -> Iterator[Pruner]:
    """Prune a model while inside, as `prune`, for callers who count prefills or suspend the pruning.

    Args:
        module, policy, model, choose, guide, show: as in `prune`.
        on_prefill: called with what each prefill kept.
        guard: watches over the images, and may have another method for some; None: nothing does.

    Raises:
        PolicyError, PruningError: as in `prune`. If the scorer does not work on the model, the error names
            those that do.
    """
    family = find_family(module, model)
    check_model(policy, family)
    parts = refuse_unprunable(module, family)
    try:
        pruner = Pruner(family, policy, choose, guide, on_prefill, guard, show)
    except PruningError as error:
        raise PruningError(f"{error}{instead_of(policy, family)}") from error
    with occupied(family), compiled_inside(parts, module, family.model), pruner.installed():
        yield pruner


def instead_of(policy: PruningPolicy, family: Family) -> str:
    """Return the end of an error message that refuses a policy: the scorers that can prune the model.

    Empty if the policy's own scorer can prune the model, or reads another model beside it.
    """
    suited = []
    for name in SCORERS:
        with suppress(Exception):  # refused on this model, or of a package that does not work
            Pruner(family, PruningPolicy(name))
            suited.append(name)
    if policy.scorer in suited or BESIDE & policy.build_scorer().needs.keys():
        return ""  # the error is about a setting or the other model
    return f" The scorers that work on {type(family.model).__name__} are {', '.join(suited)}."
