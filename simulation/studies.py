"""What each algorithm learns where the truth is known, over many seeds: the results tables."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from scipy import stats

from contracts.job import SlateQ
from contracts.progress import report
from simulation import bandits, gridworld, offline, online, pendulum, slates
from simulation.bandits import BY_CHANCE

ONLINE: dict[str, tuple[str, dict[str, object]]] = {
    "DQN": ("dqn", {"double": False}),
    "double DQN": ("dqn", {}),
    "dueling double DQN": ("dqn", {"dueling": True}),
    "noisy double DQN": ("dqn", {"noisy": True}),
    "C51": ("c51", {"atoms": 51}),
    "QR-DQN": ("qrDqn", {"quantiles": 21}),
    "DDPG": ("ddpg", {}),
    "TD3": ("td3", {}),
    "SAC": ("sac", {}),
}
OF_NUMBERS = ("Pendulum-v1",)
LONG = ("LunarLander-v3",)
"""Takes so long that it is tried with double DQN alone."""
SLATE_LOG, SLATE_STEPS, SLATE_EPISODES = 500, 2_000, 300


@dataclass(frozen=True)
class Result:
    """Of one cell of a study's table, over several seeds."""

    column: str
    row: str
    values: list[float]  # one for each seed

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % for the mean over seeds, by Student's t."""
        if len(self.values) < 2:
            return -math.inf, math.inf
        half = float(stats.t.ppf(0.975, len(self.values) - 1)) * statistics.stdev(self.values)
        half /= math.sqrt(len(self.values))
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Study:
    """A table: what `measure` finds for a column, a row and a seed, where the two go together."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    measure: Callable[[str, str, int], float]
    fits: Callable[[str, str], bool] = lambda column, row: True
    decimals: int = 0


def played(environment: str, algorithm: str, seed: int) -> float:
    """Mean return over 100 fresh episodes of the greedy policy that was learned by playing; or of random actions."""
    torch.set_num_threads(1)
    if algorithm == BY_CHANCE:
        return online.random_return(environment, seed)
    name, given = ONLINE[algorithm]
    settings, made = online.settings_for(environment, name, given)
    return statistics.mean(online.learn_online(environment, made, settings, seed).returns)


def shown(environment: str, algorithm: str, seed: int) -> float:
    """Mean return of slates learned from a log of random ones."""
    torch.set_num_threads(1)
    policy = None
    if algorithm != BY_CHANCE:
        log = slates.play(environment, None, SLATE_LOG, seed)
        config = SlateQ(
            hiddenLayers=[64, 64], targetUpdateRate=0.02, nextSlate="logged" if "SARSA" in algorithm else "best"
        )
        policy = slates.learn_from(log, config, SLATE_STEPS, seed)
    return float(slates.play(environment, policy, SLATE_EPISODES, seed + offline.FRESH).returns.mean())


def _plays(environment: str, algorithm: str) -> bool:
    of_numbers = ONLINE.get(algorithm, ("",))[0] in ("ddpg", "td3", "sac")
    if environment in LONG:
        return algorithm in (BY_CHANCE, "double DQN")
    return algorithm == BY_CHANCE or of_numbers == (environment in OF_NUMBERS)


STUDIES: dict[str, Study] = {
    "offline": Study(
        f"Mean greedy return on CartPole-v1 of what is learned from {offline.ROWS:,} logged decisions",
        tuple(offline.LOGS),
        (offline.LOGGED, *offline.ALGORITHMS),
        offline.cartpole,
    ),
    "online": Study(
        "Mean greedy return over 100 fresh episodes of what is learned by playing",
        tuple(online.KNOWN),
        (BY_CHANCE, *ONLINE),
        played,
        _plays,
    ),
    "gridworld": Study(
        "Learned from 20,000 random moves in a gridworld, in hundredths of its prize: how far values are from the true "
        "ones on average, and what is lost by acting on them",
        (gridworld.TRUTH, gridworld.LOSS),
        (BY_CHANCE, *gridworld.ALGORITHMS),
        gridworld.gridworld,
        decimals=1,
    ),
    "pendulum": Study(
        f"Mean greedy return on Pendulum-v1 of what is learned from {pendulum.ROWS:,} logged decisions",
        tuple(pendulum.LOGS),
        (offline.LOGGED, *pendulum.ALGORITHMS),
        pendulum.pendulum,
    ),
    "slates": Study(
        f"Mean return of an episode, of slates learned from {SLATE_LOG:,} episodes of random ones",
        tuple(slates.ENVIRONMENTS),
        (BY_CHANCE, "SlateQ", "SlateQ, SARSA"),
        shown,
    ),
    "bandits": Study(
        "Expected regret in 1,000 decisions, learned from a log of random ones",
        tuple(bandits.SIZES),
        (BY_CHANCE, *bandits.BANDITS),
        bandits.regret,
    ),
}


def reproduce(name: str, only: list[str], seeds: range) -> list[Result]:
    """Fill a study's table on all cores; `only` the cells whose column or row is named, and each row's name for all."""
    study = STUDIES[name]
    cells = [
        (column, row)
        for row in study.rows
        for column in study.columns
        if study.fits(column, row)
        and (not set(only) & set(study.columns) or column in only)
        and (not set(only) & set(study.rows) or row in only)
    ]
    jobs = [(*cell, seed) for cell in cells for seed in seeds]
    found: dict[tuple[str, str], dict[int, float]] = {cell: {} for cell in cells}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(study.measure, *job): job for job in jobs}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                column, row, seed = futures[future]
                found[column, row][seed] = future.result()
                report(done, len(jobs), f"{column}, {row}")
        except BaseException:
            # Told at once, not when all that is queued has run.
            pool.shutdown(cancel_futures=True)
            raise
    return [Result(*cell, [values[seed] for seed in seeds]) for cell, values in found.items()]


def table(results: list[Result], decimals: int = 0) -> str:
    """The results as Markdown."""
    columns = list(dict.fromkeys(result.column for result in results))
    cells = {(result.column, result.row): result for result in results}
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in dict.fromkeys(result.row for result in results):
        texts = [_cell(cells[column, row], decimals) if (column, row) in cells else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(result: Result, decimals: int) -> str:
    mean, low, high = (f"{value:.{decimals}f}" for value in (result.mean, *result.interval))
    return f"{mean} [{low}, {high}]"
