"""Policies as arguments: a `PruningPolicy`, a path or address of one, or its fields in a configuration file."""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catp_lightning.errors import PolicyError, did_you_mean
from catp_lightning.policy.budgets import check_keep, keep_to_json
from catp_lightning.policy.policy import PruningPolicy

if TYPE_CHECKING:
    Source = str | Path | PruningPolicy | Mapping[str, Any]
else:
    # The command line would write a union into a saved configuration as the first of its types that takes the value:
    # fields would become the text of a Namespace, which the next run reads as a path. `Any` is written as it was given.
    Source = Any


def policy_or_path(source: Any) -> str | Path | PruningPolicy | None:
    """Return the policy, or its path or address, that an argument from Python or a configuration file means.

    Args:
        source: a policy, a path, an address or None, returned as they are; or the fields of a policy by name, `keep` as
            a number or as in a policy's file; or these fields as LightningCLI saves an object, under `class_path` and
            `init_args`.

    Raises:
        PolicyError: a field is unknown or wrong, or `source` is of another type.

    >>> policy_or_path({"scorer": "catp", "keep": 1})
    PruningPolicy(scorer='catp', keep=1)
    """
    if source is None or isinstance(source, str | Path | PruningPolicy):
        return source
    if hasattr(source, "as_dict"):  # a Namespace, which jsonargparse passes where it cannot make an object of it
        source = source.as_dict()
    if not isinstance(source, Mapping):
        raise PolicyError(f"policy is {reprlib.repr(source)}; give {_ALLOWED}.")
    values = dict(source)
    if "class_path" in values:
        _check_class(values)
        values = dict(values.get("init_args") or {})
    known = [*(field.name for field in fields(PruningPolicy)), "stages"]
    for name in values:
        if name not in known:
            raise PolicyError(
                f"A policy has no field {name!r:.200}; it has {', '.join(known)}.{did_you_mean(name, known)}"
            )
    if "keep" in values and not isinstance(keep := values["keep"], Mapping):
        check_keep(keep)
        values["keep"] = keep_to_json(keep)
    return PruningPolicy.from_dict(values)


_ALLOWED = "a PruningPolicy, a path, or the fields of one: {scorer: catp, keep: 0.25}"


def _check_class(values: Mapping[str, Any]) -> None:
    name = str(values["class_path"])
    if name.rpartition(".")[2] != PruningPolicy.__name__ or not set(values) <= {"class_path", "init_args"}:
        raise PolicyError(
            f"policy is of class_path {name!r:.200} with {sorted(map(str, values))!r:.200}; give {_ALLOWED}."
        )
