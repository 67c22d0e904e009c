"""More rows of the matrix: models of newer types, whose images are laid out as Qwen-VL's or Mistral's."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.support.decoder_oracle import Decoder
from tests.support.families import OLDEST, QWEN_INPUTS, QWEN_LACKS, WRAP
from tests.support.grid_models import apart, grid, grids, qwen3_vl, sized
from tests.support.newer_models import (
    compressed_videos,
    cosmos_edge,
    cosmos_omni,
    exaone,
    glm,
    glm_moe,
    glm_video,
    glm_videos,
    heard,
    hyperclova,
    lighton_ocr,
    minimax,
    omni_inputs,
    paddle_ocr,
    qwen2_5_omni,
    qwen3_omni,
    qwen3_vl_moe,
    squares,
    video_llama3,
    video_llama3_images,
    video_llama3_inputs,
)
from tests.support.oracles import Inputs
from tests.support.rows import Row
from tests.support.samples import Image, Sample, each_image, prompts

PACKED = partial(each_image, join=torch.cat)
ROTATED = Decoder(coordinates=True)
IN_COLUMNS = 2e-6  # generate counts columns, padding included, as positions, with rotary angles in float32
IN_ROUTER = 1e-7  # experts are weighed in float32
UNSPLIT = "transformers then splits the features of videos by another count of tokens, and fails unpruned as well"
EXPANDED = {"beams_and_sampling_find_what_the_masked_model_finds": UNSPLIT}
VIDEOS_5_13 = EXPANDED if OLDEST else {}
COMPRESSED_LACKS = {} if OLDEST else EXPANDED
SEEN = "in transformers 5.13 the images of a batch see each other in its tower, unpruned as well"
MINIMAX_LACKS = {
    "a_sample_does_not_depend_on_its_batch_or_padding": SEEN,
    "compact_positions_equal_a_prompt_physically_shortened": SEEN,
}
GLM_VIDEO_LACKS = {
    **EXPANDED,
    "embeddings_without_ids_are_refused": "transformers fails before: it looks for another token than ids have",
}


def newer(
    name: str,
    kind: str,
    make: Callable[[], PreTrainedModel],
    images: Callable[[], list[list[Image]]],
    oracle: Decoder = ROTATED,
    join: Callable[[Sequence[Sample], Inputs], Inputs] = QWEN_INPUTS,
    rounding: float = 0.0,
    lacks: Mapping[str, str] = MappingProxyType({}),
    change: Callable[[list[Sample]], list[Sample]] = list,
    known: bool = True,
    coarse: float = 0.0,
) -> list[Row]:
    """Return a list of one row; [] if transformers lacks the class `kind`, or has it in another form (not `known`)."""
    lacks = {**(QWEN_LACKS if oracle.coordinates else {}), **lacks}
    row = Row(
        name,
        make,
        lambda: change(prompts(images(), wrap=WRAP)),
        oracle,
        join,
        rounding=rounding,
        coarse=coarse,
        lacks=lacks,
    )
    return [row] if known and hasattr(hf, f"{kind}ForConditionalGeneration") else []


def with_video() -> list[list[Image]]:
    return grids(grid(2, 4, 4, 3))


def with_frames(patch: tuple[int, ...] = (96,)) -> list[list[Image]]:
    return grids(*apart(grid(2, 4, 4, 3, patch)), patch=patch)


def stills(patch: tuple[int, ...] = (96,)) -> list[list[Image]]:
    return grids(grid(1, 6, 6, 3, patch), patch=patch)


NEWER = [
    *newer("GLM-4V", "Glm4v", partial(glm, "Glm4v"), stills),
    *newer(
        "GLM-4V, videos",
        "Glm4v",
        partial(glm, "Glm4v"),
        lambda: [glm_video(0), glm_video(1), []],
        join=glm_videos,
        lacks=GLM_VIDEO_LACKS,
    ),
    *newer("GLM-4V-MoE", "Glm4vMoe", glm_moe, stills, rounding=IN_ROUTER),
    *newer("GLM-4.6V", "Glm46V", partial(glm, "Glm46V"), stills),
    *newer("GLM-GA", "Glm46V", partial(glm, "Glmga"), stills, known=hasattr(hf, "GlmgaConfig")),
    *newer("GLM-OCR", "GlmOcr", partial(glm, "GlmOcr", head_dim=8), stills),
    *newer("Qwen3-VL, videos", "Qwen3VL", qwen3_vl, with_frames),
    *newer("Qwen3-VL-MoE", "Qwen3VLMoe", qwen3_vl_moe, with_frames),
    *newer(
        "Qwen2.5-Omni",
        "Qwen2_5OmniThinker",
        qwen2_5_omni,
        with_video,
        join=omni_inputs,
        change=partial(heard, tokens=5),
        known=not OLDEST,  # in 5.13 its towers are attributes of the head
    ),
    *newer(
        "Qwen3-Omni-MoE",
        "Qwen3OmniMoeThinker",
        qwen3_omni,
        with_video,
        join=omni_inputs,
        change=partial(heard, tokens=3),
        known=not OLDEST,
    ),
    *newer(
        "VideoLLaMA3",
        "VideoLlama3",
        video_llama3,
        lambda: video_llama3_images(squares(2, 4, 4, 3, 2)),
        Decoder(),
        PACKED,
    ),
    *newer(
        "VideoLLaMA3, compressed videos",
        "VideoLlama3",
        video_llama3,
        compressed_videos,
        Decoder(),
        video_llama3_inputs,
        lacks=COMPRESSED_LACKS,
    ),
    *newer("PaddleOCR-VL", "PaddleOCRVL", paddle_ocr, partial(stills, (3, 4, 4))),
    *newer("EXAONE-4.5", "Exaone4_5_", exaone, with_video, Decoder(), PACKED, IN_COLUMNS, VIDEOS_5_13),
    *newer(
        "EXAONE-4.5, sliding windows",
        "Exaone4_5_",
        partial(exaone, 12),
        with_video,
        Decoder(),
        PACKED,
        IN_COLUMNS,
        VIDEOS_5_13,
    ),
    *newer("HyperCLOVAX-V2", "HyperCLOVAXVisionV2", hyperclova, with_video, Decoder(), PACKED, IN_COLUMNS),
    *newer("LightOnOCR", "LightOnOcr", lighton_ocr, partial(sized, 8), Decoder(), each_image),
    *newer("Cosmos3-Omni", "Cosmos3Omni", cosmos_omni, with_frames),
    *newer("Cosmos3-Edge", "Cosmos3Edge", cosmos_edge, partial(with_frames, (48,))),
    *newer(
        "MiniMax-M3, full attention",
        "MiniMaxM3Sparse",
        minimax,
        with_video,
        Decoder(),
        PACKED,
        IN_ROUTER,
        MINIMAX_LACKS if OLDEST else {},
    ),
]
