"""Where a model is looked for, and why one cannot be pruned."""

from collections.abc import Callable

import pytest
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from catp_lightning import PruningError, prune
from catp_lightning.models import find_family
from tests.support.families import BY_NAME
from tests.support.models import random_blip2
from tests.support.policies import CATP


class Holder(nn.Module):
    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)


def test_the_model_is_found_where_a_user_keeps_it() -> None:
    (one, _), (two, _) = random_blip2(0), random_blip2(1)
    assert find_family(Holder(net=Holder(student=one))).model is one
    assert find_family(Holder(teacher=one, student=two), "student").model is two
    with pytest.raises(PruningError, match=r'teacher \(Blip2For.*student \(Blip2For.*model="<name>"'):
        find_family(Holder(teacher=one, student=two))
    with pytest.raises(PruningError, match="no supported model at 'pupil'"):
        find_family(Holder(teacher=one, student=two), "pupil")
    with pytest.raises(PruningError, match="no Hugging Face model at all"):
        find_family(nn.Linear(2, 2))
    with pytest.raises(PruningError, match=r"Found: OPTForCausalLM reads text alone.*Looked for: Blip2For"):
        find_family(one.language_model)
    with pytest.raises(PruningError, match=r"Found: OPTForCausalLM \(language_model\) reads text alone"):
        find_family(Holder(language_model=one.language_model), "language_model")


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEING = {**SMALL, "image_size": 16, "patch_size": 8}
WORDS = {**SMALL, "vocab_size": 50}


def t5() -> PreTrainedModel:
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1))


def clip() -> PreTrainedModel:
    return hf.CLIPModel(hf.CLIPConfig(text_config=WORDS, vision_config=SEEING))


class UnmarkedConfig(hf.GitConfig):
    model_type = "unmarked"


def unmarked() -> PreTrainedModel:
    return hf.GitForCausalLM(UnmarkedConfig(**WORDS, vision_config=SEEING))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**WORDS)),
            "LlamaForCausalLM reads text alone: its config has neither",
        ),
        (clip, "CLIPModel generates no text"),
        (t5, "T5ForConditionalGeneration is an encoder-decoder: its prompt has no placeholders"),
        (unmarked, "GitForCausalLM has no image_token_id in its config, so its visual tokens cannot be told from text"),
        (
            lambda: BY_NAME["Llava"].model().model,
            "LlavaModel has no language-model head; hand over the model that has it",
        ),
        (
            lambda: Holder(net=Holder(tower=clip()), text=t5()),
            r"CLIPModel \(net.tower\) .*; T5For\S* \(text\) is an enc",
        ),
    ],
    ids=["text", "no text", "encoder-decoder", "no image token", "no head", "several, deep inside"],
)
def test_a_model_that_cannot_be_pruned_is_told_why(make: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(PruningError, match=f"holds no model that can be pruned. Found: {says}") as raised:
        find_family(make())
    assert "LlavaForConditionalGeneration" in str(raised.value), "what was looked for"


class Wrapper:
    """No module of torch."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net


def test_a_model_where_torch_does_not_look_is_named_with_its_place() -> None:
    model = BY_NAME["Llava"].model()
    holder = Holder(head=nn.Linear(2, 2))
    for held, place in (
        ([model], "models[0]"),
        ({"student": model}, "models['student']"),
        ([{"a": 1}, (2, model)], "models[1][1]"),
        (Wrapper(model), "models.net"),
    ):
        holder.models = held
        with pytest.raises(PruningError) as raised:
            find_family(Holder(inner=holder))
        assert f"Not searched: a LlavaForConditionalGeneration in inner.{place}." in str(raised.value)
        assert "nn.ModuleList" in str(raised.value)
    holder.models = nn.ModuleList([model])
    assert find_family(holder).model is model


def test_what_is_no_module_is_refused_by_what_it_is() -> None:
    model = BY_NAME["Llava"].model()
    for given, says in (
        ([model], r"list is not a torch.nn.Module.*holds a LlavaForConditionalGeneration at it\[0\]: hand over that"),
        (Wrapper(model), "Wrapper is not a torch.nn.Module.*LlavaForConditionalGeneration at it.net"),
        ("llava-hf/llava-1.5-7b-hf", "str is not a torch.nn.Module.*call from_pretrained first"),
        (None, "NoneType is not a torch.nn.Module"),
        (type(model), "is not a torch.nn.Module"),
    ):
        with pytest.raises(PruningError, match=says), prune(given, CATP):  # type: ignore[arg-type]
            pass
