"""The two-dimensional control: evenly spaced rows and columns at any budget, of any image, tiles and frames."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.methods.method import select_tokens
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.selectors.grid import Grid, spread
from catp_lightning.models import find_family
from catp_lightning.models.layout import Image
from tests.support.families import BY_NAME, ROWS

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.slow
@given(
    widths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=4), share=st.floats(0, 1)
)
@settings(max_examples=300, deadline=None)
def test_any_budget_of_any_rows_is_kept_exactly(widths: list[list[int]], share: float) -> None:
    total = sum(map(sum, widths))
    count = max(1, round(share * total))
    chosen = spread(tuple(map(tuple, widths)), count)
    assert len(chosen) == len(set(chosen)) == count and sorted(chosen) == list(chosen)
    assert chosen[0] >= 0 and chosen[-1] < total
    starts = np.cumsum([0, *map(sum, widths)])
    for own, first, after in zip(widths, starts, starts[1:], strict=False):
        in_part = sum(first <= place < after for place in chosen)
        assert abs(in_part - count * sum(own) / total) < 1, "parts get their share, to a token"


def rows_and_columns(rows: int, columns: int, count: int) -> np.ndarray:
    return np.array([divmod(place, columns) for place in spread(((columns,) * rows,), count)])


def test_at_a_quarter_it_is_every_second_row_and_column_and_at_a_sixteenth_every_fourth() -> None:
    assert rows_and_columns(12, 12, 36).tolist() == [
        [row, column] for row in range(1, 12, 2) for column in range(1, 12, 2)
    ]
    assert rows_and_columns(8, 24, 12).tolist() == [[row, column] for row in (2, 6) for column in range(2, 24, 4)]
    assert sorted({row for row, _ in rows_and_columns(24, 24, 576).tolist()}) == list(range(24))


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (24, 24), (7, 30), (30, 7), (1, 16), (16, 1), (5, 5)])
def test_no_token_is_far_from_a_kept_one_as_it_is_under_a_stride_in_one_dimension(rows: int, columns: int) -> None:
    everywhere = np.array([divmod(place, columns) for place in range(rows * columns)])

    def farthest(kept: np.ndarray) -> float:
        return float(((everywhere[:, None] - kept[None]) ** 2).sum(-1).min(1).max() ** 0.5)

    worse = 0
    for count in sorted({max(1, rows * columns // part) for part in (2, 3, 4, 6, 8, 12, 16, 20, 32)}):
        kept = farthest(rows_and_columns(rows, columns, count))
        best = (rows * columns / count / np.pi) ** 0.5  # discs that just cover the image are as large
        edge = max(1.0, count / min(rows, columns))  # a line of tokens cannot cover a plane better
        assert kept <= 2.5 * best + 1 or edge > 1 or min(rows, columns) == 1
        places = np.arange(count) * rows * columns // count
        worse += farthest(everywhere[places]) < kept - 1e-9
    assert worse <= 3, "a line that is cut into rows is now and then as good, and seldom better"


def places(name: str) -> tuple[Any, Any, Observation]:
    """What a row of the matrix shows of where its tokens lie."""
    row = BY_NAME[name]
    model, inputs, found = row.model(), row.inputs(), []
    family = find_family(model)
    original = family.__class__.observation

    def observed(self: Any, values: Any, wanted: Any, prompt: Any) -> Observation:
        found.append(original(self, values, wanted, prompt))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family.__class__, "observation", observed)
        with prune(model, PruningPolicy("grid", keep=0.5)):
            model(**row.oracle.forward_inputs(inputs))
    return model, inputs, found[0]


def test_squares_are_read_line_by_line_and_a_tile_begins_with_its_class() -> None:
    seen = places("Llava")[2]
    assert seen[Signal.PATCH_POSITION][0].tolist() == [[0, place // 3, place % 3] for place in range(9)]
    model, _, seen = places("Mllama")
    rows = model.model.vision_model.num_patches
    side = int((rows - 1) ** 0.5)
    tile = [[-1, -1], *([place // side, place % side] for place in range(rows - 1))]
    count = model.config.vision_config.max_num_tiles
    assert seen[Signal.PATCH_POSITION][0].tolist() == [[number, *place] for number in range(count) for place in tile]


@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
def test_crops_make_one_picture_beside_the_whole_image_as_the_model_packs_them(name: str) -> None:
    model, inputs, seen = places(name)
    family = find_family(model)
    config, side = model.config, family._side()  # type: ignore[attr-defined]
    arguments = dict(inputs.items())
    counts = family._crop_counts(arguments)  # type: ignore[attr-defined]
    sizes = inputs["image_sizes"]
    checked = 0
    for image, (count, size) in enumerate(zip(counts, sizes, strict=True)):
        own = seen[Signal.PATCH_POSITION][image][seen.valid[image]]
        base = own[: side * side]
        assert base.tolist() == [[0, place // side, place % side] for place in range(side * side)]
        if count == 1:
            continue

        high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        features = torch.full((count, side * side, 3), -1.0)
        for crop in range(high * wide):
            for place in range(side * side):
                row, column = crop // wide * side + place // side, crop % wide * side + place % side
                features[1 + crop, place] = torch.tensor([1.0, row, column])
        packed = family._packed([features], {**arguments, "image_sizes": size[None]})[0]  # type: ignore[attr-defined]
        rest, expected = own[side * side :], packed[side * side :]
        patches = expected[:, 0] > 0.5
        assert torch.equal(rest[:, 1] >= 0, patches)
        if bool((expected[patches] == expected[patches].round()).all()):  # not resampled
            first = expected[patches].amin(0)
            assert torch.equal(rest[patches, 1:], (expected[patches] - first)[:, 1:].long())
            checked += 1
    assert checked, "no image was cut, so nothing was proved"


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_rows_and_columns_of_qwen_are_those_of_its_position_ids(name: str) -> None:
    row = next(row for row in ROWS if row.name.startswith(name))
    model, inputs, seen = places(row.name)
    caught: dict[str, Any] = {}
    handle = model.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
    )
    model(**row.oracle.forward_inputs(inputs))
    handle.remove()
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(find_family(model).placeholder_ids))
    positions = caught["position_ids"][-3:].movedim(0, -1)[visual]  # time, height, width of each visual token
    first = 0
    for image in range(seen.images):
        count = int(seen.valid[image].sum())
        own = positions[first : first + count, 1:]
        assert torch.equal(seen[Signal.PATCH_POSITION][image, :count, 1:], own - own.amin(0)), image
        first += count
    assert first == len(positions) and seen.images > 1


def test_a_square_that_lacks_its_first_patch_keeps_its_lines() -> None:
    image = Image(8, torch.zeros(1), shape=(3, 3), patches=torch.arange(1, 9))
    assert image.places()[:, 1:].tolist() == [[place // 3, place % 3] for place in range(1, 9)]
    assert Image(6, torch.zeros(1)).places().tolist() == [[0, 0, place] for place in range(6)], "no square: one line"


def seen_of(place: Tensor) -> Observation:
    valid = torch.ones(place.shape[:2], dtype=torch.bool)
    return Observation(valid, {}, {Signal.PATCH_POSITION: place})


def test_a_class_comes_last_and_crops_may_have_a_budget_each() -> None:
    tile = torch.tensor([[0, -1, -1], *([0, place // 4, place % 4] for place in range(16))])
    place = torch.cat([tile, tile + torch.tensor([1, 0, 0])])[None]
    seen = replace(seen_of(place), crops=place[..., 0])
    scores = torch.zeros(1, 34)
    for keep, per, expected in ((8, "image", 8), (4, "crop", 8), (32, "image", 32), (33, "image", 33)):
        chosen = select_tokens(scores, Grid(per=per), keep, seen, seen.valid).keep  # type: ignore[arg-type]
        assert chosen.sum() == expected
        assert int(chosen[0, [0, 17]].sum()) == max(0, expected - 32), "patches first"
    half = select_tokens(scores, Grid(), 8, seen, seen.valid).keep[0]
    assert half[:17].sum() == half[17:].sum() == 4 and torch.equal(half[:17], half[17:])


def test_queries_have_no_grid_and_a_sample_has_several() -> None:
    row = BY_NAME["Blip2-OPT"]
    with pytest.raises(PruningError, match="reads patch-position"), prune(row.model(), PruningPolicy("grid", keep=0.5)):
        pass
    with pytest.raises(PolicyError, match='per is "sample"'):
        PruningPolicy("grid", selector_args={"per": "sample"})
