"""Model types that transformers lists as reading images and text, and that cannot be pruned, each with its reason."""

from collections.abc import Mapping

_OTHER = "Take another model: docs/families.md lists them"
_ENCODER_DECODER = (
    "is an encoder-decoder: its image is read by the encoder or by cross-attention, and no token of a prompt stands "
    f"for a part of it. {_OTHER}"
)
_CROSS_ATTENTION = (
    "reads images by cross-attention, in a way of its own: no token of a prompt stands for a part of one. "
    "Llama-3.2-Vision, which reads them so too, can be pruned"
)
_INDEXED = (
    "has layers that read only the keys an index chooses among all columns: without some columns it would choose "
    f"others, and answers would not be those of the model with tokens hidden. {_OTHER}"
)
_CODES = (
    "turns an image into words of its own vocabulary, in the stack of layers that reads them: there is no text decoder "
    f"at whose entry rows could leave. {_OTHER}"
)
_UNMARKED = (
    "has no image token in its config: its features are put where the text says otherwise, or before it, so columns of "
    f"visual tokens cannot be told from text. {_OTHER}"
)
_BOTH = (
    "has layers that are attention and recurrent at once, whose states are not known to follow when rows leave. "
    "Qwen3.5 and LFM2-VL, in which such layers take turns, can be pruned"
)
_UNTESTED = f"makes tokens of images in a way of its own, and no test shows that pruning it is exact. {_OTHER}"

REFUSED: Mapping[str, str] = {
    "apertus1p5": _UNTESTED,
    "blip": _CROSS_ATTENTION.replace("Llama-3.2-Vision, which reads them so too,", "BLIP-2 and InstructBLIP"),
    "chameleon": _CODES,
    "deepseek_ocr2": _UNTESTED,
    "diffusion_gemma": f"writes blocks of text by diffusion, and reads a prompt more than once in other ways. {_OTHER}",
    "dots3_note": _INDEXED,
    "emu3": _CODES,
    "evolla": "reads proteins, not images: there are no visual tokens to prune",
    "florence2": _ENCODER_DECODER,
    "gemma3n": (
        "takes embeddings of each token in every layer, and its vision tower is one of the library timm: no test shows "
        "that pruning it is exact. Gemma 3 and Gemma 4 can be pruned"
    ),
    "git": _UNMARKED,
    "glm5_next": _INDEXED,
    "granite4_vision": _UNTESTED,
    "hunyuan_vl": _UNTESTED,
    "hy_v4_vl": _INDEXED,
    "idefics": _CROSS_ATTENTION,
    "inkling2": _BOTH,
    "inkling2_loop": _BOTH,
    "inkling_mm_model": _BOTH,
    "kosmos-2": _UNMARKED,
    "kosmos-2.5": _UNMARKED,
    "lfm3_vl": _UNTESTED,
    "llama4": (
        "has chunked attention, whose chunks count columns, and no part `model` below its head that puts visual tokens "
        f"into the prompt. {_OTHER}"
    ),
    "minicpm_ocr": _UNTESTED,
    "minicpmv4_6": _UNTESTED,
    "minicpmv4_7": _UNTESTED,
    "mistral4": "reads text alone: there are no visual tokens to prune",
    "mistral_large4": _INDEXED,
    "nemotron_h_omni": f"has no part `model` below its head that puts visual tokens into the prompt. {_OTHER}",
    "pi0": "gives actions of a robot, not text: nothing is generated that a pruned prompt could shorten",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "qwen4_exp": _INDEXED,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "unlimited_ocr": (
        "has layers that always see their first columns beside a window: columns that leave would move both. " + _OTHER
    ),
    "vision-encoder-decoder": _ENCODER_DECODER,
}
"""Reason by model type, as the end of a sentence that begins with the model's class."""
