"""Build methods from the names and arguments that a policy holds."""

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

from catp_lightning.errors import PolicyError, did_you_mean
from catp_lightning.methods.counts import Counted, Counts
from catp_lightning.methods.method import Method
from catp_lightning.methods.registry import Registry
from catp_lightning.methods.routing import Routed, Router
from catp_lightning.methods.scorers import SCORERS, Scorer
from catp_lightning.methods.selectors import SELECTORS, Selector
from catp_lightning.policy.typed import build

Part = TypeVar("Part")

DEEP = 1024
"""More decoder layers than any model has: a scorer with stages there has stages in every decoder."""

RULE = ("scorer", "scorer_args", "selector", "selector_args")
"""Fields that make a rule, a method without a budget."""


def build_scorer(name: str, args: Mapping[str, Any]) -> Scorer:
    """Build a scorer from its registered name and its arguments."""
    return _build("scorer", name, SCORERS, args)


def build_selector(scorer: str, name: str | None, args: Mapping[str, Any]) -> Selector:
    """Build a selector from its registered name, None for the scorer's default, and its arguments."""
    name = _lookup("scorer", scorer, SCORERS).selector if name is None else name
    return _build("selector", name, SELECTORS, args)


def build_method(
    scorer: str, scorer_args: Mapping[str, Any], selector: str | None, selector_args: Mapping[str, Any]
) -> Method:
    """Build scorer and selector."""
    return Method(build_scorer(scorer, scorer_args), build_selector(scorer, selector, selector_args))


def build_routed(first: Method, routes: Mapping[str, Any]) -> Routed:
    """Build the method that routes questions between a policy's own rule and those of its `routes`.

    Raises:
        PolicyError: `routes` is no description of rules and their router.
    """
    rules, router = routes.get("rules"), routes.get("router")
    if set(routes) != {"rules", "router"} or not isinstance(rules, list) or not rules:
        raise PolicyError(f'routes has {sorted(routes)!r:.200}; it holds "rules", a list of them, and "router".')
    if not all(isinstance(value, Mapping) for value in (*rules, router)):
        raise PolicyError('routes holds something else than dictionaries in "rules" and "router".')
    if unknown := sorted(set().union(*rules) - set(RULE)):
        raise PolicyError(f"a rule of routes has {unknown!r:.200}; it takes {', '.join(RULE)}.")
    for rule in rules:
        if not all(isinstance(rule.get(name, {}), Mapping) for name in ("scorer_args", "selector_args")):
            raise PolicyError("a rule of routes has scorer_args or selector_args that are no dictionary.")
        if "scorer" not in rule:
            raise PolicyError("a rule of routes lacks scorer.")
    others = tuple(
        build_method(rule["scorer"], rule.get("scorer_args", {}), rule.get("selector"), rule.get("selector_args", {}))
        for rule in rules
    )
    found = build(Router, routes["router"], "the router of routes")
    if len(found.divergence) != len(others) + 1:
        raise PolicyError(
            f"The router of routes is for {len(found.divergence)} rules; there are {len(others) + 1}, the policy's "
            "own scorer and those in routes."
        )
    return Routed(first.scorer, first.selector, others, found)


def build_counted(method: Method, counts: Mapping[str, Any]) -> Counted:
    """Build the method under which samples keep as many tokens as a policy's `counts` say.

    Raises:
        PolicyError: `counts` are no arguments of `Counts`, or the method drops tokens inside the language model.
    """
    for rule in method.rules:
        if rule.scorer.stages(DEEP):
            raise PolicyError(
                f"counts do not go with scorer {SCORERS.name_of(rule.scorer)!r}, dropping tokens inside the decoder: "
                "they say how many enter it. Leave counts out."
            )
    return Counted.of(method, build(Counts, counts, "counts"))


def _lookup(kind: str, name: Any, known: Mapping[str, type[Part]]) -> type[Part]:
    if not isinstance(name, str) or name not in known:
        hint = did_you_mean(name, known)
        raise PolicyError(f"There is no {kind} {name!r:.200}; known are {', '.join(sorted(known))}.{hint}")
    return known[name]


def _build(kind: str, name: str, known: Mapping[str, type[Part]], args: Mapping[str, Any]) -> Part:
    return build(_lookup(kind, name, known), args, f"{kind} {name!r}")


def named(known: Registry[Any], part: Any) -> tuple[str, dict[str, Any]]:
    """Return the registered name of an object's class, and the fields that differ from their defaults."""
    name = known.name_of(part)
    if name not in known or known[name] is not type(part):
        raise PolicyError(
            f"{part!r:.200} is not a {known.kind} that a policy can name: {type(part).__qualname__} is not registered. "
            f"Register its class by an entry point of the group {known.group}; CONTRIBUTING.md shows how."
        )
    plain = known[name]()
    values = {part_.name: (getattr(part, part_.name), getattr(plain, part_.name)) for part_ in fields(part)}
    changed = {key: value for key, (value, default) in values.items() if value != default}
    return name, {
        key: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        for key, value in changed.items()
    }
