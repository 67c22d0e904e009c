"""Oracle for models whose decoder reads visual tokens in its prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.support.oracles import CACHE, Inputs, Oracle, cache_of, columns_kept, hidden_in, hooked, of_rows


@dataclass(frozen=True)
class Decoder(Oracle):
    """Oracle for models that put visual tokens into placeholders of a decoder's prompt.

    Attributes:
        path: path of the stack of decoder layers.
        stepper: path of the part that is called for one more token; "": the model.
        first_position: position of a prompt's first token.
        first_type: type of a generated token, where tokens have types.
        coordinates: True if position ids have axes (multimodal rotary positions).
    """

    path: str = "model.language_model"
    stepper: str = ""
    first_position: int = 0
    first_type: int = 0
    coordinates: bool = False

    def cached(self, output: Any) -> int:
        layer = next(layer for layer in cache_of(output).layers if hasattr(layer, "keys"))  # not a recurrent one
        return int(getattr(layer, "cumulative_length", layer.keys.shape[2]))  # a sliding layer lets rows go

    def inside(self, model: PreTrainedModel) -> nn.Module:
        return model.get_submodule(self.path).layers[1]

    @contextmanager
    def masked(self, model: PreTrainedModel, inputs: Inputs, keep: Tensor) -> Iterator[None]:
        columns = columns_kept(inputs, keep)
        layers, lengths = list(model.get_submodule(self.path).layers), list[int]()

        def hide(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            rows, queries = hidden_states.shape[:2]
            cache = kwargs.get(CACHE)
            if layer is layers[0]:  # later ones may be called for the last row alone
                lengths[:] = [queries + (0 if cache is None else cache.get_seq_length())]
            length = lengths[0]
            mask = kwargs["attention_mask"]
            if mask is None:  # causal, and nothing is padding
                mask = torch.ones(1, 1, queries, length, dtype=torch.bool).tril(length - queries)
            gone = torch.zeros(rows, length, dtype=torch.bool)
            gone[:, : columns.shape[1]] = ~of_rows(columns, rows)
            keys = torch.arange(length - mask.shape[-1], length)  # a sliding layer's cache holds the last columns
            others = torch.arange(length - queries, length)[:, None] != keys  # no row is left with nothing to see
            return {"attention_mask": hidden_in(mask, gone[:, None, None, keys] & others)}

        with hooked(layers, hide):
            yield

    def compact(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, keep: Tensor) -> Tensor:
        stack, n = model.get_submodule(self.path), tokens.shape[1]
        grown = self.grow(inputs, tokens[:, :-1])
        columns = torch.cat([columns_kept(inputs, keep), torch.ones(1, n - 1, dtype=torch.bool)], 1)[0].nonzero()[:, 0]
        seen: dict[str, Any] = {}
        with hooked([stack], lambda module, args, kwargs: seen.update(kwargs) or {}):
            model(**grown, use_cache=False)
        positions = seen.get("position_ids")
        length = grown["input_ids"].shape[1]
        positions = torch.arange(length)[None] + self.first_position if positions is None else positions
        output = stack(
            inputs_embeds=seen["inputs_embeds"][:, columns],
            attention_mask=self._shortened(seen.get("attention_mask"), columns, stack.config),
            position_ids=positions[:, columns] - (columns - torch.arange(len(columns))),
            use_cache=False,
            **self._features(seen, columns),
        )
        return model.get_output_embeddings()(output.last_hidden_state)[0, -n:]

    def _features(self, seen: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        """Return the stack's other inputs for the kept columns: of each layer, or added to visual rows in the first."""
        found = {name: seen[name][:, columns] for name in ("per_layer_inputs",) if seen.get(name) is not None}
        visual = seen.get("visual_pos_masks")
        if visual is None:
            return found
        number = (visual.cumsum(1) - 1)[0, columns][visual[0, columns]]
        features = [layer[number] for layer in seen["deepstack_visual_embeds"]]
        return {**found, "visual_pos_masks": visual[:, columns], "deepstack_visual_embeds": features}

    def _shortened(self, mask: Any, columns: Tensor, config: Any) -> Any:
        if isinstance(mask, dict):
            return {kind: one if one is None else self._shortened(one, columns, config) for kind, one in mask.items()}
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return mask[:, :, columns][..., columns]
        window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if not window or (types and "sliding_attention" not in types):
            return None if mask is None else mask[:, columns]
        distance = columns[:, None] - columns  # windows are counted in the columns of the full prompt
        masks = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance < window)}
        masks = {kind: one[None, None] for kind, one in masks.items()}
        return masks if types else masks["sliding_attention"]

    def loop(self, model: PreTrainedModel, inputs: Inputs, tokens: Tensor, with_positions: bool) -> Iterator[Tensor]:
        mask, steps = inputs["attention_mask"], model.get_submodule(self.stepper)
        given = self.positions(mask) if with_positions else {}
        output = model(**inputs, **given, use_cache=True)
        yield output.logits[:, -1]
        cache = cache_of(output)
        for token in tokens[:, :-1].split(1, 1):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            if with_positions:
                given = {"position_ids": self._counted(mask)[:, -1:]}
                if self.coordinates:
                    given["position_ids"] = (given["position_ids"] + model.model.rope_deltas).expand(3, -1, -1)
            output = steps(input_ids=token, attention_mask=mask, **{CACHE: cache}, use_cache=True, **given)
            yield output.logits[:, -1]

    def positions(self, mask: Tensor) -> Inputs:
        return {} if self.coordinates else {"position_ids": self._counted(mask)}

    def _counted(self, mask: Tensor) -> Tensor:
        return (mask.cumsum(1) - 1).clamp(min=0) + self.first_position
