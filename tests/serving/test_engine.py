"""What vLLM can carry of a policy, and what its models would be given, tested without vLLM."""

import ast
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import catp_lightning.serving
from catp_lightning import PolicyError, PruningPolicy, prune
from catp_lightning.serving.engine import check_engine, kept_of_image, policy_of
from catp_lightning.serving.mrope import Span, placed, prompt_positions, read, written
from catp_lightning.serving.vllm_plugin import ARCHITECTURES, MODELS
from tests.support.families import BY_NAME
from tests.support.grid_models import grid
from tests.support.oracles import END, IMAGE, START
from tests.support.samples import prompts

CARRIED = ["divprune", "l2-norm", "position", "stride", "grid"]
QWENS = ["Qwen2.5-VL", "Qwen3-VL"]
ROOT = Path(__file__).parents[2]


def one_image(row: str, seed: int = 0) -> tuple[Any, dict[str, Any], tuple[int, int]]:
    """A model, a prompt with one image, and the image's rows and columns of tokens."""
    model, inputs = BY_NAME[row].model(), BY_NAME[row].inputs(rows=[seed])
    if "image_grid_thw" not in inputs:
        return model, inputs, (3, 3)
    _, height, width = inputs["image_grid_thw"][0].tolist()
    return model, inputs, (height // 2, width // 2)


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("row", ["Llava", *QWENS])
def test_the_engine_keeps_what_prune_keeps(row: str, name: str) -> None:
    model, inputs, (rows, columns) = one_image(row)
    positions: Any = "compact" if row == "Llava" else "original"
    policy = PruningPolicy(name, keep=0.34, positions=positions)
    check_engine(policy, model.config)
    grids = {key: inputs[key] for key in ("image_grid_thw",) if key in inputs}
    (features,) = model.get_image_features(pixel_values=inputs["pixel_values"], **grids).pooler_output
    places = kept_of_image(policy, features, rows, columns)
    with prune(model, policy) as pruning:
        model(**inputs)
    assert pruning.keep is not None
    assert (places[:, 0] * columns + places[:, 1]).tolist() == pruning.keep[0].nonzero()[:, 0].tolist()
    assert len(places) < rows * columns


@pytest.mark.parametrize(
    ("row", "policy", "why"),
    [
        ("Llava", PruningPolicy("divprune"), 'positions are "original", and vLLM gives'),
        ("Qwen2.5-VL", PruningPolicy("divprune", positions="compact"), 'positions are "compact", and vLLM gives'),
        ("Qwen2.5-VL", PruningPolicy("fastervlm"), "reads vision-attention, which vLLM's fused kernels"),
        ("Qwen3-VL", PruningPolicy("vispruner"), "reads vision-attention, which vLLM's fused kernels"),
        ("Qwen3-VL", PruningPolicy("random"), "'random' reads a checksum of pixels"),
        ("Qwen3-VL", PruningPolicy("cdpruner"), "image-embeds, text-embeds"),
        ("Qwen3-VL", PruningPolicy("divprune", model={"type": "llava"}), "was made for llava; this model is qwen3_vl"),
        ("LlavaNext", PruningPolicy("divprune", positions="compact"), "this model is llava_next"),
        ("Pixtral", PruningPolicy("divprune", positions="compact"), "here they are pixtral, 'full'"),
    ],
)
def test_what_vllm_cannot_carry_is_refused_with_the_reason(row: str, policy: PruningPolicy, why: str) -> None:
    with pytest.raises(PolicyError, match=why):
        check_engine(policy, BY_NAME[row].model().config)


def test_a_config_names_the_file_of_its_policy(tmp_path: Path) -> None:
    config = BY_NAME["Qwen3-VL"].make().config
    with pytest.raises(PolicyError, match=r"catp_policy=None; it is the path .* --hf-overrides"):
        policy_of(config)
    policy = PruningPolicy("divprune", keep=0.25, model={"type": "qwen3_vl"})
    policy.save(tmp_path / "policy.json")
    config.update({"catp_policy": str(tmp_path / "policy.json")})  # what --hf-overrides does
    assert policy_of(config) == policy
    replace(policy, scorer="fastv").save(tmp_path / "policy.json")
    with pytest.raises(PolicyError, match="inside the decoder"):
        policy_of(config)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("row", QWENS)
def test_positions_are_those_of_the_whole_prompt_however_it_is_cut(row: str, chunk: int) -> None:
    model = BY_NAME[row].model()
    images = [grid(1, 16, 4, 0), grid(1, 4, 8, 1)]  # the first is taller than it is wide
    (sample,) = prompts([images], before=(9, 0, 0, 0), wrap=(START, END))
    ids = torch.tensor(sample.ids)
    grids = torch.stack([image.tensors["image_grid_thw"] for image in images])
    whole, delta = model.model.get_rope_index(
        input_ids=ids[None], mm_token_type_ids=(ids == IMAGE).long()[None], image_grid_thw=grids
    )
    is_image = ids == IMAGE
    stay = ~is_image
    stay[is_image.nonzero()[::3, 0]] = True
    kept = ids[stay]
    first, spans = 0, []
    for _, height, width in grids.tolist():
        start = int((ids[first:] == START).nonzero()[0]) + first + 1
        own = stay[start : start + height * width // 4]
        spans.append(Span(int(stay[:start].sum()), int(own.sum()), height // 2, width // 2))
        first = start + len(own)
    positions, shift = prompt_positions(len(kept), spans)
    places = torch.cat([torch.cartesian_prod(torch.arange(s.rows), torch.arange(s.columns)) for s in spans])
    rows = written(places[stay[is_image]], torch.bfloat16)
    for start in range(0, len(kept), chunk):
        before, now = (int((kept[:at] == IMAGE).sum()) for at in (start, start + chunk))
        positions = placed(positions, kept == IMAGE, start, read(rows[before:now]))
        positions = placed(positions, kept == IMAGE, start, read(rows[before:now]))  # the same once more: no change
    assert positions.tolist() == whole[:, 0, stay].tolist()
    assert shift == int(delta) + len(ids) - len(kept)
    assert int(positions.max()) + 1 - len(kept) == shift


def test_a_prompt_without_images_is_numbered_one_by_one() -> None:
    positions, shift = prompt_positions(5, [])
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert shift == 0


def test_the_plug_in_is_an_entry_point_and_its_architectures_are_classes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {
        "catp_lightning": "catp_lightning.serving.vllm_plugin:register"
    }
    folder = Path(catp_lightning.serving.__file__).parent
    tree = ast.parse((folder / f"{MODELS.rpartition('.')[2]}.py").read_text())
    assert {node.name for node in tree.body if isinstance(node, ast.ClassDef)} >= set(ARCHITECTURES)
