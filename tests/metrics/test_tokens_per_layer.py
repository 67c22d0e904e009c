"""Tokens per layer: the mean over layers of what each reads."""

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image

from catp_lightning.callbacks import TokenPruning
from catp_lightning.data import PROMPTS, shipped
from catp_lightning.modules.vqa import VQAModule
from catp_lightning.policy import PruningPolicy
from catp_lightning.pruning import prune
from catp_lightning.pruning.pruner import applied
from catp_lightning.pruning.record import Prefill


def test_tokens_per_layer_is_the_mean_over_layers_of_what_each_reads() -> None:
    """PyramidDrop on 144 tokens, stages at layers 1, 2, 3 of 4: counted from what is kept at each stage."""
    module = VQAModule(str(shipped("digits_llava")))
    inputs = _llava_inputs(3)
    found: list[Prefill] = []
    with torch.no_grad(), applied(module, PruningPolicy("pyramiddrop", keep=0.125), on_prefill=found.append) as pruner:
        module.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        module.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert pruner.leave_at == (1, 2, 3)
    assert [prefill.tokens_per_layer.tolist() for prefill in found] == [[(144 + 72 + 36 + 18) / 4] * 3] * 2
    with torch.no_grad(), prune(module, PruningPolicy("stride", keep=0.125)) as pruning:
        module.model(**inputs)
        assert pruning.last.tokens_per_layer.tolist() == [18.0] * 3


def _llava_inputs(count: int) -> dict[str, torch.Tensor]:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(shipped("digits_llava"))
    rng = np.random.default_rng(0)
    images = [[Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8))] for _ in range(count)]
    text = [PROMPTS["digits_llava"].replace("{}", "Is there a 3?")] * count
    return dict(processor(images=images, text=text, return_tensors="pt", padding=True))


def test_token_pruning_logs_tokens_per_layer_only_where_tokens_leave_inside_the_decoder() -> None:
    module, inputs = VQAModule(str(shipped("digits_llava"))), _llava_inputs(2)
    batch = {"inputs": inputs, "question_ids": torch.arange(2)}
    loader = torch.utils.data.DataLoader([batch, batch], batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    found = {}
    for scorer, keep in (("fastv", 0.25), ("stride", 0.25), ("fastv", 144)):
        callback = TokenPruning(PruningPolicy(scorer, keep=keep))
        Trainer(accelerator="cpu", callbacks=[callback], **quiet).predict(module, loader)
        found[scorer, keep] = callback.figures
    assert found["fastv", 0.25]["catp/tokens_per_layer"] == (144 + 144 + 36 + 36) / 4
    assert found["stride", 0.25].keys() == found["fastv", 144].keys() == {"catp/tokens_kept", "catp/keep_share"}
