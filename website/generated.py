"""A page for each method, schedule, family and package of the API, written from the code and the tables of docs/."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

from catp_lightning.methods import SCORERS, SELECTORS, Scorer, Selector
from catp_lightning.methods.schedule import visits
from catp_lightning.models import FAMILIES, Family
from catp_lightning.policy import SCHEDULES, PruningPolicy
from catp_lightning.policy.schedules import two_stages
from website.tables import about, arxiv, rows

DEPTH = 32  # layers of the decoder for which places are told
TOKENS = 576  # visual tokens of an image for which numbers are told, those of LLaVA-1.5
READS = {
    "decoder": "the entry of the text decoder, or of a layer inside it",
    "encoder": "the entry of the text encoder, or of a block inside it",
    "cross-attention": "rows that cross-attention reads: its keys, values and cache",
}
API = {
    "catp_lightning": (),
    "catp_lightning.calibration": (),
    "catp_lightning.data": ("SHIPPED", "GRIDS", "PROMPTS", "shipped"),
    "catp_lightning.data.benchmarks": (),
    "catp_lightning.data.scenes": ("Drawing", "write_scenes"),
    "catp_lightning.data.vqa": ("VQADataModule", "VQASplit"),
    "catp_lightning.methods": (),
    "catp_lightning.metrics": (),
    "catp_lightning.models": (),
    "catp_lightning.plots": (),
    "catp_lightning.policy": (),
    "catp_lightning.pricing": (),
}
"""Packages of the API, and the names shown; none: those of `__all__`."""
_OPTIONS = "    options:\n      members: false\n      heading_level: 3\n"

Pages = Iterator[tuple[Path, str]]


def scorer_pages(pictures: set[str]) -> Pages:
    """Write the page of each scorer.

    Args:
        pictures: names of pictures beside the pages, without their ending.
    """
    told, runs = rows("methods.md", "name"), rows("methods.md", "method")
    for name, scorer in SCORERS.items():
        facts = [
            ("Source", arxiv(told[name]["source"])),
            ("Reads", _signals(scorer())),
            ("Tokens leave", _place(scorer())),
            ("Selector", f"[`{scorer.selector}`](../selectors/{scorer.selector}.md), unless the policy names another"),
            ("Runs on", ", ".join(model for model, cell in runs[name].items() if cell == "yes")),
        ]
        if scorer.control:
            facts.append(("Control", "takes part in every calibration, whose policy says where it is level or ahead"))
        use = f'TokenPruning(PruningPolicy("{name}", keep=0.25))'
        yield (
            Path("scorers", f"{name}.md"),
            _method(name, told[name]["what it computes"], facts, use, pictures & {name}, scorer),
        )


def selector_pages(pictures: set[str]) -> Pages:
    """Write the page of each selector; arguments as of `scorer_pages`."""
    told = rows("methods.md", "selector")
    for name, selector in SELECTORS.items():
        of = [scorer for scorer, cls in SCORERS.items() if cls.selector == name]
        facts = [
            ("Source", arxiv(told[name]["source"]) or "-"),
            ("Reads", ", ".join(filter(None, ["scores", _signals(selector())]))),
            ("Nested", "yes: a smaller budget keeps a subset" if selector.nested else "no: each budget chooses anew"),
            ("Merges", "yes" if selector.merges else "no"),
            ("Own selector of", ", ".join(f"[`{scorer}`](../scorers/{scorer}.md)" for scorer in of) or "none"),
        ]
        use = f'TokenPruning(PruningPolicy("{of[0] if of else "l2-norm"}", selector="{name}", keep=0.25))'
        picture = pictures & {f"selector-{name}"}
        yield Path("selectors", f"{name}.md"), _method(name, told[name]["what it keeps"], facts, use, picture, selector)


def schedule_pages(pictures: set[str]) -> Pages:
    """Write the page of each named schedule; arguments as of `scorer_pages`."""
    told, runs = rows("methods.md", "schedule"), rows("methods.md", "method")
    for name, schedule in SCHEDULES.items():
        stages = schedule(0.25, DEPTH)
        every = [{model for model, cell in runs[one.scorer].items() if cell == "yes"} for one in stages]
        selectors = [one.selector or SCORERS[one.scorer].selector for one in stages]
        facts = [
            ("Source", arxiv(told[name]["source"])),
            ("Budget", "share of the visual tokens that a layer reads, the mean over the decoder's layers"),
            ("Scorers", ", ".join(f"[`{one.scorer}`](../scorers/{one.scorer}.md)" for one in stages)),
            ("Selectors", ", ".join(f"[`{one}`](../selectors/{one}.md)" for one in selectors)),
            ("Runs on", ", ".join(model for model in runs[stages[0].scorer] if all(model in one for one in every))),
        ]
        line = told[name]["stages"]
        text = f"# `{name}`\n\n{line[0].upper()}{line[1:]}.\n\n{_facts(facts)}\n{_layers(name)}"
        code = f'policy = PruningPolicy.schedule("{name}", keep=0.25, depth={DEPTH})\ncallback = TokenPruning(policy)'
        code = f"from catp_lightning import PruningPolicy, TokenPruning\n\n{code}"
        text += f"## In use\n\n```python\n{code}\n```\n\n"
        for file in pictures & {f"schedule-{name}"}:
            text += "## On one picture\n\nWhat is there from layer to layer at `keep=0.25`, in a small decoder:\n\n"
            text += f"![Visual tokens that are there from layer to layer](../pictures/{file}.png)\n\n"
        formula = "".join(f"::: {one.__module__}.{one.__qualname__}\n{_OPTIONS}\n" for one in (schedule, two_stages))
        text += f"## Formula\n\n{formula}## Code\n\n{_code(schedule)}"
        yield Path("schedules", f"{name}.md"), text


def family_pages(pictures: set[str]) -> Pages:
    """Write the page of each family; arguments as of `scorer_pages`."""
    for family in FAMILIES:
        types = getattr(family, "types", ()) or (() if family.__name__ == "Placeholder" else (family.name,))
        yield Path("models", f"{family.__name__}.md"), _family(family, tuple(types), pictures)


def api_pages() -> Pages:
    """Write a page for each package of the API, with its public names; one of several packages is on the first page."""
    seen: dict[str, str] = {}
    for package, chosen in API.items():
        module = import_module(package)
        text = f"# `{package}`\n\n{(module.__doc__ or '').strip().replace('Example::', '**Example**')}\n"
        for name in sorted(chosen or module.__all__, key=str.lower):
            value = getattr(module, name)
            defined = isinstance(value, type | FunctionType) and value.__module__.startswith("catp_lightning")
            place = f"{value.__module__ if defined else package}.{name}"  # else a constant or an alias
            first = seen.setdefault(place, package)
            text += f"\n::: {place}\n" if first == package else f"\n## [{name}]({first}.md#{place})\n"
        yield Path("api", f"{package}.md"), text


def _method(
    name: str, line: str, facts: list[tuple[str, str]], use: str, picture: set[str], cls: type[Scorer | Selector]
) -> str:
    text = f"# `{name}`\n\n{line[0].upper()}{line[1:]}.\n\n{_facts(facts)}\n"
    code = f"from catp_lightning import PruningPolicy, TokenPruning\n\ncallback = {use}"
    text += f"## In use\n\n```python\n{code}\n```\n\n"
    for file in picture:
        text += "## On one picture\n\nWhat stays of a scene when a quarter of the tokens is asked for:\n\n"
        text += f"![Kept visual tokens over a scene of digits](../pictures/{file}.png)\n\n"
    return text + _source(cls, "Formula and code")


def _family(family: type[Family], types: tuple[str, ...], pictures: set[str]) -> str:
    name, first = family.__name__, family.classes[0] if family.classes else ""
    words = {*types, *family.classes, *(c.removesuffix("ForConditionalGeneration") for c in family.classes)}
    anchor = about(words) if types else "other-families"
    facts = [
        ("Model types", ", ".join(f"`{kind}`" for kind in types) or "any other with an image token and a text decoder"),
        ("Classes", ", ".join(f"`{one}`" for one in family.classes) or "-"),
        ("Tokens leave at", READS[family.reads]),
        ("What was tested, and what it cannot do", f"[its section in Families](../families.md#{anchor})"),
    ]
    text = f"# {name}\n\n{(family.__doc__ or '').strip().splitlines()[0]}\n\n{_facts(facts)}\n"
    if first:
        text += (
            "## In use\n\n```python\n"
            f"from typing import Any\n\nfrom transformers import {first}\n\n"
            "from catp_lightning import PruningPolicy, prune\n\n\n"
            f"def answer(model: {first}, inputs: dict[str, Any]) -> Any:\n"
            '    with prune(model, PruningPolicy("divprune", keep=0.25)):\n'
            "        return model.generate(**inputs)\n```\n\n"
        )
    if name in pictures:
        text += f"## On one picture\n\n![Kept visual tokens over a scene of digits](../pictures/{name}.png)\n\n"
    return text + _source(family)


def _layers(name: str) -> str:
    """Return a section that tells how many tokens each layer reads under a schedule, at some budgets."""
    text = f"## How many stay\n\nOf {TOKENS} visual tokens, in a decoder of {DEPTH} layers:\n\n"
    text += "| keep | tokens that layers read | mean |\n|---|---|---|\n"
    for told, keep in (("1/2", 1 / 2), ("1/4", 1 / 4), ("1/9", 1 / 9), ("1/20", 1 / 20)):
        read = visits(PruningPolicy.schedule(name, keep, DEPTH).steps(), TOKENS, DEPTH)
        parts = [(count, [layer for layer in range(DEPTH) if read[layer] == count]) for count in dict.fromkeys(read)]
        cells = ", ".join(f"{count} in layers {layers[0]} to {layers[-1]}" for count, layers in parts)
        text += f"| {told} | {cells} | {sum(read) / DEPTH:.1f} |\n"
    return f"{text}\n"


def _source(cls: type, title: str = "Code") -> str:
    return f"## The class\n\n::: {cls.__module__}.{cls.__qualname__}\n{_OPTIONS}\n## {title}\n\n{_code(cls)}"


def _code(of: Any) -> str:
    """Return the source of the module that a class or function is in."""
    return f"`{of.__module__}`\n\n~~~~~~python\n{inspect.getsource(import_module(of.__module__))}~~~~~~\n"


def _facts(facts: list[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in facts)


def _signals(part: Any) -> str:
    return "; ".join(f"`{signal.name}`: {signal.value}" for signal in part.needs).replace("|", "\\|")


def _place(scorer: Scorer) -> str:
    layers = scorer.stages(DEPTH)
    if not layers:
        return "before the decoder"
    return f"at the entry of {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} of {DEPTH}"
