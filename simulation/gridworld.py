"""A gridworld whose values are known exactly by dynamic programming, and what algorithms learn of them from a log.

Five by five cells. A move off the grid is not possible; one of ten moves slips to either side instead. The far corner
brings 1 and the pit in the middle -1, and both end the MDP.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import Shuffled
from components.training.store import build_store
from components.training.trainer import Trainer
from components.transitions import Lists, Transitions
from contracts.job import Algorithm, QLearning
from simulation.bandits import BY_CHANCE
from simulation.standardized import standardized

SIZE, SLIP, DISCOUNT = 5, 0.1, 0.9
CELLS = SIZE * SIZE
PRIZE, PIT = CELLS - 1, CELLS // 2
MOVES = np.array([[0, 1], [0, -1], [1, 0], [-1, 0]])
ROWS, LONGEST, STEPS, BATCH = 20_000, 50, 2_000, 256
LEFT = np.array([cell for cell in range(CELLS) if cell not in (PRIZE, PIT)])
"""Cells where there is something to decide."""

TRUTH, LOSS = "distance of values", "value lost"
QUICK: dict[str, Any] = {"hiddenLayers": [64], "learningRate": 0.002}
SLOW = QUICK | {"targetUpdateRate": 0.02, "dueling": False}
DESCRIBED = ", moves described"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "DQN": {"dqn": SLOW | {"double": False}},
    "double DQN": {"dqn": SLOW},
    "dueling double DQN": {"dqn": SLOW | {"dueling": True}},
    "2-step double DQN": {"dqn": SLOW | {"steps": 2}},
    "noisy double DQN": {"dqn": SLOW | {"noisy": True}},
    "SARSA": {"dqn": SLOW | {"nextAction": "logged"}},
    "C51": {"c51": SLOW | {"atoms": 41, "lowestReturn": -1.0, "highestReturn": 1.0}},
    "QR-DQN": {"qrDqn": SLOW | {"quantiles": 21}},
    "BCQ": {"bcq": SLOW},
    "CQL, alpha 0.01": {"cql": SLOW | {"alpha": 0.01}},
}
ALGORITHMS |= {name + DESCRIBED: made for name, made in ALGORITHMS.items()}


def arrivals() -> np.ndarray:
    """[CELLS, moves, CELLS]: how likely a move leads from one cell to another; one that slips off the grid stays."""
    found = np.zeros((CELLS, len(MOVES), CELLS))
    for cell in range(CELLS):
        for move, step in enumerate(MOVES):
            for direction, chance in ((step, 1 - SLIP), (step[::-1], SLIP / 2), (-step[::-1], SLIP / 2)):
                place = np.array(divmod(cell, SIZE)) + direction
                inside = ((place >= 0) & (place < SIZE)).all()
                found[cell, move, place @ [SIZE, 1] if inside else cell] += chance
    return found


ARRIVALS = arrivals()
_REACHED = np.stack([np.stack(np.divmod(np.arange(CELLS), SIZE), 1) + move for move in MOVES], 1)
POSSIBLE = np.all((_REACHED >= 0) & (_REACHED < SIZE), axis=2)
"""[CELLS, moves]: those that stay on the grid."""
BROUGHT = np.zeros(CELLS)
BROUGHT[[PRIZE, PIT]] = 1.0, -1.0


def values_of(policy: np.ndarray | None = None) -> np.ndarray:
    """Q [CELLS, moves] of a policy [CELLS, moves], or of the best, by iteration to a fixed point."""
    q = np.zeros((CELLS, len(MOVES)))
    for _ in range(500):
        value = (policy * q).sum(1) if policy is not None else np.where(POSSIBLE, q, -np.inf).max(1)
        value[[PRIZE, PIT]] = 0.0
        q = ARRIVALS @ (BROUGHT + DISCOUNT * value)
    return q


BY_RANDOM = POSSIBLE / POSSIBLE.sum(1, keepdims=True)


def logged(seed: int, described: bool = False) -> Transitions:
    """Decisions of a policy that takes any possible move, from any cell on, cut off after `LONGEST`."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, float, bool, bool, int, int]] = []
    mdp = 0
    while len(rows) < ROWS:
        cell = int(rng.choice(LEFT))
        for step in range(LONGEST):
            move = int(rng.choice(len(MOVES), p=BY_RANDOM[cell]))
            following = int(rng.choice(CELLS, p=ARRIVALS[cell, move]))
            ends = following in (PRIZE, PIT)
            rows.append((cell, move, BROUGHT[following], ends, step == LONGEST - 1 and not ends, step + 1, mdp))
            cell = following
            if ends:
                break
        mdp += 1
    cells, action, reward, terminal, truncated, ordinal, of = map(np.array, zip(*rows, strict=True))
    possible: Any = POSSIBLE[cells]
    if described:
        offsets = np.concatenate([[0], possible.sum(1).cumsum()])
        items = np.nonzero(possible)[1]
        action = (possible.cumsum(1) - 1)[np.arange(len(cells)), action]
        possible = Lists(["down", "right"], MOVES.astype(np.float32), offsets, items, np.ones(len(cells), bool))
    return Transitions(
        ["cell"], [] if described else ["right", "left", "down", "up"], ["reward"],
        state=cells.astype(np.float32)[:, None], action=action, propensity=BY_RANDOM[cells].max(1), possible=possible,
        metrics=reward.astype(np.float32)[:, None], time_diff=np.ones(len(cells)), terminal=terminal,
        truncated=truncated, ordinal=ordinal, mdp=of, mdp_ids=[str(i) for i in range(mdp)],
    )  # fmt: skip


def learned(algorithm: str, seed: int) -> np.ndarray:
    """Q [CELLS, moves] after `STEPS` steps on a log."""
    described = algorithm.endswith(DESCRIBED)
    data, made = logged(seed, described), Algorithm.model_validate(ALGORITHMS[algorithm])
    cell = FeatureNormalization(name="cell", type="enum", values=list(range(CELLS)), how="by hand", evidence={})
    step = standardized(["down", "right"], np.zeros(2), np.ones(2))
    actions = Actions([], described=step) if described else Actions(data.actions)
    torch.manual_seed(seed)
    network = build_network(made, NormalizationSpec(inputs=["cell"], features=[cell]), actions)
    learner = build_learner(made, network)
    trainer = Trainer(learner, made.learning_rate)
    assert isinstance(made.config, QLearning)
    discounts = np.full(len(data), DISCOUNT, np.float32)
    store = build_store(data, network, data.metrics[:, 0], discounts, made.config.steps)
    for batch in store.batches(Shuffled(store.usable, BATCH, seed), 0, STEPS):
        trainer.step(batch)
    # Of what is constrained, the values themselves are asked for.
    network.network = learner.valuing
    cells, moves = torch.arange(CELLS, dtype=torch.float32)[:, None], torch.from_numpy(MOVES).float()
    each = (cells.repeat_interleave(len(MOVES), 0), moves.repeat(CELLS, 1)) if described else (cells,)
    with torch.no_grad():
        return network.eval()(*each).view(CELLS, -1).double().numpy()


def gridworld(column: str, algorithm: str, seed: int) -> float:
    """In hundredths of the prize: how far values are from the true ones on average, or what acting on them loses.

    SARSA's are held against those of the logged policy; all others' against the best.
    """
    torch.set_num_threads(1)
    best, by_random = values_of(), values_of(BY_RANDOM)
    found = by_random if algorithm == BY_CHANCE else learned(algorithm, seed)
    if column == TRUTH:
        wanted = by_random if algorithm.startswith("SARSA") else best
        return float(100 * np.abs(found - wanted)[LEFT][POSSIBLE[LEFT]].mean())
    greedy = np.eye(len(MOVES))[np.where(POSSIBLE, found, -np.inf).argmax(1)]
    policy = BY_RANDOM if algorithm == BY_CHANCE else greedy
    lost = np.where(POSSIBLE, best, -np.inf).max(1) - (policy * values_of(policy)).sum(1)
    return float(100 * lost[LEFT].mean())
