"""Nothing of a context goes along into copies: of a whole model, of any part of it, or into a worker's process."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info

from catp_lightning import CrossAttentionCalibration, PruningError, PruningPolicy, TokenPruning, prune
from catp_lightning.utils.hooks import OURS, Seen
from tests.support.families import BY_NAME
from tests.support.matrix import EVERYTHING, uneven
from tests.support.models import GREEDY, random_blip2, random_inputs
from tests.support.trainers import trainer

PLACES = [
    ("Llava", PruningPolicy("fastervlm", keep=3)),
    ("Llava", PruningPolicy("fastv", {"layer": 1}, keep=3)),
    ("Llava", PruningPolicy("stride", keep=3)),
    ("Blip2-OPT", PruningPolicy("catp", keep=3)),
    ("Blip2-T5", PruningPolicy("catp", keep=3)),
    ("Mllama", PruningPolicy("trimmed-llama", keep=3)),
]


def of_ours(part: nn.Module) -> list[str]:
    """What of a context is in a module or its parts: hooks, attributes, names of attention."""
    found = []
    for path, module in part.named_modules():
        state = vars(module)
        hooks = [*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()]
        found += [f"{path} hook" for hook in hooks if hasattr(hook, OURS)]
        found += [f"{path} {name}" for name, value in state.items() if name.startswith("_catp") or is_ours(value)]
        if str(getattr(getattr(module, "config", None), "_attn_implementation", "")).startswith("catp_"):
            found.append(f"{path} config")
    return found


def is_ours(value: Any) -> bool:
    return isinstance(value, Seen) or hasattr(value, OURS) or isinstance(value, partial)


def dump(part: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(part))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "copied"),
    [*((*place, copy.deepcopy) for place in PLACES), *((*place, dump) for place in PLACES[:2])],
    ids=["deepcopy"] * len(PLACES) + ["pickle"] * 2,
)
def test_a_copy_of_a_part_is_refused_or_has_nothing_of_the_context(
    name: str, policy: PruningPolicy, copied: Any
) -> None:
    row = BY_NAME[name]
    model = row.make().eval()
    refused = copies = 0
    with prune(model, policy):
        for path, part in model.named_modules():
            dirty = bool(of_ours(part))
            try:
                found = copied(part)
            except PruningError as error:
                assert "cannot be copied or pickled" in str(error)  # noqa: PT017
                assert dirty, f"{path} has nothing of ours"
                refused += 1
            else:
                assert not dirty and not of_ours(found), path
                copies += 1
    assert refused and copies
    assert not of_ours(copied(model))


def test_a_state_dict_is_taken_inside_and_parts_are_copied_again_afterwards() -> None:
    row = BY_NAME["Llava"]
    model, inputs = row.make().eval().double(), row.inputs()
    with prune(model, EVERYTHING, choose=uneven()):
        weights = copy.deepcopy(model.state_dict())
    stack = copy.deepcopy(model.model.language_model)
    with torch.no_grad(), prune(model, EVERYTHING, choose=uneven()) as pruning:
        expected = model(**inputs).logits
    model.load_state_dict(weights)
    model.model.language_model = stack
    with torch.no_grad(), prune(model, EVERYTHING, choose=uneven()):
        assert torch.equal(model(**inputs).logits, expected) and pruning.keep is not None


class Collating(L.LightningModule):
    """Its batches are made by a method of its own, in processes that are started while it is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.net, _ = random_blip2()
        self.samples = random_inputs(8, 24, True, torch.float32)

    def collate(self, numbers: list[int]) -> dict[str, Tensor]:
        if get_worker_info() is not None:
            of_hooks = [name for name in of_ours(self) if not name.endswith(" config")]  # shared by many modules
            assert not of_hooks, "a worker gets the model without any hook or attribute of the context"
        return {name: value[numbers] for name, value in self.samples.items()}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.net.generate(**batch, **GREEDY)

    def loader(self, count: int, workers: int = 1) -> DataLoader[Any]:
        context = "spawn" if workers else None
        numbers: Any = range(count)
        return DataLoader(numbers, 8, num_workers=workers, multiprocessing_context=context, collate_fn=self.collate)


@pytest.mark.slow
def test_workers_spawned_while_a_model_is_pruned_or_calibrated_make_batches_by_its_method(tmp_path: Path) -> None:
    module, policy = Collating(), PruningPolicy("catp", keep=4)
    plain = trainer(TokenPruning(policy)).predict(module, [module.loader(8, 0), module.loader(16, 0)])
    found = trainer(TokenPruning(policy)).predict(module, [module.loader(8), module.loader(16)])
    assert plain is not None and found is not None
    for one, other in zip([*plain[0], *plain[1]], [*found[0], *found[1]], strict=True):
        assert torch.equal(one, other)
    trainer(CrossAttentionCalibration(tmp_path / "p.json", keep=0.5)).predict(module, module.loader(24))
    assert PruningPolicy.load(tmp_path / "p.json").evidence["samples"]


def test_a_worker_that_cannot_be_sent_the_model_says_what_to_do() -> None:
    """transformers' own hooks are local functions, from the first call that needs them on."""
    module = Collating()

    def local(*args: object) -> None:
        pass

    module.net.qformer.register_forward_hook(local)
    with (
        prune(module, PruningPolicy("catp", keep=4)),
        pytest.raises(PruningError, match=r"cannot be sent.*local.*Make collate_fn a function"),
    ):
        next(iter(module.loader(8)))
