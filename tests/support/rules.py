"""The one list of methods that tests try, on the models that show what they need."""

from dataclasses import fields
from typing import Any

from catp_lightning.methods.scorers import SCORERS
from tests.support.compressors import COMPRESSORS, compressor, exiting
from tests.support.questions import learned, routed

WITH_PATCHES = ("Llava", "LlavaNext", "LlavaOnevision", "VideoLlava", "Qwen2.5-VL", "SmolVLM", "Mistral3")
WITH_TOWER = (
    *("Llava", "VipLlava", "LlavaNext", "LlavaNextVideo", "LlavaOnevision", "LlavaOnevision-video", "VideoLlava"),
    *("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "Gemma3", "PaliGemma", "SmolVLM", "Idefics3", "Mistral3"),
    "Pixtral",
)
OUTPUTS = ({"scorer": "l2-norm"}, {"scorer": "divprune"}, {"scorer": "random"})
"""Rules that every model has the signals for."""
RULES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"scorer": scorer}) for name in (*WITH_PATCHES, "Mllama") for scorer in ("random", "l2-norm")),
    ("Llava", {"scorer": "stride"}),
    *((name, {"scorer": "fastervlm"}) for name in WITH_TOWER),
    ("LlavaNext", {"scorer": "fastervlm", "selector_args": {"per": "crop"}}),
    *((n, {"scorer": s}) for n in ("Llava", "LlavaNext") for s in ("vtc-cls", "vispruner", "visionzip")),
    ("Qwen2.5-VL", {"scorer": "vtc-cls"}),
    *((name, {"scorer": "visionzip"}) for name in ("Qwen2.5-VL", "InternVL", "Gemma3", "SmolVLM", "Mistral3")),
    ("InternVL", {"scorer": "vispruner", "selector_args": {"per": "crop"}}),
    ("VideoLlava", {"scorer": "visionzip"}),
    *(
        (name, {"scorer": "fastervlm", "selector": "vscan"})
        for name in ("Llava", "VideoLlava", "Qwen2.5-VL", "SmolVLM")
    ),
    ("LlavaNext", {"scorer": "fastervlm", "selector": "vscan", "selector_args": {"per": "crop", "layer": 0}}),
    *((n, {"scorer": "divprune"}) for n in ("Llava", "LlavaNext", "Qwen2.5-VL", "Mllama", "Blip2-OPT", "Blip2-T5")),
    *((n, {"scorer": "cdpruner"}) for n in ("Llava", "LlavaNext", "Qwen2.5-VL", "Blip2-OPT", "InstructBlip")),
    ("LlavaNext", {"scorer": "vispruner", "selector_args": {"per": "crop"}}),
    ("LlavaOnevision", {"scorer": "visionzip", "selector_args": {"per": "sample"}}),
    *((name, {"scorer": "downsample"}) for name in ("Llava", "Gemma3", "PaliGemma", "SmolVLM")),
    *((name, {"scorer": "grid"}) for name in (*WITH_PATCHES, "InternVL", "Mllama")),
    ("LlavaNext", {"scorer": "grid", "selector_args": {"per": "crop"}}),
    ("Mllama", {"scorer": "trimmed-llama", "selector_args": {"budget": "rows"}}),
    ("LlavaNext", {"scorer": "l2-norm", "selector": "dpp", "selector_args": {"similarity": "outputs"}}),
    ("InternVL", {"scorer": "stride", "selector_args": {"per": "crop"}}),
    ("InstructBlip", {"scorer": "catp"}),
    ("InstructBlip", {"scorer": "self-attention"}),
    ("InstructBlip", {"scorer": "region-attention"}),
    ("Blip2-OPT", {"scorer": "position"}),
    ("Blip2-T5", {"scorer": "catp", "selector": "dpp"}),
    ("InstructBlipVideo", {"scorer": "cross-attention"}),
    ("Mllama", {"scorer": "trimmed-llama"}),
    ("Mllama", {"scorer": "trimmed-llama", "selector": "top-k", "selector_args": {"per": "crop"}}),
    ("Llava", {"scorer": "fastv"}),
    ("Qwen2.5-VL", {"scorer": "fastv", "scorer_args": {"layer": 1}}),
    ("Blip2-OPT", {"scorer": "pyramiddrop"}),
    ("Llava", {"scorer": "sparsevlm"}),
    ("Qwen2.5-VL", {"scorer": "sparsevlm", "scorer_args": {"stages_at": [1, 2], "schedule": "rank", "scale": 0.7}}),
    ("Blip2-OPT", {"scorer": "sparsevlm", "selector": "top-k"}),
    ("Llava", {"scorer": "dart", "selector_args": {"pivots": 2}}),
    ("Qwen2.5-VL", {"scorer": "dart"}),
    ("Blip2-OPT", {"scorer": "dart", "scorer_args": {"layer": 1}}),
    ("Gemma3", {"scorer": "fastv", "scorer_args": {"layer": 1}}),
    ("Blip2-T5", {"scorer": "fastv", "scorer_args": {"layer": 1}}),
    ("InstructBlip-T5", {"scorer": "pyramiddrop"}),
    ("PaliGemma2", {"scorer": "sparsevlm", "scorer_args": {"stages_at": [1, 2]}}),
    ("Mistral3, sliding window", {"scorer": "dart", "scorer_args": {"layer": 1}}),
    *((name, {"scorer": "visual-exit"}) for name in ("Llava", "Qwen2.5-VL", "Blip2-OPT")),
    *((name, learned()) for name in ("Llava", "LlavaNext", "Qwen2.5-VL", "InternVL", "Mllama")),
    *((name, learned(slots=8)) for name in ("Blip2-OPT", "Blip2-T5")),
    ("InstructBlip", {**learned(slots=8), "selector": "dpp"}),
    *((name, compressor(s)) for name in ("Llava", "LlavaNext", "Qwen2.5-VL", "InternVL") for s in COMPRESSORS),
    *(("Blip2-OPT", compressor(s, on_grid=False)) for s in COMPRESSORS),
    *((name, exiting()) for name in ("Llava", "Qwen2.5-VL", "Blip2-OPT")),
    *((name, routed(*OUTPUTS)) for name in ("Llava", "LlavaNext", "Qwen2.5-VL", "Mllama", "Blip2-OPT", "Blip2-T5")),
]
NAN, INF = float("nan"), float("inf")


def early(scorer: str) -> dict[str, Any]:
    """Return the arguments with which a method inside the decoder drops tokens at layer 1; {} for any other."""
    names = {field.name for field in fields(SCORERS[scorer])} if SCORERS[scorer]().stages(4) else set()
    return {"stages_at": [1]} if "stages_at" in names else {"layer": 1} if "layer" in names else {}
