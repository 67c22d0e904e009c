"""Find parts of a question that a tokenizer would not read as text: special tokens and image placeholders."""

import unicodedata
from collections.abc import Sequence
from typing import Any

BRACKETS = {"<": ">", "[": "]", "{": "}", "(": ")", "|": "|", "｟": "｠"}


def marks_in(questions: Sequence[str], prompt: str, processor: Any) -> list[str | None]:
    """Return for each question the first control token in it, or None if all of it is text.

    Control tokens are special tokens, in every spelling that the tokenizer parses (other letter case, say, where it
    lowers them), and added tokens that look like them, in brackets. Other added words and spaces are text. Strings that
    the processor itself reads as images or videos are looked for first.

    Args:
        questions: the questions.
        prompt: the text around each question, with `{}` where the question goes.
        processor: processor of a vision-language model.
    """
    tokenizer, images = processor.tokenizer, _image_marks(processor)
    found = [next((mark for mark in images if mark in question), None) for question in questions]
    controls = _controls(tokenizer)
    if not getattr(tokenizer, "is_fast", False):  # slow: it does not say where in a text its tokens were
        marks = [(mark, _plain(mark)) for mark in controls.values()]
        parsed = [next((mark for mark, text in marks if text in _plain(question)), None) for question in questions]
    else:
        texts = [prompt.replace("{}", question) for question in questions]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        starts = prompt.index("{}")
        parsed = [
            _parsed(tokenizer, controls, text, range(starts, starts + len(question)), ids, spans)
            for question, text, ids, spans in zip(
                questions, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]
    return [image or other for image, other in zip(found, parsed, strict=True)]


def _parsed(
    tokenizer: Any,
    controls: dict[int, str],
    text: str,
    question: range,
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
) -> str | None:
    """Return the first of `controls` that the tokenizer parsed in the question's range of a text, or None."""
    for number, (first, last) in zip(ids, spans, strict=True):
        inside = text[max(first, question.start) : min(last, question.stop)].strip()
        # An unknown word is text: the unknown token counts as control only where its own name was written.
        if number in controls and inside and (number != tokenizer.unk_token_id or _is(tokenizer, inside)):
            return controls[number]
    return None


def _controls(tokenizer: Any) -> dict[int, str]:
    special = dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=False))
    added = getattr(tokenizer, "added_tokens_decoder", None)
    added = added if isinstance(added, dict) else {}  # a tokenizer of mistral-common has a method there
    marks = {number: str(token) for number, token in added.items() if token.special or _in_brackets(str(token))}
    return special | marks


def image_token_id(processor: Any) -> int | None:
    """Return the token id that stands for an image in a processor's input ids; None if it is not known."""
    number = getattr(processor, "image_token_id", None)
    if number is None and getattr(processor, "image_token", None) is not None:
        number = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    return number if isinstance(number, int) else None


def _image_marks(processor: Any) -> list[str]:
    """Return strings that a processor itself reads as an image or video, or its start or end, anywhere in a text."""
    tokens = {name: value for name, value in vars(processor).items() if value and name.endswith("token")}
    return [str(token) for name, token in tokens.items() if "image" in name or "video" in name]


def _in_brackets(token: str) -> bool:
    return len(token) > 2 and BRACKETS.get(token[0]) == token[-1]


def _is(tokenizer: Any, text: str) -> bool:
    """True if a text is the unknown token's own name, as the tokenizer's normalizer compares them."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    compared = [part if normalizer is None else normalizer.normalize_str(part) for part in (text, tokenizer.unk_token)]
    return compared[0].strip() == compared[1].strip()


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
