"""Train the small Llama-3.2-Vision that ships with the package: about digit scenes of one to four tiles, from nothing.

    python training/mllama.py           # writes catp_lightning/data/digits_mllama and training/mllama.jsonl

Three stages: the vision tower learns to read the cells, the language model learns to answer questions about what the
tower reads, then both learn together. Heads used on the way are thrown away.
"""

from functools import partial
from pathlib import Path

import torch
from common import (
    EOS,
    PAD,
    SEED,
    Batches,
    Group,
    Log,
    Reader,
    accuracy,
    arguments,
    augmented_pool,
    build_tokenizer,
    minimise,
    save,
    split_language_model,
)
from mllama_batches import (
    BOS,
    GRIDS,
    IMAGE,
    PATCH,
    PROMPT,
    RATIOS,
    SIDE,
    TILE,
    TILES,
    Packed,
    Scenes,
    draw,
    pack,
    patch_places,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

VISION, TEXT = 64, 96  # widths
ASKED = ("how many",) + 4 * ("is there",) + 3 * ("largest or smallest",) + 4 * ("which digit",)  # per scene


def build_processor() -> MllamaProcessor:
    tokenizer = build_tokenizer(IMAGE, BOS)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    images = MllamaImageProcessor(
        size={"height": TILE, "width": TILE}, max_image_tiles=TILES, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return MllamaProcessor(images, tokenizer)


def build_model(processor: MllamaProcessor) -> MllamaForConditionalGeneration:
    ids = processor.tokenizer.get_vocab()
    special = {"pad_token_id": ids[PAD], "bos_token_id": ids[BOS], "eos_token_id": ids[EOS]}
    vision = MllamaVisionConfig(
        hidden_size=VISION,
        intermediate_size=3 * VISION,
        num_hidden_layers=3,
        num_global_layers=1,
        attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        max_num_tiles=TILES,
        supported_aspect_ratios=RATIOS,
        intermediate_layers_indices=[1],
        vision_output_dim=2 * VISION,
    )
    text = MllamaTextConfig(
        vocab_size=len(ids),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3, 5, 7],
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **special,
    )
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=ids[IMAGE])
    model = MllamaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **special)
    start_weights(model)
    return model


@torch.no_grad()
def start_weights(model: MllamaForConditionalGeneration) -> None:
    """Replace initial weights of transformers from which training would take thousands of steps more."""
    for name, weight in model.named_parameters():
        if "gate" in name and weight.numel() == 1:
            nn.init.constant_(weight, 0.5)  # zero by default: nothing of the image would reach the text
    # At the usual deviation of 0.02 a word's embedding drowns in the output of attention.
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.2)
    nn.init.normal_(model.model.multi_modal_projector.weight, std=(2 * VISION) ** -0.5)
    tower = model.model.vision_model
    # A patch starts with the place of its cell in the whole image, the same however the image is cut into tiles, and
    # with its own place in the cell.
    rows, columns, corners = torch.randn(16, VISION), torch.randn(16, VISION), torch.randn(4, VISION)
    places = torch.zeros(len(RATIOS) + 1, TILES, SIDE * SIDE + 1, VISION)
    for number, (high, wide) in enumerate(RATIOS, 1):
        for tile in range(high * wide):
            row, column = patch_places(tile, wide)
            corner = row % 2 * 2 + column % 2
            places[number, tile, 1:] = rows[row // 2] + columns[column // 2] + corners[corner]
    tower.gated_positional_embedding.tile_embedding.weight.copy_(0.5 * places.flatten(1))


def image_states(model: MllamaForConditionalGeneration, vision: dict[str, Tensor]) -> Tensor:
    """Return the image rows that cross-attention reads: [B, 148, D]."""
    rows = model.model.vision_model(**vision).last_hidden_state
    return model.model.multi_modal_projector(rows).flatten(1, 3)


def hidden_states(model: MllamaForConditionalGeneration, states: Tensor, real: Tensor, packed: Packed) -> Tensor:
    """Return the language model's last hidden states, [B, L, D]; `real` [B, 1, 4] is 1 for tiles of the image."""
    seen = real[:, None].repeat(1, packed.ids.shape[1], 1, 1)
    seen[:, 0] = 0  # the first token stands before the image
    output = model.model(
        input_ids=packed.ids,
        position_ids=packed.places,
        attention_mask=packed.mask,
        cross_attention_states=states,
        cross_attention_mask=seen,
        use_cache=False,
    )
    return output.last_hidden_state


def answer_loss(model: MllamaForConditionalGeneration, hidden: Tensor, packed: Packed) -> Tensor:
    """Return the cross-entropy of answer and end, plus half that of the answer at the last words of the question."""
    answered, early = packed.targets >= 0, packed.early >= 0
    # The last words of a question already know enough to answer: asked there too, the language model learns much sooner
    # to use the digit, row or column it was asked about.
    return F.cross_entropy(model.lm_head(hidden[answered]), packed.targets[answered]) + 0.5 * F.cross_entropy(
        model.lm_head(hidden[early]), packed.early[early]
    )


class Training:
    """Training run: the model, its batches, and the log of its progress."""

    def __init__(self, output: Path, log: Path) -> None:
        self.processor, self.output = build_processor(), output
        self.model, self.log = build_model(self.processor).train(), Log(log)
        self.reader, self.patch_reader = Reader(TEXT, *GRIDS[-1]), nn.Linear(TEXT, 11)
        prompt = PROMPT.replace(IMAGE, IMAGE + BOS)  # as the processor does
        self.batches = Batches(self.processor.tokenizer, prompt, augmented_pool(24, SEED), SEED)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.log.note(seed=SEED, parameters=parameters, torch=torch.__version__)

    def reading_loss(self, scenes: Scenes, states: Tensor) -> tuple[Tensor, float]:
        """Return the cross-entropy of reading all rows and each patch, and the share of digits read right."""
        hidden = scenes.vision["aspect_ratio_mask"][:, 0].repeat_interleave(SIDE * SIDE + 1, 1) == 0
        each = len(scenes.cells[0])
        read = [
            self.reader.loss(*one) for one in zip(states.split(each), scenes.cells, hidden.split(each), strict=True)
        ]
        patches = F.cross_entropy(self.patch_reader(states).flatten(0, 1), scenes.patches.flatten())
        losses, shares = zip(*read, strict=True)
        return torch.stack(losses).mean() + patches, sum(shares) / len(shares)

    def loss_of(self, stage: str, each: int, step: int) -> Tensor:
        scenes = draw(self.batches, each, () if stage == "tower" else ASKED)
        loss, figures = torch.zeros(()), dict[str, float]()
        with torch.set_grad_enabled(stage != "language"):
            states = image_states(self.model, scenes.vision)
        if stage != "tower":
            packed = pack(scenes.text, self.batches.ids[PAD], self.batches.ids[EOS])
            hidden = hidden_states(self.model, states, scenes.vision["aspect_ratio_mask"], packed)
            loss = answer_loss(self.model, hidden, packed)
            figures["answers"] = round(loss.item(), 4)
        if stage != "language":
            reading, share = self.reading_loss(scenes, states)
            loss = loss + (1.0 if stage == "tower" else 0.3) * reading
            figures |= {"reading": round(reading.item(), 4), "digits_read": round(share, 4)}
        if step % 50 == 0:
            self.log.note(stage=stage, step=step, **figures)
        return loss

    def after(self, stage: str, step: int) -> None:
        if stage != "tower" and step % 250 == 0:
            self.log.note(stage=stage, step=step, calibration=self.accuracy("calibration", 400, 1))
            save(self.model, self.processor, self.output)  # a long run that is stopped leaves something to look at

    def accuracy(self, split: str, questions: int, seed: int) -> dict[str, float]:
        return accuracy(self.model, self.processor, PROMPT, split, questions, seed, GRIDS)

    def run(self, tower_steps: int, language_steps: int, steps: int) -> None:
        adam, muon = torch.optim.AdamW, torch.optim.Muon
        tower = [*self.model.model.vision_model.parameters(), *self.model.model.multi_modal_projector.parameters()]
        tower += [*self.reader.parameters(), *self.patch_reader.parameters()]
        matrices, others = split_language_model(self.model.model.language_model)
        others += self.model.lm_head.parameters()
        groups: dict[str, list[Group]] = {
            "tower": [(adam, tower, 2e-3)],
            "language": [(adam, others, 2e-3), (muon, matrices, 2e-2)],
            "all": [(adam, tower, 2e-4), (adam, others, 5e-4), (muon, matrices, 5e-3)],
        }
        for stage, count, each in (("tower", tower_steps, 12), ("language", language_steps, 8), ("all", steps, 8)):
            minimise(partial(self.loss_of, stage, each), groups[stage], count, partial(self.after, stage))
        self.log.note(test_questions=2000, test=self.accuracy("test", 2000, 2))
        save(self.model, self.processor, self.output)


if __name__ == "__main__":
    a = arguments(__doc__, "mllama", tower_steps=1000, language_steps=1000, steps=600)
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order on any machine
    Training(a.output, a.log).run(a.tower_steps, a.language_steps, a.steps)
