"""TextTower: a CLIP's text encoder, which compares the patches of a model's CLIP tower with a prompt's text."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.methods.precision import without_autocast
from catp_lightning.methods.selection import sample_of_images
from catp_lightning.models import Family
from catp_lightning.models.towers import Towered
from catp_lightning.prompt.prompt import DecoderPrompt, Prompt
from catp_lightning.utils.messages import warn

SAME = ("hidden_size", "image_size", "patch_size")
WITHOUT = "Leave text_encoder out to compare tokens and words as the language model reads them."


class TextTower:
    """Text encoder of a CLIP beside a model whose vision tower is that CLIP's.

    A patch, as the model's tower hands it to the projector, goes through CLIP's `post_layernorm` and
    `visual_projection`. The prompt's text after the sample's first visual token, or all of its text if none is after
    it, is decoded without special tokens by the model's own tokenizer, and encoded by CLIP. All is computed in float32
    at least. The weights are loaded once, from safetensors and without code of the repository, and moved to the device
    of each prompt; the model that is pruned is not touched.

    Args:
        family: family of the model that is pruned.
        folder: folder, or name on the Hugging Face hub, of the CLIP and its tokenizer.

    Raises:
        PruningError: the model does not show patches of a CLIP tower, `folder` holds no CLIP with that tower's sizes,
            or a tokenizer is not found.
    """

    def __init__(self, family: Family, folder: str) -> None:
        if not family.shows({Signal.VISION_STATES}):
            raise PruningError(
                f"text_encoder compares a prompt with patches of a CLIP vision tower; {type(family.model).__name__} "
                "does not project patches of one layer of one such tower: LLaVA-1.5 and LLaVA-NeXT with CLIP do. "
                f"{WITHOUT}"
            )
        self._own_tokens = _own_tokenizer(family.model)
        clip = _loaded(family, folder)
        self._clip_tokens = _tokenizer(folder, f"The text_encoder {folder!r:.200}", "Save the CLIP's tokenizer there.")
        self._segment = int(clip.config.text_config.max_position_embeddings)
        self._encoder, self._to_text = clip.text_model, clip.text_projection
        self._norm, self._to_patch = clip.vision_model.post_layernorm, clip.visual_projection

    @torch.no_grad()
    def add(self, seen: Observation, prompt: Prompt) -> Observation:
        """Return the signals with `Signal.TEXT_RELEVANCE` in the place of `Signal.VISION_STATES`."""
        states = seen[Signal.VISION_STATES].transpose(1, 2)
        wide = torch.promote_types(states.dtype, torch.float32)
        parts: list[nn.Module] = [self._encoder, self._to_text, self._norm, self._to_patch]
        for part in parts:
            part.to(states.device, wide)
        with without_autocast(states):
            patches = F.normalize(self._to_patch(self._norm(states.to(wide))), dim=-1)
            texts = torch.stack([self._encoded(text) for text in self._texts(cast(DecoderPrompt, prompt))])
            relevance = torch.einsum("itd,id->it", patches, texts[sample_of_images(seen.valid, prompt.tokens)])
        values: Values = {key: value for key, value in seen.values.items() if key is not Signal.VISION_STATES}
        values[Signal.TEXT_RELEVANCE] = relevance
        return replace(seen, values=values)

    def _texts(self, prompt: DecoderPrompt) -> list[str]:
        """Return the text of each sample that its visual tokens are compared with."""
        columns, valid = prompt.text_columns()
        rows = zip(prompt.ids.gather(1, columns), valid, strict=True)
        return [self._own_tokens.decode(ids[own].tolist(), skip_special_tokens=True).strip() for ids, own in rows]

    def _encoded(self, text: str) -> Tensor:
        """Return the mean of a text's normalised segments, [D]; 0 for no text.

        As in the authors' code a text with too many tokens is cut after every 77th, begin and end marks included, and
        its last segment is filled up with zeros, which follow the end mark: CLIP, whose attention is causal, does not
        see them.
        """
        weight = self._to_text.weight
        if not text:
            return weight.new_zeros(len(weight))
        ids = torch.tensor(self._clip_tokens(text, verbose=False)["input_ids"], dtype=torch.int64, device=weight.device)
        segments = F.pad(ids, (0, -len(ids) % self._segment)).view(-1, self._segment)
        pooled = self._encoder(input_ids=segments).pooler_output
        return F.normalize(self._to_text(pooled), dim=-1).mean(0)


def _loaded(family: Family, folder: str) -> Any:
    """Return the CLIP of a folder or hub name, in float32, after a check that its vision tower is that of a model."""
    what = f"The text_encoder {folder!r:.200}"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged or foreign file may raise anything
        raise PruningError(f"{what} cannot be loaded: {error!s:.500}. Give folder or hub name of a CLIP.") from error
    if config.model_type != "clip":
        raise PruningError(
            f"{what} is a {config.model_type!r:.50}; a text_encoder is a whole CLIP: only there single patches are "
            "projected into the space of texts (SigLIP pools all patches first). For LLaVA-1.5 it is "
            f"openai/clip-vit-large-patch14-336. {WITHOUT}"
        )
    own: Any = family.model.config.vision_config
    wrong = [
        f"{name} {getattr(config.vision_config, name)}, the model's vision tower {getattr(own, name)}"
        for name in SAME
        if getattr(config.vision_config, name) != getattr(own, name)
    ]
    if wrong:
        raise PruningError(f"{what} has {'; '.join(wrong)}. Give the CLIP that the vision tower was taken from.")
    loaded: Any
    try:
        loaded = CLIPModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise PruningError(f"{what} cannot be loaded: {error!s:.500}. Its weights must be safetensors.") from error
    clip, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    if missing:
        raise PruningError(
            f"{what} lacks weights, {missing[0]!r:.200} for example: it is no whole CLIP. Give one with both encoders."
        )
    _warn_of_another(cast(Towered, family), clip, what)
    return clip.eval().requires_grad_(False)


def _warn_of_another(family: Towered, clip: Any, what: str) -> None:
    """Warn if the model's vision tower has other weights than CLIP's, to go by the embedding of [CLS]."""
    tower: Any = family.towers[0].model
    own = getattr(tower, "vision_model", tower).embeddings.class_embedding.detach()
    same = clip.vision_model.embeddings.class_embedding.detach().to(own.dtype)
    if not own.is_meta and not torch.equal(own.cpu(), same.cpu()):
        warn(
            f"{what} has other weights than the vision tower of {type(family.model).__name__}: the tower was trained "
            "further, or it is another one, whose patches mean nothing to this text encoder.",
            stacklevel=2,
        )


def _own_tokenizer(model: Any) -> Any:
    """Return the tokenizer that lies beside a model's weights."""
    name, what = str(getattr(model, "name_or_path", "") or ""), type(model).__name__
    if not name:
        raise PruningError(
            f"text_encoder reads the prompt's text, and where the tokenizer of this {what} lies is not known: load the "
            "model with from_pretrained, or set model.name_or_path to a folder or hub name that has its tokenizer."
        )
    subject = f"model.name_or_path of this {what}, {name!r:.200},"
    return _tokenizer(name, subject, "text_encoder reads the prompt's text: set it to one that has its tokenizer.")


def _tokenizer(name: str, what: str, repair: str) -> Any:
    """Return the tokenizer of a folder or hub name.

    Raises:
        PruningError: there is none, or an empty one, which transformers makes where files are missing.
    """
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a tokenizer may raise anything
        raise PruningError(f"{what} has no tokenizer that can be loaded: {error!s:.500}. {repair}") from error
    if len(found) <= len(found.all_special_tokens):
        raise PruningError(f"{what} has no tokenizer. {repair}")
    return found
