"""What a processor is called with: prompts, and images or frames of videos in the form that its model reads."""

import re
from collections.abc import Sequence
from typing import Any

from catp_lightning.data.vqa_dataset import VQAExample
from catp_lightning.errors import DataError

_EACH = re.compile(r"\{frames:([^{}]*)\}")
"""The text of a frame in a prompt, for models that read frames as images."""


def visual_inputs(examples: Sequence[VQAExample], processor: Any, prompt: str) -> dict[str, Any]:
    """Return a processor's arguments for a batch: texts, and images or videos.

    Every image is a list of its own, the one form that processors of one and of several images a sample both take.
    Frames of a video are one video where the prompt has the processor's video token. Otherwise they are images, and
    the text in `{frames:...}` stands in the prompt once for each.

    Args:
        examples: the questions; all have an image, or all have a clip with as many frames.
        processor: the processor.
        prompt: text around each question, with `{}` where the question goes.

    Raises:
        DataError: the prompt has no place for frames, or the processor takes one image for each question.
    """
    clips = [example["clip"] for example in examples if "clip" in example]
    count = len(clips[0].frames) if clips else 1
    around = _EACH.sub(lambda match: match[1] * count, prompt)
    texts = {"text": [around.replace("{}", example["question"]) for example in examples]}
    if not clips:
        return {"images": [[example["image"]] for example in examples], **texts}
    if (token := video_token(processor)) is not None and token in prompt:
        seconds = [{"total_num_frames": clip.total, "fps": clip.rate, "frames_indices": clip.numbers} for clip in clips]
        videos = [clip.frames for clip in clips]
        return {"videos": videos, "video_metadata": seconds, "do_sample_frames": False, **texts}
    if count > 1 and hasattr(processor, "num_query_tokens"):  # BLIP-2 and InstructBLIP put them before the text
        raise DataError(
            f"{type(processor).__name__} takes one image for each question, and a video has {count} frames here. Give "
            "the reader frames=1, or evaluate a model that reads several images."
        )
    if count > 1 and _EACH.search(prompt) is None:
        image = getattr(processor, "image_token", None) or "<image>"
        read = "" if token is None else f" To have it read as a video, write its video token {token!r} there."
        raise DataError(
            f"prompt={prompt!r:.500} has no place for the frames of a video. Write {{frames:{image!s}}} where they go: "
            f"what stands between the colon and the brace is repeated for each frame.{read}"
        )
    return {"images": [clip.frames for clip in clips], **texts}


def video_token(processor: Any) -> str | None:
    """Return the text that stands for a video in a processor's prompts; None where it takes none."""
    token = getattr(processor, "video_token", None)
    return None if token is None or getattr(processor, "video_processor", None) is None else str(token)


def described(example: VQAExample) -> str:
    """Return in words what a question is about, for messages."""
    if "clip" not in example:
        return f"image {example['image_id']}, of {example['image'].size} pixels"
    frames = example["clip"].frames
    return f"video {example['image_id']}, {len(frames)} frames of {frames[0].size} pixels"
