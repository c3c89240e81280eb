"""Whether a log is one that the job's algorithm can learn from."""

from __future__ import annotations

import numpy as np

from components.training.worker import LOOKING_AHEAD
from components.transitions import Lists, Transitions
from contracts.job import BCQ, C51, CQL, JobSpec, LinearThompson, LinUCB, LogisticBandit, QLearning
from contracts.stage import StageError

LOOKED_AT, FEW = 10_000, 0.01
"""Decisions whose returns are looked at, and the share of them that may lie beyond the atoms, as outliers do."""


def check_fits(data: Transitions, spec: JobSpec, rewards: np.ndarray) -> list[str]:
    """Raise `StageError` for a log that the job's algorithm cannot learn from, by the `rewards`, [N], that it would.

    Returns what people should be warned of.
    """
    warnings: list[str] = []
    check_explores(data)
    if no_choice(data, spec.slate.size if spec.slate else 1):
        took = "items than it showed" if spec.slate else "than the action that it took"
        raise StageError(
            f"possible_actions: no decision of the log lists more {took}, so that there is nothing to choose; log all "
            "that was possible, or leave the column out where that is not known"
        )
    algorithm = spec.algorithm.config
    if isinstance(algorithm, LOOKING_AHEAD) and data.truncated.all():
        raise StageError(
            "training: no transition is left, for what followed is not known of any; see data.lastStep and the "
            "timeline's report"
        )
    if isinstance(algorithm, LogisticBandit):
        low, high = rewards.min(), rewards.max()
        if low < 0 or high > 1:
            raise StageError(
                f"algorithm.logisticBandit: rewards lie between {low:g} and {high:g}, and must be in [0, 1]: set "
                "training.rewardClip and rewardScale so that they are, or choose linearThompson"
            )
    if isinstance(algorithm, C51):
        rows = np.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).astype(int)
        _within_atoms(algorithm, data.returns(rows, rewards, data.discount(spec.reward)))
    if spec.slate and data.chosen is not None and (data.chosen == spec.slate.size).all():
        raise StageError(
            f"slate.choice: the metric {spec.slate.choice} tells of no decision that an item was chosen, as 1 for the "
            "first of the slate would; name the metric that does"
        )
    flat = spec.export.policy == "softmax" and spec.export.temperature >= rewards.std()
    if isinstance(algorithm, LinUCB | LogisticBandit) and flat:
        scores = "upper bounds of rewards" if isinstance(algorithm, LinUCB) else "probabilities of a reward"
        warnings.append(
            f"export.policy softmax: scores of {spec.algorithm.name} are {scores}, so that at temperature "
            f"{spec.export.temperature:g} actions are taken about alike; set export.policy greedy or epsilonGreedy"
        )
    lists = data.possible
    if isinstance(algorithm, LinearThompson) and isinstance(lists, np.ndarray) and not lists.all():
        raise StageError(
            "algorithm.linearThompson: the log has decisions at which not all actions were possible, and how likely "
            "one is the best is asked among all: choose linUcb"
        )
    by_lists = (
        not isinstance(algorithm, QLearning) or isinstance(algorithm, CQL | BCQ) or algorithm.next_action == "best"
    )
    if isinstance(lists, Lists) and by_lists and not lists.logged.all():
        if not lists.logged.any():
            sarsa = isinstance(algorithm, QLearning) and not isinstance(algorithm, CQL | BCQ)
            without = f", or set algorithm.{spec.algorithm.name}.nextAction: logged" if sarsa else ""
            best = isinstance(algorithm, QLearning) and algorithm.next_action == "best"
            learns = "best next action" if best else "log's choice"
            raise StageError(
                f"algorithm.{spec.algorithm.name}: the log has no possible_actions to tell what else a decision could "
                f"have taken, and so nothing of the {learns}; log them{without}"
            )
        alone = f"{(~lists.logged).sum():,} of {len(data):,} decisions"
        warnings.append(f"possible_actions: {alone} have none, as if nothing else had been possible")
    return warnings


def no_choice(data: Transitions, taken: int) -> bool:
    """Whether nowhere in a log, where it tells what was possible, more was than is `taken` at once."""
    lists = data.possible
    if lists is None or (isinstance(lists, Lists) and not lists.logged.any()):
        return False

    def none(rows: slice) -> bool:
        if isinstance(lists, np.ndarray):
            return bool((lists[rows].sum(1) <= taken).all())
        lengths = lists.offsets[1:][rows] - lists.offsets[:-1][rows]
        return bool((lengths[lists.logged[rows]] <= taken).all())

    # All are looked at only where the first ones have none.
    return none(slice(LOOKED_AT)) and none(slice(None))


def _within_atoms(algorithm: C51, returns: np.ndarray) -> None:
    """Refuse atoms that do not reach as far as the log's own returns: values beyond them cannot be learned."""
    returns = returns[~np.isnan(returns)]
    outside = (returns < algorithm.lowest_return) | (returns > algorithm.highest_return)
    if len(returns) and outside.mean() > FEW:
        raise StageError(
            f"algorithm.c51: the log's discounted returns lie between {returns.min():.4g} and {returns.max():.4g}, "
            f"{outside.mean():.0%} of them outside of lowestReturn {algorithm.lowest_return:g} and highestReturn "
            f"{algorithm.highest_return:g}: set those around them, or choose qrDqn"
        )


def check_explores(data: Transitions) -> None:
    """Raise `StageError` for a log that always does the same."""
    if only := _only_action(data):
        raise StageError(
            f"actions: the log takes only {only}: nothing tells what another would have brought; log some exploration"
        )


def _only_action(data: Transitions) -> str:
    """The action that all of a log takes, if there is such a one."""
    if isinstance(data.possible, Lists):
        taken = data.possible.taken(data.action)
        what = "action" if taken.ndim == 1 else "slate of items"
        return f"one {what} of {len(data.possible.described):,}" if (taken == taken[0]).all() else ""
    if data.action.ndim == 2:
        same = (data.action == data.action[0]).all()
        return f"one action, {dict(zip(data.actions, data.action[0].tolist(), strict=True))}" if same else ""
    counts = np.bincount(data.action, minlength=len(data.actions))
    return f"{data.actions[int(counts.argmax())]!r} of {', '.join(data.actions)}" if (counts > 0).sum() == 1 else ""
