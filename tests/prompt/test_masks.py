"""Masks of a shortened prompt."""

import pytest
import torch
from torch import Tensor

from catp_lightning.prompt.masks import layer_mask
from catp_lightning.prompt.prompt import DecoderPrompt
from catp_lightning.pruning.sites.stage_prompt import DecoderPrefill
from tests.support.matrix import exact
from tests.support.oracles import of_rows

pytestmark = pytest.mark.usefixtures("no_grad")
NO_PADS, PADS = [[1] * 7] * 2, [[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1]]


def small_prefill(mask: Tensor) -> DecoderPrefill:
    """Two samples, a beam of two each; visual tokens in columns 2 to 5 of 7, of the second in 2 and 3."""
    visual = torch.zeros(2, 7, dtype=torch.bool)
    visual[0, 2:6], visual[1, 2:4] = True, True
    rows, positions = of_rows(mask, 4), torch.arange(7).expand(4, -1)
    is_prompt = (torch.arange(7) < 6) & mask.bool()  # the last column is not the one that asks
    prompt = DecoderPrompt.of({}, 2, visual.long(), visual, torch.zeros(4, 7, 8), rows, positions, is_prompt)
    return DecoderPrefill(prompt, {})


@pytest.mark.parametrize("pads", [NO_PADS, PADS], ids=["no pads", "pads"])
def test_masks_of_flash_attention_say_what_those_of_sdpa_say(pads: list[list[int]]) -> None:
    """They have two dimensions or are None, and are causal all the same."""
    mask = torch.tensor(pads)
    prefill, given = small_prefill(mask), of_rows(mask, 4)
    full = torch.ones(7, 7, dtype=torch.bool).tril() & given[:, None, None].bool()
    query, key = torch.randn(4, 6, 7, 8), torch.randn(4, 2, 7, 8)
    paid = prefill.last_row(query, key, full, 0.5)
    exact(prefill.last_row(query, key, given, 0.5), paid, atol=1e-6)
    if pads is NO_PADS:
        exact(prefill.last_row(query, key, None, 0.5), paid, atol=1e-6)
    prefill.narrow(torch.tensor([[True, False, False, True], [False, True, False, False]]))
    rows, n = prefill.rows, prefill.rows.order.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    short, flash = layer_mask(full, rows, 0, flash=False), layer_mask(given, rows, 0, flash=True)
    assert torch.equal(short, causal & flash[:, None, None].bool())
    assert flash.sum(1).tolist() == ([5, 5, 6, 6] if pads is NO_PADS else [3, 3, 5, 5]), "fillers are hidden"
    query, key = query[:, :, :n], key[:, :, :n]
    exact(prefill.last_row(query, key, flash, 0.5), prefill.last_row(query, key, short, 0.5), atol=1e-6)
    later = torch.cat([given, torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])], 1)
    decoding = layer_mask(later[:, None, None].bool(), rows, 2, flash=False)
    assert torch.equal(decoding[:, 0, 0].long(), layer_mask(later, rows, 2, flash=True))
    if pads is NO_PADS:
        assert torch.equal(layer_mask(None, rows, 0, flash=True), flash), "gaps are not read as packed sequences"
        assert torch.equal(layer_mask(None, rows, 0, flash=False), short)
        assert layer_mask(None, rows, 2, flash=True).sum(1).tolist() == [7, 7, 8, 8]
        assert layer_mask(None, rows, 2, flash=False).sum(3).flatten().tolist() == [7, 7, 8, 8]
