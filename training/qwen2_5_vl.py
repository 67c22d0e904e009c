"""Train the small Qwen2.5-VL that ships with the package: about digit scenes of 36 to 400 tokens, from nothing.

    python training/qwen2_5_vl.py       # writes catp_lightning/data/digits_qwen2_5_vl and training/qwen2_5_vl.jsonl

Two stages. The vision tower learns to read: every visual token comes to be one of eleven fixed vectors, that of the
digit in its cell or of an empty one. Then the tower is left alone, and the language model learns to answer questions.
Its visual tokens also learn, after a few layers, in which row and column of cells they are: the tower has relative
positions only, so this has to come from the distance to the text before the image. One head, thrown away later, reads
that and the row and column that a question names: without it the token that is asked for is found much later.
In three quarters of the second stage's batches visual tokens are left out at random; the others keep their
positions.
"""

from pathlib import Path

import torch
from common import (
    SEED,
    Batches,
    Group,
    Log,
    accuracy,
    arguments,
    augmented_pool,
    minimise,
    save,
    split_language_model,
)
from qwen2_5_vl_batches import BEFORE, GRIDS, PROMPT, QUESTION, by_token, leave_out, pack, patches
from qwen2_5_vl_model import (
    RARE,
    TEXT,
    PlaceHead,
    answer_loss,
    build_model,
    build_processor,
    check_batches,
    digit_loss,
    hidden_states,
)
from torch import Tensor

from catp_lightning.data.scenes import Drawing

TOWER_SCENES = {(3, 3): 64, (3, 6): 32, (6, 4): 24, (6, 6): 16, (5, 10): 10, (10, 10): 4}  # a batch, by grid
SCENES = {(3, 3): 16, (3, 6): 14, (6, 4): 12, (6, 6): 10, (5, 10): 8, (10, 10): 5}
ASKED = ("how many",) + 2 * ("is there",) + 2 * ("largest or smallest",) + 5 * ("which digit",)  # per scene


class Training:
    """Training run: the model, its batches, and the log of its progress."""

    def __init__(self, output: Path, log: Path) -> None:
        torch.manual_seed(SEED)
        self.processor, self.output = build_processor(), output
        self.model, self.log = build_model(self.processor).train(), Log(log)
        self.place_head, self.shown = PlaceHead(), torch.randn(11, TEXT) * 0.3  # about the size of embeddings
        self.pool = augmented_pool(24, SEED)
        self.start_stage(0)
        check_batches(self.model, self.processor, self.batches)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.log.note(seed=SEED, parameters=parameters, torch=torch.__version__)

    def start_stage(self, number: int) -> None:
        """Seed all draws anew: a stage depends on the stage before by its weights alone."""
        torch.manual_seed(SEED + number)
        self.batches = Batches(self.processor.tokenizer, QUESTION, self.pool, SEED + number)

    def tower_loss(self, steps: int, step: int) -> Tensor:
        rows, columns = GRIDS[int(torch.randint(len(GRIDS), ()))]
        drawing = Drawing(digits=(1, 2 * rows * columns // 3))  # more than in any question: there is more to read
        pixels, cells = self.batches.scenes(TOWER_SCENES[rows, columns], rows, columns, drawing)
        tokens, digit = self.tokens(pixels).flatten(0, 1), by_token(cells).flatten()
        apart = (tokens[:, None] - self.shown).square().sum(-1)
        weight = torch.tensor(RARE)[digit]
        distance = (apart.gather(1, digit[:, None])[:, 0] * weight).sum() / weight.sum()
        read = digit_loss(-apart, digit)
        if step % 50 == 0 or step == steps:
            right = (apart.argmin(-1) == digit)[digit > 0].float().mean().item()
            figures = {"distance": round(distance.item(), 4), "loss": round(read.item(), 4), "read": round(right, 4)}
            self.log.note(stage="tower", step=step, grid=[rows, columns], **figures)
        return read + 0.1 * distance

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return the visual tokens of scenes of one grid, [B, T, D]."""
        values, grid = patches(pixels)
        return self.model.model.visual(values, grid_thw=grid).pooler_output.unflatten(0, (len(pixels), -1))

    def language_loss(self, steps: int, step: int) -> Tensor:
        grid = GRIDS[int(torch.randint(len(GRIDS), ()))]
        pixels, cells = self.batches.scenes(SCENES[grid], *grid)
        with torch.no_grad():
            tokens = self.tokens(pixels)
        kept = leave_out(cells)
        image = tokens.gather(1, kept[..., None].expand(-1, -1, TEXT))
        packed = pack(self.batches, ASKED, kept, *grid)
        image_middle, text_middle, hidden = hidden_states(self.model, self.batches.tokens(BEFORE), image, packed)
        answers, early = answer_loss(self.model, hidden, packed)
        places, placed = self.place_head.loss(image_middle, cells, kept)
        asked = self.place_head.asked_loss(text_middle, packed.asked)
        if step % 50 == 0 or step == steps:
            figures = {"answers": answers, "early": early, "places": places, "asked": asked}
            figures = {name: round(loss.item(), 4) for name, loss in figures.items()}
            which = (packed.asked[..., 0] >= 0) & (packed.targets >= 0)
            found = (self.model.lm_head(hidden[which]).argmax(-1) == packed.targets[which]).float().mean().item()
            shares = {"placed": round(placed, 4), "which_digit": round(found, 4)}
            self.log.note(stage="answers", step=step, grid=list(grid), **figures, **shares)
        return answers + 0.5 * early + 0.3 * (places + asked)

    def after(self, step: int) -> None:
        if step % 250 == 0:
            self.log.note(stage="answers", step=step, calibration=self.accuracy("calibration", 480, 1))
            save(self.model, self.processor, self.output)  # a long run that is stopped leaves something to look at

    def accuracy(self, split: str, questions: int, seed: int) -> dict[str, float]:
        return accuracy(self.model, self.processor, PROMPT, split, questions, seed, GRIDS)

    def read(self, steps: int) -> None:
        """Train the tower."""
        self.start_stage(1)
        groups: list[Group] = [(torch.optim.AdamW, list(self.model.model.visual.parameters()), 2e-3)]
        minimise(lambda step: self.tower_loss(steps, step), groups, steps, lambda step: None)

    def answer(self, steps: int) -> None:
        """Train the language model on a finished tower."""
        self.start_stage(2)
        matrices, others = split_language_model(self.model.model.language_model)
        others += self.place_head.parameters()
        groups: list[Group] = [(torch.optim.AdamW, others, 2e-3), (torch.optim.Muon, matrices, 2e-2)]
        minimise(lambda step: self.language_loss(steps, step), groups, steps, self.after)
        self.log.note(test_questions=2000, test=self.accuracy("test", 2000, 2))
        save(self.model, self.processor, self.output)


if __name__ == "__main__":
    a = arguments(__doc__, "qwen2_5_vl", tower_steps=700, steps=2000)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    training = Training(a.output, a.log)
    training.read(a.tower_steps)
    training.answer(a.steps)
