"""The family of Llama-3.2-Vision."""

import copy

import pytest
import torch
from transformers import MllamaForConditionalGeneration

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Signal
from catp_lightning.models.mllama import Mllama
from catp_lightning.prompt.prompt import CrossAttended
from catp_lightning.utils.hashing import fingerprint
from tests.support.cross_attended import CASES, CROSS, GREEDY, IMAGE, dropping, inputs_of, model_of

pytestmark = pytest.mark.usefixtures("no_grad")


class TestFamily:
    def test_it_knows_the_parts_of_its_model(self) -> None:
        family = Mllama(model_of(torch.float64))
        assert dict(family.shape()) == {"cross_attention_layers": 2, "heads": 4, "rows_per_tile": 17, "tiles": 4}
        assert Mllama.handles(family.model) and not Mllama.handles(family.model.model)
        assert family.placeholder_ids == (IMAGE,) and family.describe()["type"] == "mllama"
        assert [module.layer_idx for module in family.cross_attention] == CROSS

    def test_flash_attention_is_refused(self) -> None:
        model = MllamaForConditionalGeneration(copy.deepcopy(model_of(torch.float64).config))
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(PruningError, match=r"flash_attention_2.*'eager' or 'sdpa'"):
            Mllama(model)

    def test_signals_are_of_the_images_that_text_sees(self) -> None:
        """Images of one to three tiles in three samples: their rows, in order, are the tokens of the batch."""
        model, inputs = model_of(torch.float64), inputs_of(CASES["one or two images, padded"])
        prompts: list[CrossAttended] = []
        with dropping(model, lambda prompt: prompts.append(prompt) or prompt.tokens, observe=True):
            model.generate(**inputs, **GREEDY, num_beams=2)
        wanted = frozenset({Signal.IMAGE_FEATURES, Signal.IMAGE_HASH})
        observed = Mllama(model).observation({}, wanted, prompts[0])
        assert observed.valid.sum(1).tolist() == [17, 34, 51, 34, 17] and observed.valid.shape == (5, 68)
        assert torch.equal(prompts[0].states[prompts[0].tokens], observed[Signal.IMAGE_FEATURES][observed.valid])
        attention = observed.by_layer(Signal.CROSS_ATTENTION_TO_IMAGE)[:, 0].transpose(1, 2)[observed.valid]
        assert torch.equal(prompts[0].attention.transpose(1, 2)[prompts[0].tokens], attention)
        pixels = torch.stack([inputs["pixel_values"][row, n] for row, n in ((0, 0), (0, 1), (1, 0), (2, 0), (2, 1))])
        assert torch.equal(observed[Signal.IMAGE_HASH], fingerprint(pixels))
        assert observed.crops.unique().tolist() == [0, 1, 2, 3]
