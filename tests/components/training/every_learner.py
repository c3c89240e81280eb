"""Every learner, and transitions for it."""

from typing import Any

import numpy as np
import torch

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.store import Offers, Store
from components.training.trainer import Trainer
from contracts.job import Algorithm

N, BATCH = 200, 15
"""A batch that two workers have unequal shares of."""
DESCRIBED = NormalizationSpec(
    inputs=["x", "y"],
    features=[FeatureNormalization(name=n, type="continuous", how="by hand", evidence={}) for n in "xy"],
)
LEARNERS: list[tuple[str, dict[str, dict[str, Any]]]] = [
    ("discrete", {"dqn": {"dueling": True, "noisy": True}}),
    ("discrete", {"c51": {"lowestReturn": -5.0, "highestReturn": 5.0}}),
    ("discrete", {"qrDqn": {}}),
    ("discrete", {"cql": {}}),
    ("discrete", {"bcq": {}}),
    ("discrete", {"behaviourCloning": {}}),
    ("discrete", {"logisticBandit": {}}),
    ("discrete", {"linUcb": {}}),
    ("discrete", {"linearThompson": {}}),
    ("parametric", {"dqn": {}}),
    ("parametric", {"c51": {"lowestReturn": -5.0, "highestReturn": 5.0}}),
    ("parametric", {"qrDqn": {}}),
    ("parametric", {"cql": {}}),
    ("parametric", {"bcq": {}}),
    ("parametric", {"bcq": {"nextAction": "logged"}}),
    ("parametric", {"dqn": {"nextAction": "logged"}}),
    ("parametric", {"behaviourCloning": {}}),
    ("slate", {"slateQ": {}}),
    ("slate", {"slateQ": {"nextSlate": "logged"}}),
    ("continuous", {"ddpg": {}}),
    ("continuous", {"td3": {}}),
    ("continuous", {"td3Bc": {}}),
    ("continuous", {"sac": {}}),
    ("continuous", {"iql": {}}),
]


def store(kind: str) -> tuple[Store, Actions]:
    """Random transitions, each followed by the next row."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    state, reward, discount = torch.randn(N, 2), torch.randn(N), torch.full((N,), 0.9)
    following, usable = torch.arange(1, N + 1).clamp(max=N - 1), np.arange(N - 1)
    if kind == "continuous":
        action = torch.rand(N, 1) * 2 - 1
        return Store(state, action, None, reward, following, discount, usable), Actions(["a"], [(0.0, 1.0)])
    if kind == "discrete":
        possible = torch.rand(N, 3) < 0.7
        possible[:, 0] = True
        action = torch.zeros(N, dtype=torch.int64)
        return Store(state, action, possible, reward, following, discount, usable), Actions(["a", "b", "c"])
    lengths = rng.integers(2, 9, N)
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    offers = Offers(torch.randn(30, 2), torch.from_numpy(rng.integers(30, size=lengths.sum())), offsets)
    if kind == "parametric":
        action = torch.ones(N, dtype=torch.int64)
        return Store(state, action, offers, reward, following, discount, usable), Actions([], described=DESCRIBED)
    slates, chosen = torch.tensor([[1, 0]]).expand(N, 2), torch.from_numpy(rng.integers(3, size=N))
    filled = Store(state, slates, offers, reward, following, discount, usable, chosen=chosen)
    return filled, Actions([], described=DESCRIBED, slate=2)


def trainer(actions: Actions, algorithm: dict[str, dict[str, Any]], seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    made = Algorithm.model_validate(algorithm)
    learner = build_learner(made, build_network(made, DESCRIBED, actions))
    learner.expect(N)
    trainer = Trainer(learner, 1e-3)
    for group in trainer.optimizer.param_groups if trainer.optimizer else []:
        # By default Adam takes full steps by gradients that are nothing but rounding, as those of a softmax's bias are.
        group["eps"] = 1e-5
    return trainer


def shuffled(data: Store, rank: int = 0, workers: int = 1) -> Shuffled:
    return Shuffled(data.usable, BATCH, 0, rank, workers)


def take_steps(made: Trainer, data: Store, share: Shuffled, start: int, stop: int) -> None:
    """With the batches from start to stop, as a worker does."""
    for batch in data.batches(share, start, stop):
        made.step(batch)
    made.learner.settle()
