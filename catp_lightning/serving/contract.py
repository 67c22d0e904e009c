"""How many visual tokens of an image stay, known before its features are; and which ones, once they are."""

from collections.abc import Sequence

from torch import Tensor

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.methods import SELECTORS, Method, Observation, Signal
from catp_lightning.methods.budget import keep_count
from catp_lightning.policy import PruningPolicy
from catp_lightning.policy.building import DEEP
from catp_lightning.utils.on_cpu import on_cpu

OF_VISION = frozenset(
    {
        Signal.CROSS_ATTENTION,
        Signal.SELF_ATTENTION,
        Signal.VISION_ATTENTION,
        Signal.VISION_ATTENTION_RECEIVED,
        Signal.VISION_KEYS,
        Signal.VISION_STATES,
        Signal.IMAGE_FEATURES,
        Signal.PATCH_POSITION,
        Signal.IMAGE_HASH,
    }
)
"""Signals that are there once an image's features are, before a decoder reads its tokens."""


def check_servable(policy: PruningPolicy) -> Method:
    """Return the method of a policy that the two functions can carry.

    It decides before the decoder, for each image alone, from what the vision part shows, and keeps a number of tokens
    that depends on the image's size only.

    Raises:
        PolicyError: the policy is another; the message says why.
    """
    inside = [stage.scorer for stage in policy.stages if stage.step().method.scorer.stages(DEEP)]
    if inside:
        raise _refused(
            policy, f"{inside[0]!r} lets tokens leave inside the decoder, which has no place in the contract"
        )
    if policy.then:
        raise _refused(policy, f"it has {len(policy.stages)} stages, and a server asks once")
    if policy.counts is not None:
        raise _refused(policy, "the question says how many tokens stay (counts), and the number is asked for before")
    if policy.routes is not None:
        raise _refused(policy, "the question chooses the rule (routes), and an image is decided on without it")
    method = policy.method()
    selector = SELECTORS.name_of(method.selector)
    if method.rewrites:
        what = f"{selector!r} merges tokens" if method.selector.merges else f"{policy.scorer!r} writes rows of its own"
        raise _refused(policy, f"{what}, and a mask only says which tokens stay as they are")
    if method.selector.per == "sample":
        raise _refused(policy, 'its budget is of all images of a prompt (per: "sample"), and each is decided on alone')
    others = sorted(signal.name.lower().replace("_", "-") for signal in method.needs.keys() - OF_VISION)
    if others:
        raise _refused(policy, f"it reads {', '.join(others)}, which the vision part does not show")
    return method


def kept_count(policy: PruningPolicy, tokens: int | Sequence[int], protected: int = 0) -> int:
    """Return how many tokens of an image, or of one frame of a video, stay.

    Args:
        policy: the policy.
        tokens: how many tokens may be dropped; of an image that is cut, of each crop, which matters where the budget
            is of each crop (`per: "crop"`).
        protected: how many more tokens there are that always stay, such as the ends of a LLaVA-NeXT's lines.

    Raises:
        PolicyError: the contract cannot carry the policy.

    >>> kept_count(PruningPolicy("divprune", keep=0.25), 576), kept_count(PruningPolicy("divprune", keep=64), 20)
    (144, 20)
    """
    method = check_servable(policy)
    parts = [tokens] if isinstance(tokens, int) else list(tokens)
    budgets = parts if method.selector.per == "crop" else [sum(parts)]
    return protected + sum(keep_count(policy.keep, size) for size in budgets)


def kept_tokens(policy: PruningPolicy, seen: Observation) -> Tensor:
    """Return which tokens stay: bool [I, T]; of each image as many as `kept_count` says, False beyond its own.

    Args:
        policy: the policy.
        seen: signals of I images, or frames of videos, each of which is decided on alone: those in the `needs` of
            `check_servable`'s method.

    Raises:
        PolicyError: the contract cannot carry the policy.
        PruningError: a selector of another package keeps another number of tokens.

    >>> import torch
    >>> features = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [1.0, 0.0]]])
    >>> seen = Observation.of_equal(1, 4, {}, {Signal.IMAGE_FEATURES: features})
    >>> kept_tokens(PruningPolicy("l2-norm", keep=2), seen)
    tensor([[ True, False,  True, False]])
    """
    method = check_servable(policy)
    if policy.everything:
        return seen.valid
    keep = method.select(seen, policy.keep, seen.valid).keep
    found, valid, droppable = on_cpu(keep, seen.valid, seen.droppable)
    crops = None if seen.crops is None else on_cpu(seen.crops)[0]
    for image, free in enumerate(droppable):
        sizes = int(free.sum()) if crops is None else crops[image][free].bincount().tolist()
        count, announced = int(found[image].sum()), kept_count(policy, sizes, int((valid[image] & ~free).sum()))
        if count != announced:
            raise PruningError(
                f"The selector {SELECTORS.name_of(method.selector)!r} keeps {count} tokens of image {image}, where "
                f"{announced} were announced and a server has made room for these. Choose another selector."
            )
    return keep


def _refused(policy: PruningPolicy, why: str) -> PolicyError:
    return PolicyError(
        f"{policy!r:.200} cannot be served as two functions, how many tokens and which: {why}. Use it with prune or "
        "TokenPruning, or choose another rule; docs/serving.md lists those that can."
    )
