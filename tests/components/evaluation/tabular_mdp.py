"""A small MDP whose values are known exactly, and logs of it under a known behaviour policy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Log:
    """Rows of logged decisions, sorted by MDP and step."""

    mdp: np.ndarray
    step: np.ndarray
    state: np.ndarray
    action: np.ndarray
    metric: np.ndarray

    def ends(self) -> np.ndarray:
        return np.append(np.diff(self.mdp) != 0, True)


@dataclass(frozen=True)
class TabularMdp:
    """States, two actions, at most `horizon` steps; each step may be the last with a probability of its own."""

    reward: np.ndarray  # [S, A], mean of the metric
    moves: np.ndarray  # [S, A, S], where an MDP that goes on goes to
    ends: np.ndarray  # [S, A], probability that the step is the last
    behaviour: np.ndarray  # [S, A]
    target: np.ndarray  # [S, A]
    horizon: int
    discount: float
    noise: float = 0.5

    @classmethod
    def small(cls) -> TabularMdp:
        return cls(
            reward=np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]]),
            moves=np.array(
                [[[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]], [[0.2, 0.5, 0.3], [0.5, 0.1, 0.4]], [[0.3, 0.3, 0.4]] * 2]
            ),
            ends=np.array([[0.1, 0.3], [0.25, 0.05], [0.1, 0.2]]),
            behaviour=np.array([[0.6, 0.4], [0.4, 0.6], [0.55, 0.45]]),
            target=np.array([[0.3, 0.7], [0.65, 0.35], [0.7, 0.3]]),
            horizon=6,
            discount=0.9,
        )

    @classmethod
    def uneven(cls) -> TabularMdp:
        """One state; the first action mostly ends the MDP, the second, that the target prefers, mostly does not."""
        return cls(
            reward=np.array([[1.0, 1.0]]),
            moves=np.ones((1, 2, 1)),
            ends=np.array([[0.6, 0.1]]),
            behaviour=np.array([[0.5, 0.5]]),
            target=np.array([[0.35, 0.65]]),
            horizon=12,
            discount=0.95,
        )

    def q_values(self) -> np.ndarray:
        """Exact action values of the target policy, [horizon, S, A]."""
        q = np.zeros((self.horizon + 1, *self.reward.shape))
        for t in reversed(range(self.horizon)):
            following = (q[t + 1] * self.target).sum(1)
            q[t] = self.reward + self.discount * (1 - self.ends) * (self.moves @ following)
        return q[:-1]

    def value(self) -> float:
        """Exact discounted value of the target policy per MDP; every MDP starts in a state drawn uniformly."""
        return float((self.q_values()[0] * self.target).sum(1).mean())

    def value_per_step(self) -> float:
        """Exact mean of the metric per decision, in the states that the behaviour policy meets."""
        alive, gained, met = np.full(len(self.reward), 1 / len(self.reward)), 0.0, 0.0
        for _ in range(self.horizon):
            gained += float(alive @ (self.target * self.reward).sum(1))
            met += float(alive.sum())
            alive = np.einsum("s,sa,sa,sat->t", alive, self.behaviour, 1 - self.ends, self.moves)
        return gained / met

    def simulate(self, mdps: int, rng: np.random.Generator) -> Log:
        states, columns = len(self.reward), []
        running, state = np.arange(mdps), rng.integers(states, size=mdps)
        for t in range(self.horizon):
            action = (rng.random(len(state)) >= self.behaviour[state, 0]).astype(np.int64)
            metric = self.reward[state, action] + self.noise * rng.normal(size=len(state))
            columns.append((running, np.full(len(state), t), state, action, metric))
            goes_on = rng.random(len(state)) >= self.ends[state, action]
            moved = self.moves[state, action].cumsum(1)
            state = np.minimum((rng.random((len(state), 1)) >= moved).sum(1), states - 1)[goes_on]
            running = running[goes_on]
        mdp, step, state, action, metric = (np.concatenate(c) for c in zip(*columns, strict=True))
        order = np.lexsort((step, mdp))
        return Log(mdp[order], step[order], state[order], action[order], metric[order])

    def weights(self, log: Log) -> np.ndarray:
        return self.target[log.state, log.action] / self.behaviour[log.state, log.action]
