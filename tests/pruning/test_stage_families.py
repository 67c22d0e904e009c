"""Dropping inside the decoder of every newer type: equal to hiding from later layers, or refused at entry."""

import pytest

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.hybrid_families import HYBRID
from tests.support.latest_families import LATEST
from tests.support.layered_families import LAYERED
from tests.support.picture_families import PICTURED
from tests.support.rows import Row
from tests.support.stages import check_dropping

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
    check_dropping(row, model, inputs, LAST, moves=0.01, tolerance=row.tolerance())
