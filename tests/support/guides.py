"""A small LLaVA that guides others, and the policy that asks it."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

from catp_lightning import PruningPolicy
from tests.support.families import BY_NAME
from tests.support.oracles import END, IMAGE, START, VIDEO
from tests.support.rows import Row
from tests.support.small_configs import GATED, TOKENS, clip

ANSWER = 4
RULE = PruningPolicy(scorer="sgl", scorer_args={"answer_tokens": ANSWER}, keep=0.4)


def small_llava(**changes: Any) -> PreTrainedModel:
    """Two layers of two heads, and another width than the large model's."""
    text = {**GATED, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = hf.LlavaConfig(vision_config=clip(), text_config=hf.LlamaConfig(**{**text, **changes}), **TOKENS)
    return hf.LlavaForConditionalGeneration(config)


@cache
def guide(name: str) -> PreTrainedModel:
    """Another model than the row's own; it looks at images and answers with more than one word."""
    make = small_llava if name == "Llava" else BY_NAME[name].make
    model = replace(BY_NAME[name], name=f"guide of {name}", make=make).model()
    generator = torch.Generator().manual_seed(9)
    for weight in model.parameters():
        if weight.dim() == 2:  # not the same numbers as the large model's
            weight.data = weight.data[:, torch.randperm(weight.shape[1], generator=generator)]
    marks = [token for token in (IMAGE, VIDEO, START, END) if token < len(model.get_output_embeddings().weight)]
    model.generation_config.suppress_tokens = marks
    return model


def slowly(row: Row, model: PreTrainedModel, own: int, ends: tuple[int, ...]) -> tuple[list[float], list[int]]:
    """What the text of one sample and its answer pay each visual token; and the answer. No cache, no batch."""
    inputs, answer = row.inputs([own]), list[int]()

    def run(tokens: list[int], **settings: Any) -> Any:
        new = torch.tensor([tokens], dtype=torch.long)
        return model(**row.oracle.forward_inputs(row.oracle.grow(inputs, new)), **settings)

    while len(answer) < ANSWER and not set(answer) & set(ends):
        logits = run(answer).logits[0, -1]
        logits[model.generation_config.suppress_tokens] = -torch.inf
        answer.append(int(logits.argmax()))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    output = run(answer[:-1], output_attentions=True)
    model.set_attn_implementation(before)
    ids = inputs["input_ids"][0].tolist() + answer[:-1]
    visual = [column for column, id_ in enumerate(ids) if id_ in (IMAGE, VIDEO)]
    scores = [0.0] * len(visual)
    for layer in output.get("language_model_outputs", output).attentions:
        for head in layer[0].tolist():
            for column, paid in enumerate(head):
                if column > visual[0] and column not in visual:
                    scores = [score + paid[token] for score, token in zip(scores, visual, strict=True)]
    return scores, answer


def with_images(row: Row) -> list[int]:
    return [own for own, sample in enumerate(row.samples()) if sample.images]
