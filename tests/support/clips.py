"""A small CLIP with its tokenizer, and small models whose vision tower is that CLIP's."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.support.families import BY_NAME
from tests.support.oracles import IMAGE, PAD

WORDS, BEGIN, END = 97, 97, 98
"""Number of words in CLIP's vocabulary, and its ids of the marks at begin and end of a text; 99 is an unknown word."""
SEGMENT, TURN = 77, 119
"""Number of tokens that CLIP reads at once, and the model's id of a special token in the text."""


@dataclass(frozen=True)
class Pair:
    """A model, and the CLIP that its vision tower is of.

    Attributes:
        model: the model, in float64; its tokenizer, where id n is the word "w" and n, is in a folder of its own.
        clip: the CLIP, in float64.
        folder: where the CLIP lies, in float32, with its tokenizer, where a word has another id.
    """

    model: Any
    clip: Any
    folder: Path

    @property
    def args(self) -> dict[str, Any]:
        return {"text_encoder": str(self.folder)}


def pair(name: str, folder: Path) -> Pair:
    """Return a copy of a row's model with the tower of a CLIP that is saved below a folder."""
    model, clip = deepcopy(BY_NAME[name].model()), small_clip(BY_NAME[name].model().config.vision_config.to_dict())
    own = folder / "clip"
    clip.save_pretrained(own)
    clip_tokenizer().save_pretrained(own)
    tower = model.model.vision_tower
    getattr(tower, "vision_model", tower).load_state_dict(clip.vision_model.state_dict())
    own_tokenizer().save_pretrained(folder / "model")
    model.name_or_path = str(folder / "model")
    return Pair(model, clip.double(), own)


def small_clip(vision: dict[str, Any]) -> PreTrainedModel:
    text = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": SEGMENT,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        clip = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
        for weight in clip.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, 0, 1.5 * weight[0].numel() ** -0.5)
            elif weight.dim():
                nn.init.normal_(weight, 1 if len(weight) > 12 else 0, 0.3)
    return clip


def clip_ids(words: list[int]) -> list[int]:
    """Return CLIP's ids of words that the model has as these ids, marks included."""
    return [BEGIN, *(word * 7 % WORDS for word in words), END]


def clip_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{word}": word * 7 % WORDS for word in range(WORDS)}
    made = _of_words({**words, "<begin>": BEGIN, "<end>": END, "<unknown>": 99}, "<unknown>")
    made.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", BEGIN), ("<end>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<begin>", eos_token="<end>", unk_token="<unknown>", model_max_length=SEGMENT
    )


def own_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{word}": word for word in range(120)}
    special = {"<pad>": PAD, "<image>": IMAGE, "<turn>": TURN}
    own = {word: id_ for word, id_ in words.items() if id_ not in special.values()}
    made = _of_words({**own, **special}, "<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", additional_special_tokens=[*special][1:])


def _of_words(vocabulary: dict[str, int], unknown: str) -> Tokenizer:
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def cosines(pair: Pair, pixels: Tensor, words: list[int]) -> Tensor:
    """Return the mean cosine of each patch and the segments of a text: pixels [P, C, H, W] -> [P, N]."""
    states = pair.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    patches = pair.clip.visual_projection(pair.clip.vision_model.post_layernorm(states))
    ids, found = clip_ids(words), []
    for start in range(0, len(ids), SEGMENT):
        part = ids[start : start + SEGMENT]
        rest = [0] * (SEGMENT - len(part))
        text = {"input_ids": torch.tensor([part + rest]), "attention_mask": torch.tensor([[1] * len(part) + rest])}
        features = pair.clip.get_text_features(**text)
        embeds = getattr(features, "pooler_output", features)[0]
        found.append((patches @ embeds) / patches.norm(dim=-1) / embeds.norm())
    return torch.stack(found).mean(0)
