"""Models made from one configuration, copies of models, and guides beside each other."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from catp_lightning import PruningError, PruningPolicy, prune
from tests.support.families import BY_NAME
from tests.support.footprints import everything_of
from tests.support.guides import RULE, small_llava
from tests.support.models import random_blip2
from tests.support.policies import HALF
from tests.support.threads import by_policy


def test_models_made_from_one_config_are_left_in_any_order() -> None:
    """They share the object that says how they attend."""
    config = BY_NAME["Llava"].make().config
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    one, two = LlavaForConditionalGeneration(config).eval(), LlavaForConditionalGeneration(config).eval()
    inputs = BY_NAME["Llava"].inputs([0], dtype=torch.float32)
    policy = PruningPolicy(scorer="fastervlm", keep=0.5)
    expected = []
    for model in (one, two):
        with torch.no_grad(), prune(model, policy):
            expected.append(model(**inputs).logits)
    before = [everything_of(model) for model in (one, two)]
    with torch.no_grad():
        first, second = prune(one, policy), prune(two, policy)
        first.__enter__()
        second.__enter__()
        assert torch.equal(one(**inputs).logits, expected[0])
        first.__exit__(None, None, None)
        assert torch.equal(two(**inputs).logits, expected[1]), "the second is still observed"
        second.__exit__(None, None, None)
    assert [everything_of(model) for model in (one, two)] == before


def test_a_copy_of_a_model_that_is_being_pruned_is_refused() -> None:
    """It would be pruned for good, and its generate would be the original's."""
    model, inputs = random_blip2()
    with prune(model, HALF) as pruning:
        with pytest.raises(PruningError, match=r"cannot be copied or pickled.*Copy it before the context or after it"):
            copy.deepcopy(model)
        assert len(model.state_dict()) and model(**inputs) and pruning.keep is not None
    twin = copy.deepcopy(model)
    with prune(twin, HALF):
        assert torch.equal(twin(**inputs).logits, by_policy(model, inputs, HALF))


def test_a_guide_that_is_pruned_later_is_refused_when_it_is_asked_and_answers_again_afterwards() -> None:
    row, small = BY_NAME["Llava"], small_llava().eval()
    inputs, model = row.inputs([0], dtype=torch.float32), replace(row, name="guided").model(torch.float32)
    with torch.no_grad(), prune(model, RULE, guide=small) as pruning:
        expected = model(**inputs).logits
        refusal = pytest.raises(PruningError, match="LlavaForConditionalGeneration is being pruned already")
        with prune(small, PruningPolicy(scorer="stride")), refusal:
            model(**inputs)
        pruning.keep = None
        assert torch.equal(model(**inputs).logits, expected) and pruning.keep is not None
