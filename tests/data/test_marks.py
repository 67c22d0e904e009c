"""What a tokenizer would read as control inside a question is found as it parses it; what is text stays text."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from catp_lightning.data.marks import image_token_id, marks_in
from tests.support.tiny_vqa import build_processor

PROMPT = "question : {} short answer :"


def processor():
    made = build_processor()  # which reads all letters as small ones
    made.tokenizer.add_tokens(
        [
            AddedToken("[object]", normalized=True),
            AddedToken("<box>", normalized=False),
            AddedToken("scene"),
            AddedToken("\n\n", normalized=False),
        ]
    )
    return made


@pytest.mark.parametrize(
    ("question", "mark"),
    [
        ("what is </s> here ?", "</s>"),
        ("</s>", "</s>"),
        ("digits<pad>", "<pad>"),
        ("is <unk> there ?", "<unk>"),
        ("is<image>there ?", "<image>"),
        ("the <box> in it ?", "<box>"),
        ("the [object] in it ?", "[object]"),
        ("the [OBJect] in it ?", "[object]"),
        ("how many digits are there ?", None),
        ("☃ is unknown and so is unk", None),
        ("< pad > <PAD> </ s>", None),  # special tokens are not normalised: these are read letter by letter
        ("the scene \n\n here ?", None),
        ("", None),
    ],
)
def test_a_token_is_found_in_every_spelling_that_the_tokenizer_parses(question, mark):
    made = processor()
    assert marks_in(["how many", question, "is there"], PROMPT, made) == [None, mark, None]
    controls = {0, 1, 3, *(made.tokenizer.convert_tokens_to_ids(token) for token in ("<box>", "[object]"))}
    read = controls & set(made.tokenizer(question, add_special_tokens=False).input_ids)
    assert bool(read) == (mark is not None and mark != "<unk>"), "or the case says nothing"


def test_tokens_of_the_prompt_itself_are_no_marks_of_a_question():
    for prompt in ("<image> {}", "</s>{}", "<box>{}<pad>", "{}"):
        assert marks_in([" how many ", ""], prompt, processor()) == [None, None]
    assert marks_in(["image> is there"], "<{}", processor()) == ["<image>"], "made by prompt and question together"


def test_a_tokenizer_that_does_not_say_where_its_tokens_were_is_asked_by_their_names():
    slow = SimpleNamespace(tokenizer=ByT5Tokenizer())
    assert not slow.tokenizer.is_fast
    questions = ["what is </s> ?", "<PAD>", "is <unk> there", "how many ?"]
    assert marks_in(questions, PROMPT, slow) == ["</s>", "<pad>", "<unk>", None]


def test_the_image_token_is_known_where_a_processor_has_only_its_name():
    made = build_processor()
    assert not hasattr(made, "image_token_id") and image_token_id(made) == 3
    assert image_token_id(SimpleNamespace(tokenizer=made.tokenizer)) is None
