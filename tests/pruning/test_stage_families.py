"""Dropping inside the decoder of every newer type: equal to hiding from later layers, or refused at entry."""

import pytest

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.hybrid_families import HYBRID
from tests.support.latest_families import LATEST
from tests.support.layered_families import LAYERED
from tests.support.matrix import exact, generate, scale
from tests.support.picture_families import PICTURED
from tests.support.rows import Row
from tests.support.stages import Uneven, chosen, masked, stages_of

pytestmark = pytest.mark.usefixtures("no_grad")
LAST = (2,)
REFUSALS = "hands .* to each layer|recurrent state|adds features to all visual tokens|sliding_attention"


@pytest.mark.slow
@pytest.mark.parametrize("row", [*PICTURED, *LATEST, *LAYERED, *HYBRID], ids=repr)
def test_dropping_at_a_layer_equals_hiding_from_later_layers_or_is_refused(row: Row) -> None:
    model, inputs = row.model(), row.inputs()
    try:
        with prune(model, PruningPolicy("visual-exit", {"layer": LAST[0]}, keep=0.5)):
            pass
    except PruningError as error:
        with pytest.raises(PruningError, match=REFUSALS):
            raise error
        return
    full, keeps = model(**inputs).logits, chosen(inputs, row, LAST)
    with stages_of(model, LAST, Uneven()).installed():
        prefill = model(**inputs).logits
        _, steps = generate(row, model, inputs)
    with masked(row, model, inputs, LAST, keeps):
        oracle = model(**inputs).logits
        _, oracle_steps = generate(row, model, inputs)
    rows, atol = row.oracle.compared(inputs, keeps[-1]), row.tolerance() * scale(full)
    assert scale(oracle[rows] - full[rows]) > 0.01 * scale(full), "dropping must move logits, or this proves nothing"
    exact(prefill[rows], oracle[rows], atol=atol)
    exact(steps, oracle_steps, atol=atol)
