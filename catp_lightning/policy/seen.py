"""What a calibration saw of its images, as a policy's evidence holds it, and guards that watch for others."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from catp_lightning.errors import PolicyError
from catp_lightning.methods.guard import Guard
from catp_lightning.methods.method import Method
from catp_lightning.methods.summary import SUMMARY, Range, Ranges
from catp_lightning.policy.building import RULE, build_method
from catp_lightning.policy.policy import PruningPolicy
from catp_lightning.policy.typed import build

if TYPE_CHECKING:
    Fallback = str | Mapping[str, Any]
else:
    Fallback = Any  # as with a policy, a saved configuration must keep what was given
"""Name of a scorer, with its default selector, or `scorer`, `scorer_args`, `selector` and `selector_args` by name."""

SEEN = "seen"
"""Key of the ranges in a policy's evidence."""


def build_fallback(fallback: Any) -> Method | None:
    """Build the method that a user names as a fallback; None stays None.

    Raises:
        PolicyError: it is no name and no mapping with these fields, or there is no such method.
    """
    if fallback is None:
        return None
    if hasattr(fallback, "as_dict"):  # a Namespace of jsonargparse
        fallback = fallback.as_dict()
    rule: Any = {"scorer": fallback} if isinstance(fallback, str) else fallback
    if not isinstance(rule, Mapping) or "scorer" not in rule or not set(rule) <= set(RULE):
        raise PolicyError(
            f"fallback is {fallback!r:.200}; give the name of a rule, 'divprune', or a dictionary with scorer and, "
            f"where they are needed, {', '.join(RULE[1:])}."
        )
    return build_method(
        rule["scorer"], rule.get("scorer_args") or {}, rule.get("selector"), rule.get("selector_args") or {}
    )


def seen_ranges(policy: PruningPolicy) -> Ranges | None:
    """Return the ranges of the images that a policy was calibrated on; None if its evidence holds none.

    Raises:
        PolicyError: they are damaged.
    """
    entry = policy.evidence.get(SEEN)
    if not entry:
        return None
    try:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("features"), Mapping):
            raise PolicyError(f'it is {entry!r:.200} and should hold "tokens" and "features".')
        features = {str(name): _range(name, found) for name, found in entry["features"].items()}
        if SUMMARY.keys() != features.keys():
            return None  # numbers of another version
        return Ranges(float(entry["tokens"]), features)
    except (PolicyError, KeyError, TypeError, ValueError) as error:
        raise PolicyError(
            f"What the policy's calibration saw of its images, {SEEN!r} in its evidence, is damaged: {error} Take "
            f"{SEEN!r} out of its evidence to use it without being warned of other images, or calibrate again."
        ) from error


def guard_of(policy: PruningPolicy, fallback: Method | None) -> Guard | None:
    """Return a guard over a policy's images; None if the policy has no ranges, or prunes nothing.

    Raises:
        PolicyError: the ranges are damaged, or there is a fallback and no ranges that say when to use it.
    """
    ranges = seen_ranges(policy)
    if ranges is not None:
        return None if policy.everything else Guard(ranges, fallback)
    if fallback is None:
        return None
    raise PolicyError(
        "fallback is for images unlike those of the policy's calibration, and this policy does not say what these were "
        "like: it was not calibrated, or by an earlier version, or on too few images. Calibrate again, with "
        "CrossAttentionCalibration on at least 16 images, or leave fallback out."
    )


def _range(name: str, found: Any) -> Range:
    if not isinstance(found, Mapping):
        raise PolicyError(f"the range of {name!r:.50} is {found!r:.200}.")
    return build(Range, found, f"the range of {name!r:.50}")
