"""Questions are counted and drawn by image and group, whatever the batches, their order and the processes."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.asked import Asked, AskedImages, GroupNames
from catp_lightning.calibration.replay.groups import Groups
from tests.support.several_processes import each

NAMES = ["how many", "yes/no", "", "日本 🙂", "x" * 300, "\ud800 half", "a\nb"]


def samples(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of few images and three groups; two budgets."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(-(2**63), 2**63 - 1, (9,), generator=draw)[torch.randint(9, (count,), generator=draw)]
    groups = torch.tensor([0, -7, 2**62])[torch.randint(3, (count,), generator=draw)]
    draws = torch.randint(-(2**63), 2**63 - 1, (count,), generator=draw)
    return images, groups, draws, torch.rand(2, count, generator=draw) < 0.6


def part(whole: tuple[Tensor, ...], rows: Any) -> tuple[Tensor, ...]:
    return tuple(value[..., rows] for value in whole)


def equal(one: AskedImages, other: AskedImages) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in AskedImages.__dataclass_fields__)


def test_questions_are_counted_and_one_of_each_image_and_group_is_drawn() -> None:
    images, groups, draws, agreed = samples()
    metric = Asked(2)
    metric.update(images, groups, draws, agreed)
    found, expected = metric.compute(), defaultdict(list)
    for row in range(len(images)):
        expected[int(images[row]), int(groups[row])].append((int(draws[row]), (~agreed[:, row]).long().tolist()))
    assert [*zip(found.images.tolist(), found.groups.tolist(), strict=True)] == sorted(expected)
    for row, key in enumerate(sorted(expected)):
        asked = expected[key]
        assert found.questions[row] == len(asked)
        assert found.drawn[row].tolist() == min(asked)[1]
        assert found.disagreed[row].tolist() == [sum(one[1][k] for one in asked) for k in range(2)]
    assert len(expected) < 60 and max(found.questions) > 2, "or this proves nothing"


def test_batches_and_their_order_do_not_matter() -> None:
    whole, one, many = samples(), Asked(2), Asked(2)
    one.update(*whole)
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(7):
        many.update(*part(whole, rows))
    assert equal(one.compute(), many.compute())


def test_without_budgets_questions_are_counted_alone() -> None:
    images, groups, draws, _ = samples()
    counted, answered = Asked(), Asked(2)
    counted.update(images, groups, draws, torch.empty(0, 60).bool())
    answered.update(*samples())
    assert np.array_equal(counted.compute().questions, answered.compute().questions)
    assert counted.compute().drawn.shape == counted.compute().disagreed.shape == (len(counted.compute().images), 0)


def test_places_are_uniform_and_have_nothing_to_do_with_the_draw() -> None:
    images = torch.arange(4000)
    metric = Asked(1)
    metric.update(images, torch.zeros_like(images), images, (images % 2 == 0)[None])
    place, drawn = metric.compute().place, metric.compute().drawn[:, 0]
    assert np.abs(np.quantile(place, [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03
    assert abs(np.corrcoef(place, drawn)[0, 1]) < 0.05


def test_names_are_gathered_whole() -> None:
    one, many = GroupNames(), GroupNames()
    groups = Groups.of({"kind": NAMES}, "kind")
    one.update(groups.names)
    for name in [*NAMES, *reversed(NAMES)]:
        many.update(Groups.of({"kind": [name]}, "kind").names)
    many.update({})
    assert one.compute() == many.compute() == dict(groups.names) and sorted(one.compute().values()) == sorted(NAMES)


def reduced(rank: int | None, processes: int = 2) -> dict[str, Any]:
    """What both metrics find, of all samples or of a process's share; the last process met only one group."""
    whole, asked, names = samples(), Asked(2), GroupNames()
    nothing = torch.empty(0, dtype=torch.int64)
    asked.update(nothing, nothing, nothing, torch.empty(2, 0).bool())
    names.update({})
    last = whole[1] == 0
    shares = [(~last).nonzero()[:, 0], last.nonzero()[:, 0]]
    for share in shares if rank is None else [shares[rank]] if rank < 2 else []:
        asked.update(*part(whole, share))
    for number, name in enumerate(NAMES):
        if rank in (None, number % 2):
            names.update(Groups.of({"kind": [name]}, "kind").names)
    found = asked.compute()
    return {
        "names": names.compute(),
        **{name: torch.from_numpy(np.array(getattr(found, name))) for name in vars(found)},
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_come_to_what_one_finds_whoever_met_which_group(tmp_path: Path, processes: int) -> None:
    def work(rank: int) -> dict[str, Any]:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/met", rank=rank, world_size=processes
        )
        found = reduced(rank)
        torch.distributed.destroy_process_group()
        return found

    alone = reduced(None)
    for found in each(tmp_path, work, processes):
        assert found["names"] == alone["names"]
        assert all(torch.equal(found[name], alone[name]) for name in alone.keys() - {"names"})
