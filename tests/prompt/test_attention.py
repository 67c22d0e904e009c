"""Observed attention is the attention the model pays, and observing does not change what the model computes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from catp_lightning import PruningError
from catp_lightning.methods.observation import Needs, Observation, Signal
from catp_lightning.models import find_family
from catp_lightning.prompt.attention import attention_map, attention_received, observe_attention
from catp_lightning.prompt.call import CallTracker, ModelCall
from catp_lightning.prompt.prompt import Prompt
from catp_lightning.pruning.observer import Observer
from tests.support.models import SHAPES, random_blip2

ALL = {
    Signal.CROSS_ATTENTION: None,
    Signal.SELF_ATTENTION: None,
    Signal.VISION_ATTENTION_RECEIVED: None,
    Signal.IMAGE_FEATURES: None,
}


def in_one_call(model: Blip2ForConditionalGeneration, needs: Needs) -> tuple[Observer, Prompt]:
    """An observer that takes all that is run for one call, and a prompt of that call: a Q-Former does not need more."""
    call: Any = SimpleNamespace(user_call=ModelCall())
    return Observer(find_family(model), needs, call), Prompt(torch.empty(0, 0), call.user_call, 1)


def observe(model: Blip2ForConditionalGeneration, inputs: dict[str, Tensor]) -> tuple[Observation, Tensor]:
    observer, prompt = in_one_call(model, {**ALL, Signal.IMAGE_HASH: None})
    with torch.no_grad(), observer.watching():
        logits = model(**inputs).logits
    return observer.take(prompt), logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_observed_is_what_output_attentions_returns(shape: str, attention: str) -> None:
    model, inputs = random_blip2(shape=SHAPES[shape], attention=attention)
    before = model(**inputs).logits
    seen, logits = observe(model, inputs)
    assert torch.equal(logits, before), "the model's own implementation computes the output"

    model.set_attn_implementation("eager")
    queries = SHAPES[shape].queries
    vision = model.vision_model(inputs["pixel_values"], output_attentions=True, return_dict=True)
    qformer = model.qformer(
        query_embeds=model.query_tokens.expand(3, -1, -1),
        encoder_hidden_states=vision.last_hidden_state,
        output_attentions=True,
        return_dict=True,
    )
    received = vision.attentions[-1].sum((1, 2))
    own = [a for a in qformer.attentions if a.shape[-1] == queries]  # 5.23 lists cross-attention among them
    torch.testing.assert_close(seen[Signal.VISION_ATTENTION_RECEIVED], received, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        seen.by_layer(Signal.CROSS_ATTENTION), torch.stack(qformer.cross_attentions, 1), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(seen.by_layer(Signal.SELF_ATTENTION), torch.stack(own, 1).sum(3), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen[Signal.IMAGE_FEATURES], qformer.last_hidden_state, atol=1e-5, rtol=1e-5)
    spread = seen.by_layer(Signal.CROSS_ATTENTION)
    assert spread.max() > 2 / spread.shape[-1], "flat maps would prove nothing"


def test_only_the_layers_asked_for_are_observed() -> None:
    model, inputs = random_blip2()
    observer, prompt = in_one_call(model, {Signal.CROSS_ATTENTION: (-1,)})
    with torch.no_grad(), observer.watching():
        model(**inputs)
        assert model.vision_model.config._attn_implementation == "sdpa", "nothing is observed there"
    assert list(prompt.arguments.signals) == [(Signal.CROSS_ATTENTION, 1)]


def test_attention_under_masks_and_in_half_precision() -> None:
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    mask = torch.rand(2, 1, 4, 5) > 0.3
    mask[..., 0] = True
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    expected = torch.softmax((query @ key.transpose(-1, -2) * 0.3).masked_fill(~mask, -torch.inf), -1)
    torch.testing.assert_close(attention_map(query, key, mask, 0.3), expected)
    torch.testing.assert_close(attention_map(query, key, additive, 0.3), expected)
    torch.testing.assert_close(attention_received(query, key, mask, 0.3), expected.sum(2))
    torch.testing.assert_close(attention_received(query, key, additive, 0.3), expected.sum(2))
    per_head = torch.rand(2, 3, 4, 5) > 0.3
    per_head[..., 0] = True
    torch.testing.assert_close(
        attention_received(query, key, per_head, 0.3), attention_map(query, key, per_head, 0.3).sum(2)
    )
    keys = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    by_key = attention_map(query, key, keys[:, None, None].bool(), 0.3)
    torch.testing.assert_close(attention_map(query, key, keys, 0.3), by_key)
    torch.testing.assert_close(attention_received(query, key, keys, 0.3), by_key.sum(2))
    half = attention_map(query.bfloat16(), key.bfloat16(), None, 0.3)
    assert half.dtype == torch.float32 and torch.allclose(half.sum(-1), torch.ones(2, 3, 4))
    assert attention_map(query.double(), key.double(), None, 0.3).dtype == torch.float64


@pytest.mark.parametrize("shape", [None, (2, 1, 7, 5), (2, 3, 7, 5), (2, 1, 1, 5), (2, 5)], ids=str)
def test_attention_received_is_added_up_a_few_rows_at_a_time(
    shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("catp_lightning.prompt.attention.ROWS", 3)
    query, key = torch.randn(2, 3, 7, 8, dtype=torch.float64), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    mask = None
    if shape is not None:
        mask = torch.rand(shape) > 0.3
        mask[..., 0] = True
    expected = attention_map(query, key, mask, 0.3)
    torch.testing.assert_close(attention_received(query, key, mask, 0.3), expected.sum(2))
    counted = torch.rand(2, 1, 7, 5) > 0.5
    torch.testing.assert_close(attention_received(query, key, mask, 0.3, counted), (expected * counted).sum(2))


def test_the_scaling_that_the_module_passes_is_used() -> None:
    """OPT scales its queries itself and passes 1.0."""
    model, _ = random_blip2()
    module, seen = model.qformer.encoder.layer[0].crossattention.attention, []
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 5, 8)
    with observe_attention(model.qformer, {module: (attention_map, seen.append)}):
        function = ALL_ATTENTION_FUNCTIONS[model.qformer.config._attn_implementation]
        function(module, query, key, key, None, scaling=1.0)
        function(module, query, key, key, None)
    torch.testing.assert_close(seen[0], (query @ key.transpose(-1, -2)).softmax(-1))
    torch.testing.assert_close(seen[1], (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1))


def test_an_implementation_that_cannot_be_observed_is_refused_before_anything_changes() -> None:
    model, _ = random_blip2()
    model.qformer.config._attn_implementation = "flex_attention"
    module = model.qformer.encoder.layer[0].crossattention.attention
    with pytest.raises(PruningError, match=r"under attn_implementation='flex_attention'.*l2-norm"):  # noqa: SIM117
        with observe_attention(model.qformer, {module: (attention_map, lambda value: None)}):
            pass
    assert "_catp_observer" not in module.__dict__


def test_nothing_is_kept_from_a_call_that_failed() -> None:
    model, inputs = random_blip2()
    calls = CallTracker(model, model)
    observer = Observer(find_family(model), {Signal.CROSS_ATTENTION: None}, calls)
    hook = model.qformer.encoder.layer[1].register_forward_hook(lambda *args: 1 / 0)
    with calls.watching(), observer.watching():
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        with pytest.raises(PruningError, match="without the vision part"):
            observer.take(Prompt(torch.empty(0, 0), calls.user_call, 1))


def test_the_observer_sits_on_the_module_only_inside() -> None:
    model, _ = random_blip2()
    parts: list[nn.Module] = list(model.modules())
    observer, _ = in_one_call(model, ALL)
    with observer.watching():
        assert sum("_catp_observer" in part.__dict__ for part in parts) == 2 + 4 + 1
        assert model.qformer.config._attn_implementation == "catp_sdpa"
    assert not any("_catp_observer" in part.__dict__ for part in parts)
    assert model.qformer.config._attn_implementation == "sdpa"


def test_an_observation_inside_another_leaves_the_outer_one_in_place() -> None:
    """A replay observes the layers that the recording around it observes."""
    model, inputs = random_blip2()
    module, outer, inner = model.qformer.encoder.layer[0].crossattention.attention, [], []
    with observe_attention(model.qformer, {module: (attention_map, outer.append)}):
        with observe_attention(model.qformer, {module: (attention_map, inner.append)}):
            model(**inputs)
        assert (len(outer), len(inner)) == (0, 1)
        model(**inputs)
        assert (len(outer), len(inner)) == (1, 1)
    assert "_catp_observer" not in module.__dict__ and model.qformer.config._attn_implementation == "sdpa"
