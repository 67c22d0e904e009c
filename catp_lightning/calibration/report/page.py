"""Render a calibration as a page of Markdown, from the evidence of its policies."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from catp_lightning.calibration import statistics
from catp_lightning.calibration.report.controls import against
from catp_lightning.calibration.report.evidence import FitEvidence, budget_name, evidence_of, fits, unit, visual_tokens
from catp_lightning.calibration.report.promise import promise_section
from catp_lightning.calibration.report.questions import decoded, questions_section
from catp_lightning.policy import PruningPolicy
from catp_lightning.safe_text import markdown_text
from catp_lightning.utils.markdown import markdown_table

SHOWN = 20
"""Number of candidates in a budget's table, which shows all controls too."""

CAPTIONS = {
    "front": (
        "What a price buys: the share of samples answered otherwise than by the unpruned model, over the price; bars "
        "are 95% intervals, and lower is better. All rules of one price are compared at that price."
    ),
    "retention": (
        "What is kept: the share of samples answered as by the unpruned model, over visual tokens kept; bars are 95% "
        "intervals, thin lines are controls, and higher is better."
    ),
    "layers": (
        "Each layer by itself: the same share when CATP, or the method whose layers were asked, reads that one alone, "
        "at each budget; dashed is the chosen policy. Where the points lie apart, it matters which layer is read."
    ),
    "heads": (
        "Weights of the heads of the chosen layers: red heads look at tokens that help the answer, blue heads at "
        "tokens that are better dropped, and blank ones were not selected."
    ),
    "slots": (
        "What keeping each slot changes in the log-probability of the unpruned answer, a mean over images: blue slots "
        "are better dropped, if any has to be."
    ),
}
"""Captions of the figures by file name without suffix, in the order of the page; those of statistics come last."""


def page(
    policies: Sequence[PruningPolicy],
    lines: Mapping[str, str],
    figures: Sequence[str],
    modules: Sequence[object] = (),
    everyone: bool = False,
) -> str:
    """Return the report of a calibration as Markdown.

    Args:
        policies: policies of one calibration.
        lines: what was chosen, what it keeps and what it cost, in a sentence each.
        figures: names of the figures that exist, as in `CAPTIONS`; their files lie beside the page.
        modules: the user's module and model, in which a tokenizer is looked for that decodes questions.
        everyone: True to show every candidate, not only the best and the controls.
    """
    evidence = evidence_of(policies[0])
    parts = ", ".join(f"{count} samples to {part}" for part, count in evidence["samples"].items())
    sections = [
        f"# Calibration of {markdown_text((policies[0].model or {})['type'])}",
        "".join(f"- **{name.capitalize()}**: {markdown_text(text)}\n" for name, text in lines.items()),
        f"## Budgets\n\n{_budgets(policies)}",
        f"The split: {parts}. Intervals are Wilson's, of 95%. The last column is how far the choice is ahead of the "
        "control that agreed most on the checked samples, paired by sample, with a 95% interval over images; *level* "
        "where that contains 0.",
        *([promise_section(policies[0])] if "promise" in evidence else []),
        *_figures(figures, ("front", "retention", "layers")),
        "## What the probes found",
        "Layers are found by forward selection, then heads by a signed sparse fit; shares are of the variance of the "
        "answers' log-probability, on images left out, ± a standard error.",
        "".join(f"- {markdown_text(name)}: {_found(fit)}\n" for name, fit in fits(policies[0]).items()),
        *_figures(figures, ("heads", "slots", *(one.name for one in statistics.STATISTICS))),
        *([said] if (said := questions_section(policies[0], partial(decoded, modules))) else []),
        *(
            section
            for policy in policies
            for section in (_candidates(policy, everyone), _perturbed(policy))
            if evidence_of(policy)["candidates"] and section
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in sections) + "\n"


def percent(value: float) -> str:
    return f"{value:.1%}"


def interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.1%} to {ends[1]:.1%}"


def _figures(there: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    captions = {**CAPTIONS, **{one.name: one.caption for one in statistics.STATISTICS}}
    for name in names:
        if name in there:
            yield f"![{name.replace('_', ' ')}]({name}.png)\n\n{captions[name]}"


def _budgets(policies: Sequence[PruningPolicy]) -> str:
    evidence, total = evidence_of(policies[0]), visual_tokens(policies[0])
    prices = [f"{name} paid" for name in evidence["retention"][0].get("prices", ())]
    controls = {row["name"] for policy in policies for row in evidence_of(policy)["candidates"] if row["control"]}
    rows = [
        [
            point["keep"],
            *_prices(point.get("prices")),
            f"{point['tokens']} of {total}",
            f"{point['chosen']}{' (a control)' if point['chosen'] in controls else ''}",
            percent(point["agreement"]),
            interval(point["interval"]),
            evidence["samples"]["check"],
            against(point) or "-",
        ]
        for point in evidence["retention"]
    ]
    counted = "visual tokens left" if prices else "visual tokens"
    found = ("chosen", "agreement", "95% interval", "samples checked", "and the best control")
    return markdown_table((unit(policies[0]), *prices, counted, *found), rows)


def _prices(prices: Mapping[str, float] | None) -> list[str]:
    """Return the cells of a point's prices, as shares of what the unpruned model pays."""
    return [] if prices is None else [percent(share) for share in prices.values()]


def _found(fit: FitEvidence) -> str:
    """Describe in words the layers and heads that were fitted for one scorer."""
    if not fit["layers"]:
        return "nothing; no layer's head scores predict the answers better than chance on left-out images."
    steps = ", ".join(
        f"layer {step['layer']} ({_explained(step['explained'], step['error'])} of the variance, chosen again in "
        f"{fit['layer_stability'][step['layer']]:.0%} of the fits that leave a fold out)"
        for step in fit["layer_steps"]
    )
    weights, stability = np.array(fit["head_weights"]), np.array(fit["head_stability"])
    chosen = weights != 0
    if not chosen.any():
        return f"{steps}; but no selection of heads predicts the answers better than chance on left-out images."
    return (
        f"{steps}; {chosen.sum()} of {chosen.size} heads, which explain "
        f"{_explained(fit['explained'], fit['explained_error'])} of the variance beyond the slots, each found again "
        f"with the same sign in {stability[chosen].min():.0%} to {stability[chosen].max():.0%} of those fits."
    )


def _explained(share: float, error: float) -> str:
    return f"{share:.2%} ± {error:.2%}"


def _candidates(policy: PruningPolicy, every: bool) -> str:
    everyone = evidence_of(policy)["candidates"]
    shown = [row for place, row in enumerate(everyone) if every or place < SHOWN or row["control"]]
    rows = [
        [
            row["name"],
            "yes" if row["control"] else "",
            row["choose"]["samples"],
            f"{row['choose']['divergence']:.4f} ± {row['choose']['divergence_error']:.4f}",
            percent(row["choose"]["agreement"]),
            f"{percent(row['check']['agreement'])} ({interval(row['check']['interval'])})" if row["check"] else "",
        ]
        for row in shown
    ]
    header = ("candidate", "control", "samples", "divergence", "agreement", "agreement, checked")
    more = len(everyone) - len(shown)
    rest = f"{more} more candidates are not shown" if more else "These are all candidates"
    return (
        f"## Candidates at {budget_name(policy)}\n\n{markdown_table(header, rows)}\n"
        f"{rest}; the figures of all {len(everyone)} are in the policy's evidence. Candidates that left early "
        "answered fewer samples and stand below those that stayed; controls and single layers are checked however "
        "they do. Divergence, which decides, is the mean over answer "
        "tokens of KL(unpruned || pruned) in nats, with its standard error."
    )


def _perturbed(policy: PruningPolicy) -> str:
    """Return the section on agreement on perturbed images; "" if calibration did not perturb."""
    evidence = evidence_of(policy)
    found = evidence.get("perturbed")
    if found is None:
        return ""
    checked = [row for row in evidence["candidates"] if row["check"]]
    checked.sort(key=lambda row: row["name"] != evidence["chosen"])
    rows = [
        [
            row["name"],
            "yes" if row["control"] else "",
            percent(row["check"]["agreement"]) if row["check"] else "",
            *(percent(figures[row["name"]]["agreement"]) for figures in found.values()),
        ]
        for row in checked
    ]
    return (
        f"## Perturbed images at {budget_name(policy)}\n\n"
        f"{markdown_table(('candidate', 'control', 'as they are', *found), rows)}\n"
        "The checked samples again, each with its image perturbed: the share of answers that are the unpruned model's "
        "to the same perturbed image. The first row is the choice. "
        "Candidates were fitted and chosen on images as they are and perturbed alike, and the divergences under which "
        "they competed are means over both; agreement is elsewhere that of images as they are."
    )


def worst_perturbed(policy: PruningPolicy) -> str:
    """Return in words the choice's lowest agreement on perturbed images, and what perturbed them."""
    evidence = evidence_of(policy)
    found = {name: figures[evidence["chosen"]]["agreement"] for name, figures in evidence["perturbed"].items()}
    worst = min(found, key=lambda name: found[name])
    return f"{percent(found[worst])} ({worst})"
