"""Candidates that a calibration compares: named rules, each a scorer and a selector without a budget."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from catp_lightning.calibration.fit.fitting import Fitted, ScorerFit
from catp_lightning.calibration.plan import Plan, why_not
from catp_lightning.calibration.search.candidate import Candidate, Exit
from catp_lightning.methods.observation import Signal
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.policy import PruningPolicy

STRENGTHS = (0.5, 1.5)
"""Relevance weights of unfitted scores in a DPP, tried with both signs: which sign helps depends on the model."""


FITTED_STRENGTHS = (0.25, 0.5, 1.0)
"""Relevance weights of fitted scores in a DPP, whose sign is known."""


COMPARED = 1024
"""Limit on the tokens of an image for selection by similarity: each candidate's kernel has that number squared."""

WEIGHTS = ("layers", "head_weights", "slot_weights")


def default_candidates(plan: Plan) -> list[Candidate]:
    """Return every rule that drops before the decoder, single layers, and DPPs of several similarities and strengths.

    If the plan is for one method, the candidates are that method's. Otherwise rules that drop inside the decoder are
    left out: their first layers read all tokens, so at the same budget they read more. So is `trimmed-llama` with its
    own selector, which keeps more than the budget.
    """
    if plan.method is not None:
        return list(_of_method(plan, plan.method))
    found = []
    for name, cls in SCORERS.usable():
        rule = Candidate(name, name, control=cls.control, reference=cls.control)
        if name == "trimmed-llama":
            rule = Candidate(f"{name}, top-k", name, selector="top-k")
        if SELECTORS[cls.selector].compares and not _similar(plan):
            continue
        if not cls().stages(plan.family.depth) and why_not(plan.family, rule.policy(0.5)) is None:
            found.append(rule)
    if Signal.CROSS_ATTENTION in plan.family.layers():
        return found + list(_of_qformer(plan))
    for name in plan.scorers:
        layers = plan.layers_read(name)
        single = [_top_k(f"{name} layer {n}", name, {"layers": [n]}, reference=True) for n in layers]
        found += single if len(layers) > 1 else []
    return found + list(_of_outputs(plan))


def _of_qformer(plan: Plan) -> Iterator[Candidate]:
    """Yield a Q-Former's single layers (`catp layer 0` reads its first cross-attention), weighted CATP, and DPPs."""
    layers = range(plan.family.layers()[Signal.CROSS_ATTENTION])
    for name in ("catp", *plan.scorers):
        yield from (Candidate(f"{name} layer {n}", name, {"layers": [n]}, reference=name == "catp") for n in layers)
    yield Candidate("catp weighted by image token", "catp", {"image_weight": "received"})
    for scorer in ("catp", "cross-attention", "region-attention", "self-attention"):
        yield from _both_signs(scorer)
    for similarity in ("cross-attention", "outputs"):
        yield _diversity(similarity, {"similarity": similarity}, control=True)
    yield from _coverage()
    # Diversity of regions or of one layer's attention counts as a finding; of all layers, or of outputs, as a control.
    yield _diversity("regions", {"similarity": "regions"})
    yield from (_diversity(f"cross-attention layer {n}", {"layers": [n]}) for n in layers)


def _both_signs(scorer: str) -> Iterator[Candidate]:
    for strength in sorted(sign * size for sign in (1, -1) for size in STRENGTHS):
        args = {"similarity": "outputs", "relevance": strength}
        yield Candidate(f"dpp of outputs, {scorer} x {strength:+g}", scorer, {}, "dpp", args)


def _of_outputs(plan: Plan) -> Iterator[Candidate]:
    """Yield DPPs on the similarity of token features, with and without relevance; none where tokens are too many."""
    if _similar(plan):
        for name in (*plan.scorers, "l2-norm"):
            yield from _both_signs(name)
        for name in plan.scorers:
            layers = plan.layers_read(name)
            for n in layers if len(layers) > 1 else []:
                args = {"similarity": "outputs", "relevance": STRENGTHS[0]}
                title = f"dpp of outputs, {name} layer {n} x {STRENGTHS[0]:+g}"
                yield Candidate(title, name, {"layers": [n]}, "dpp", args)
        yield _diversity("outputs", {"similarity": "outputs"}, control=True)
        yield from _coverage()


def _coverage() -> Iterator[Candidate]:
    """Yield facility location, for each distance of the tokens' features."""
    for distance in ("cosine", "euclidean", "squared"):
        args = {} if distance == "cosine" else {"distance": distance}
        yield Candidate(f"coverage of outputs, {distance}", "position", {}, "facility-location", args)


def _similar(plan: Plan) -> bool:
    """Return True if tokens leave before the decoder and no image is known to have more than `COMPARED` of them."""
    return plan.layer == 0 and (plan.largest is None or plan.largest <= COMPARED)


def _of_method(plan: Plan, method: PruningPolicy) -> Iterator[Candidate]:
    """Yield one method as it is given and with each single layer; if it drops before the decoder, the controls too."""
    args, more = dict(method.scorer_args), (method.selector, method.selector_args)
    if method.scorer == "visual-exit":
        yield Exit("visual-exit", method.scorer, args, *more, depth=plan.family.depth)
        return
    yield Candidate(method.scorer, method.scorer, args, *more, control=SCORERS[method.scorer].control)
    for name in plan.scorers:
        layers = plan.layers_read(name)
        plain = {key: value for key, value in args.items() if key not in WEIGHTS}
        single = [Candidate(f"{name} layer {n}", name, {**plain, "layers": [n]}, *more, reference=True) for n in layers]
        yield from single if len(layers) > 1 else []
    if plan.layer == 0:
        for name, cls in SCORERS.usable():
            rule = Candidate(name, name, control=True, reference=True, eligible=False)
            if cls.control and name != method.scorer and why_not(plan.family, rule.policy(0.5)) is None:
                yield rule


def fitted_candidates(plan: Plan, fitted: Fitted) -> list[Candidate]:
    """Return candidates of the relevance that probes found, alone and in DPPs of several similarities and strengths.

    Args:
        plan: plan of the calibration.
        fitted: findings of the probes.
    """
    if plan.method is not None:
        return list(_of_method_fitted(plan, plan.method, fitted))
    found = []
    if fitted.greedy is not None:
        found.append(Candidate("fixed set", "position", {"weights": fitted.greedy}))
    several = dict(_similarities(plan, fitted))
    # Beside a network, which estimates a token's worth better, other estimates are tried in fewer sets.
    fewer = several if fitted.network is None else _plain(several)
    if fitted.slots:
        found += _sets("slots", "position", {"weights": fitted.slots}, fewer)
    for name, fit in fitted.scorers.items():
        if fit.selected:
            heads = {**_scale(plan, name), **_weights(plan, name, fit)}
            found += _sets(f"{name} heads", name, heads, _plain(several))
            if fitted.slots:
                both = {**heads, "slot_weights": fit.slot_weights}
                found += _sets(f"{name} heads and slots", name, both, fewer)
    if fitted.network is not None:
        found += _sets("learned", "learned", {"network": asdict(fitted.network)}, several)
    return found


def _plain(similarities: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the similarities of outputs and of all cross-attention layers."""
    return {kind: args for kind, args in similarities.items() if kind in ("outputs", "cross-attention")}


def _of_method_fitted(plan: Plan, method: PruningPolicy, fitted: Fitted) -> Iterator[Candidate]:
    plain = {key: value for key, value in method.scorer_args.items() if key not in WEIGHTS}
    for name, fit in fitted.scorers.items():
        if fit.selected:
            args = {**plain, **_scale(plan, name), **_weights(plan, name, fit)}
            yield Candidate(f"{name} heads", name, args, method.selector, method.selector_args)
            if fitted.slots:
                both = {**args, "slot_weights": fit.slot_weights}
                yield Candidate(f"{name} heads and slots", name, both, method.selector, method.selector_args)


def _scale(plan: Plan, name: str) -> dict[str, Any]:
    """Return the `scale` argument with which a scorer's weights were fitted; empty if its scorer has none."""
    scale = getattr(plan.scorers[name], "scale", None)
    return {} if scale is None else {"scale": scale}


def _weights(plan: Plan, name: str, found: ScorerFit) -> dict[str, Any]:
    return {"layers": list(found.layers), "head_weights": found.head_weights(plan.heads(name))}


def _sets(
    name: str, scorer: str, scorer_args: Mapping[str, Any], similarities: Mapping[str, dict[str, Any]]
) -> Iterator[Candidate]:
    """Yield candidates of one relevance score: top-k, and a DPP of each similarity at each of `FITTED_STRENGTHS`."""
    yield _top_k(name, scorer, scorer_args)
    for kind, args in similarities.items():
        for strength in FITTED_STRENGTHS:
            selector_args = {**args, "relevance": strength}
            yield Candidate(f"dpp of {kind}, {name} x {strength:g}", scorer, scorer_args, "dpp", selector_args)


def _top_k(name: str, scorer: str, scorer_args: Mapping[str, Any], reference: bool = False) -> Candidate:
    """Return a candidate that keeps the highest scores, whatever the scorer's own selector."""
    selector = None if SCORERS[scorer].selector == "top-k" else "top-k"
    return Candidate(name, scorer, scorer_args, selector, reference=reference)


def _similarities(plan: Plan, fitted: Fitted) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each similarity and the DPP arguments for it; none where tokens are too many to compare."""
    if not _similar(plan):
        return
    yield "outputs", {"similarity": "outputs"}
    if Signal.CROSS_ATTENTION not in plan.family.layers():
        return
    layers = range(plan.family.layers()[Signal.CROSS_ATTENTION])
    yield "cross-attention", {}
    yield "regions", {"similarity": "regions"}
    yield from ((f"cross-attention layer {layer}", {"layers": [layer]}) for layer in layers)
    chosen = {found.layers for found in fitted.scorers.values() if 1 < len(found.layers) < len(layers)}
    for several in sorted(chosen):
        yield f"cross-attention layers {' and '.join(map(str, several))}", {"layers": list(several)}


def _diversity(name: str, args: Mapping[str, Any], control: bool = False) -> Candidate:
    selector_args = {**args, "relevance": 0.0}
    return Candidate(f"diversity of {name}", "position", {}, "dpp", selector_args, control, reference=control)
