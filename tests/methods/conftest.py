"""Fixtures of the tests of methods."""

from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from catp_lightning.data import shipped
from catp_lightning.data.scenes import digit_pool, draw_scene


@pytest.fixture(scope="module")
def llava() -> tuple[Any, dict[str, Tensor]]:
    folder = shipped("digits_llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    rng, pool = np.random.default_rng(3), digit_pool("test")
    images = [[np.stack([draw_scene(rng, pool, 6, 6).image] * 3, -1)] for _ in range(4)]
    texts = [
        f"<image> Question: {words} Short answer:" for words in ("Is there a 3?", "How many digits are there?") * 2
    ]
    return model.eval(), processor(images=images, text=texts, padding=True, return_tensors="pt")
