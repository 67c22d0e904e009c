"""Test sets of digit scenes unlike those that the shipped models were trained on and are calibrated on, by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from catp_lightning.data.scenes import AS_TRAINED, GRID, KINDS, Drawing, Split, write_scenes


@dataclass(frozen=True)
class Shift:
    """How scenes are drawn and what is asked about them; the defaults are as in training.

    Attributes:
        drawing: noise, contrast, place, size and number of digits.
        kinds: kinds of question, taken in turn.
        questions_per_image: number of questions that share one image.
        turns: number of questions in a prompt, of which the last is scored.
    """

    drawing: Drawing = AS_TRAINED
    kinds: Sequence[str] = KINDS
    questions_per_image: int = 2
    turns: int = 1

    def write(
        self,
        folder: str | Path,
        split: Split,
        questions: int,
        seed: int = 0,
        grids: Sequence[tuple[int, int]] = ((GRID, GRID),),
    ) -> Path:
        """Write scenes and questions as `write_scenes` does."""
        each = self.questions_per_image
        return write_scenes(folder, split, questions, seed, each, grids, self.drawing, self.kinds, self.turns)


SHIFTS = {
    "noisy": Shift(Drawing(noise=2 * AS_TRAINED.noise, contrast=(0.35, 0.5))),
    "moved": Shift(Drawing(shift=3)),
    "crowded": Shift(Drawing(digits=(4, 5))),
    # One question an image: seven in ten are the same words, and no image should be asked them twice.
    "other-questions": Shift(kinds=("how many",) * 7 + KINDS[1:], questions_per_image=1),
    "detail": Shift(Drawing(glyph=12)),
    "several-turns": Shift(turns=2),
}
"""Noisier and fainter; digits out of their cells; 4 to 5 of them; mostly counts; digits of 12 pixels in place of 16; a
question that comes after another one about the same scene, with its answer."""
