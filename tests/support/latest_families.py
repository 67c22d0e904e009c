"""More rows of the matrix: models of the latest types, each laid out in its own way."""

from functools import partial

from tests.support.decoder_oracle import Decoder
from tests.support.latest_models import (
    MUSE_EXPERTS,
    granite_docling,
    granite_inputs,
    kimi,
    molmo2,
    molmo2_inputs,
    muse,
    step3p7,
    step_images,
    step_inputs,
    views,
)
from tests.support.newer_families import PACKED, newer, stills, with_video
from tests.support.samples import pictures

IN_GATES = 1e-6  # a rounding of float32 more or less, wherever experts are weighed
OWN_TEXT = Decoder("model.text_model")
LATEST = [
    *newer("Kimi-K2.5", "Kimi_K25", kimi, partial(stills, (3, 4, 4)), Decoder(), PACKED, coarse=IN_GATES),
    *newer("Muse-Glimmer", "MuseGlimmer", partial(muse, "MuseGlimmer"), with_video, Decoder(), PACKED),
    *newer(
        "Muse-Spark",
        "MuseSpark",
        partial(muse, "MuseSpark", **MUSE_EXPERTS),
        with_video,
        Decoder(),
        PACKED,
        10 * IN_GATES,
        coarse=IN_GATES,
    ),
    *newer(
        "Molmo2",
        "Molmo2",
        molmo2,
        lambda: [[views(2, 3, 2, 0)], [views(2, 2, 2, 1), views(3, 2, 3, 2)], [views(3, 3, 2, 3)], []],
        Decoder(),
        molmo2_inputs,
    ),
    *newer("Granite-Docling", "GraniteDocling", granite_docling, pictures, OWN_TEXT, granite_inputs),
    *newer("Step-3.7", "Step3p7", step3p7, step_images, Decoder(), step_inputs),
]
