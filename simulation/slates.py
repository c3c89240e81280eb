"""Two environments of Google's RecSim (Ie et al. 2019, arXiv 1909.04847) in Gymnasium, and SlateQ learned from a log.

A user is shown a slate of k out of N items, which are drawn anew for each decision, and chooses one or none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import torch
from gymnasium import spaces

from components.training.algorithms.learner import Batch, Listed
from components.training.algorithms.slate import SlateNetwork, SlateQLearner, best_slate, judge_lists
from components.training.trainer import Trainer
from contracts.decision_log import schema
from contracts.job import SlateQ

CANDIDATES, SLATE = 10, 2
DISCOUNT = 0.99
LOGGED = ("mdp_id", "sequence_number", "state_features", "action", "action_probability", "possible_actions", "metrics")
Observation = dict[str, Any]


class SlateEnvironment(gymnasium.Env[Observation, np.ndarray]):
    """Observed are the user's features [F], the items' [N, G], and the choice from the slate before, k for none."""

    user_features: int
    item_features: int
    time: float
    """That the user has left; the episode ends when none is."""

    def __init__(self) -> None:
        self.action_space = spaces.MultiDiscrete([CANDIDATES] * SLATE)
        self.observation_space = spaces.Dict(
            {
                "user": spaces.Box(-1, 1, (self.user_features,), np.float32),
                "items": spaces.Box(-1, 1, (CANDIDATES, self.item_features), np.float32),
                "chosen": spaces.Discrete(SLATE + 1),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        self.begin()
        return self._observe(SLATE), {}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if len(set(np.asarray(action).tolist())) < SLATE:
            raise ValueError(f"a slate shows {SLATE} different items, found {action}")
        chosen, reward = self.show(np.asarray(action))
        return self._observe(chosen), reward, self.time <= 0, False, {}

    def _observe(self, chosen: int) -> Observation:
        self.items = self.draw().astype(np.float32)
        return {"user": self.user().astype(np.float32), "items": self.items, "chosen": chosen}

    @abstractmethod
    def begin(self) -> None:
        """A new user."""

    @abstractmethod
    def user(self) -> np.ndarray:
        """What is known of the user, [F] in [-1, 1]."""

    @abstractmethod
    def draw(self) -> np.ndarray:
        """Items to choose among, [N, G] in [-1, 1]."""

    @abstractmethod
    def show(self, slate: np.ndarray) -> tuple[int, float]:
        """What is chosen from the slate, and the reward."""


class LongTermSatisfaction(SlateEnvironment):
    """Kale and chocolate: what people consume at once makes them less content in the long run.

    An item's clickbait score c is uniform in [0, 1]; the first of a slate is always chosen. Engagement, the reward, is
    log-normal with mean (5 c + 4 (1 - c)) * satisfaction and deviation 1 of its logarithm. Satisfaction is
    sigmoid(0.01 x), and nobody sees it; x becomes 0.7 x - 2 (c - 1/2) + N(0, 0.05) and begins uniform in
    [-1/2, 1/2] / 0.3. An episode has 60 steps.
    """

    user_features, item_features = 0, 1

    def begin(self) -> None:
        self.time = 60
        self.exposure = (self.np_random.random() - 0.5) / (1 - 0.7)

    def user(self) -> np.ndarray:
        return np.zeros(0)

    def draw(self) -> np.ndarray:
        return self.np_random.random((CANDIDATES, 1))

    def show(self, slate: np.ndarray) -> tuple[int, float]:
        clickbait = float(self.items[slate[0], 0])
        satisfaction = 1 / (1 + np.exp(-0.01 * self.exposure))
        reward = np.exp(self.np_random.normal((5 * clickbait + 4 * (1 - clickbait)) * satisfaction, 1.0))
        self.exposure = 0.7 * self.exposure - 2 * (clickbait - 0.5) + self.np_random.normal(scale=0.05)
        self.time -= 1
        return 0, float(reward)


class InterestEvolution(SlateEnvironment):
    """Interests grow or fade by what is watched, and videos of good quality keep people longer.

    A video belongs to one of 20 topics, its features are that topic's; its quality is N(q, 0.1), with q from -3 to 0
    over the first 14 topics and 0 to 3 over the last 6. A user likes each topic by u in [-1, 1], begins with 200
    minutes, and chooses a video in proportion to u + 1, or none in proportion to 2. A video takes 4 minutes, which are
    the reward; 0.9 * quality / 3.4 of them are given back. Choosing none costs half a minute. With probability
    (u + 1) / 2 the interest in the topic moves by 0.3 (1 - |u|) of its distance to 1 towards it, else as far away.
    """

    user_features = item_features = 20
    quality = np.concatenate([np.linspace(-3, 0, 14), np.linspace(0, 3, 6)])

    def begin(self) -> None:
        self.time = 200.0
        self.interests = self.np_random.uniform(-1, 1, self.user_features)

    def user(self) -> np.ndarray:
        return self.interests

    def draw(self) -> np.ndarray:
        self.topics = self.np_random.integers(self.item_features, size=CANDIDATES)
        return np.eye(self.item_features)[self.topics]

    def show(self, slate: np.ndarray) -> tuple[int, float]:
        topics = self.topics[slate]
        mass = np.append(self.interests[topics] + 1, 2.0)
        chosen = int(self.np_random.choice(SLATE + 1, p=mass / mass.sum()))
        if chosen == SLATE:
            self.time -= 0.5
            return chosen, 0.0
        topic = topics[chosen]
        interest = self.interests[topic]
        step = 0.3 * (1 - abs(interest)) * (1 - interest)
        towards = self.np_random.random() < (interest + 1) / 2
        self.interests[topic] = np.clip(interest + (step if towards else -step), -1, 1)
        watched = min(self.time, 4.0)
        self.time += watched * (0.9 / 3.4 * self.np_random.normal(self.quality[topic], 0.1) - 1)
        return chosen, watched


ENVIRONMENTS: dict[str, type[SlateEnvironment]] = {
    "long-term satisfaction": LongTermSatisfaction,
    "interest evolution": InterestEvolution,
}


@dataclass(frozen=True)
class SlateLog:
    """Decisions of whole episodes, one after another; all arrays have a row for each."""

    user: np.ndarray  # float32 [N, F]
    items: np.ndarray  # float32 [N, candidates, G]
    slate: np.ndarray  # int64 [N, k]
    chosen: np.ndarray  # int64 [N]
    reward: np.ndarray  # float32 [N]
    terminal: np.ndarray  # bool [N]

    @property
    def returns(self) -> np.ndarray:
        """Sum of rewards of each episode."""
        return self.discounted(1.0)

    @property
    def episode(self) -> np.ndarray:
        """int64 [N], from 0 on."""
        return np.cumsum(np.append(False, self.terminal[:-1]))

    @property
    def step(self) -> np.ndarray:
        """int64 [N], from 0 on in each episode."""
        first = np.flatnonzero(np.diff(self.episode, prepend=-1))
        return np.asarray(np.arange(len(self.episode)) - first[self.episode])

    def discounted(self, discount: float) -> np.ndarray:
        """The same, discounted to the first decision."""
        return np.bincount(self.episode, self.reward * discount**self.step)

    def batch(self, rows: np.ndarray) -> Batch:
        following = np.where(self.terminal[rows], rows, np.minimum(rows + 1, len(self.reward) - 1))
        begins = np.arange(len(rows))[:, None] * CANDIDATES
        state, action, reward, next_state, next_action, discount, chosen = map(
            torch.from_numpy,
            (
                self.user[rows], begins + self.slate[rows], self.reward[rows],
                self.user[following], begins + self.slate[following],
                np.where(self.terminal[rows], 0, DISCOUNT).astype(np.float32), self.chosen[rows],
            ),
        )  # fmt: skip
        possible, next_possible = (listed(self.items[each]) for each in (rows, following))
        return Batch(state, action, possible, reward, next_state, next_action, next_possible, discount, chosen)

    @property
    def propensity(self) -> np.ndarray:
        """float64 [N]: of random slates in their order, of items alike any."""
        rows = np.arange(len(self.items))
        alike = (self.items[:, :, None] == self.items[:, None]).all(3)
        left, found = np.ones((len(rows), CANDIDATES), bool), np.ones(len(rows))
        for at in self.slate.T:
            found *= (alike[rows, at] & left).sum(1) / left.sum(1)
            left[rows, at] = False
        return found

    def decisions(self) -> pa.Table:
        """The same as a product would log it that shows random slates."""
        items = [[_named("item", item) for item in items] for items in self.items.tolist()]
        choice = np.where(self.chosen == SLATE, 0, self.chosen + 1)
        metrics = zip(self.reward.tolist(), choice.tolist(), strict=True)
        return pa.table(
            {
                "mdp_id": [f"user-{e:06}" for e in self.episode],
                "sequence_number": self.step,
                "state_features": [_named("user", user) for user in self.user.tolist()],
                "action": [[shown[i] for i in slate] for shown, slate in zip(items, self.slate.tolist(), strict=True)],
                "action_probability": self.propensity,
                "possible_actions": items,
                "metrics": [[("reward", reward), ("choice", place)] for reward, place in metrics],
            },
            pa.schema([field for field in schema("slate") if field.name in LOGGED]),
        )


def _named(what: str, numbers: list[float]) -> list[tuple[str, float]]:
    return [(f"{what}_{i}", number) for i, number in enumerate(numbers)]


def listed(items: np.ndarray) -> Listed:
    """float32 [B, N, G] as lists."""
    row = torch.arange(len(items)).repeat_interleave(items.shape[1])
    return Listed(torch.from_numpy(items).flatten(0, 1), row, *items.shape[:2])


def play(name: str, policy: Callable[[Observation], np.ndarray] | None, episodes: int, seed: int) -> SlateLog:
    """Whole episodes of the policy's slates, or of random ones."""
    environment = ENVIRONMENTS[name]()
    rng = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    for episode in range(episodes):
        seen, _ = environment.reset(seed=seed * 100_003 + episode)
        ended = False
        while not ended:
            slate = policy(seen) if policy else rng.choice(CANDIDATES, SLATE, replace=False)
            following, reward, ended, _, _ = environment.step(slate)
            rows.append((seen["user"], seen["items"], slate, following["chosen"], np.float32(reward), ended))
            seen = following
    return SlateLog(*(np.stack(column) for column in zip(*rows, strict=True)))


def learn_from(log: SlateLog, config: SlateQ, steps: int, seed: int) -> Callable[[Observation], np.ndarray]:
    """SlateQ from a log, by batches of 256; what it shows is the best slate."""
    torch.manual_seed(seed)
    network = SlateNetwork(log.user.shape[1], log.items.shape[2], SLATE, config.hidden_layers)
    trainer = Trainer(SlateQLearner(network, config), config.learning_rate)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        trainer.step(log.batch(rng.integers(len(log.reward), size=256)))

    def best(seen: Observation) -> np.ndarray:
        with torch.no_grad():
            judged = judge_lists(network, torch.from_numpy(seen["user"])[None], listed(seen["items"][None]))
            return best_slate(judged, SLATE)[0].numpy()

    return best
