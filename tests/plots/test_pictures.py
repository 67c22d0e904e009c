"""What pictures show is what was kept, where it lies in the image, for every layout of visual tokens."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from catp_lightning import PruningError, PruningPolicy, Stage, plots, prune
from catp_lightning.models import find_family
from catp_lightning.models.llava_next import CutImage
from catp_lightning.pruning.shown import Shown
from tests.support.contrast import contrast
from tests.support.families import BY_NAME
from tests.support.footprints import footprint

pytestmark = pytest.mark.usefixtures("no_grad")
Scenes = Callable[[str], tuple[Any, Any, list[np.ndarray]]]
LAYOUTS = {  # rows of the matrix whose tokens stand for patches, by layout
    "one square": "Llava",
    "crops": "LlavaNext",
    "crops, resampled": "LlavaOnevision",
    "windows and frames": "Qwen2.5-VL",
    "tiles": "Mllama",
    "own sizes": "Pixtral",
    "several images": "InternVL",
}


def shown_by(name: str, policy: PruningPolicy, **settings: Any) -> tuple[Any, tuple[Shown, ...]]:
    """The record of a row of the matrix, and what it shows."""
    row = next(row for own, row in BY_NAME.items() if own.startswith(name))
    model, inputs = row.model(torch.float32), row.inputs(dtype=torch.float32)
    with prune(model, policy, show=True, **settings) as pruning:
        model(**row.oracle.forward_inputs(inputs))
    return pruning, pruning.shown


def drawn(figure: Figure) -> list[np.ndarray]:
    """What is drawn over each part: the second image of its axes."""
    return [np.ma.getdata(axes.images[1].get_array()) for axes in figure.axes if len(axes.images) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS.values(), ids=LAYOUTS)
def test_exactly_the_patches_of_kept_tokens_are_left_uncovered(name: str) -> None:
    pruning, samples = shown_by(name, PruningPolicy("l2-norm", keep=0.5))
    visual = pruning.scores > -torch.inf
    assert len(samples) == len(pruning.keep) > 1
    for row, shown in enumerate(samples):
        own = visual[row]
        assert torch.equal(shown.last.keep, pruning.keep[row][own]), "in placeholder order"
        assert torch.equal(shown.last.scores, pruning.scores[row][own])
        expected: dict[tuple[int, int], set[tuple[int, int]]] = {}
        for image, (part, line, column), keep in zip(
            shown.image.tolist(), shown.places.tolist(), shown.last.keep.tolist(), strict=True
        ):
            cells = expected.setdefault((image, part), set()) if line >= 0 else set()
            if keep:
                cells.add((line, column))
        covers = drawn(plots.kept_tokens(shown).figure)
        assert len(covers) == len(expected) > 0
        for cover, cells in zip(covers, expected.values(), strict=True):
            assert set(map(tuple, np.argwhere(cover[..., 3] == 0).tolist())) == cells
            assert 0 < len(cells) < cover[..., 3].size or not cells
        heat = drawn(plots.score_map(shown).figure)
        on_patch = shown.places[:, 1] >= 0
        expected_scores = shown.last.scores[on_patch].sort().values
        found = np.sort(np.concatenate([part[np.isfinite(part)] for part in heat]))
        assert np.allclose(found, expected_scores), "each token's score, once"


def test_the_picture_under_a_square_of_patches_is_what_the_vision_part_reads(scenes: Scenes) -> None:
    model, inputs, _ = scenes("digits_llava")
    with prune(model, PruningPolicy("fastervlm", keep=0.25), show=True) as pruning:
        model(**inputs)
    for row, shown in enumerate(pruning.shown):
        ((part,),) = shown.images
        assert torch.equal(part.picture, inputs["pixel_values"][row]) and (part.rows, part.columns) == (12, 12)


@pytest.mark.parametrize("name", ["digits_qwen2_5_vl", "digits_mllama"])
def test_merged_patches_and_tiles_are_put_together_to_the_image_that_the_processor_cut(
    scenes: Scenes, name: str
) -> None:
    model, inputs, images = scenes(name)
    with prune(model, PruningPolicy("l2-norm", keep=0.25), show=True) as pruning:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    for shown, image in zip(pruning.shown, images, strict=True):
        (parts,) = shown.images
        size = parts[0].picture.shape[-1]
        high, wide = (1 + max(part.at[axis] for part in parts) for axis in (0, 1))
        whole = torch.zeros(3, high * parts[0].picture.shape[1], wide * size)
        for part in parts:
            top, left = part.at[0] * part.picture.shape[1], part.at[1] * size
            whole[:, top : top + part.picture.shape[1], left : left + size] = part.picture
        assert whole.shape[1:] == image.shape[:2], "nothing was resized"
        expected = torch.from_numpy(image).permute(2, 0, 1).float()
        line = torch.stack([expected.flatten(), torch.ones(expected.numel())], 1)  # pixels are shifted and scaled
        fit = torch.linalg.lstsq(line.double(), whole.double().flatten()[:, None]).solution
        torch.testing.assert_close(line.double() @ fit, whole.double().flatten()[:, None], atol=0.05, rtol=0)
        assert fit[0] > 0, "light is light"


@pytest.mark.parametrize("name", ["LlavaNext", "LlavaOnevision"])
def test_crops_are_put_together_as_the_model_packs_their_features(name: str) -> None:
    """The model's own packing is given the pixels of each patch in the place of its feature."""
    row = BY_NAME[name]
    model, inputs = row.model(torch.float32), row.inputs(dtype=torch.float32)
    with prune(model, PruningPolicy("l2-norm", keep=0.5), show=True) as pruning:
        model(**row.oracle.forward_inputs(inputs))
    family: Any = find_family(model)
    patch, side = model.config.vision_config.patch_size, family._side()
    images = [parts for shown in pruning.shown for parts in shown.images]
    own = [
        crops[:count] for crops, count in zip(inputs["pixel_values"], family._crop_counts(dict(inputs)), strict=True)
    ]
    patches = [
        crops[..., : side * patch, : side * patch]
        .unflatten(3, (side, patch))
        .unflatten(2, (side, patch))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
        .flatten(1, 2)
        for crops in own
    ]
    checked = 0
    for parts, packed in zip(images, family._packed(patches, dict(inputs)), strict=True):
        rest = packed[side**2 :]
        if len(parts) == 1 or len(rest) != parts[1].rows * (parts[1].columns + 1):
            continue
        if parts[1].rows * patch != parts[1].picture.shape[1]:  # features are resampled, pixels are not
            continue
        lines = rest.unflatten(0, (parts[1].rows, -1))[:, :-1]  # without line ends
        expected = lines.unflatten(2, (3, patch, patch)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        assert torch.equal(parts[1].picture, expected)
        checked += 1
    assert checked >= {"LlavaNext": 3, "LlavaOnevision": 0}[name]
    for parts, crops in zip(images, own, strict=True):
        assert torch.equal(parts[0].picture, crops[0, :, : side * patch, : side * patch])


def test_padding_above_and_below_is_no_part_of_a_picture() -> None:
    pixels = torch.rand(5, 3, 16, 16)
    image = CutImage(1, pixels, size=(10, 32), pinpoints=[[32, 32]], patch=8)  # wide, in a square of four crops
    whole = torch.cat([torch.cat([pixels[1], pixels[2]], 2), torch.cat([pixels[3], pixels[4]], 2)], 1)
    first, rest = image.pictures()
    assert torch.equal(first, pixels[0]) and torch.equal(rest, whole[:, 8:24])


def test_query_tokens_are_shown_by_the_patches_that_they_attend_to(scenes: Scenes) -> None:
    model, inputs, _ = scenes("digits_blip2")
    with prune(model, PruningPolicy("catp", keep=5), show=True) as pruning:
        model.generate(**inputs, max_new_tokens=1)
    states = model.vision_model(inputs["pixel_values"]).last_hidden_state
    model.set_attn_implementation("eager")
    try:
        seen = model.qformer(
            query_embeds=model.query_tokens.expand(2, -1, -1), encoder_hidden_states=states, output_attentions=True
        )
    finally:
        model.set_attn_implementation("sdpa")
    maps = torch.stack([layer for layer in seen.cross_attentions if layer is not None], 1).mean((1, 2))
    for row, shown in enumerate(pruning.shown):
        torch.testing.assert_close(shown.attention.flatten(1), maps[row][:, 1:], atol=1e-5, rtol=1e-4)
        order = sorted(pruning.keep[row].nonzero()[:, 0].tolist(), key=lambda token: -pruning.scores[row, token])
        (axes,) = plots.kept_tokens(shown).figure.axes
        assert [text.get_text() for text in axes.texts] == ["image", *(f"query {token}" for token in order)]
        heat = [np.ma.getdata(image.get_array()) for image in axes.images][2::2]
        assert all(np.array_equal(one, shown.attention[token]) for one, token in zip(heat, order, strict=True))
        (axes,) = plots.score_map(shown).figure.axes
        assert len(axes.texts) == 33 and sum("kept" in text.get_text() for text in axes.texts) == 5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scorer"), [("Llava", "fastervlm"), ("Blip2-OPT", "l2-norm"), ("Llava", "fastv")])
def test_what_is_kept_is_the_same_whether_it_is_shown_or_not(name: str, scorer: str) -> None:
    row, policy = BY_NAME[name], PruningPolicy(scorer, keep=0.5)
    model, inputs = row.model(), row.oracle.forward_inputs(row.inputs())
    model(**inputs)  # transformers installs hooks of its own at the first call
    before = footprint(model)
    found = []
    for show in (False, True):
        with prune(model, policy, show=show) as pruning:
            logits = model(**inputs).logits
        assert footprint(model) == before
        found.append((pruning.keep, logits))
        assert bool(pruning.shown) == show
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_stages_are_shown_with_their_layers_and_what_was_chosen_by_hand_too() -> None:
    pruning, samples = shown_by(
        "Llava", PruningPolicy("l2-norm", keep=0.7, then=[Stage("fastv", {"layer": 1}, keep=0.4)])
    )
    layers = pruning.last.per_layer[0].tolist()
    stages = samples[0].stages
    assert [layers[stage.layer] for stage in stages] == [int(stage.keep.sum()) for stage in stages]
    assert len(stages) > 1 and torch.equal(samples[0].last.keep, pruning.keep[0][: len(samples[0].image)])
    pruning, samples = shown_by("Llava", PruningPolicy(keep=0.5), choose=lambda visual: visual.cumsum(1) % 2 == 0)
    assert samples[0].last.keep.tolist() == [False, True] * 4 + [False]
    assert len(drawn(plots.kept_tokens(samples[0]).figure)) == 1
    with pytest.raises(PruningError, match=r"no scores.*Draw what is kept"):
        plots.score_map(samples[0])


def test_a_sample_without_an_image_is_refused_and_text_alone_shows_nothing() -> None:
    row = BY_NAME["Llava"]
    model = row.model(torch.float32)
    with prune(model, PruningPolicy("l2-norm", keep=0.5), show=True) as pruning:
        assert pruning.shown == ()
        model(**row.oracle.forward_inputs(row.inputs([0, 3], dtype=torch.float32)))
        first, second = pruning.shown
        model(**row.oracle.forward_inputs(row.inputs([3], dtype=torch.float32)))
        assert pruning.shown == ()
    plots.kept_tokens(first)
    for draw in (plots.kept_tokens, plots.score_map):
        with pytest.raises(PruningError, match="no image"):
            draw(second)


def test_a_picture_is_a_png_in_notebooks_and_in_a_file_that_is_whole(scenes: Scenes, tmp_path: Path) -> None:
    model, inputs, _ = scenes("digits_llava")
    with prune(model, PruningPolicy("l2-norm", keep=0.25), show=True) as pruning:
        model(**inputs)
    picture = plots.kept_tokens(pruning.shown[0])
    content = picture._repr_png_()
    assert content.startswith(b"\x89PNG\r\n")
    file = picture.save(tmp_path / "new" / "kept.png")
    assert file.read_bytes() == content and [path.name for path in file.parent.iterdir()] == ["kept.png"]
    with pytest.raises(ValueError, match=r"kept.jpg.*\.png.*savefig"):
        picture.save(tmp_path / "kept.jpg")
    with pytest.raises(IsADirectoryError):
        picture.save(_folder(tmp_path / "folder.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"new", "folder.png"}


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


STYLES = ({"savefig.transparent": True}, {"figure.facecolor": "none"}, "dark_background")
every_drawing = pytest.mark.parametrize(
    "draw", [plots.kept_tokens, plots.score_map, plots.by_layer], ids=lambda draw: draw.__name__
)


@every_drawing
@pytest.mark.parametrize("style", STYLES, ids=str)
def test_pictures_can_be_read_on_any_page_whatever_the_style(draw: Any, style: Any) -> None:
    """They are opaque, and their words have the contrast that WCAG asks of small text, 4.5:1."""
    _, (shown, *_) = shown_by("Llava", PruningPolicy("fastv", {"layer": 1}, keep=0.5))
    with matplotlib.style.context(style):
        picture = draw(shown)
        with Image.open(BytesIO(picture.png())) as image:
            pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    ground = to_hex(pixels[1, 1, :3] / 255)
    words = [text for text in picture.figure.findobj(Text) if text.get_text()]
    assert len(words) > 1 or draw is plots.kept_tokens
    assert min(contrast(text.get_color(), ground) for text in words) >= 4.5


@every_drawing
def test_nothing_that_is_drawn_is_cut_at_an_edge(draw: Any) -> None:
    model, inputs = BY_NAME["Llava"].model(torch.float32), BY_NAME["Llava"].inputs(dtype=torch.float32)
    with prune(model, PruningPolicy("fastervlm", keep=0.5), show=True) as pruning:
        model(**inputs)
    stage = pruning.shown[0].last
    shown = replace(pruning.shown[0], stages=(replace(stage, scores=stage.scores / 1000),))  # numbers of many digits
    figure = draw(shown).figure
    figure.draw_without_rendering()
    box, (wide, high) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0 and box.x1 <= wide and box.y1 <= high
