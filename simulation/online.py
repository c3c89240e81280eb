"""Learning online: a policy plays an environment and learns from a replay buffer of what it did there."""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from components.normalization.graph import CLAMP
from components.normalization.spec import NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.actor_critic import ActorCriticNetwork, SACLearner
from components.training.algorithms.build import build_learner, build_network
from components.training.algorithms.learner import Batch, Learner
from components.training.bundle import write_bundle
from components.training.network import NoisyLinear, Normalized
from components.training.trainer import Trainer
from contracts.job import (
    DDPG,
    SAC,
    TD3,
    TD3BC,
    ActorCritic,
    Algorithm,
    JobError,
    PolicyHead,
    QLearning,
    explain,
)
from simulation.standardized import standardized

EPISODES = 100
"""Fresh ones, that the policy is tried on at the end."""
GLANCE = 20
"""Episodes of a look in between."""
FRESH = 1_000_000
APART = 100_003
"""Seeds of environments: copies of one begin by a seed, the next one, and so on, which others' seeds must not be."""


@dataclass(frozen=True)
class Settings:
    """How much is played and learned."""

    decisions: int
    """In all copies of the environment together."""
    warm_up: int = 1_000
    """Random ones at first; of them features are standardized, too."""
    batch: int = 256
    updates: float = 1.0
    """Optimizer steps for each decision."""
    copies: int = 8
    """Of the environment, played side by side."""
    capacity: int = 100_000
    """Decisions that are remembered."""
    discount: float = 0.99
    exploration: float = 0.05
    """Of named actions the share of random ones in the end, of numbers the noise's deviation, of half a range."""
    explored: float = 0.3
    """Share of the decisions over which the share of random ones falls to that."""
    held: int = 1
    """Most decisions for which a random one of named actions is drawn; each number is as likely. What only a long push
    reaches, single random actions find seldom (Dabney et al. 2021, arXiv 2006.01782)."""
    look_every: int = 5_000
    """Decisions from one look at the greedy policy to the next."""
    enough: float | None = None
    """Greedy mean return at which to stop."""


OF_VALUES: dict[str, Any] = {
    "hiddenLayers": [256, 256],
    "dueling": False,
    "learningRate": 5e-4,
    "targetUpdateRate": 0.01,
}
KNOWN: dict[str, tuple[Settings, dict[str, Any]]] = {
    "CartPole-v1": (Settings(60_000, updates=0.5, batch=128, look_every=2_500, enough=499), OF_VALUES | {"steps": 3}),
    "Acrobot-v1": (
        Settings(200_000, warm_up=10_000, updates=0.5, batch=128, exploration=0.1, explored=0.15, held=10, enough=-82),
        OF_VALUES,
    ),
    "LunarLander-v3": (Settings(150_000, updates=0.5, batch=128, look_every=10_000, enough=250), OF_VALUES),
    "Pendulum-v1": (
        Settings(20_000, copies=4, batch=128, discount=0.98, exploration=0.1, look_every=1_000, enough=-170),
        {"hiddenLayers": [128, 128], "learningRate": 1e-3, "targetUpdateRate": 0.01},
    ),
}
"""What is known to work, by environment: with what algorithms are given."""


RETURNS = {"CartPole-v1": (0.0, 100.0), "Acrobot-v1": (-100.0, 0.0), "LunarLander-v3": (-200.0, 200.0)}
"""Between which discounted returns lie, where that is known."""


class Replay:
    """The last decisions of E copies of an environment, of which batches are drawn at random.

    The state that follows a decision is that of the next row: of a copy whose episode has ended, the row after it holds
    its last state, and no decision.
    """

    def __init__(self, rows: int, state: np.ndarray, action: np.ndarray) -> None:
        self.rows, self.copies = rows, len(state)
        self.state = torch.zeros((rows, *state.shape))
        self.action = torch.zeros((rows, *action.shape), dtype=torch.from_numpy(action).dtype)
        self.reward = torch.zeros((rows, self.copies))
        self.terminal, self.truncated, self.decided = torch.zeros((3, rows, self.copies), dtype=torch.bool)
        self.at = self.size = 0

    def add(self, state: Tensor, action: np.ndarray, *outcome: np.ndarray) -> None:
        """A row: states [E, F], actions [E, ...], and reward, terminal, truncated and decided, [E] each."""
        columns = (self.reward, self.terminal, self.truncated, self.decided)
        for column, value in zip((self.action, *columns), (action, *outcome), strict=True):
            column[self.at] = torch.from_numpy(value)
        self.state[self.at] = state
        self.at, self.size = (self.at + 1) % self.rows, min(self.size + 1, self.rows)

    def sample(self, size: int, steps: int, discount: float, rng: np.random.Generator) -> Batch:
        """Transitions over as many decisions, or fewer where an episode ends before."""
        row, copy_ = np.zeros(0, np.int64), np.zeros(0, np.int64)
        while len(row) < size:
            age = rng.integers(steps, self.size, size)
            drawn, of = (self.at - 1 - age) % self.rows, rng.integers(self.copies, size=size)
            kept = self.decided.numpy()[drawn, of]
            row, copy_ = np.concatenate([row, drawn[kept]]), np.concatenate([copy_, of[kept]])
        rows, of_copy = torch.from_numpy(row[:size]), torch.from_numpy(copy_[:size])
        total, factor, following = torch.zeros(size), torch.ones(size), rows
        going, ended = torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
        for _ in range(steps):
            here = following
            total = total + torch.where(going, factor * self.reward[here, of_copy], 0.0)
            factor = torch.where(going, factor * discount, factor)
            following = torch.where(going, (here + 1) % self.rows, here)
            ended = ended | (going & self.terminal[here, of_copy])
            going = going & ~(self.terminal | self.truncated)[here, of_copy] if steps > 1 else going
        return Batch(
            state=self.state[rows, of_copy],
            action=self.action[rows, of_copy],
            possible=None,
            reward=total,
            next_state=self.state[following, of_copy],
            next_action=self.action[following, of_copy],
            next_possible=None,
            discount=torch.where(ended, 0.0, factor),
        )


@dataclass
class Learned:
    """A policy, and how it came to be."""

    network: Normalized
    normalization: NormalizationSpec
    actions: Actions
    algorithm: Algorithm
    looks: list[dict[str, float]] = field(default_factory=list)
    """{decisions, mean_return} of the greedy policy, each time it was looked at."""
    returns: list[float] = field(default_factory=list)
    """Of the best of these policies, over fresh episodes."""


def settings_for(
    environment: str, algorithm: str | None, given: dict[str, Any], decisions: int | None = None
) -> tuple[Settings, Algorithm]:
    """What to learn with: what is known to work in the environment, and above it what is given of the algorithm.

    Raises `JobError` for fields that the algorithm does not have.
    """
    played = make(environment, 1)
    continuous = actions_of(played).space == "continuous"
    played.close()
    algorithm = algorithm or ("sac" if continuous else "dqn")
    settings, known = KNOWN.get(environment, (Settings(100_000), {}))
    if algorithm == "c51" and environment in RETURNS:
        known = known | dict(zip(("lowestReturn", "highestReturn"), RETURNS[environment], strict=True))
    kind = Algorithm.model_fields[algorithm_field(algorithm)].annotation
    fields = {field.alias for model in typing.get_args(kind) for field in getattr(model, "model_fields", {}).values()}
    try:
        made = Algorithm.model_validate({algorithm: {k: v for k, v in known.items() if k in fields} | given})
    except ValidationError as error:
        raise JobError(
            "\n".join(explain({**e, "loc": ("spec", "algorithm", *e["loc"])}) for e in error.errors())
        ) from None
    return replace(settings, decisions=decisions or settings.decisions), made


def algorithm_field(name: str) -> str:
    """Of the field of `Algorithm` with this name in a job."""
    return next(field for field, info in Algorithm.model_fields.items() if info.alias == name)


def make(environment: str, copies: int) -> VectorEnv[Any, Any, Any]:
    """Copies of an environment, played side by side; raises `JobError` for one that cannot be played here."""
    try:
        made = gymnasium.make_vec(environment, num_envs=copies)
    except gymnasium.error.Error as error:
        raise JobError(f"{environment}: {' '.join(str(error).split())}") from None
    if made.metadata.get("autoreset_mode") != AutoresetMode.NEXT_STEP:
        raise JobError(f"{environment}: its copies do not show an episode's last state in a step of its own")
    if len(made.single_observation_space.shape or ()) != 1:
        raise JobError(f"{environment}: states must be vectors of numbers, found {made.single_observation_space}")
    return made


def actions_of(environment: VectorEnv[Any, Any, Any]) -> Actions:
    space = environment.single_action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return Actions([f"action_{i}" for i in range(int(space.n))])
    if isinstance(space, gymnasium.spaces.Box) and space.is_bounded() and len(space.shape) == 1:
        bounds = zip(space.low.tolist(), space.high.tolist(), strict=True)
        return Actions([f"action_{i}" for i in range(space.shape[0])], bounds=list(bounds))
    raise JobError(f"actions must be discrete, or numbers within bounds; found {space}")


def normalization_of(environment: VectorEnv[Any, Any, Any], seen: np.ndarray) -> NormalizationSpec:
    """By the moments of the states seen so far, but so that no state within finite bounds is clamped.

    What random actions reach is not all that there is to reach.
    """
    space = environment.single_observation_space
    assert isinstance(space, gymnasium.spaces.Box)
    bounded = np.isfinite(space.low) & np.isfinite(space.high) & (np.abs(space.high) < 1e6)
    mean = seen.mean(0)
    furthest = np.maximum(np.abs(space.high - mean), np.abs(space.low - mean), where=bounded, out=np.zeros(len(mean)))
    return standardized([f"observation_{i}" for i in range(len(mean))], mean, np.maximum(seen.std(0), furthest / CLAMP))


def check_fits(algorithm: Algorithm, actions: Actions, environment: str) -> None:
    """Raise `JobError` for an algorithm that cannot play."""
    config = algorithm.config
    if isinstance(config, TD3BC) or not isinstance(config, QLearning | DDPG | TD3 | SAC):
        raise JobError(f"{algorithm.name} learns from logs alone; online there are dqn, c51, qrDqn, ddpg, td3 and sac")
    if isinstance(config, ActorCritic) != (actions.space == "continuous"):
        raise JobError(f"{algorithm.name} cannot act in {environment}, whose actions are {actions.space}")
    if isinstance(config, QLearning) and config.next_action == "logged":
        raise JobError("nextAction logged is of logs: online the next action is the best")


def learn_online(
    environment: str,
    algorithm: Algorithm,
    settings: Settings,
    seed: int,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Learned:
    """Play and learn; keeps the policy that earned most when it was looked at, and tries it on fresh episodes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    played = make(environment, settings.copies)
    actions = actions_of(played)
    check_fits(algorithm, actions, environment)
    settings = replace(settings, warm_up=min(settings.warm_up, settings.decisions // 2))
    rows = settings.warm_up // settings.copies
    steps = algorithm.config.steps if isinstance(algorithm.config, QLearning) else 1
    if rows <= 2 * steps:
        raise JobError(
            f"decisions {settings.decisions:,}: too few to look {steps} ahead in {settings.copies} copies; "
            "play more, or lower steps"
        )
    low, high = np.array(actions.bounds or [(0.0, 0.0)], np.float32).T

    held = Held(len(actions.names), settings.copies, settings.held)

    def random_actions() -> np.ndarray:
        if actions.bounds is None:
            return held.next(rng)
        return rng.uniform(-1, 1, (settings.copies, len(low))).astype(np.float32)

    raw, _ = played.reset(seed=seed * APART)
    state = torch.from_numpy(raw.astype(np.float32))
    replay = Replay(max(settings.capacity // settings.copies, 2), state.numpy(), random_actions())
    decided = np.ones(settings.copies, bool)
    learned: Learned | None = None
    learner: Learner | None = None
    done, owed, last_look, best = 0, 0.0, 0, -np.inf
    weights: dict[str, Tensor] = {}
    loss = torch.zeros(())
    while done < settings.decisions:
        if learned is None and done >= settings.warm_up:
            seen = replay.state[: replay.size].flatten(0, 1).numpy()
            spec = normalization_of(played, seen)
            network = build_network(algorithm, spec, actions)
            learned = Learned(network, spec, actions, algorithm)
            learner = build_learner(algorithm, network)
            trainer = Trainer(learner, algorithm.learning_rate)
            with torch.no_grad():
                filled = replay.state[: replay.size]
                filled.copy_(network.normalization(filled.flatten(0, 1)).view_as(filled))
                state = network.normalization(state)
        action = random_actions()
        if learner:
            action = explore(learner, state, action, settings, done, rng)
        given = low + (action + 1) / 2 * (high - low) if actions.bounds is not None else action
        raw, reward, terminated, truncated, _ = played.step(given)
        replay.add(state, action, reward.astype(np.float32), terminated, truncated & ~terminated, decided)
        done += int(decided.sum())
        decided = ~(terminated | truncated)
        state = torch.from_numpy(raw.astype(np.float32))
        if learned is None or learner is None:
            continue
        with torch.no_grad():
            state = learned.network.normalization(state)
        owed += settings.copies * settings.updates
        while owed >= 1:
            loss, _ = trainer.step(replay.sample(settings.batch, steps, settings.discount, rng))
            owed -= 1
        if done - last_look >= settings.look_every or done >= settings.decisions:
            last_look = done
            if not loss.isfinite():
                raise JobError(
                    f"learning diverges: after {done:,} decisions the loss is {loss:g}; lower learningRate or "
                    "targetUpdateRate"
                )
            mean = float(np.mean(greedy_returns(environment, learned.network, GLANCE, seed + FRESH)))
            learned.looks.append({"decisions": done, "mean_return": mean})
            progress(min(done, settings.decisions), settings.decisions, f"greedy return {mean:.1f}")
            if mean > best:
                best, weights = mean, copy.deepcopy(learned.network.state_dict())
            if settings.enough is not None and mean >= settings.enough:
                break
    played.close()
    assert learned
    learned.network.load_state_dict(weights)
    learned.network.eval()
    learned.returns = greedy_returns(environment, learned.network, EPISODES, seed + 2 * FRESH)
    return learned


class Held:
    """Random ones of A actions in E copies of an environment, each held for up to so many decisions."""

    def __init__(self, actions: int, copies: int, most: int) -> None:
        self.actions, self.most = actions, most
        self.drawn, self.left = np.zeros(copies, np.int64), np.zeros(copies, np.int64)

    def next(self, rng: np.random.Generator) -> np.ndarray:
        """int64 [E]."""
        over = self.left == 0
        self.drawn[over] = rng.integers(self.actions, size=over.sum())
        self.left[over] = rng.integers(self.most, size=over.sum()) + 1
        self.left -= 1
        return self.drawn.copy()


def explore(
    learner: Learner, state: Tensor, at_random: np.ndarray, settings: Settings, done: int, rng: np.random.Generator
) -> np.ndarray:
    """Actions [E], or [E, D] in [-1, 1]: mostly what is best so far."""
    with torch.no_grad():
        if isinstance(learner, SACLearner):
            return np.asarray(learner.network.actor.sampled(state)[0].numpy())
        if isinstance(learner.network, ActorCriticNetwork):
            unit = learner.network.actor.unit(state)
            return np.asarray((unit + settings.exploration * torch.randn_like(unit)).clamp(-1, 1).numpy())
        best = learner.network(state).argmax(1).numpy()
    noisy = any(isinstance(module, NoisyLinear) for module in learner.network.modules())
    falls = (done - settings.warm_up) / max(settings.explored * settings.decisions, 1)
    share = 0.0 if noisy else max(1 - falls, 0.0) * (1 - settings.exploration) + settings.exploration
    return np.where(rng.random(len(best)) < share, at_random, best)


def greedy_returns(environment: str, network: nn.Module, episodes: int, seed: int) -> list[float]:
    """Undiscounted returns of the policy that always takes the best action, one for each episode."""
    played = make(environment, episodes)
    discrete = isinstance(played.single_action_space, gymnasium.spaces.Discrete)
    was_training = network.training
    network.eval()
    state, _ = played.reset(seed=seed * APART)
    running, returns = np.ones(episodes, bool), np.zeros(episodes)
    while running.any():
        with torch.no_grad():
            found = network(torch.from_numpy(state.astype(np.float32)))
        state, reward, terminated, truncated, _ = played.step((found.argmax(1) if discrete else found).numpy())
        returns += np.where(running, reward, 0.0)
        running &= ~(terminated | truncated)
    played.close()
    network.train(was_training)
    return [float(each) for each in returns]


def random_return(environment: str, seed: int, episodes: int = EPISODES) -> float:
    """Mean return of actions that are drawn at random."""
    played = make(environment, episodes)
    played.action_space.seed(seed)
    played.reset(seed=seed * APART)
    running, returns = np.ones(episodes, bool), np.zeros(episodes)
    while running.any():
        _, reward, terminated, truncated, _ = played.step(played.action_space.sample())
        returns += np.where(running, reward, 0.0)
        running &= ~(terminated | truncated)
    played.close()
    return float(returns.mean())


def result(environment: str, learned: Learned, seed: int) -> dict[str, Any]:
    """What was reached, with a 95 % interval over episodes, and how it went."""
    half = float(stats.sem(learned.returns) * stats.t.ppf(0.975, len(learned.returns) - 1))
    mean = float(np.mean(learned.returns))
    return {
        "environment": environment,
        "algorithm": {learned.algorithm.name: learned.algorithm.config.model_dump(by_alias=True)},
        "seed": seed,
        "decisions": int(learned.looks[-1]["decisions"]),
        "episodes": len(learned.returns),
        "mean_return": mean,
        "interval": [mean - half, mean + half],
        "looks": learned.looks,
    }


def save(learned: Learned, output: Path, facts: dict[str, Any]) -> None:
    """Write a policy bundle, as training from a log does, and `result.json` beside it."""
    write_bundle(
        output / "policy", learned.network, learned.algorithm, learned.normalization, learned.actions,
        PolicyHead(policy="greedy"), {name: facts[name] for name in ("environment", "seed", "decisions")},
    )  # fmt: skip
    (output / "result.json").write_text(json.dumps(facts, indent=2))
