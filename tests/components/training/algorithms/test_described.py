"""Algorithms for described actions: values over lists of any length, learned to those of dynamic programming."""

from typing import Any

import numpy as np
import pytest
import torch

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch, Listed, score
from components.training.network import NEVER
from components.training.trainer import Trainer
from contracts.job import Algorithm

PLACES, DISCOUNT = 5, 0.9
MOVES = np.array([-1, 0, 1, 2])
"""Steps along a corridor; each is described by its length, and costs little. At the end waits a prize."""


def step(place: np.ndarray, move: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    following = np.clip(place + move, 0, PLACES - 1)
    ends = place + move >= PLACES
    return following, np.where(ends, 1.0, -0.02 * np.abs(move)), ends


def possible(place: np.ndarray) -> np.ndarray:
    """bool [..., moves]: two steps at once are possible at even places alone, and none back at the first."""
    return ((MOVES != 2) | (place[..., None] % 2 == 0)) & ((MOVES != -1) | (place[..., None] > 0))


def exact(moves: int = len(MOVES)) -> np.ndarray:
    """[places, moves], of those that take one of the first so many; those not possible -inf."""
    place, move = np.repeat(np.arange(PLACES), len(MOVES)), np.tile(MOVES, PLACES)
    following, reward, ends = step(place, move)
    q = np.zeros((PLACES, len(MOVES)))
    for _ in range(300):
        best = np.where(possible(np.arange(PLACES)), q, -np.inf)[:, :moves].max(1)
        q = (reward + DISCOUNT * np.where(ends, 0, best[following])).reshape(PLACES, len(MOVES))
    return np.where(possible(np.arange(PLACES)), q, -np.inf)


def lists(place: np.ndarray) -> tuple[Listed, np.ndarray]:
    """What is possible, and of each move the place among all that is listed."""
    there = possible(place)
    row, move = there.nonzero()
    features = NormalizationGraph(ACTION)(torch.from_numpy(MOVES[move]).float()[:, None])
    return Listed(features, torch.from_numpy(row), len(place), len(MOVES)), there.ravel().cumsum().reshape(
        there.shape
    ) - 1


def feature(name: str, type_: str, **more: Any) -> FeatureNormalization:
    return FeatureNormalization.model_validate({"name": name, "type": type_, "how": "by hand", "evidence": {}, **more})


STATE = NormalizationSpec(inputs=["place"], features=[feature("place", "enum", values=list(range(PLACES)))])
ACTION = NormalizationSpec(inputs=["move"], features=[feature("move", "enum", values=MOVES.tolist())])


def learned(algorithm: dict[str, Any], likely: tuple[float, ...] = (1, 1, 1, 1)) -> np.ndarray:
    """Scores of each move at each place, those not possible -inf; the log takes each as `likely` as this to others."""
    torch.manual_seed(0)
    name, settings = next(iter(algorithm.items()))
    slowly = {} if name == "behaviourCloning" else {"targetUpdateRate": 0.05}
    made = Algorithm.model_validate({name: {"hiddenLayers": [64], "learningRate": 0.003} | slowly | settings})
    policy = build_network(made, STATE, Actions([], described=ACTION))
    learner, rng = build_learner(made, policy), np.random.default_rng(0)
    trainer = Trainer(learner, made.learning_rate)

    def normalized(place: np.ndarray) -> torch.Tensor:
        return policy.normalization(torch.from_numpy(place).float()[:, None])

    for _ in range(1500):
        place = rng.integers(PLACES, size=64)
        # Drawn by Gumbel's trick.
        choice = np.where(possible(place), np.log(likely) + rng.gumbel(size=(64, len(MOVES))), -np.inf).argmax(1)
        following, reward, ends = step(place, MOVES[choice])
        (now, at), (later, _) = lists(place), lists(following)
        trainer.step(
            Batch(
                state=normalized(place),
                action=torch.from_numpy(at[np.arange(64), choice]),
                possible=now,
                reward=torch.from_numpy(reward).float(),
                next_state=normalized(following),
                next_action=torch.zeros(64, dtype=torch.int64),
                next_possible=later,
                discount=torch.from_numpy(np.where(ends, 0, DISCOUNT)).float(),
            )
        )
    every = np.arange(PLACES)
    found = np.full((PLACES, len(MOVES)), -np.inf)
    with torch.no_grad():
        found[possible(every)] = score(policy.eval().network, normalized(every), lists(every)[0]).numpy()
    return found


@pytest.mark.parametrize(
    "algorithm",
    [
        {"dqn": {}},
        {"dqn": {"double": False, "dueling": False}},
        {"c51": {"atoms": 21, "lowestReturn": -1.0, "highestReturn": 1.0}},
        {"qrDqn": {"quantiles": 11, "dueling": False}},
        {"cql": {"alpha": 0.0}},
        {"bcq": {"threshold": 0.1}},
        {"bcq": {"threshold": 0.1, "double": False, "dueling": False}},
    ],
    ids=str,
)
def test_values_over_lists_are_learned(algorithm: dict[str, Any]) -> None:
    np.testing.assert_allclose(learned(algorithm), exact(), atol=0.06)


def test_cql_over_lists_keeps_to_what_the_log_does() -> None:
    # The log takes any possible move alike: none is held down more than another.
    found, wanted = learned({"cql": {"alpha": 0.5}}), exact()
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.8


@pytest.mark.parametrize("double", [True, False])
def test_bcq_over_lists_never_takes_what_the_log_does_not(double: bool) -> None:
    # Two steps at once would be the best; where they are possible, the log takes them once in a hundred times.
    found = learned({"bcq": {"threshold": 0.3, "double": double}}, likely=(1, 1, 1, 0.03))
    two = possible(np.arange(PLACES))[:, 3]
    assert two.any()
    assert (found[two, 3] == np.float32(NEVER)).all()
    np.testing.assert_allclose(found[:, :3], exact(moves=3)[:, :3], atol=0.06)
    there = possible(np.arange(PLACES))[:, :3]
    assert np.abs(exact()[:, :3][there] - exact(moves=3)[:, :3][there]).max() > 0.06


def test_cloning_over_lists_learns_the_logged_probabilities() -> None:
    scores = learned({"behaviourCloning": {}})
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    even = possible(np.arange(PLACES)) / possible(np.arange(PLACES)).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, even, atol=0.06)
