"""Train a small LLaVA on easy-VQA from nothing: its tower first, then the rest on questions.

pip install easy-vqa
python examples/easy_vqa/train.py                # writes runs/easy_vqa/data and runs/easy_vqa/model
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from model import FEATURE_LAYER, GRID, PROMPT, WIDTH, build_model, build_processor
from project import QUIET, TESTS, options, read_data, read_model, trainer
from scenes import COLORS, SHAPES, SIDE, Picture, ask_scene, draw_scene, read_pictures, write_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor

KINDS = len(COLORS) * len(SHAPES)
TURNS = 8  # questions about a picture in training, one after the other, as LLaVA is trained
SINGLE = 0.25  # share of pictures that are one image


class Conversations(IterableDataset[dict[str, Any]]):
    """Pictures of one image and of nine, without end: each with several questions, and what its cells show."""

    def __init__(self, pictures: list[Picture], seed: int) -> None:
        self.pictures, self.seed = pictures, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(self.seed)
        while True:
            if rng.random() < SINGLE:
                picture = self.pictures[rng.integers(len(self.pictures))]
                image, cells = picture.image, [picture] * SIDE * SIDE
                turns = [picture.ask(rng) for _ in range(TURNS)]
            else:
                image, cells = draw_scene(rng, self.pictures)
                turns = [ask_scene(rng, cells) for _ in range(TURNS)]
            text = PROMPT.format(" ".join(f"{question} {answer}</s>" for question, answer in turns))
            yield {"image": image, "text": text, "kinds": [cell.kind for cell in cells]}


class Collate:
    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        images, texts = [[example["image"]] for example in examples], [example["text"] for example in examples]
        inputs = dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
        end = inputs["input_ids"] == self.processor.tokenizer.eos_token_id
        answered = end | end.roll(-1, 1)  # an answer is a word and the end
        labels = inputs["input_ids"].where(answered, -100)
        return {"inputs": inputs, "labels": labels, "kinds": torch.tensor([example["kinds"] for example in examples])}


class Training(LightningModule):
    """Training by Muon, for the matrices of some blocks, and AdamW, for all else; rates go up and down once."""

    def __init__(self, blocks: nn.Module, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.matrices = [weight for weight in blocks.parameters() if weight.dim() == 2]
        self.steps = steps

    def loss(self, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], index: int) -> None:
        optimizers: Any = self.optimizers()
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_([weight for weight in self.parameters() if weight.requires_grad], 1.0)
        schedules: Any = self.lr_schedulers()
        for each in (*optimizers, *schedules):
            each.step()
        if (index + 1) % 50 == 0:
            figures = {name: round(float(value), 3) for name, value in self.trainer.callback_metrics.items()}
            print(f"{type(self).__name__}, step {index + 1}: {figures}", flush=True)

    def configure_optimizers(self) -> Any:
        muon = {id(weight) for weight in self.matrices}
        others = [weight for weight in self.parameters() if weight.requires_grad and id(weight) not in muon]
        optimizers = [
            torch.optim.Muon(self.matrices, lr=2e-2, weight_decay=0.02),
            torch.optim.AdamW(others, lr=2e-3, weight_decay=0.02),
        ]
        schedule = torch.optim.lr_scheduler.OneCycleLR
        settings: Any = {"total_steps": self.steps, "pct_start": 0.1, "cycle_momentum": False}
        return optimizers, [schedule(each, each.param_groups[0]["lr"], **settings) for each in optimizers]


class TowerTraining(Training):
    """What a finished CLIP would bring: patches tell what their cell shows, and where it is, [CLS] what there is.

    Without the place, features lose it, and no question of a place can be answered.
    """

    def __init__(self, tower: CLIPVisionModel, steps: int) -> None:
        super().__init__(tower.encoder, steps)
        self.tower = tower
        self.cell = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KINDS))
        self.place = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SIDE * SIDE))
        self.summary = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, KINDS))

    def loss(self, batch: dict[str, Any]) -> Tensor:
        kinds, pixels = batch["kinds"], batch["inputs"]["pixel_values"]
        features = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
        each, single = GRID // SIDE, (kinds == kinds[:, :1]).all(1)[:, None, None]
        cells = features[:, 1:].unflatten(1, (SIDE, each, SIDE, each)).mean((2, 4)).flatten(1, 2)
        read = self.cell(torch.where(single, cells.mean(1, keepdim=True), cells))
        named = self.summary(features[:, 0])
        numbers = torch.arange(SIDE * SIDE, device=kinds.device).view(SIDE, SIDE)
        places = numbers.repeat_interleave(each, 0).repeat_interleave(each, 1).flatten().expand(len(kinds), -1)
        found = self.place(features[:, 1:])
        there = F.one_hot(kinds + 1, KINDS + 1).amax(1)[:, 1:].float()
        loss = F.cross_entropy(read.flatten(0, 1), kinds.flatten(), ignore_index=-1)
        loss = loss + F.cross_entropy(found.flatten(0, 1), places.flatten())
        loss = loss + F.binary_cross_entropy_with_logits(named, there)
        self.log("loss", loss.detach())
        self.log("found", (found.argmax(-1) == places).float().mean())
        self.log("read", (read.argmax(-1) == kinds)[kinds >= 0].float().mean())
        return loss


class AnswerTraining(Training):
    """Projector and language model learn to answer; the tower stays as it is."""

    def __init__(self, model: LlavaForConditionalGeneration, steps: int) -> None:
        super().__init__(model.model.language_model.layers, steps)
        model.model.vision_tower.requires_grad_(False)
        self.model = model

    def loss(self, batch: dict[str, Any]) -> Tensor:
        output = self.model(**batch["inputs"], labels=batch["labels"])
        words = batch["labels"][:, 1:]
        asked = (words != -100) & (words != self.model.config.get_text_config().eos_token_id)
        self.log("loss", output.loss.detach())
        self.log("right", (output.logits[:, :-1].argmax(-1) == words)[asked].float().mean())
        loss: Tensor = output.loss
        return loss


def easy_vqa() -> Path:
    """Return the folder of easy-VQA's data, in the package of that name."""
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise SystemExit("easy-VQA is not installed: pip install easy-vqa")
    return Path(found.origin).parent / "data"


def write_data(source: Path, folder: Path, share: float) -> list[Picture]:
    """Write calibration and test splits, a share of their 512, 400 and 600 questions; return the pictures to train on.

    No image of easy-VQA is in two of training, calibration and test.
    """
    pictures = read_pictures(str(source / "train"))
    order = np.random.default_rng(0).permutation(len(pictures))
    held = len(pictures) // 8  # that only calibration sees
    calibration, test = [pictures[number] for number in order[:held]], read_pictures(str(source / "test"))
    splits = {"calibration": (calibration, 64, 192), "single": (test, 200, 0), "scenes": (test, 0, 300)}
    for seed, (name, (of, singles, scenes)) in enumerate(splits.items()):
        write_split(folder / name, of, round(singles * share), round(scenes * share), seed)
    return [pictures[number] for number in order[held:]]


def main() -> None:
    given = options(__doc__, tower_steps=400, steps=700, questions=1.0, data="")
    seed_everything(0)
    source = Path(given.data) if given.data else easy_vqa()
    train = write_data(source, given.out / "data", given.questions)
    processor = build_processor()
    model = build_model(processor).train()

    def fit(training: Training, batch_size: int) -> None:
        loader = DataLoader(
            Conversations(train, training.steps), batch_size=batch_size, collate_fn=Collate(processor), num_workers=1
        )
        Trainer(**QUIET, max_epochs=1, limit_train_batches=training.steps).fit(training, loader)
        model.save_pretrained(given.out / "model")
        processor.save_pretrained(given.out / "model")

    fit(TowerTraining(model.model.vision_tower, given.tower_steps), 32)
    fit(AnswerTraining(model, given.steps), 16)
    for name in TESTS:
        print(name)
        trainer().test(read_model(given.out), read_data(given.out, name))


if __name__ == "__main__":
    main()
