"""Pictures of what each method keeps of one scene, by the models that come with the package."""

import tempfile
import warnings
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from catp_lightning import PolicyError, PruningError, PruningPolicy, VQAModule, plots, prune
from catp_lightning.data import GRIDS, PROMPTS, shipped
from catp_lightning.data.scenes import write_scenes
from catp_lightning.data.vqa import VQADataModule, VQASplit
from catp_lightning.methods import SCORERS, SELECTORS, Signal
from catp_lightning.models import find_family
from catp_lightning.policy import SCHEDULES
from catp_lightning.pruning.shown import Shown

MODELS = ("digits_llava", "digits_blip2", "digits_mllama")
"""Shipped models; a method is drawn on the first that it runs on."""
FAMILIES = {"Llava": "digits_llava", "Blip2": "digits_blip2", "Mllama": "digits_mllama", "QwenVL": "digits_qwen2_5_vl"}
"""Families with a shipped model."""
KEEP = 0.25


def draw(folder: Path) -> set[str]:
    """Draw what each method that runs without training keeps of a scene, a quarter of its visual tokens.

    Args:
        folder: gets `<scorer>.png`, `selector-<selector>.png`, `schedule-<schedule>.png` and `<family>.png`.

    Returns:
        The names of the pictures, without their ending.
    """
    own = {cls.selector: name for name, cls in reversed(list(SCORERS.items()))}
    cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {name: ({"scorer": name}, MODELS) for name in SCORERS}
    for name in SELECTORS:
        cases[f"selector-{name}"] = {"scorer": own.get(name, "fastervlm"), "selector": name}, MODELS
    for family, model in FAMILIES.items():
        cases[family] = {"scorer": "divprune"}, (model,)
    drawn = set()
    for name, (rule, models) in cases.items():
        for model in models:
            try:
                picture = plots.kept_tokens(_shown(model, PruningPolicy(**rule, keep=KEEP)))
            except (PolicyError, PruningError):  # it needs other signals, or weights of a training
                continue
            picture.save(folder / f"{name}.png")
            drawn.add(name)
            break
    for name in SCHEDULES:
        depth = find_family(_scene(MODELS[0])[0]).depth
        picture = plots.by_layer(_shown(MODELS[0], PruningPolicy.schedule(name, KEEP, depth)))
        picture.save(folder / f"schedule-{name}.png")
        drawn.add(f"schedule-{name}")
    return drawn


def _shown(name: str, policy: PruningPolicy) -> Shown:
    """Return what a shipped model keeps of a scene under a policy."""
    module, batch = _scene(name)
    guide = deepcopy(module.model) if Signal.GUIDE_ATTENTION in SCORERS[policy.scorer]().needs else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with prune(module.model, policy, show=True, guide=guide) as pruning:
            module.model.generate(**batch["inputs"], max_new_tokens=1, do_sample=False)
    return pruning.shown[0]


@cache
def _scene(name: str) -> tuple[VQAModule, dict[str, Any]]:
    """Return a shipped model in a module, and a batch of one question about a scene of digits."""
    model = str(shipped(name))
    with tempfile.TemporaryDirectory() as folder:
        split = VQASplit.of_scenes(write_scenes(folder, "test", 1, grids=GRIDS[name][-1:]))
        data = VQADataModule(model, test=split, prompt=PROMPTS[name], batch_size=1)
        data.setup("test")
        batch = next(iter(data.test_dataloader()))
    return VQAModule(model), batch
