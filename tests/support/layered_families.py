"""More rows of the matrix: models whose decoder takes more than rows of embeddings."""

from functools import partial

from tests.support.decoder_oracle import Decoder
from tests.support.families import OLDEST
from tests.support.grid_models import grids
from tests.support.layered_models import (
    compass,
    ernie,
    ernie_inputs,
    gemma4,
    gemma4_inputs,
    gemma4_unified,
    joined_frames,
    spots,
)
from tests.support.newer_families import IN_ROUTER, newer, with_frames
from tests.support.samples import Image

UNKNOWN_ROW = "transformers fails before: it looks for the ids that rows were made of, and rows of images have none"
GEMMA4_LACKS = {"embeddings_without_ids_are_refused": UNKNOWN_ROW}
UNEXTENDED = "transformers hands on the types of the prompt's rows alone, and fails unpruned as well"
ERNIE_LACKS = {"decoding_without_a_cache_equals_cached_decoding": UNEXTENDED}


def spotted() -> list[list[Image]]:
    videos = [] if OLDEST else [spots(4, 4, 4, frames=2)]  # transformers 5.13 has them in another form
    return [[spots(4, 6, 0)], [spots(4, 4, 1), spots(6, 4, 2)], [spots(6, 6, 3), *videos], []]


def unified() -> list[list[Image]]:
    small = [spots(2, 2, 1, each=1), spots(3, 2, 2, each=1)]
    videos = [] if OLDEST else [spots(2, 2, 4, frames=2, each=1)]
    return [[spots(2, 3, 0, each=1)], small, [spots(3, 3, 3, each=1), *videos], []]


def with_joined_frames() -> list[list[Image]]:
    return grids(joined_frames(3), patch=(48,))


LAYERED = [
    *newer("Gemma4", "Gemma4", gemma4, spotted, Decoder(), gemma4_inputs, lacks=GEMMA4_LACKS),
    *newer(
        "Gemma4, images see each other",
        "Gemma4",
        partial(gemma4, use_bidirectional_attention="vision"),
        spotted,
        Decoder(),
        gemma4_inputs,
        lacks=GEMMA4_LACKS,
    ),
    *newer("Gemma4-unified", "Gemma4Unified", gemma4_unified, unified, Decoder(), gemma4_inputs),
    *newer(
        "ERNIE-4.5-VL",
        "Ernie4_5_VLMoe",
        ernie,
        with_joined_frames,
        join=ernie_inputs,
        coarse=IN_ROUTER,
        lacks=ERNIE_LACKS,
    ),
    *newer("Cohere-Compass", "CohereCompass", compass, with_frames),
]
