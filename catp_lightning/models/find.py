"""Search for the model to prune in any module that a user hands over."""

from torch import nn
from transformers import PreTrainedModel

from catp_lightning.errors import PruningError
from catp_lightning.models.base import Family
from catp_lightning.models.blip2 import Blip2, InstructBlip, InstructBlipVideo
from catp_lightning.models.cosmos import Compass, Cosmos
from catp_lightning.models.ernie import Ernie
from catp_lightning.models.exaone import Exaone
from catp_lightning.models.fuyu import Fuyu
from catp_lightning.models.gemma import Gemma, Gemma4, PaliGemma
from catp_lightning.models.glm import GLM
from catp_lightning.models.hyperclovax import HyperCLOVAX
from catp_lightning.models.idefics import Idefics
from catp_lightning.models.internvl import InternVL
from catp_lightning.models.kimi import Kimi, Muse
from catp_lightning.models.lfm2 import Lfm2
from catp_lightning.models.llava import Llava
from catp_lightning.models.llava_next import LlavaNext
from catp_lightning.models.llava_onevision import LlavaOnevision
from catp_lightning.models.minimax import MiniMax
from catp_lightning.models.missing import no_model, refuse_other
from catp_lightning.models.mistral import Mistral
from catp_lightning.models.mllama import Mllama
from catp_lightning.models.molmo import Molmo
from catp_lightning.models.paddleocr import PaddleOCR
from catp_lightning.models.perception import Perception
from catp_lightning.models.pictures import Pictures
from catp_lightning.models.placeholder import Placeholder
from catp_lightning.models.qwen_vl import QwenVL
from catp_lightning.models.tiles import GraniteDocling, Step
from catp_lightning.models.video_llama import VideoLlama
from catp_lightning.models.video_llava import VideoLlava
from catp_lightning.utils.parts import outermost

FAMILIES: tuple[type[Family], ...] = (
    Blip2,
    InstructBlip,
    InstructBlipVideo,
    Llava,
    LlavaNext,
    LlavaOnevision,
    VideoLlava,
    Mllama,
    QwenVL,
    GLM,
    InternVL,
    Idefics,
    Mistral,
    Gemma,
    PaliGemma,
    Gemma4,
    Ernie,
    Cosmos,
    Compass,
    Exaone,
    HyperCLOVAX,
    MiniMax,
    PaddleOCR,
    VideoLlama,
    Pictures,
    Perception,
    Fuyu,
    Lfm2,
    Kimi,
    Muse,
    Molmo,
    GraniteDocling,
    Step,
    Placeholder,  # models of no other family
)
"""Families, one file each. Of a model's type the first that handles it is taken."""


def _family_of(part: nn.Module) -> tuple[type[Family], PreTrainedModel] | None:
    if not isinstance(part, PreTrainedModel):
        return None
    family = next((family for family in FAMILIES if family.handles(part)), None)
    return None if family is None else (family, part)


def find_family(module: nn.Module, name: str | None = None) -> Family:
    """Return the family of the model to prune: the outermost supported model in `module`, under PEFT or DDP too.

    Args:
        module: a Hugging Face model, or any module that holds one.
        name: attribute path of the model, if several are held: "student" or "net.student" for example.

    Raises:
        PruningError: there is none, there are several and `name` chooses none of them, or it cannot be pruned.
    """
    refuse_other(module)
    supported = dict(outermost(module, _family_of))
    if not supported:
        raise no_model(module, [name for family in FAMILIES for name in family.classes])
    listed = ", ".join(f"{path or 'itself'} ({type(part).__name__})" for path, (_, part) in supported.items())
    if name is not None and name not in supported:
        raise PruningError(f"There is no supported model at {name!r}; there are: {listed}.")
    if name is None and len(supported) > 1:
        raise PruningError(f'{type(module).__name__} holds several models: {listed}. Choose one with model="<name>".')
    family, model = supported[name] if name is not None else next(iter(supported.values()))
    return family(model)
