"""Downsampling: the mean over cells of a coarser grid."""

from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from catp_lightning.methods.method import select_tokens
from catp_lightning.methods.observation import Observation, Signal
from catp_lightning.methods.selectors.pool import Pool, grid
from tests.support.families import BY_NAME
from tests.support.slow_selectors import slow_pool


def square(sides: list[int], **more: Any) -> Observation:
    valid = torch.arange(max(sides) ** 2) < torch.tensor([side**2 for side in sides])[:, None]
    return Observation(valid, {Signal.VISION_ATTENTION: 2}, {}, **more)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 12])
def test_downsampling_is_the_mean_over_cells_of_a_coarser_grid(side: int) -> None:
    seen, scores = square([side, 12]), torch.zeros(2, 144)
    for count in range(1, side**2 + 1):
        choice = select_tokens(scores, Pool(), count, seen, seen.valid)
        expected = slow_pool(side, count)
        assert choice.destination is not None and choice.destination[0, : side**2].tolist() == expected
        assert choice.keep[0, : side**2].tolist() == [carrier == t for t, carrier in enumerate(expected)]
        assert not choice.keep[0, side**2 :].any() and choice.destination[0, side**2 :].eq(-1).all()


def test_grids_of_hand_computed_budgets() -> None:
    assert [grid(12, count) for count in (1, 7, 8, 13, 18, 36, 72)] == [
        *((1, 1), (1, 7), (2, 4), (3, 4), (3, 6), (6, 6), (8, 9))
    ]


@pytest.mark.parametrize(
    ("seen", "says"),
    [
        (Observation.of_equal(1, 6, {}, {}), "an image has 6 of them, which is not a square number"),
        (square([3], crops=torch.zeros(1, 9, dtype=torch.long)), "several crops"),
        (square([3], protected=torch.arange(9)[None] == 8), "line ends"),
    ],
)
def test_what_is_no_square_grid_is_not_pooled(seen: Observation, says: str) -> None:
    with pytest.raises(PruningError, match=says):
        Pool().vectors(seen)


@pytest.mark.parametrize("name", ["Blip2-OPT", "Qwen2-VL", "Mistral3", "LlavaNext"])
def test_a_family_whose_tokens_are_no_square_of_patches_is_not_downsampled(name: str) -> None:
    model = BY_NAME[name].model()
    says = f"averages tokens over a square grid, and those of {type(model).__name__} form none"
    with pytest.raises(PruningError, match=says), prune(model, PruningPolicy(scorer="downsample")):
        pass


def test_downsampling_the_shipped_llava_is_reading_means_in_the_place_of_cells(
    llava: tuple[Any, dict[str, Tensor]],
) -> None:
    model, inputs = llava
    rows: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    visual = inputs["input_ids"] == model.config.image_token_id
    features = rows[0][visual].view(4, 12, 12, -1)
    carriers = torch.tensor(slow_pool(12, 36))
    written, mask = rows[0].clone(), inputs["attention_mask"].clone()
    flat = features.flatten(1, 2).clone()
    flat[:, carriers.unique()] = features.unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).flatten(1, 2)
    written[visual] = flat.flatten(0, 1)
    mask[visual] = (carriers == torch.arange(144)).long().repeat(4)
    with torch.no_grad():
        positions = torch.arange(mask.shape[1]).expand(mask.shape)
        full = model(inputs_embeds=written, attention_mask=mask, position_ids=positions).logits[:, -1]
        with prune(model, PruningPolicy(scorer="downsample", keep=36)):
            pruned = model(**inputs).logits[:, -1]
    torch.testing.assert_close(pruned, full, rtol=0, atol=2e-5 * float(full.abs().max()))
