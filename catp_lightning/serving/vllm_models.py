"""vLLM's models with images pruned by a policy; imported by vLLM alone, in its processes.

Each has a processor that makes room for the tokens that stay, and a model that gives the language model only these.
Qwen's keep their positions: vLLM's protocol for pruning models has them written beside the embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava, qwen2_5_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from catp_lightning.errors import PolicyError
from catp_lightning.policy import PruningPolicy
from catp_lightning.serving.contract import kept_count
from catp_lightning.serving.engine import kept_of_image, policy_of
from catp_lightning.serving.mrope import Span, placed, prompt_positions, read, written


class _ImagesOnly:
    """Processing info that allows no videos: a policy was measured on images."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class _Shortened:
    """Processor that replaces an image by as many placeholders as its policy keeps."""

    def __init__(self, info: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(info, *args, **kwargs)  # type: ignore[call-arg]
        self._policy = policy_of(info.get_hf_config())

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        return shortened(self._policy, super()._get_prompt_updates(*args, **kwargs))  # type: ignore[misc]


def shortened(policy: PruningPolicy, updates: Sequence[Any]) -> list[Any]:
    """Return vLLM's replacements of images by placeholders, with as many of these as the policy keeps."""
    return [
        replace(update, replacement=partial(_first, policy, update.replacement))
        for update in updates
        if update.modality == "image"
    ]


def _first(policy: PruningPolicy, whole: Any, item: int) -> list[int]:
    """Return the placeholders of an image, as many as stay of those that `whole` gives for it."""
    ids = whole(item)
    return list(ids[: kept_count(policy, len(ids))])


class _PrunedQwen:
    """Qwen-VL whose images are pruned, with positions by row and column as in the whole prompt."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._take(self.config, policy_of(self.config))  # type: ignore[attr-defined]
        if not self.is_multimodal_pruning_enabled:  # type: ignore[attr-defined]
            raise PolicyError(
                "vLLM takes positions from a model only where its own pruning is on. Start it with "
                "--video-pruning-rate 0.5 as well: any rate above 0 will do, for videos are refused here."
            )
        if vllm_config.speculative_config is not None:
            raise PolicyError("Positions of pruned images are not known to a draft model: leave it out.")

    def _take(self, config: Any, policy: PruningPolicy) -> None:
        vision = config.vision_config
        self._policy, self._image, self._side = policy, config.image_token_id, int(vision.spatial_merge_size)
        self._features = int(vision.out_hidden_size)
        deep = getattr(vision, "deepstack_visual_indexes", None) or ()
        self._width = self._features * (1 + len(deep))  # what Qwen3-VL's first layers add stands behind the features

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return what stays of each image, float [K, D + 4]: the last four columns say where each token stood."""
        found = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        return tuple(self._kept(rows, *grid) for rows, grid in zip(found, _grids(kwargs), strict=True))

    def _kept(self, image: Tensor, time: int, height: int, width: int) -> Tensor:
        rows, columns = height // self._side, width // self._side
        places = kept_of_image(self._policy, image[:, : self._features], rows, columns)
        stay = places[:, 0] * columns + places[:, 1]
        return torch.cat([image[stay, : self._width], written(places, image.dtype)], 1)

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        spans = []
        for one in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            _, height, width = one.data["image_grid_thw"].data.tolist()
            at = one.mm_position
            spans.append(Span(at.offset, at.length, height // self._side, width // self._side))
        return prompt_positions(len(input_tokens), spans)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        device = mrope_positions.device
        is_image = torch.as_tensor(input_ids, device=device) == self._image
        positions = mrope_positions
        if len(multimodal_embeddings):
            places = torch.cat([read(part[:, -4:]) for part in multimodal_embeddings]).to(device)
            positions = placed(positions, is_image, num_computed_tokens, places)
        delta = int(positions.max()) + 1 - len(is_image)  # text, or an image's end, is last
        return [part[:, :-4] for part in multimodal_embeddings], positions, delta


def _grids(kwargs: Mapping[str, Any]) -> list[list[int]]:
    """Return the grids of the images of a call in patches: time, height and width of each."""
    grids = kwargs.get("image_grid_thw")
    return [] if grids is None else [list(map(int, grid)) for grid in grids]


class _Qwen2_5_VLInfo(_ImagesOnly, qwen2_5_vl.Qwen2_5_VLProcessingInfo): ...


class _Qwen2_5_VLProcessor(_Shortened, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2_5_VLProcessor, info=_Qwen2_5_VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class CatpQwen2_5_VLForConditionalGeneration(_PrunedQwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with images pruned by the policy that its config names."""


class _Qwen3VLInfo(_ImagesOnly, qwen3_vl.Qwen3VLProcessingInfo): ...


class _Qwen3VLProcessor(_Shortened, qwen3_vl.Qwen3VLMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen3VLProcessor, info=_Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class CatpQwen3VLForConditionalGeneration(_PrunedQwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL with images pruned by the policy that its config names."""


class _LlavaProcessor(_Shortened, llava.LlavaMultiModalProcessor): ...


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaProcessor, info=llava.LlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class CatpLlavaForConditionalGeneration(llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 with images pruned by the policy that its config names; kept tokens are numbered anew."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._policy = policy_of(self.config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return what stays of each image, float [K, D]."""
        return tuple(map(self._kept, super().embed_multimodal(**kwargs)))

    def _kept(self, image: Tensor) -> Tensor:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        places = kept_of_image(self._policy, image, side, side)
        return image[places[:, 0] * side + places[:, 1]]
