"""Strategies of hypothesis for the arguments of policies."""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from catp_lightning import PruningPolicy
from catp_lightning.calibration.plan import why_not
from catp_lightning.methods.scorers import SCORERS
from catp_lightning.methods.selectors import SELECTORS
from catp_lightning.models import find_family
from tests.support.models import random_blip2

TEXT = st.text(st.characters(), max_size=8)  # halves of characters too


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    inner = lambda each: st.lists(each, max_size=3) | st.dictionaries(TEXT, each, max_size=3)  # noqa: E731
    return st.recursive(leaves, inner, max_leaves=8)


PLAIN = trees(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT)
JUNK = trees(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([2**70, -(10**400), 1e308, 5e-324, -0.0, b"x", {1}, object])
)  # fmt: skip
KEEP = st.floats(0, 1, exclude_min=True) | st.integers(1, 2**63 - 1)


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a typed field, as JSON has them."""
    origin, options = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return arguments(hint, junk=False)
    if origin in (Union, UnionType):
        return st.one_of(map(of_type, options))
    if origin is Literal:
        return st.sampled_from(options)
    if origin is tuple:
        return st.lists(of_type(options[0]), max_size=4)
    if hint is int:
        return st.integers(-3, 6) | st.integers()
    return {
        float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2),
        bool: st.booleans(),
        str: st.text(max_size=5),
        type(None): st.none(),
    }[hint]


def arguments(cls: type, junk: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Some of a method's arguments, of the types of its fields; or anything in place of them."""
    hints = get_type_hints(cls)
    each = {part.name: JUNK if junk else of_type(hints[part.name]) for part in fields(cls) if part.init}
    return st.fixed_dictionaries({}, optional=each)


@st.composite
def rules(draw: st.DrawFn, junk: bool, scorers: Sequence[str] = sorted(SCORERS)) -> dict[str, Any]:
    scorer = draw(st.sampled_from(scorers))
    selector = draw(st.none() | st.sampled_from(sorted(SELECTORS)))
    chosen = SELECTORS[selector or SCORERS[scorer].selector]
    return {
        "scorer": scorer,
        "scorer_args": draw(arguments(SCORERS[scorer], junk)),
        "selector": selector,
        "selector_args": draw(arguments(chosen, junk)),
    }


MODEL = random_blip2()
ON_BLIP2 = [name for name in SCORERS if why_not(find_family(MODEL[0]), PruningPolicy(name)) is None]


def exact(policy: PruningPolicy) -> str:
    """A policy to the last bit: 1 is not 1.0 here, and -0.0 not 0."""
    return json.dumps(policy.to_dict(), sort_keys=True)
