"""Family of any model whose text decoder reads visual tokens in the place of placeholder ids."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.methods.observation import Observation, Signal, Values
from catp_lightning.models.base import AttentionSite, Family, OutputSite, Runs
from catp_lightning.models.images import Image, Part, equal_images
from catp_lightning.models.layout import Layout
from catp_lightning.models.missing import lacks
from catp_lightning.prompt.caches import CACHE_NAMES
from catp_lightning.prompt.kept import KeptSequence
from catp_lightning.prompt.masks import RECURRENT, recurrent, window
from catp_lightning.prompt.merging import merged_features
from catp_lightning.prompt.prompt import DecoderPrompt, Prompt, visual_tokens
from catp_lightning.utils.messages import warn
from catp_lightning.utils.on_cpu import of_known, on_cpu, on_device
from catp_lightning.utils.signatures import parameters_of

PER_LAYER = "per_layer_inputs"
BY_COLUMN = (PER_LAYER, "moe_mm_token_type_ids")  # inputs of a decoder that have a row for each column
KNOWN_INPUTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "kwargs", *CACHE_NAMES),
    *("output_attentions", "output_hidden_states", "return_dict", "cache_position"),
    *("visual_pos_masks", "deepstack_visual_embeds", *BY_COLUMN, "logits_to_keep"),  # shortened below
}
# Inputs, beyond a text model's, of a model below the head that makes the same number of tokens of each picture.
PICTURES = {
    *("pixel_values", "high_res_pixel_values", "pixel_mask", "pixel_attention_mask", "mm_encoder_outputs"),
    *("vision_feature_layer", "vision_feature_select_strategy", "interpolate_pos_encoding"),
    *("token_type_ids", "mm_token_type_ids", "labels", "logits_to_keep", "output_router_logits"),
}
PIXELS = ("pixel_values", "image_patches")  # beginnings of the names of what a call brings of images
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Placeholder(Family):
    """Vision-language model with an image token in its config and a text decoder.

    Tokens are compared by what the decoder receives: projected features, one for each placeholder. A subclass lists the
    model types whose pruning the tests show to be exact. Any other model is of this class: it is pruned, with a
    warning, if nothing speaks against it.

    Attributes:
        types: model types in the configs of its models; empty: all that no other family lists.
    """

    types: ClassVar[tuple[str, ...]] = ()
    classes: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.model.config.model_type).replace("_", "-")

    @classmethod
    def handles(cls, model: PreTrainedModel) -> bool:
        return (not cls.types or model.config.model_type in cls.types) and lacks(model) is None

    def check(self) -> None:
        if self.model.config.image_token_id is None:
            raise PruningError(
                f"The config of this {type(self.model).__name__} has image_token_id None, so its visual tokens cannot "
                "be found. Load a checkpoint saved by a recent transformers, or set model.config.image_token_id."
            )
        unknown = sorted(set(parameters_of(self.decoder.forward)) - KNOWN_INPUTS)
        if unknown:
            raise PruningError(
                f"{type(self.decoder).__name__} also takes {', '.join(unknown)}, which may have a row for each column "
                "of the prompt: it is not known how to shorten that, so it cannot be pruned exactly."
            )
        config = self.decoder_config
        known = KNOWN_LAYERS | (RECURRENT if self.types else set())
        unknown = sorted(set(getattr(config, "layer_types", None) or ()) - known)
        if unknown:
            raise PruningError(
                f"{type(self.decoder).__name__} has layers of type {', '.join(unknown)}; full and sliding attention "
                "can be pruned exactly. Use a checkpoint without them."
            )
        if window(config) is not None and "flash" in str(config._attn_implementation):
            raise PruningError(
                f"{type(self.decoder).__name__} has sliding windows, which flash attention counts in the rows that are "
                'left, not in those that were there. Load the model with attn_implementation="sdpa".'
            )
        if getattr(config, "output_router_logits", False):
            raise PruningError(
                f"{type(self.decoder).__name__} has output_router_logits=True: the loss of its router is computed of "
                "every row of the prompt, and dropped rows have none. Set it to False in the text config."
            )
        if not self.types:
            sizes = self._unknown_sizes()
            warn(
                f"{type(self.model).__name__} is not among the models whose pruning was tested to be exact. Its "
                "decoder takes nothing unknown, so it should be; compare a few answers at keep=1.0 and with a mask."
                f"{sizes and f' Its images take {sizes}, so most scorers are refused; choose= is not.'}",
                stacklevel=2,
            )

    def check_use(self, by_image: bool, stages: tuple[int, ...], compact: bool) -> None:
        name = type(self.model).__name__
        if by_image and (unknown := self._unknown_sizes()):
            raise PruningError(
                f"{name} also takes {unknown}: how it makes tokens of images is not known, so they cannot be scored. "
                "Choose them yourself, prune(..., choose=...), or let them leave inside the decoder, where a budget "
                "is of the whole sample: fastv, visual-exit."
            )
        vision = getattr(self.model.config, "vision_config", None)
        added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        if stages and stages[0] < added:
            raise PruningError(
                f"{name} adds features to all visual tokens after each of its first {added} layers, and tokens are to "
                f"leave at layer {stages[0]}: choose layers from {added} on."
            )
        if stages and (reason := self._against_stages()):
            raise PruningError(
                f"{name} {reason}, and tokens are to leave at layer {stages[0]}: let them leave before the first, "
                "as most scorers in docs/methods.md do."
            )
        if compact and hasattr(self.outer, "get_rope_index"):
            raise PruningError(
                f'positions="compact" has no meaning in {name}: visual tokens have coordinates in their image, not '
                'places in a row, and dropping them leaves no gap. Use positions="original".'
            )

    def _against_stages(self) -> str:
        """Return why tokens cannot leave inside the decoder, as the end of a sentence; empty if they can."""
        config, inputs = self.decoder_config, parameters_of(self.decoder.forward)
        if own := [name for name in BY_COLUMN if name in inputs]:
            return f"hands {', '.join(own)} to each layer, with a row for each column"
        if shared := getattr(config, "num_kv_shared_layers", 0):
            return f"has {shared} last layers that read keys and values of layers before them"
        return "has layers with a recurrent state, which read rows in turn" if recurrent(config) else ""

    def _unknown_sizes(self) -> str:
        """Return inputs that may say how many tokens each image has, of an untested model type; empty if none."""
        if self.types:
            return ""
        return ", ".join(sorted(set(parameters_of(self.outer.forward)) - KNOWN_INPUTS - PICTURES))

    def shape(self) -> Mapping[str, int]:
        config = self.decoder_config
        return {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}

    @property
    def placeholder_ids(self) -> tuple[int, ...]:
        ids = (self.model.config.image_token_id, getattr(self.model.config, "video_token_id", None))
        return tuple(int(token) for token in ids if token is not None)

    @property
    def outer(self) -> nn.Module:
        return self.model.model

    @property
    def decoder(self) -> nn.Module:
        return self.model.model.get_decoder()

    def positions(self, mask: Tensor, past: int = 0) -> Tensor:
        deltas = getattr(self.outer, "rope_deltas", None)
        if deltas is None or len(mask) % len(deltas):  # deltas of an earlier batch: this one has no image
            return super().positions(mask, past)
        columns = (mask.cumsum(1)[:, past:] - 1).clamp(min=0) + deltas.repeat_interleave(len(mask) // len(deltas), 0)
        return columns.expand(3, -1, -1)

    @property
    def by_column(self) -> tuple[str, ...]:
        return BY_COLUMN

    def inputs_of_text(self, names: Iterable[str], ids: Tensor, embeds: Tensor) -> dict[str, Tensor]:
        decoder: Any = self.decoder
        made: dict[str, Callable[[], Tensor]] = {
            PER_LAYER: lambda: decoder.get_per_layer_inputs(ids, embeds),
            "moe_mm_token_type_ids": lambda: torch.zeros_like(ids),
        }
        return {name: made[name]() for name in names}

    def gather_extras(self, kwargs: Mapping[str, Any], prompt: KeptSequence, visual: Tensor) -> dict[str, Any]:
        """Return the decoder's other inputs, shortened like the prompt.

        Gemma 4 adds embeddings of each token to the rows of each layer, and computes its last layers of the rows alone
        whose logits are wanted, which are counted in the full prompt: here of all. ERNIE 4.5 has experts for visual
        rows. Qwen3-VL adds features of earlier vision layers to the visual rows after the first decoder layers.
        """
        found: dict[str, Any] = {
            name: prompt.gather(kwargs[name]) for name in BY_COLUMN if kwargs.get(name) is not None
        }
        if "logits_to_keep" in kwargs:
            found["logits_to_keep"] = 0
        if kwargs.get("visual_pos_masks") is None:
            return found
        there, order = on_cpu(visual, prompt.order)
        there = there.repeat_interleave(len(order) // len(there), 0)
        place = (there.flatten().cumsum(0) - 1).view(there.shape)  # index of each visual row's features
        stays = there.gather(1, order)
        index = on_device(place.gather(1, order)[stays], visual.device)
        return found | {
            "visual_pos_masks": on_device(stays, visual.device),
            "deepstack_visual_embeds": [embeds[index] for embeds in kwargs["deepstack_visual_embeds"]],
        }

    def merge_extras(self, kwargs: Mapping[str, Any], visual: Tensor, destination: Tensor) -> dict[str, Any]:
        features = kwargs.get("deepstack_visual_embeds")
        if features is None:
            return {}
        beams = len(features[0]) // int(on_cpu(visual)[0].sum())  # features lie in the order of placeholders
        tokens = of_known(lambda own: own.repeat_interleave(beams, 0), visual_tokens(visual))
        destination = destination.repeat_interleave(beams, 0)
        return {"deepstack_visual_embeds": [merged_features(flat, tokens, destination) for flat in features]}

    def layers(self) -> Mapping[Signal, int]:
        return {}

    @property
    def signals(self) -> frozenset[Signal]:
        return self.at_entry

    @property
    def at_entry(self) -> frozenset[Signal]:
        return frozenset(
            {
                Signal.IMAGE_FEATURES,
                Signal.IMAGE_EMBEDS,
                Signal.TEXT_EMBEDS,
                Signal.QUESTION,
                Signal.PATCH_POSITION,
                Signal.IMAGE_HASH,
            }
        )

    def attention_sites(self, signal: Signal, layer: int) -> Sequence[AttentionSite]:
        raise NotImplementedError(signal)

    def output_site(self, signal: Signal) -> OutputSite:
        raise NotImplementedError(signal)

    def images(self, prompt: DecoderPrompt, counts: Mapping[int, int]) -> dict[int, list[Image]]:
        """Return images and frames by placeholder id, in the order of their features.

        Args:
            prompt: the prompts that they belong to.
            counts: number of placeholders by id.
        """
        return equal_images(self.model, prompt, counts)

    def observation(self, values: Runs, wanted: frozenset[Signal], prompt: Prompt) -> Observation:
        prompt = cast(DecoderPrompt, prompt)
        layout = self._layout(prompt)
        found: Values = {key: layout.tokens(value) for key, value in self.on_tokens(values, prompt).items()}
        for signal in wanted & {
            Signal.IMAGE_FEATURES,
            Signal.IMAGE_EMBEDS,
        }:  # features are one to a token only after projection
            found[signal] = layout.padded(prompt.of_tokens(prompt.embeds[:: prompt.rows_per_sample]).detach())
        text = None
        if not wanted.isdisjoint({Signal.TEXT_EMBEDS, Signal.QUESTION}):
            samples = layout.samples(prompt.visual)
        if Signal.QUESTION in wanted:
            found[Signal.QUESTION] = prompt.question()[samples]
        if Signal.TEXT_EMBEDS in wanted:
            found[Signal.TEXT_EMBEDS], text = (part[samples] for part in prompt.text())
        if Signal.IMAGE_HASH in wanted:
            found[Signal.IMAGE_HASH] = layout.fingerprints()
        if Signal.PATCH_POSITION in wanted:
            found[Signal.PATCH_POSITION] = layout.places()
        return Observation(layout.valid, self.layers(), found, layout.protected, layout.crops, text)

    def _layout(self, prompt: DecoderPrompt) -> Layout:
        """Return which placeholder is of which image; the call must have brought pixels."""
        (ids,) = on_cpu(prompt.ids)
        counts = {token: int((ids == token).sum()) for token in self.placeholder_ids}
        if not any(name.startswith(PIXELS) for name, value in prompt.arguments.items() if value is not None):
            raise PruningError(
                "The prompt has image tokens, but the call brought no pixel_values, so it is not known which token is "
                "of which image. Pass pixel_values, not precomputed image features, and call the model's own generate "
                "or forward inside the context, not a copy of the method that was taken before; or use keep=1.0."
            )
        images: dict[int, list[Image]] = {token: [] for token, count in counts.items() if count} | self.images(
            prompt, counts
        )
        return Layout.of(images, prompt.ids)

    def parts(self, prompt: Prompt) -> list[list[Part]]:
        return [image.parts() for image in self._layout(cast(DecoderPrompt, prompt)).images]

    def on_tokens(self, values: Runs, prompt: DecoderPrompt) -> dict[Any, dict[int, list[Tensor]]]:
        """Return, for each signal that was observed by patch, its values for the tokens of each image: [..., tokens].

        They are grouped by the images' placeholder id, and there in the order of their features.
        """
        return {}
