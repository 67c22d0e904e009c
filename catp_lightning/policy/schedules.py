"""Published methods of several stages, by name: where tokens leave, by which method, and how many at a given price.

Their papers and code differ in what a budget counts. Here it is always the visual tokens that a layer of the decoder
reads, the mean over its layers, so that methods of one budget do equal work there.
"""

from collections.abc import Callable, Mapping
from typing import Any

from catp_lightning.errors import PolicyError, did_you_mean
from catp_lightning.policy.stages import Stage


def vscan(keep: float, depth: int) -> list[Stage]:
    """VScan (2505.22654): local and global scan of the vision tower with merging, then the middle layer.

    Of the tokens that the first stage keeps, the third with the most attention from the last row of the prompt stays
    from the middle layer on: 96 and then 32 of 576 for 64 on average (layer 16 of 32), as the authors set it. They
    score with the middle layer's own queries and keys before it runs; here the layer before it is read.

    Example:
        >>> [round(576 * stage.keep) for stage in vscan(1 / 9, 32)]
        [96, 32]
    """
    middle = depth // 2
    return two_stages(Stage("fastervlm", selector="vscan"), Stage("fastv", {"layer": middle}), 1 / 3, keep, depth)


def divprune_fastv(keep: float, depth: int) -> list[Stage]:
    """DivPrune before the decoder and FastV at layer 2: the pair that UniPruneBench's README composes (2511.02650).

    FastV keeps half of what DivPrune kept. The benchmark's KEEP_RATIO is the share that DivPrune keeps.

    Example:
        >>> [(stage.scorer, stage.keep) for stage in divprune_fastv(0.25, 30)]
        [('divprune', 0.46875), ('fastv', 0.234375)]
    """
    return two_stages(Stage("divprune"), Stage("fastv", {"layer": 2}), 0.5, keep, depth)


Schedule = Callable[[float, int], list[Stage]]
"""Function of a budget and the depth of a decoder that returns the stages of a method, in order."""

SCHEDULES: Mapping[str, Schedule] = {"vscan": vscan, "divprune+fastv": divprune_fastv}
"""Published methods of several stages, by name."""


def stages_of(name: str, keep: Any, depth: Any) -> list[Stage]:
    """Return the stages of a method of `SCHEDULES`; the arguments are those of `PruningPolicy.schedule`.

    Raises:
        PolicyError: there is no such method, or a value is not allowed.
    """
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise PolicyError(f"There is no schedule {name!r:.200}. There are {known}.{did_you_mean(name, SCHEDULES)}")
    if not isinstance(keep, float) or not 0 < keep <= 1:
        raise PolicyError(
            f"keep is {keep!r:.200}; of a schedule it is the share of visual tokens that a layer reads on average, a "
            "float above 0 and at most 1."
        )
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 3:
        raise PolicyError(f"depth is {depth!r:.200}; it is the decoder's number of layers, an int of at least 3.")
    return SCHEDULES[name](keep, depth)


def two_stages(first: Stage, second: Stage, ratio: float, keep: float, depth: int) -> list[Stage]:
    """Return two stages with budgets such that `keep` is what a layer reads on average.

    Of `depth` layers the first stage is read by `layer`, the second by the others, so that
    keep * depth = early * layer + late * (depth - layer) with late = ratio * early:
    early = keep * depth / (layer + ratio * (depth - layer)).

    Args:
        first: stage at the decoder's input.
        second: stage at its `layer`.
        ratio: share of the first stage's tokens that the second keeps; more where the first would need more than all.
        keep: share of the tokens that a layer reads, the mean over layers.
        depth: number of layers.

    Example:
        >>> [stage.keep for stage in two_stages(Stage("stride"), Stage("fastv", {"layer": 8}), 1 / 3, 0.25, 16)]
        [0.375, 0.125]
    """
    layer = second.scorer_args["layer"]
    early = min(1.0, keep * depth / (layer + ratio * (depth - layer)))
    late = min(1.0, (keep * depth - early * layer) / (depth - layer))
    return [first.with_keep(early), second.with_keep(late)]
