"""Checks before anything is pruned, which refuse a policy for another model, or a rule that makes no sense here."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from catp_lightning.errors import PolicyError, PruningError
from catp_lightning.methods.method import Method
from catp_lightning.methods.observation import BESIDE, STAGED, Needs
from catp_lightning.methods.scorers import SCORERS, Compressor, Learned, Trained
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.models import Family
from catp_lightning.policy import PruningPolicy, Stage
from catp_lightning.utils.hooks import not_copied
from catp_lightning.utils.messages import warn
from catp_lightning.utils.parts import all_parts, parts_of

MARK = "_catp_pruning"
"""Attribute of a model while it is being pruned, calibrated, or asked as a guide."""


def check_model(policy: PruningPolicy, family: Family) -> None:
    """Raise PolicyError if a policy was made for another architecture; warn if it was made for another checkpoint."""
    if policy.model is None:
        return
    made_for, here = dict(policy.model), family.describe()
    names = made_for.pop("name", ""), here.pop("name", "")
    if made_for != here:
        raise PolicyError(
            f"The policy was made for {_described(made_for)}; this model is {_described(here)}. "
            "Calibrate again with CrossAttentionCalibration, or load the model it was made for."
        )
    if all(names) and names[0] != names[1]:
        warn(
            f"The policy was made for the checkpoint {names[0]!r} and is used on {names[1]!r} of the same shape: "
            "what it promises was measured on the first.",
            stacklevel=4,
        )


def _described(model: Mapping[str, Any]) -> str:
    shape = [f"{value} {key.replace('_', ' ')}" for key, value in model.items() if key != "type"]
    return f"{model.get('type', 'a model')} with {', '.join(shape)}" if shape else str(model.get("type", "unknown"))


def refuse_unprunable(module: nn.Module, family: Family) -> Collection[nn.Module]:
    """Raise PruningError if a model is being pruned already, or if it, or a step that calls it, was compiled before.

    Returns:
        All parts of the module and of the model.
    """
    if MARK in family.model.__dict__:
        raise _occupied(family)
    own = all_parts(family.model)
    parts = own | (all_parts(module) if module is not family.model else set())
    kinds = {kind: _compiled_among(_calls(kind, {})) for kind in {type(part) for part in parts}}
    for part in parts:
        # A part beside the model, a loss for example, may be compiled: nothing is pruned there.
        if (how := _compiled(part, kinds[type(part)])) is not None and (part in own or family.model in part.modules()):
            path = (parts_of(family.model) if part in own else parts_of(module))[part]
            raise PruningError(
                f"{type(part).__name__}{path and f' {path!r}'} was compiled before pruning ({how}), and compiled code "
                "may run past what is pruned. Hand over the module itself, not what torch.compile made of it, enter "
                "prune first and compile inside. Under a Trainer compile in on_validation_start, on_test_start or "
                "on_predict_start of your module, which run inside: self.model.compile(), for example, or of a part of "
                "it; what is compiled in place there is no longer when the loop has ended. To train compiled and "
                "validate pruned, compile the training step alone: "
                "module.training_step = torch.compile(module.training_step)."
            )
    return parts


_CALLED = ("forward", "generate", "validation_step", "test_step", "predict_step")


def _compiled(part: nn.Module, of_class: str | None) -> str | None:
    """Return how a module or a step of it was compiled; None if it was not.

    Training steps may be compiled: they run outside of every context. `of_class` says how methods of its class were,
    which count where the module has none of its own.
    """
    own = vars(part)
    if "_orig_mod" in part._modules or "_orig_mod" in own:
        return "torch.compile(module)"
    if own.get("_compiled_call_impl") is not None:
        return "module.compile()"
    return of_class if own.keys().isdisjoint(_CALLED) else _compiled_among(_calls(type(part), own))


def _calls(kind: type, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what runs when a method that pruning reaches is called, of a module with the attributes `own`."""
    return {name: own.get(name) or getattr(kind, name, None) for name in _CALLED}


def _compiled_among(calls: Mapping[str, Any]) -> str | None:
    for name, call in calls.items():
        if hasattr(call, "_torchdynamo_orig_callable") and not hasattr(call, "_torchdynamo_disable"):
            return f"torch.compile(module.{name})"
    return None


@contextmanager
def compiled_inside(parts: Collection[nn.Module], *modules: nn.Module) -> Iterator[None]:
    """Undo, when the context is left, the in-place compilation of parts of modules that was done inside.

    Args:
        parts: all parts of the modules.
        modules: the modules, which may have other parts in the end.
    """
    before = _compiled_in_place(parts)
    try:
        yield
    finally:
        after: set[nn.Module] = set()
        for module in modules:
            after |= set() if module in after else all_parts(module)
        for part in _compiled_in_place(after) - before:
            del part.__dict__["_compiled_call_impl"]


def _compiled_in_place(parts: Iterable[nn.Module]) -> set[nn.Module]:
    return {part for part in parts if vars(part).get("_compiled_call_impl") is not None}


@contextmanager
def occupied(family: Family) -> Iterator[None]:
    """Reserve a model while inside: no other context can have it, in this thread or another.

    Raises:
        PruningError: another context has the model.
    """
    mark = object()
    try:  # from here on: an interrupt may come at any line
        if family.model.__dict__.setdefault(MARK, mark) is not mark:  # in one step: threads may ask at the same time
            raise _occupied(family)
        with not_copied(family.model):
            yield
    finally:
        if family.model.__dict__.get(MARK) is mark:
            del family.model.__dict__[MARK]


def _occupied(family: Family) -> PruningError:
    return PruningError(
        f"This {type(family.model).__name__} is being pruned already, or calibrated, or asked as a guide: leave that "
        "context first, prune does not nest. What runs at the same time needs a model of its own."
    )


def refuse_methods(policy: PruningPolicy, family: Family, fallback: Method | None) -> None:
    """Raise PruningError or PolicyError if a model cannot be pruned by the methods of a policy's stages.

    Args:
        policy: the policy.
        family: family of the model.
        fallback: method for images that the first stage's is not for; None: there is none.
    """
    stages = list(zip(policy.stages, policy.steps(), strict=True))
    somewhere = any(step.method.scorer.stages(family.depth) for _, step in stages)
    for _, step in stages:
        refuse_untrained(step.method, fallback)
    for stage, step in stages:
        method, inside = step.method, bool(step.method.scorer.stages(family.depth))
        if len(method.rules) > 1:
            refuse_routes(method, family.depth)
        if inside:
            refuse_at_stages(stage, method.needs)
        refuse_compressing(stage, method, family)
        if method.selector.merges:
            refuse_merging(stage, method.selector, family, somewhere)
    if fallback is not None:
        refuse_fallback(stages[0][1].method, fallback, family)


def refuse_at_stages(stage: Stage, needs: Needs) -> None:
    """Raise PolicyError if a stage drops tokens inside the decoder and needs what is seen only before it.

    That is a signal outside of `observation.STAGED`, or a budget of each image.
    """
    if stage.selector_args.get("per", "sample") != "sample" or not needs.keys() <= STAGED:
        raise PolicyError(
            f"scorer {stage.scorer!r} drops tokens inside the decoder, where a budget is of the whole sample and "
            f"only the decoder's own rows are seen: leave selector and selector_args out (selector is "
            f"{stage.selector!r}, selector_args {dict(stage.selector_args)})."
        )


def refuse_untrained(method: Method, fallback: Method | None) -> None:
    """Raise PruningError if a rule of the method, or its fallback, needs a network and has none."""
    for rule in (*method.rules, *(() if fallback is None else fallback.rules)):
        if isinstance(rule.scorer, Learned) and rule.scorer.network is None:
            raise PruningError(
                "The scorer 'learned' has no network: a calibration of all methods trains one and writes it into its "
                "policies. Calibrate with CrossAttentionCalibration and use the policy that it saves, or choose "
                "another scorer."
            )
        if isinstance(rule.scorer, Trained) and rule.scorer.weights is None:
            name = SCORERS.name_of(rule.scorer)
            raise PruningError(
                f"The scorer {name!r} has no weights. Train some, trainer.fit(CompressorTraining(module, "
                f"compressor={name!r}), loader), and use the policy that its policy() gives."
            )


def refuse_compressing(stage: Stage, method: Method, family: Family) -> None:
    """Raise PruningError if a stage's scorer is a compressor that cannot work on the model, or at its budget."""
    scorer = method.scorer
    if not isinstance(scorer, Compressor):
        return
    if family.reads != "decoder":
        raise PruningError(
            f"{stage.scorer!r} writes rows that a decoder reads; {type(family.model).__name__} reads visual tokens by "
            f"{family.reads}. Choose another scorer; docs/methods.md lists them."
        )
    if stage.keep != scorer.tokens or not isinstance(stage.keep, int):
        raise PruningError(
            f"The policy's {stage.scorer!r} was trained to write {scorer.tokens} tokens an image, and keep is "
            f"{stage.keep}. Give keep={scorer.tokens}, or train one for another number."
        )
    if stage.selector not in (None, "top-k") or method.selector.per != "image":
        raise PruningError(
            f"The policy's {stage.scorer!r} itself says at whose places its rows are written: leave selector and "
            f"selector_args out (selector is {stage.selector!r}, selector_args {dict(stage.selector_args)})."
        )


def refuse_routes(method: Method, depth: int) -> None:
    """Raise PruningError if one of the rules that a question chooses among cannot take the place of another.

    Args:
        method: several rules.
        depth: number of layers of the decoder.
    """
    for rule in method.rules:
        if rule.scorer.stages(depth) or rule.rewrites or BESIDE & rule.needs.keys():
            raise PruningError(
                f"A question cannot choose {SCORERS.name_of(rule.scorer)!r} with {SELECTORS.name_of(rule.selector)!r}: "
                "the rules of a policy with routes drop tokens before the decoder, merge none, and read no other "
                "model, guide or text encoder. Give others, or leave routes out."
            )


def refuse_fallback(method: Method, fallback: Method, family: Family) -> None:
    """Raise PruningError if a fallback cannot take the place of a policy's method on this model, sample by sample."""
    name = f"fallback {SCORERS.name_of(fallback.scorer)!r} with {SELECTORS.name_of(fallback.selector)!r}"
    for rule, what in ((method, "policy"), (fallback, name)):
        if rule.scorer.stages(family.depth) or rule.rewrites:
            raise PruningError(
                f"A fallback and the policy it stands in for drop tokens before the decoder and merge none; the {what} "
                "does otherwise. Leave fallback out, or choose another rule: 'divprune' works on every model."
            )
    if BESIDE & fallback.needs.keys():
        raise PruningError(
            f"The {name} reads a model beside the one that is pruned, a guide or a text encoder, which a fallback has "
            "not. Choose 'divprune'."
        )
    if not family.shows(fallback.needs):
        missing = sorted(
            signal.name.lower().replace("_", "-") for signal in fallback.needs if not family.shows({signal})
        )
        raise PruningError(
            f"The {name} reads {', '.join(missing)}, which {type(family.model).__name__} does not show. Choose "
            "'divprune', which works on every model."
        )


def refuse_merging(stage: Stage, selector: Selector, family: Family, inside: bool) -> None:
    """Raise PruningError if a selector that merges tokens cannot work on a model.

    Either no layers read visual tokens as rows at the place where tokens leave, or they have no grid to be averaged on.
    `inside` is True if tokens leave inside the decoder or encoder, at this stage or another.
    """
    if selector.needs_grid and not family.has_grid:
        raise PruningError(
            f"The policy's {stage.selector or stage.scorer!r} averages tokens over a square grid, and those of "
            f"{type(family.model).__name__} form none: they are queries, or of several crops, or have line ends or a "
            "[CLS] among them. Use it on a LLaVA-1.5, or choose another control: stride works on every model."
        )
    if family.reads != "decoder" and not inside:
        raise PruningError(
            f"The policy's {stage.selector or stage.scorer!r} merges tokens, which is exact where a decoder reads "
            f"them as rows; {type(family.model).__name__} reads them by {family.reads}. Choose another selector; "
            "docs/methods.md lists them."
        )
