"""Networks that learn what tokens are worth: what they find in planted probes, and which samples they learn from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from catp_lightning.calibration.fit import records
from catp_lightning.calibration.fit.learning import learn
from catp_lightning.calibration.fit.probes import random_subset
from catp_lightning.calibration.fit.records import ProbeRecords, Recorded
from catp_lightning.calibration.settings import DEFAULTS
from catp_lightning.methods.components import Features
from catp_lightning.methods.network import worth
from tests.support.questions import components

FOLDS, SLOTS, PROBES = DEFAULTS.folds, 8, 8
COMPONENTS = components(2), Features(components(3).basis, components(3).offset)
Worth = Callable[[Tensor, Tensor], Tensor]


def recorded(worth_of: Worth, samples: int = 80, noise: float = 0.3, seed: int = 0, images: int = 1) -> Recorded:
    """Probes of samples whose tokens are worth what `worth_of` gives for their features and their question."""
    draw = torch.Generator().manual_seed(seed)
    tokens = SLOTS * images
    features, question = torch.randn(samples, tokens, 3, generator=draw), torch.randn(samples, 2, generator=draw)
    visual, seeds = torch.ones(samples, tokens, dtype=torch.bool), torch.randint(2**40, (samples,), generator=draw)
    counts = [torch.full((samples,), images * size) for size in (4, 2)]
    kept = torch.stack(
        [torch.stack([random_subset(seeds, visual, count, n) for n in range(PROBES)], 2) for count in counts], 2
    )
    gain = torch.einsum("btsp,bt->bsp", kept.float(), worth_of(features, question))
    gain = gain + noise * torch.randn(gain.shape, generator=draw)
    return Recorded(
        keys=seeds,
        folds=torch.randint(FOLDS, (samples,), generator=draw),
        counts=torch.full((samples,), tokens),
        question=question,
        features=features.flatten(0, 1),
        kept=kept.flatten(0, 1),
        gain=gain,
    )


def asked_for(features: Tensor, question: Tensor) -> Tensor:
    """The first feature counts, its sign as the question says; slot 3 is worth something to each."""
    return 1.5 * features[..., 0] * question[:, :1].sign() + (torch.arange(features.shape[1]) % SLOTS == 3)


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 2])
def test_a_worth_that_depends_on_the_question_is_learned(images: int) -> None:
    networks = learn(recorded(asked_for, samples=160, images=images), COMPONENTS, FOLDS, SLOTS)
    assert networks is not None and networks.explained > 0.5 > 5 * networks.explained_error
    fresh = recorded(asked_for, seed=1)
    features, question = fresh.features.view(-1, SLOTS, 3), fresh.question
    for network in (networks.whole, *networks.by_fold):
        found = worth(network._decoded, features, question)
        together = torch.stack([found.flatten(), asked_for(features, question).flatten()])
        assert torch.corrcoef(together)[0, 1] > 0.6
        assert found.mean(0).argmax() == 3
    assert len({network.weights for network in networks.by_fold}) == FOLDS, "each has seen other samples"
    plain = learn(recorded(asked_for, samples=160, images=images), COMPONENTS, FOLDS, 0)
    assert plain is not None and len(plain.whole._decoded["slots"]) == 1, "places that mean nothing are not learned"


@pytest.mark.slow
def test_a_network_does_not_know_the_fold_that_it_is_measured_on() -> None:
    samples = recorded(asked_for)
    first = learn(samples, COMPONENTS, FOLDS, SLOTS)
    samples.gain[samples.folds == 2] *= 1.1
    other = learn(samples, COMPONENTS, FOLDS, SLOTS)
    assert first is not None and other is not None
    same = [one == two for one, two in zip(first.by_fold, other.by_fold, strict=True)]
    assert same == [fold == 2 for fold in range(FOLDS)] and first.whole != other.whole


@pytest.mark.slow
def test_noise_teaches_nothing_nor_does_a_single_fold() -> None:
    nothing = [
        learn(recorded(lambda x, q: 0 * x[..., 0], 40, seed=seed), COMPONENTS, FOLDS, SLOTS) for seed in range(8)
    ]
    assert sum(networks is not None for networks in nothing) <= 1
    samples = recorded(asked_for)
    samples.folds[:] = 1
    assert learn(samples, COMPONENTS, FOLDS, SLOTS) is None
    assert learn(samples.at(torch.arange(0)), COMPONENTS, FOLDS, SLOTS) is None


@pytest.mark.slow
def test_learning_ignores_global_settings_and_leaves_them_alone() -> None:
    samples = recorded(asked_for)
    state = torch.get_rng_state()
    expected = learn(samples, COMPONENTS, FOLDS, SLOTS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            inside = learn(
                Recorded(**{name: value.clone() for name, value in vars(samples).items()}), COMPONENTS, FOLDS, SLOTS
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected is not None and inside == expected


def same(one: Recorded, other: Recorded) -> bool:
    return all(torch.equal(value, vars(other)[name]) for name, value in vars(one).items())


def added(*parts: Recorded) -> ProbeRecords:
    metric = ProbeRecords(3, 2, 2, PROBES)
    for part in parts:
        metric.update(part)
    return metric


def test_records_do_not_depend_on_batches_and_keep_tokens_with_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = recorded(asked_for, 30)
    uneven = samples.at(torch.tensor([4, 1])).joined(recorded(asked_for, 1, images=2)).joined(samples)
    for limit in (100, 9):
        monkeypatch.setattr(records, "MOST", limit)
        whole = added(uneven).compute()
        split = added(*(uneven.at(part) for part in torch.arange(33).flip(0).split(7))).compute()
        assert same(whole, split) and len(whole.keys) == min(limit, 33)
        assert torch.equal(whole.keys, uneven.keys.sort().values[:limit])
    starts = whole.counts.cumsum(0) - whole.counts
    for number, key in enumerate(whole.keys.tolist()):
        place = uneven.keys.tolist().index(key)
        before = int(uneven.counts[:place].sum())
        count = int(whole.counts[number])
        own = whole.features[int(starts[number]) :][:count]
        assert torch.equal(own, uneven.features[before : before + count])
    assert len(ProbeRecords(3, 2, 2, PROBES).compute().keys) == 0
