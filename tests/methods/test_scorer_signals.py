"""Scorers whose signals a model does not show are refused with those that work."""

import inspect
from typing import Any

import pytest

from catp_lightning import PolicyError, PruningError, PruningPolicy, prune
from catp_lightning.methods.scorers import SCORERS
from tests.support.families import BY_NAME
from tests.support.rules import RULES

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize(
    "rule", [{"selector_args": {"per": "crop"}}, {"selector": "union"}, {"selector": "dpp"}], ids=str
)
def test_inside_the_decoder_a_selector_that_needs_more_is_refused(rule: dict[str, Any]) -> None:
    model = BY_NAME["Llava"].model()
    with pytest.raises(PolicyError, match="drops tokens inside the decoder"):
        prune(model, PruningPolicy(scorer="fastv", **rule)).__enter__()


def test_features_without_pixels_are_refused_with_what_to_do() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.model(), row.inputs()
    features = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    inputs = {name: value for name, value in inputs.items() if name != "pixel_values"}
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers takes no features from outside")
    with prune(model, PruningPolicy(scorer="stride")), pytest.raises(PruningError, match="brought no pixel_values"):
        model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scorer", "says"),
    [
        ("Llava", "catp", "reads cross-attention, which LlavaForConditionalGeneration does not show"),
        ("Blip2-OPT", "fastervlm", "vision-attention, which Blip2For"),
        ("Mllama", "fastv", "drops tokens inside a decoder .*MllamaFor.* by cross-attention"),
        ("Blip2-T5", "fastervlm", "vision-attention, which Blip2For"),
    ],
)
def test_a_scorer_without_its_signal_is_refused_with_those_that_work(name: str, scorer: str, says: str) -> None:
    model = BY_NAME[name].model()
    with pytest.raises(PruningError, match=says) as refused, prune(model, PruningPolicy(scorer=scorer)):
        pass
    _, _, listed = str(refused.value).partition(f"The scorers that work on {type(model).__name__} are ")
    told = set(listed.rstrip(".").split(", "))
    for other in SCORERS:
        works = True
        try:
            with prune(model, PruningPolicy(scorer=other)):
                pass
        except PruningError:
            works = False
        assert works == (other in told), other
    assert {"stride", "random"} <= told


def test_a_setting_that_is_refused_is_not_answered_with_other_scorers() -> None:
    for scorer, args in (("fastervlm", {"layers": [99]}), ("sgl", {})):
        with pytest.raises(PruningError) as refused, prune(BY_NAME["Llava"].model(), PruningPolicy(scorer, args)):
            pass
        assert "The scorers that work" not in str(refused.value)


def test_every_scorer_has_a_family_that_shows_its_signals() -> None:
    tried = {rule["scorer"] for _, rule in RULES} | {"region-attention", "position", "sgl"}
    assert tried == set(SCORERS)
