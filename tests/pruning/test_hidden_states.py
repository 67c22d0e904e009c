"""States and attention maps that are asked for have the shapes of the full prompt, and the values of the masked run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.decoder_oracle import Decoder
from tests.support.encoder_oracles import EncoderDecoder
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, chosen, every_row, exact, scale, uneven
from tests.support.oracles import IMAGE, Inputs, columns_kept
from tests.support.rows import Row

pytestmark = pytest.mark.usefixtures("no_grad")
ASKED = {"output_hidden_states": True, "output_attentions": True}
OF_TEXT = ("hidden_states", "attentions", "encoder_hidden_states", "encoder_attentions", "cross_attentions")


def states(output: Any) -> dict[str, tuple[Tensor, ...]]:
    """What the language model was asked for, by name; the vision part's stay as they are."""
    own = output.get("language_model_outputs", output)
    return {name: own[name] for name in OF_TEXT if own.get(name) is not None}


def by_column(row: Row, inputs: Inputs, keep: Tensor, name: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """Values whose first axes are what can be compared, and bool of those axes: rows that stayed and are no padding."""
    real = columns_kept(inputs, keep) & inputs["attention_mask"].bool()
    if isinstance(row.oracle, EncoderDecoder) and not name.startswith("encoder"):
        return value, torch.ones(value.shape[:1], dtype=torch.bool)
    if value.dim() == 3:
        return value, real
    return value.transpose(1, 2), real


@every_row
def test_hidden_states_and_attention_have_the_full_shape_and_the_masked_runs_values(row: Row) -> None:
    model, inputs = row.model(torch.float32, "eager"), row.inputs(dtype=torch.float32)
    if row.name.startswith("Mllama"):
        pytest.skip("its text rows all stay; the next test is of it")
    forward, keep = row.oracle.forward_inputs(inputs), chosen(row, inputs)
    full = states(model(**forward, **ASKED))
    with prune(model, EVERYTHING, choose=uneven()):
        found = states(model(**forward, **ASKED))
    with row.oracle.masked(model, inputs, keep):
        masked = states(model(**forward, **ASKED))
    assert found.keys() == masked.keys() and len(found) >= 2
    gone = ~columns_kept(inputs, keep)
    for name, values in found.items():
        assert [x.shape for x in values] == [x.shape for x in full[name]], name
        for own, expected in zip(values, masked[name], strict=True):
            value, compared = by_column(row, inputs, keep, name, own)
            other, _ = by_column(row, inputs, keep, name, expected)
            bound = row.tolerance(torch.float32) * scale(other[compared])
            exact(value[compared], other[compared], atol=bound)
            if isinstance(row.oracle, Decoder) or name.startswith("encoder"):
                assert not value[gone].any(), "rows that were dropped are zeros"


def test_llama_vision_shows_hidden_states_and_refuses_attention() -> None:
    row = BY_NAME["Mllama"]
    model, inputs = row.model(), row.inputs()
    full = model(**inputs, output_hidden_states=True).hidden_states
    with prune(model, EVERYTHING, choose=uneven()) as pruning:
        found = model(**inputs, output_hidden_states=True).hidden_states
        for call in (model, model.generate):
            with pytest.raises(PruningError, match="Leave output_attentions out"):
                call(**inputs, output_attentions=True)
    assert pruning.keep is not None
    with row.oracle.masked(model, inputs, pruning.keep):
        masked = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    assert shapes(found) == shapes(full)
    for own, expected in zip(found, masked, strict=True):
        exact(own[real], expected[real], atol=1e-10 * scale(expected[real]))


def test_every_step_of_generate_has_the_full_shapes() -> None:
    for name in ("Llava", "Blip2-T5", "Blip2-OPT", "Mllama"):
        row = BY_NAME[name]
        model, inputs = row.model(attention="eager"), row.inputs()
        settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **ASKED}
        settings["output_attentions"] = name != "Mllama"
        expected = model.generate(**inputs, **settings, return_dict_in_generate=True)
        for policy in (EVERYTHING, PruningPolicy("fastv", {"layer": 1}, keep=3)):
            if policy is not EVERYTHING and name == "Mllama":
                continue
            choice = {"choose": uneven()} if policy is EVERYTHING else {}
            with prune(model, policy, **choice):
                found = model.generate(**inputs, **settings, return_dict_in_generate=True)
            for kind in expected:
                if "hidden_states" in kind or "attentions" in kind:
                    assert shapes(found[kind]) == shapes(expected[kind]), (name, policy.scorer, kind)


def test_attention_maps_of_a_full_window_are_refused_even_if_it_has_as_many_keys_as_columns_were_kept() -> None:
    row = BY_NAME["Mistral3, sliding window"]
    model, inputs = row.model(attention="eager"), row.inputs([1])
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with prune(model, EVERYTHING, choose=lambda tokens: tokens & (tokens.cumsum(1) <= 1)) as pruning:
        model.generate(**inputs, **settings)
        text = int((~torch.isin(inputs["input_ids"], torch.tensor([IMAGE]))).sum())
        assert text + int(pruning.keep.sum()) == model.config.text_config.sliding_window
        with pytest.raises(PruningError, match="Leave output_attentions out"):
            model.generate(**inputs, **settings, output_attentions=True, return_dict_in_generate=True)


def shapes(value: Any) -> Any:
    return tuple(map(shapes, value)) if isinstance(value, tuple) else tuple(value.shape)


@pytest.mark.parametrize("policy", [PruningPolicy("stride", keep=3), PruningPolicy("fastv", {"layer": 1}, keep=3)])
def test_a_head_reads_the_last_real_token_where_it_stands(policy: PruningPolicy) -> None:
    """A reward head, of a batch that is padded on the right."""
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs([0, 2])
    inputs = {
        name: torch.nn.functional.pad(value, (0, 3)) if value.dim() == 2 else value for name, value in inputs.items()
    }
    with prune(model, policy):
        alone = [model(**row.inputs([sample]), output_hidden_states=True).hidden_states[-1][0, -1] for sample in (0, 2)]
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    exact(hidden[torch.arange(2), last], torch.stack(alone), atol=1e-9)
