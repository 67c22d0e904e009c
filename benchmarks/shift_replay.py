"""Answers of many policies to one test set, replayed: vision runs once a batch, and equal choices are answered once."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from catp_lightning import PruningPolicy, VQAModule
from catp_lightning.calibration.plan import Plan
from catp_lightning.calibration.replay.base import Variants
from catp_lightning.calibration.replay.recorder import Recorder
from catp_lightning.calibration.search.candidates import default_candidates
from catp_lightning.calibration.search.ranks import limits, token_ranks
from catp_lightning.evaluation.comparison import Comparison, Result
from catp_lightning.evaluation.sweep.methods import CALIBRATED, RANDOM_SEEDS, fixed_methods
from catp_lightning.methods.observation import join
from catp_lightning.methods.schedule import places
from catp_lightning.methods.selection import protected_tokens
from catp_lightning.models import find_family
from catp_lightning.pricing import tokens_read
from catp_lightning.pruning.pruner import Pruner

INSIDE = ("fastv", "pyramiddrop")
FEW = 20  # right answers, below which no share of them is shown
RANDOM = f"random ({len(RANDOM_SEEDS)} seeds)"
PROMISED = "promised"
"""Name of a policy whose budget a promise chose, beside `CALIBRATED`, whose budgets were given."""

Job = tuple[str, PruningPolicy]


@dataclass(frozen=True)
class Replayed:
    """Agreement of J policies on N questions.

    Attributes:
        names, keeps: name and budget of each policy; policies of one name and budget are draws of one method.
        same: bool [J, N], True where a policy's answer is the unpruned one.
        tokens: mean number of visual tokens that each policy keeps.
        images: [N], the image that each question is about.
        kinds: [N], the kind of each question.
        answers: [N], the unpruned answers.
        right: bool [N], True where that is the right one.
        read: mean number of visual tokens that a layer of the decoder reads, of each policy.
    """

    names: Sequence[str]
    keeps: Sequence[int | float]
    same: np.ndarray
    tokens: Sequence[float]
    images: Sequence[int]
    kinds: Sequence[str]
    answers: Sequence[str]
    right: np.ndarray
    read: Sequence[float]

    @cached_property
    def rows(self) -> dict[tuple[str, int | float], dict[str, Any]]:
        """A row of `Comparison.rows` for each method and budget."""
        jobs = zip(self.names, self.keeps, self.same.astype(float), self.tokens, self.read, strict=True)
        results = [Result(name, keep, None, same, tokens, read) for name, keep, same, tokens, read in jobs]
        return {(row["method"], row["keep"]): row for row in Comparison(self.images, CALIBRATED, results).rows()}

    @cached_property
    def dearer(self) -> list[str]:
        """Rules under which a layer of the decoder reads more tokens than under the calibrated policy of a budget."""
        others = [key for key in self.rows if key[0] not in (CALIBRATED, PROMISED)]
        more = [(name, keep) for name, keep in others if self._read(name, keep) > 1.02 * self._read(CALIBRATED, keep)]
        return list(dict.fromkeys(name for name, _ in more))

    @cached_property
    def rivals(self) -> list[str]:
        """Rules that cost what the calibrated policy does, at every budget."""
        own = {CALIBRATED, PROMISED, *self.dearer}
        return [name for name in dict.fromkeys(self.names) if name not in own]

    def _read(self, name: str, keep: int | float) -> float:
        return float(self.rows[name, keep]["tokens_per_layer"])

    @cached_property
    def by_kind(self) -> dict[str, dict[int | float, float]]:
        """Agreement of the calibrated policies on each kind of question at each budget, mean of draws."""
        ours, kinds = [key for key in self.rows if key[0] == CALIBRATED], np.array(self.kinds)
        return {kind: {key[1]: self._of(key, kinds == kind) for key in ours} for kind in dict.fromkeys(self.kinds)}

    def where_right(self, name: str, keep: int | float) -> float | None:
        """Agreement where the unpruned answer is right; None: it is right on fewer than `FEW` questions."""
        return self._of((name, keep), self.right) if self.right.sum() >= FEW else None

    def _of(self, key: tuple[str, int | float], some: np.ndarray) -> float:
        """Agreement of a method on some questions, mean of draws."""
        own = [own == key for own in zip(self.names, self.keeps, strict=True)]
        return float(self.same[own][:, some].mean())

    @property
    def accuracy(self) -> float:
        """Accuracy of the unpruned model."""
        return float(self.right.mean())

    @cached_property
    def blind(self) -> float:
        """Agreement of an answer that sees nothing: for each kind of question the most frequent unpruned answer."""
        said = Counter(zip(self.kinds, self.answers, strict=True))
        most = {kind: max(n for (of, _), n in said.items() if of == kind) for kind in set(self.kinds)}
        return sum(most.values()) / len(self.kinds)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows.values()),
            "calibrated by kind": self.by_kind,
            "where the unpruned answer is right": [[*key, self.where_right(*key)] for key in self.rows],
            "unpruned accuracy": self.accuracy,
            "blind": self.blind,
        }


def rules(module: VQAModule) -> Iterator[Job]:
    """Yield every rule without a chosen setting that drops tokens before the decoder; random, once for each seed."""
    family = find_family(module)
    for seed in RANDOM_SEEDS:
        yield RANDOM, PruningPolicy("random", {"seed": seed})
    for rule in default_candidates(Plan.of(family)):
        if rule.fitted == 0 and rule.name != "random":
            yield rule.name, rule.policy(0.5)
    for job in fixed_methods(["trimmed-llama"], family, layers=False)[0]:  # the union of what its heads choose
        yield job.name, job.policy


def rules_inside(module: VQAModule) -> Iterator[Job]:
    """Yield rules that drop inside the decoder, whose first layers read all tokens; FastV also at a late layer."""
    family = find_family(module)
    late = {"layer": -(-3 * family.depth // 4)}
    for job in fixed_methods(INSIDE, family, layers=False)[0]:
        yield job.name, job.policy
        if job.name == "fastv":
            yield f"fastv at layer {late['layer']}", PruningPolicy("fastv", late)


@torch.inference_mode()
def replayed(module: VQAModule, batches: Iterable[Any], jobs: Sequence[Job]) -> Replayed:
    """Replay the answers of every policy; vision runs once a batch, and rules that policies share rank tokens once."""
    family, policies = find_family(module), [policy for _, policy in jobs]
    inside = {n: Pruner(family, policy) for n, policy in enumerate(policies) if _inside(policy, family.depth)}
    methods = {n: policy.method() for n, policy in enumerate(policies) if n not in inside}
    ranked = list(dict.fromkeys(method for method in methods.values() if method.nested))
    budgets = list(dict.fromkeys(policy.keep for policy in policies))
    recorder = Recorder(Plan.of(family), join(method.needs for method in methods.values()))
    answers, right, images, kinds, agreed, kept = [], [], [], [], [], []
    with recorder.recording():
        for batch in batches:
            answers += module.answer(batch)
            right += [own[0] for own in batch["answers"]]  # ten equal ones
            images += batch["image_ids"].tolist()
            kinds += batch["question_types"]
            with recorder.recorded() as pairs:
                ((replay, seen, *_),) = pairs
                visual = replay.tokens
                allowed = {keep: limits(keep, seen, visual) for keep in budgets}
                ranks = token_ranks(ranked, seen, visual, max(int(limit.max()) for limit in allowed.values()))
                stay, ways, order = protected_tokens(seen, visual), [], []
                for keep, limit in allowed.items():
                    own = [n for n, policy in enumerate(policies) if policy.keep == keep]
                    nested = [n for n in own if n in methods and methods[n].nested]
                    others = [n for n in own if n in methods and n not in nested]
                    tokens = (ranks[[ranked.index(methods[n]) for n in nested]] < limit) | stay
                    chosen = [methods[n].select(seen, keep, visual) for n in others]
                    late = [n for n in own if n in inside]
                    ways.append(Variants(tokens, chosen, [(inside[n], None) for n in late]))
                    order.append((nested + others, late))
                same = torch.empty(len(jobs), len(visual), dtype=torch.bool, device="cpu")
                count = torch.empty(len(jobs), len(visual), 2, dtype=torch.float64, device="cpu")
                for (before, late), way, (_, found) in zip(order, ways, replay.compare_each(ways), strict=True):
                    same[before + late] = found.cpu()
                    stays = torch.cat([way.keep, *(selection.keep[None] for selection in way.selections)])
                    count[before] = stays.sum(-1).cpu().double()[..., None].expand(-1, -1, 2)
                    for n in late:
                        layers = tokens_read(policies[n].steps(), visual.sum(1).cpu(), family.depth).double()
                        count[n] = torch.stack([layers[:, -1], layers.mean(1)], 1)
                agreed.append(same)
                kept.append(count)
    mean = torch.cat(kept, 1).mean(1)
    names, keeps = [name for name, _ in jobs], [policy.keep for policy in policies]
    truth = np.equal(answers, right)
    same_of_all = torch.cat(agreed, 1).numpy()
    return Replayed(names, keeps, same_of_all, mean[:, 0].tolist(), images, kinds, answers, truth, mean[:, 1].tolist())


def _inside(policy: PruningPolicy, depth: int) -> bool:
    """True if tokens leave inside the decoder."""
    return any(place.layer for place in places(policy.steps(), depth))
