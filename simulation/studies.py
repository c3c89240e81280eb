"""What each algorithm learns from logs whose truth is known, over many seeds: the results table."""

from __future__ import annotations

import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from components.training.actions import Actions
from components.training.algorithms.build import build_learner, build_network
from components.training.batches import permuted_batches
from components.training.network import Normalized
from components.training.store import Store, over_steps
from components.training.trainer import Trainer
from contracts.job import Algorithm, BehaviourPolicy, QLearning
from contracts.progress import report
from simulation.cartpole import ACTIONS, FEATURES, Episodes, Policy, play
from simulation.policies import behaviour_policy
from simulation.standardized import standardized

ROWS, STEPS, BATCH, DISCOUNT = 50_000, 5_000, 256, 0.99
EPISODES = 100
"""Fresh ones, that a learned policy is tried on."""
FRESH = 1_000_000

LOGGED = "the log itself"


def _steering(strength: float, exploration: float) -> BehaviourPolicy:
    towards = {"cart_position": 0.6, "cart_velocity": 0.6, "pole_angle": 3.0, "pole_velocity": 1.0}
    weights = {name: strength * weight for name, weight in towards.items()}
    return BehaviourPolicy(weights=weights, exploration=exploration)


LOGS = {
    "random": [(1.0, _steering(0.0, 1.0))],
    "mixed": [(0.5, _steering(0.0, 1.0)), (0.5, _steering(3.0, 0.1))],
    "mediocre": [(1.0, _steering(1.5, 0.1))],
}
"""Shares of the rows, and who logged them: mean returns of about 22, 38 and 50."""

NETWORK: dict[str, Any] = {"hiddenLayers": [256, 256]}
PLAIN = NETWORK | {"dueling": False}
FAR = {"steps": 3, "targetUpdateRate": 0.02}
"""Values reach further in as many steps, where nothing makes them run away."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "behaviour cloning": {"behaviourCloning": NETWORK},
    "DQN": {"dqn": PLAIN | {"double": False}},
    "double DQN": {"dqn": PLAIN},
    "dueling double DQN": {"dqn": NETWORK},
    "3-step double DQN": {"dqn": PLAIN | {"steps": 3}},
    "noisy double DQN": {"dqn": PLAIN | {"noisy": True}},
    "C51": {"c51": PLAIN | {"atoms": 21, "lowestReturn": 0.0, "highestReturn": 100.0}},
    "QR-DQN": {"qrDqn": PLAIN | {"quantiles": 11}},
    "BCQ": {"bcq": PLAIN},
    "CQL": {"cql": PLAIN},
    "3-step CQL": {"cql": PLAIN | FAR},
}


@dataclass(frozen=True)
class Result:
    """Of one log and algorithm over several seeds."""

    log: str
    algorithm: str
    returns: list[float]  # one for each seed

    @property
    def mean(self) -> float:
        return statistics.mean(self.returns)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % for the mean over seeds, by Student's t."""
        if len(self.returns) < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf(0.975, len(self.returns) - 1)) * statistics.stdev(self.returns)
        half /= math.sqrt(len(self.returns))
        return self.mean - half, self.mean + half


def logged(name: str, seed: int) -> Episodes:
    """`ROWS` decisions of CartPole-v1 by the policies of a log, the last episode of each cut off."""
    parts: list[Episodes] = []
    for i, (share, behaviour) in enumerate(LOGS[name]):
        rows = int(ROWS * share)
        act = behaviour_policy(behaviour)
        length = play(act, 50, seed + 2 * FRESH).returns.mean()
        played = play(act, math.ceil(1.3 * rows / length) + 10, seed * len(LOGS) + i)
        if len(played.action) < rows:
            raise ValueError(f"{name}: {len(played.action)} decisions played, {rows} wanted")
        kept = {column: value[:rows] for column, value in vars(played).items()}
        kept["truncated"] = kept["truncated"].copy()
        kept["truncated"][-1] |= kept["metrics"][-1, 1] == 0
        kept["episode"] = kept["episode"] + (parts[-1].episode[-1] + 1 if parts else 0)
        parts.append(Episodes(**kept))
    return Episodes(*(np.concatenate([getattr(part, column) for part in parts]) for column in vars(parts[0])))


def store_of(played: Episodes, normalization: nn.Module, steps: int) -> Store:
    n = len(played.action)
    fell, rows = played.metrics[:, 1] > 0, np.arange(n)
    next_row = np.where(fell | played.truncated, rows, np.minimum(rows + 1, n - 1))
    rewards, discounts = played.metrics[:, 0].astype(np.float32), np.full(n, DISCOUNT, np.float32)
    over = over_steps(rewards, discounts, next_row, fell, played.truncated, steps)
    action, reward, following, terminal, discount = map(torch.from_numpy, (played.action, *over))
    with torch.no_grad():
        state = normalization(torch.from_numpy(played.state))
    return Store(state, action, None, reward, following, terminal, discount, np.flatnonzero(~played.truncated))


def learn(algorithm: Algorithm, network: Normalized, store: Store, seed: int) -> None:
    """Take `STEPS` optimizer steps."""
    trainer = Trainer(build_learner(algorithm, network), algorithm.learning_rate)
    for rows in torch.from_numpy(permuted_batches(store.usable, BATCH, STEPS, seed, 0, 1)):
        trainer.step(store.batch(rows))
    network.eval()


def greedy(network: nn.Module) -> Policy:
    def act(state: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return network(torch.from_numpy(state)).argmax(1).numpy(), np.ones(len(state))

    return act


def cartpole(log: str, algorithm: str, seed: int) -> float:
    """Mean greedy return of what is learned from a log of CartPole-v1, or of the whole episodes of the log itself."""
    torch.set_num_threads(1)
    played = logged(log, seed)
    if algorithm == LOGGED:
        cut = np.isin(np.arange(len(played.returns)), played.episode[played.truncated])
        return float(played.returns[~cut].mean())
    made = Algorithm.model_validate(ALGORITHMS[algorithm])
    torch.manual_seed(seed)
    network = build_network(made, standardized(played.state, FEATURES), Actions(list(ACTIONS)))
    store = store_of(played, network.normalization, made.config.steps if isinstance(made.config, QLearning) else 1)
    learn(made, network, store, seed)
    return float(play(greedy(network), EPISODES, seed + FRESH).returns.mean())


def reproduce(logs: list[str], algorithms: list[str], seeds: range) -> list[Result]:
    """Train each algorithm on each log, once for each seed, on all cores; the first algorithm is the log's own."""
    whole = [(log, LOGGED, seed) for log in logs for seed in seeds]
    jobs = whole + [(log, algorithm, seed) for log in logs for algorithm in algorithms for seed in seeds]
    found: dict[tuple[str, str], dict[int, float]] = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(cartpole, *job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), 1):
            log, algorithm, seed = futures[future]
            found.setdefault((log, algorithm), {})[seed] = future.result()
            report(done, len(jobs), f"{log}, {algorithm}")
    return [
        Result(log, algorithm, [found[log, algorithm][seed] for seed in seeds])
        for log in logs
        for algorithm in (LOGGED, *algorithms)
    ]


def table(results: list[Result]) -> str:
    """The results as Markdown, a row for each algorithm and a column for each log."""
    logs = list(dict.fromkeys(result.log for result in results))
    cells = {(result.log, result.algorithm): result for result in results}
    lines = [f"| algorithm | {' | '.join(logs)} |", f"|---|{'---|' * len(logs)}"]
    for algorithm in dict.fromkeys(result.algorithm for result in results):
        found = [cells[log, algorithm] for log in logs]
        texts = [f"{r.mean:.0f} [{r.interval[0]:.0f}, {r.interval[1]:.0f}]" for r in found]
        lines.append(f"| {algorithm} | {' | '.join(texts)} |")
    return "\n".join(lines)
