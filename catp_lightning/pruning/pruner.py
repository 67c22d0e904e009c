"""`prune(model, policy)`: the context in which a model reads fewer visual tokens."""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from catp_lightning.errors import PruningError
from catp_lightning.methods.method import score_tokens, select_tokens
from catp_lightning.methods.observation import Needs, Observation, Signal, join
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selection import Selection, images_to_samples
from catp_lightning.methods.selectors import without_autocast
from catp_lightning.models import Family, find_family
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.images import has_images
from catp_lightning.pruning.guide import Guide, refuse_without_rows
from catp_lightning.pruning.observer import Observer
from catp_lightning.pruning.refusals import (
    check_model,
    compiled_inside,
    occupied,
    refuse_at_stages,
    refuse_merging,
    refuse_unprunable,
)
from catp_lightning.pruning.sites import DecoderPrompt, Prompt, PruneAtDecoderLayers, StagePrompt, entry
from catp_lightning.utils.messages import warn

Choose = Callable[[Tensor], Tensor]
"""Function that is given the visual tokens that exist, bool [B, T], and returns those that stay, bool [B, T]."""


class Pruning:
    """Pruning of one model, and the record of what was kept.

    Attributes:
        keep: bool [B, T], the visual tokens that stayed in the last prefill, in placeholder order; None before the
            first. B is the batch before beams are expanded, T the longest sample's count; False beyond a sample's own.
        scores: float [B, T], scores that the tokens were ranked by; -inf beyond a sample's own, None if nothing was
            scored.
        destination: int64 [B, T], for each visual token the one that it is merged into: itself if it stays, or one that
            stays and now is the mean of all that were merged into it, or -1 if it is dropped; None if nothing is
            merged. With several stages it is the last one's: what was dropped or merged before is -1.
        choices: (keep bool [B, T], counts int64 [B]) of each prefill since it was last cleared, at most 1,024; counts
            are the visual tokens that each sample had.
        tokens_per_layer: float [B] for each of `choices`: number of visual tokens that a layer of the decoder reads,
            the mean over its layers; more than the number that stay if tokens are dropped inside the decoder.
        leave_at: decoder layers at whose entry tokens are dropped; empty: before the first.
        images: fingerprints, int64 [I], of each prefill since it was last cleared, at most 1,024: only if the policy
            says which images it was calibrated on and something is scored, for `OverlapCheck`.
    """

    def __init__(
        self, family: Family, policy: PruningPolicy, choose: Choose | None = None, guide: nn.Module | None = None
    ) -> None:
        self.family, self.policy = family, policy
        self.keep: Tensor | None = None
        self.scores: Tensor | None = None
        self.destination: Tensor | None = None
        self.choices: deque[tuple[Tensor, Tensor]] = deque(maxlen=1024)
        self.tokens_per_layer: deque[Tensor] = deque(maxlen=1024)
        self.images: deque[Tensor] = deque(maxlen=1024)
        self._given = choose
        self._everything = policy.keep == 1.0 and isinstance(policy.keep, float)
        self._scorer, self._selector = policy.build_scorer(), policy.build_selector()
        scored = choose is None and not self._everything
        self._known = scored and has_images(policy)
        self._checked = False
        needs = [self._scorer.needs, self._selector.needs] if scored else []
        wanted = join([*needs, {Signal.IMAGE_HASH: None}] if self._known else needs)
        stages = () if self._everything and choose is None else self._scorer.stages(family.depth)
        self.leave_at, self._read = stages, torch.zeros(0, dtype=torch.int64, device="cpu")
        if scored or choose is not None:
            family.check_use(scored and (self._known or not stages), stages, policy.positions == "compact")
        if stages and scored:
            refuse_at_stages(policy, self._selector, wanted)
        if self._selector.merges and scored:
            refuse_merging(policy, self._selector, family)
        self._guide = self._guided(guide, wanted) if Signal.GUIDE_ATTENTION in wanted else None
        wanted.pop(Signal.GUIDE_ATTENTION, None)
        first: Needs = {Signal.IMAGE_HASH: None} if self._known else {}
        self._observer = Observer(family, first if stages else wanted)
        compact = policy.positions == "compact"
        own: Pruning = weakref.proxy(self)  # no reference cycle: the model's memory is freed with its last reference
        decide, forget = partial(Pruning._decide, own), partial(Pruning._forget, own)
        self._entry = entry(family, decide, compact, forget, stages, wanted)

    def __repr__(self) -> str:
        """Return a short description: the model, what the policy keeps, and how much the last prefill kept."""
        found = "nothing read yet"
        if self.keep is not None:
            found = f"{int(self.keep.sum()):,} visual tokens kept of a batch of {len(self.keep)}"
        policy = f"scorer={self.policy.scorer!r}, keep={self.policy.keep!r}"
        return f"Pruning({type(self.family.model).__name__}, {policy}: {found})"

    def _guided(self, guide: nn.Module | None, wanted: Needs) -> Guide:
        refuse_without_rows(self.family)
        if guide is None:
            raise PruningError(
                f"The policy's scorer {self.policy.scorer!r} ranks tokens by the attention of a smaller model of the "
                "same kind: give it, prune(model, policy, guide=small_model). TokenPruning and PrunedModule take it "
                "too."
            )
        answer_tokens = getattr(self._scorer, "answer_tokens", 1)  # set by the method
        found = Guide(guide, self.family, wanted[Signal.GUIDE_ATTENTION], answer_tokens)
        refuse_unprunable(guide, found.family)
        return found

    def _forget(self) -> None:
        self._observer.forget()
        if self._guide is not None:
            self._guide.forget()

    @property
    def stages(self) -> PruneAtDecoderLayers:
        """Object that drops tokens inside the decoder; it exists only if the policy's scorer does so."""
        assert isinstance(self._entry, PruneAtDecoderLayers)
        return self._entry

    @property
    def labels_left_out(self) -> int:
        """Number of labels of the last call that were predicted from dropped rows: they do not count in its loss."""
        return self._entry.labels_left_out

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the model run unpruned while inside."""
        self._observer.active = self._entry.active = False
        try:
            yield
        finally:
            self._observer.active = self._entry.active = True

    @contextmanager
    def applied(self) -> Iterator[None]:
        try:
            with self._observer.watching(), self._entry.dropping():
                yield
        finally:
            self._forget()  # features and attention maps are large, and the record may be kept

    def _decide(self, prompt: Prompt) -> Selection:
        """Return the selection of a prompt's visual tokens, [B, T], and record it."""
        visual = prompt.tokens
        if self._given is not None:
            selection = Selection(self._given(visual) & visual)
        elif self._everything or not visual.any():
            selection = Selection(visual)
        else:
            selection = self._at_stage(prompt) if isinstance(prompt, StagePrompt) else self._at_entry(prompt)
        self.keep, self.scores, self.destination = selection.keep, selection.scores, selection.destination
        self._note(prompt, selection.keep)
        return selection

    def _note(self, prompt: Prompt, keep: Tensor) -> None:
        """Record what a prefill keeps, once it has come to its last stage."""
        if not isinstance(prompt, StagePrompt):
            self.choices.append((keep, prompt.tokens.sum(1)))
            self.tokens_per_layer.append(keep.sum(1).float())
            return
        counts, stage, depth = prompt.visual.sum(1), prompt.stage, self.family.depth
        before = counts * self.leave_at[0] if stage == 0 else self._read
        self._read = before + keep.sum(1) * ((*self.leave_at, depth)[stage + 1] - self.leave_at[stage])
        if stage + 1 == len(self.leave_at):
            self.choices.append((keep, counts))
            self.tokens_per_layer.append(self._read.to(torch.float32) / depth)

    def _check_budget(self, tokens: Tensor) -> None:
        """Warn, at the first prefill, if the budget is more tokens than any image has.

        Args:
            tokens: int64 [I], number of tokens of each image.
        """
        keep, first = self.policy.keep, not self._checked
        self._checked = True
        if first and isinstance(keep, int) and len(tokens) and keep > int(tokens.max()):
            warn(
                f"keep is {keep} tokens and the largest of these images has {int(tokens.max())}: nothing is pruned. "
                "Give a smaller number, or a share, a float in (0, 1].",
                stacklevel=2,
            )

    def _at_entry(self, prompt: Prompt) -> Selection:
        seen = self._observer.take(prompt)
        if self._guide is not None and isinstance(prompt, DecoderPrompt):
            seen = self._guide.add(seen, prompt)
        if self._known:
            self.images.append(seen[Signal.IMAGE_HASH])
        self._check_budget(seen.droppable.sum(1))
        scores = score_tokens(self._scorer, seen, prompt.tokens)
        return select_tokens(scores, self._selector, self.policy.keep, seen, prompt.tokens)

    def _at_stage(self, prompt: StagePrompt) -> Selection:
        seen, visual = prompt.observation(), prompt.tokens
        self._check_budget(prompt.visual.sum(1))
        if self._known and prompt.stage == 0:
            self.images.append(self._observer.take(prompt)[Signal.IMAGE_HASH])
        scores = images_to_samples(score_tokens(self._scorer, seen, visual), seen.valid, visual, -torch.inf)
        before = prompt.visual.sum(1)
        with without_autocast(visual):
            return self._chosen_at(prompt, seen, scores, before)

    def _chosen_at(self, prompt: StagePrompt, seen: Observation, scores: Tensor, before: Tensor) -> Selection:
        visual = prompt.tokens
        counts = self._scorer.stage_counts(self.policy.keep, before, prompt.stage, len(self.leave_at), seen)
        vectors = self._selector.vectors(seen)
        selection = self._selector.select(scores, visual, counts.minimum(visual.sum(1)), vectors)
        return replace(selection, scores=scores)


@contextmanager
def prune(
    module: nn.Module,
    policy: PruningPolicy,
    *,
    model: str | None = None,
    choose: Choose | None = None,
    guide: nn.Module | None = None,
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

    Yields:
        A record: `.keep` and `.scores` of the last prefill.

    Raises:
        PolicyError: the policy was made for another architecture.
        PruningError: the model, or a call inside, cannot be pruned exactly; nested use on one model.

    Example::

        with prune(model, PruningPolicy(scorer="catp", keep=0.5)) as pruning:
            model.generate(**batch)
        pruning.keep.sum(1)  # 16 of 32 query tokens, for each sample
    """
    family = find_family(module, model)
    check_model(policy, family)
    refuse_unprunable(module, family)
    pruning = _pruning(family, policy, choose, guide)
    with occupied(family), compiled_inside(module, family.model), pruning.applied():
        yield pruning


def _pruning(family: Family, policy: PruningPolicy, choose: Choose | None, guide: nn.Module | None) -> Pruning:
    """Return a pruning and its record.

    Raises:
        PruningError: the model cannot be pruned by this policy; if its scorer does not work on this model, the error
            names those that do.
    """
    try:
        return Pruning(family, policy, choose, guide)
    except PruningError as error:
        raise PruningError(f"{error}{instead_of(policy, family)}") from error


def instead_of(policy: PruningPolicy, family: Family) -> str:
    """Return the end of an error message that refuses a policy: the scorers that can prune the model.

    Empty if the policy's own scorer can prune the model, or needs a guide.
    """
    suited = []
    for name in SCORERS:
        with suppress(Exception):  # refused on this model, or of a package that does not work
            Pruning(family, PruningPolicy(name))
            suited.append(name)
    if (
        policy.scorer in suited or Signal.GUIDE_ATTENTION in policy.build_scorer().needs
    ):  # the error is about a setting or the guide
        return ""
    return f" The scorers that work on {type(family.model).__name__} are {', '.join(suited)}."
