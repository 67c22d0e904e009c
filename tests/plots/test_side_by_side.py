"""One sample several times side by side, and which of its tokens are merged into which."""

import numpy as np
import pytest
import torch

from catp_lightning import PruningError, PruningPolicy, Stage, plots, prune
from catp_lightning.plots.kept import VEIL
from tests.support.families import BY_NAME

pytestmark = pytest.mark.usefixtures("no_grad")


def record(name, policy):
    row = next(row for own, row in BY_NAME.items() if own.startswith(name))
    with prune(row.model(torch.float32), policy, show=True) as pruning:
        row.model(torch.float32)(**row.oracle.forward_inputs(row.inputs(dtype=torch.float32)))
    return pruning


def covers(figure):
    return [np.ma.getdata(axes.images[1].get_array()) for axes in figure.axes]


def test_each_budget_has_its_tokens_its_number_and_its_answer_whatever_signs_are_in_it():
    samples = [(record("Llava", PruningPolicy("l2-norm", keep=keep)).shown[0], "$1 \n2") for keep in (1.0, 4, 2)]
    figure = plots.by_budget([(shown, answer if n else "") for n, (shown, answer) in enumerate(samples)]).figure
    assert [int((cover[..., 3] == 0).sum()) for cover in covers(figure)] == [9, 4, 2]
    titles = [part._suptitle.get_text() for part in figure.subfigs]
    assert titles == ["9 of 9 tokens", *(f"{count} of 9 tokens\nanswer: $1 \\n2" for count in (4, 2))]
    with pytest.raises(ValueError, match="samples is empty"):
        plots.by_budget([])


def test_query_tokens_are_side_by_side_as_what_the_kept_ones_attend_to_on_average():
    shown = record("Blip2-OPT", PruningPolicy("catp", keep=2)).shown[0]
    (heat,) = covers(plots.by_budget([(shown, "yes")]).figure)
    torch.testing.assert_close(torch.from_numpy(heat), shown.attention[shown.last.keep].mean(0))


def test_layer_by_layer_shows_what_is_there_from_each_on():
    policy = PruningPolicy("l2-norm", keep=0.7, then=[Stage("fastv", {"layer": 1}, keep=0.4)])
    pruning = record("Llava", policy)
    figure = plots.by_layer(pruning.shown[0]).figure
    layers = pruning.last.per_layer[0].tolist()
    assert [int((cover[..., 3] == 0).sum()) for cover in covers(figure)] == [9, layers[0], layers[1]]
    titles = [part._suptitle.get_text() for part in figure.subfigs]
    assert titles == ["before: 9 tokens", f"from the first layer on: {layers[0]}", f"from layer 1 on: {layers[1]}"]


def test_merged_tokens_have_the_colour_of_the_one_that_they_are_merged_into():
    pruning = record("Llava", PruningPolicy("visionzip", keep=0.5))
    merged = 0
    for row, shown in enumerate(pruning.shown):
        count, destination = len(shown.image), pruning.destination[row]
        assert shown.last.destination.tolist() == destination[:count].tolist(), "Llava's tokens come first in a row"
        figure = plots.merged_tokens(shown).figure
        colours = np.concatenate([cover.reshape(-1, 4) for cover in covers(figure)])
        assert len(colours) == count
        into = shown.last.destination.tolist()
        groups = {target for token, target in enumerate(into) if target not in (-1, token)}
        for token, target in enumerate(into):
            if target in groups:
                assert np.array_equal(colours[token], colours[target])
                merged += token != target
            else:
                assert np.allclose(colours[token], VEIL if target < 0 else 0)
        assert len({tuple(colours[target]) for target in groups}) == len(groups)
        assert sum(len(axes.collections[0].get_segments()) for axes in figure.axes) == sum(
            target not in (-1, token) for token, target in enumerate(into)
        )
    assert merged > 3


def test_destinations_are_counted_among_a_samples_own_tokens_where_other_rows_lie_between():
    """Where text does not see a sample's first rows, its tokens do not come first."""
    from catp_lightning.pruning.shown import _renumbered

    destination = torch.tensor([-1, 3, -1, 3, 4, -1])
    assert _renumbered(destination, torch.tensor([1, 3, 4, 5])).tolist() == [1, 1, 2, -1]


def test_a_policy_that_merges_nothing_is_told():
    with pytest.raises(PruningError, match="Nothing was merged"):
        plots.merged_tokens(record("Llava", PruningPolicy("l2-norm", keep=0.5)).shown[0])
