"""Every model type that transformers lists as reading images and text is in the matrix, or in the table of refusals."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from catp_lightning import PruningError
from catp_lightning.models import FAMILIES, find_family
from catp_lightning.models.refused import REFUSED
from tests.support.families import OLDEST, ROWS
from tests.support.matrix import MORE
from tests.support.paths import ROOT

REGISTRY: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

THINKERS = {"qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"} if OLDEST else set[str]()


@cache
def in_matrix() -> set[str]:
    with torch.device("meta"):  # quicker, and only the config is looked at
        return {str(row.make().config.model_type) for row in (*ROWS, *MORE)}


@pytest.mark.slow
def test_each_type_in_transformers_registry_is_in_the_matrix_or_refused_with_its_reason() -> None:
    exact = in_matrix()
    assert exact.isdisjoint(REFUSED)
    assert sorted(REGISTRY.keys() - exact - REFUSED.keys() - THINKERS) == []
    assert len(exact & REGISTRY.keys()) >= 40


def test_each_type_that_a_family_lists_has_a_row_in_the_matrix() -> None:
    listed = {name for family in FAMILIES for name in getattr(family, "types", ())}
    assert sorted((listed & REGISTRY.keys()) - in_matrix() - THINKERS) == []


@pytest.mark.parametrize("name", sorted(THINKERS))
def test_a_thinker_whose_towers_are_attributes_of_its_head_is_refused(name: str) -> None:
    with pytest.raises(PruningError, match="holds no model that can be pruned"):
        find_family(unbuilt(name))


def unbuilt(name: str) -> hf.PreTrainedModel:
    """A model of a type of the registry, of its default size, that has no weights."""
    config = hf.AutoConfig.for_model(name)
    with torch.device("meta"):
        return getattr(hf, REGISTRY[name])(config)


NO_DEFAULT = {
    *("chameleon", "deepseek_ocr2", "diffusion_gemma", "emu3", "gemma3n"),
    *("granite4_vision", "hunyuan_vl", "qwen4_exp", "unlimited_ocr", "vision-encoder-decoder"),
}
"""Types whose default config makes no model, or none without the library timm."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REFUSED.keys() & REGISTRY.keys() - NO_DEFAULT))
def test_a_refused_type_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(PruningError, match=re.escape(f"{REGISTRY[name]} cannot be pruned: it {REFUSED[name]}.")):
        find_family(unbuilt(name))


def test_the_documentation_shows_the_table_of_refusals() -> None:
    text = Path(ROOT, "docs/families.md").read_text().partition("\n## Refused")[2]
    shown = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE))
    expected = {f"{name}": reason for name, reason in REFUSED.items()}
    assert shown == expected
