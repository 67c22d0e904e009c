"""Whatever pixels, weights, arguments and padding: the budget is kept, and no sample harms another."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from catp_lightning import PruningPolicy, prune
from catp_lightning.models import find_family
from tests.support.families import BY_NAME, ROWS
from tests.support.matrix import KIN
from tests.support.quick import quick
from tests.support.rows import Row
from tests.support.rules import INF, NAN, RULES

pytestmark = pytest.mark.usefixtures("no_grad")


def _wants(row: Row) -> bool:
    """Whether a family wants an image with every prompt."""
    return any(key.startswith("pixel_values") for key in row.inputs([3]))


@pytest.mark.parametrize("name", ["Blip2-OPT", "Llava"])
@settings(max_examples=settings.default.max_examples // 6)
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.0, 0.1, 0.5, 0.9]), pads=st.integers(0, 3))
def test_dropping_any_tokens_equals_masking_them_under_any_padding(
    name: str, seed: int, share: float, pads: int
) -> None:
    row, draw = BY_NAME[name], np.random.default_rng(seed)
    model, inputs = row.model(), row.inputs(draw.permutation(len(row.samples())).tolist(), pads)
    visual = row.oracle.tokens(inputs)
    keep = visual & torch.from_numpy(draw.random(visual.shape) < share)
    with prune(model, PruningPolicy(), choose=lambda tokens: keep):
        pruned = model(**inputs).logits
    with row.oracle.masked(model, inputs, keep):
        masked = model(**inputs).logits
    compared = row.oracle.compared(inputs, keep)
    assert (pruned[compared] - masked[compared]).abs().max() <= 1e-10 * masked.abs().max()


EVERY_RULE = [
    *RULES,
    *(
        ("Blip2-OPT", {"scorer": scorer})
        for scorer in ("catp", "cross-attention", "region-attention", "self-attention")
    ),
    *(
        ("Blip2-OPT", {"scorer": "catp", "selector": "dpp", "selector_args": {"similarity": kind}})
        for kind in ("cross-attention", "regions", "outputs")
    ),
    ("Blip2-OPT", {"scorer": "catp", "scorer_args": {"image_weight": "received"}}),
    ("Llava", {"scorer": "l2-norm", "selector": "conditional-dpp"}),
    ("Llava", {"scorer": "l2-norm", "selector": "max-min"}),
]
PACKED = {"Mistral3", "Mistral3, sliding window", "Pixtral"}
"""Families that read all images of a batch in one attention: one that is no number spoils the others, unpruned too."""
FREE = {"trimmed-llama", "sparsevlm"}
"""How many they keep depends on what they see: on each head's choice, on the rank of the attention."""
QUICK = list({rule["scorer"]: (name, rule) for name, rule in reversed(EVERY_RULE)}.values())
"""Each scorer once."""


@pytest.mark.parametrize(
    ("name", "rule"),
    [pytest.param(*rule, marks=() if rule in QUICK else pytest.mark.slow) for rule in EVERY_RULE],
)
def test_pixels_that_are_no_numbers_harm_only_their_own_sample(name: str, rule: dict[str, Any]) -> None:
    row = BY_NAME[name]
    own = [number for number, sample in enumerate(row.samples()) if sample.images]
    model, inputs = row.model(), row.oracle.forward_inputs(row.inputs(own))
    with prune(model, policy := PruningPolicy(**{"keep": 0.4, **rule})) as pruning:
        expected, sound = model(**inputs).logits, pruning.keep
    plain = model(**inputs).logits
    for value in (NAN, INF):
        damaged = {key: part.clone() for key, part in inputs.items()}
        pixels = next(part for key, part in damaged.items() if key.startswith("pixel_values"))
        pixels.view(-1)[: pixels[0].numel() // 3] = value  # a part of the first image
        with prune(model, policy) as pruning:
            found, keep = model(**damaged).logits, pruning.keep
        assert sound is not None and keep is not None
        full = model(**damaged).logits
        spared = [row for row in range(1, len(own)) if torch.equal(full[row], plain[row])]
        assert spared or name in PACKED
        for row in spared:
            assert torch.equal(found[row], expected[row]) and torch.equal(keep[row], sound[row]), "to the bit"
        if rule["scorer"] not in FREE:
            assert torch.equal(keep.sum(1), sound.sum(1))
        assert not full[0].isfinite().all()
        assert not (~found.isfinite() & full.isfinite()).any(), "no number is lost that the unpruned model has"


@pytest.mark.parametrize(
    "rule",
    [
        {"scorer": "sparsevlm", "scorer_args": {"schedule": "rank", "scale": 1e308}},
        {"scorer": "dart", "selector_args": {"pivots": 10**30}},
        {"scorer": "l2-norm", "selector": "dpp", "selector_args": {"similarity": "outputs", "relevance": -1e308}},
        {"scorer": "fastervlm", "scorer_args": {"head_weights": [[1e308, -1e308, 0.0, 1e-308]]}},
        {"scorer": "position", "scorer_args": {"weights": [1e308, -1e308, *[0.0] * 7]}},
        {"scorer": "random", "scorer_args": {"seed": -(2**63)}},
    ],
)
def test_arguments_as_large_as_their_types_allow_keep_the_budget(rule: dict[str, Any]) -> None:
    row = BY_NAME["Llava"]
    for dtype in (torch.float32, torch.float64):
        with prune(row.model(dtype), PruningPolicy(keep=3, **rule)) as pruning:
            row.model(dtype)(**row.inputs([0, 2], dtype=dtype))
        assert pruning.keep is not None and pruning.keep.sum(1).tolist() == [3, 3]


@pytest.mark.parametrize(("name", "rule"), QUICK)
def test_weights_that_are_no_numbers_leave_the_number_of_tokens_as_it_was(name: str, rule: dict[str, Any]) -> None:
    row = BY_NAME[name]
    own = [number for number, sample in enumerate(row.samples()) if sample.images]
    model, inputs = row.model(), row.oracle.forward_inputs(row.inputs(own))
    part = find_family(model).model.get_parameter(_vision_weight(model))
    before = part.flatten()[0].item()
    with prune(model, PruningPolicy(**{"keep": 0.4, **rule})) as pruning:
        model(**inputs)
        sound = pruning.keep
        try:
            part.view(-1)[0] = NAN
            model(**inputs)
        finally:
            part.view(-1)[0] = before
    assert sound is not None and pruning.keep is not None
    if rule["scorer"] not in FREE:
        assert torch.equal(pruning.keep.sum(1), sound.sum(1))


def _vision_weight(model: nn.Module) -> str:
    """The first weight of the vision tower that every image meets."""
    return next(
        name
        for name, part in model.named_parameters()
        if any(part_name in name for part_name in ("vision", "visual", "image_tower", "video_tower"))
        if part.ndim >= 2 and "position" not in name and "pos_embed" not in name and "cls" not in name.lower()
    )


TEXT_ALONE = [row for row in ROWS if len(row.samples()) > 3 and not row.samples()[3].images and not _wants(row)]


@pytest.mark.parametrize("row", quick(TEXT_ALONE, {row.name for row in ROWS} - KIN))
def test_text_alone_is_answered_as_unpruned_before_and_after_images_and_beside_them(row: Row) -> None:
    """Qwen's models remember the positions of the last images, of a batch of another size."""
    model, images = row.model(), [number for number, sample in enumerate(row.samples()) if sample.images]
    with prune(model, PruningPolicy(scorer="l2-norm", keep=0.3)) as pruning:
        alone = model(**row.oracle.forward_inputs(row.inputs([3]))).logits
        assert pruning.keep is not None and not pruning.keep.any()
        for batch in ([*images, 3], [images[0]]):
            beside = model(**row.oracle.forward_inputs(row.inputs(batch))).logits
            assert pruning.keep.any(1).tolist() == [number != 3 for number in batch]
            after = model(**row.oracle.forward_inputs(row.inputs([3]))).logits
            assert not pruning.keep.any()
            torch.testing.assert_close(after, alone, rtol=0, atol=1e-9 * alone.abs().max().item())
            if batch[-1] == 3:
                own = len(row.samples()[3].ids)
                torch.testing.assert_close(
                    beside[-1][-own:], alone[0][-own:], rtol=0, atol=1e-6 * alone.abs().max().item()
                )
    torch.testing.assert_close(
        model(**row.oracle.forward_inputs(row.inputs([3]))).logits, alone, rtol=0, atol=1e-9 * alone.abs().max().item()
    )
