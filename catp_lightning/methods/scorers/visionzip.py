"""VisionZip: the tokens that [CLS] attends to most, and means of the others (2412.04467, section 3)."""

from dataclasses import dataclass
from typing import ClassVar

from catp_lightning.methods.scorers.fastervlm import FasterVLM


@dataclass(frozen=True)
class VisionZip(FasterVLM):
    """FasterVLM's score, which finds the dominant tokens; its selector, `context-merge`, merges the other tokens.

    Tokens are merged as the language model reads them; the authors merge before the projector, and count [CLS] itself
    among the dominant tokens.
    """

    selector: ClassVar[str] = "context-merge"
