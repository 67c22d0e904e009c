"""Fixtures of the tests of pictures: the shipped models, each with two digit scenes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import digit_pool, draw_scene


@cache
def model_and_scenes(name: str) -> tuple[Any, Any, list[np.ndarray]]:
    """A shipped model, what its processor makes of two scenes, and the scenes, uint8 [H, W, 3]."""
    model, processor = (kind.from_pretrained(shipped(name)) for kind in (AutoModelForImageTextToText, AutoProcessor))
    rng = np.random.default_rng(1)
    images = [np.stack([draw_scene(rng, digit_pool("test"), *grid).image] * 3, -1) for grid in (GRIDS[name] * 2)[-2:]]
    text = [PROMPTS[name].format("How many digits are there?")] * 2
    given = [[image] for image in images] if name == "digits_mllama" else images
    return model.eval(), processor(images=given, text=text, padding=True, return_tensors="pt"), images


@pytest.fixture
def scenes() -> Callable[[str], tuple[Any, Any, list[np.ndarray]]]:
    return model_and_scenes
