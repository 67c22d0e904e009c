"""Policies in Lightning checkpoints: under one key, as plain JSON types, so that loading runs no code."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from catp_lightning.errors import PolicyError
from catp_lightning.policy.policy import PruningPolicy
from catp_lightning.utils.messages import rank_zero_warn

POLICY_KEY = "catp_policy"
_ABOUT = frozenset({"model", "evidence", "budget", "format_version"})
"""Fields that say where a policy comes from, not what it does."""


def stored_policy(checkpoint: Mapping[str, Any]) -> PruningPolicy | None:
    """Return the policy that `PrunedModule` or `TokenPruning` saved in a checkpoint; None if it holds none.

    Raises:
        PolicyError: the policy in the checkpoint is damaged.
    """
    if POLICY_KEY not in checkpoint:
        return None
    try:
        return PruningPolicy.from_dict(checkpoint[POLICY_KEY])
    except PolicyError as error:
        raise PolicyError(
            f"The policy in the checkpoint, under {POLICY_KEY!r}, is damaged: {error} Give one in its place."
        ) from error


def missing_policy(name: str, example: str) -> PolicyError:
    """Return the error for a class `name` that was given no policy and found none in a checkpoint.

    Args:
        name: the class, "TokenPruning" for example.
        example: code that gives it a policy.
    """
    return PolicyError(
        f"{name} has no policy: none was given, and no checkpoint that holds one was loaded. Give one, {example}, or "
        "run with ckpt_path= of a checkpoint that TokenPruning or PrunedModule saved, not of weights alone."
    )


def warn_where_another(name: str, given: PruningPolicy, checkpoint: Mapping[str, Any]) -> None:
    """Warn if a checkpoint holds a policy that prunes differently from `given`, or a damaged one; `given` is used."""
    try:
        stored = stored_policy(checkpoint)
    except PolicyError as error:
        rank_zero_warn(f"{name} uses the policy it was given. {error}")
        return
    if stored is None:
        return
    ours, theirs = _fields(given), _fields(stored)
    if differ := [key for key in ours if key not in _ABOUT and ours[key] != theirs[key]]:
        here, there = _said(ours, differ), _said(theirs, differ)
        rank_zero_warn(
            f"{name} was given a policy with {here}; the one in the checkpoint has {there}. The one that was given is "
            "used. To take the checkpoint's, give none."
        )


def _fields(policy: PruningPolicy) -> dict[str, Any]:
    """Return what policies are compared by: the fields of the first stage, the stages after it, and all others."""
    return {part.name: getattr(policy, part.name) for part in fields(policy)}


def _said(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {values[key]!s:.200}" for key in keys)
