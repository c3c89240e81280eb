"""Training data in memory: each state once, the next state being the next row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from contracts.hashing import unit_interval
from contracts.job import JobSpec, Reward
from contracts.stage import StageError

UNKNOWN = 0.01
"""What the value of a state that is not known may count for in a return that counts as known."""


@dataclass(frozen=True)
class Lists:
    """What each of N decisions could choose among, of I different items that G features each describe."""

    names: list[str]  # of the G features
    described: np.ndarray  # float32 [I, G], NaN = missing
    offsets: np.ndarray  # int64 [N + 1]: decision i lists the items from offsets[i] to offsets[i + 1]
    items: np.ndarray  # int64, which of the I items
    logged: np.ndarray  # bool [N]: false where the log has no list, and what was taken stands alone

    def select(self, rows: np.ndarray) -> Lists:
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Lists(self.names, self.described, offsets, self.items[places], self.logged[rows])

    def taken(self, action: np.ndarray) -> np.ndarray:
        """int64 [N], of slates [N, k]: which of the I items, of those that stand at these places in the lists."""
        begins = self.offsets[:-1] if action.ndim == 1 else self.offsets[:-1, None]
        return np.asarray(self.items[begins + action])


@dataclass(frozen=True)
class Transitions:
    """N transitions sorted by MDP and ordinal, over F features, A actions and M metrics.

    Actions are discrete, or D numbers each (`actions` names them), or described: then `action` is the place in the
    decision's own list, or the k places of a slate's items.
    """

    features: list[str]
    actions: list[str]
    metric_names: list[str]
    state: np.ndarray  # float32 [N, F], NaN = missing
    action: np.ndarray  # int64 [N], index into actions; of continuous ones float32 [N, D], of slates int64 [N, k]
    propensity: np.ndarray  # float64 [N], NaN = not logged
    possible: np.ndarray | Lists | None  # bool [N, A], actions possible at the decision; None of continuous ones
    metrics: np.ndarray  # float32 [N, M]
    time_diff: (
        np.ndarray
    )  # float64 [N], from a decision to the next, in units of sequence_number; NaN where none is known
    terminal: np.ndarray  # bool [N]
    truncated: np.ndarray  # bool [N], what followed is not known: no transition to learn from
    ordinal: np.ndarray  # int64 [N], 1-based place among all decisions of the MDP, rejected ones counted
    mdp: np.ndarray  # int64 [N], index of the MDP
    mdp_ids: list[str]
    chosen: np.ndarray | None = None  # int64 [N], of slates: the place that was chosen, k where nothing was

    def __len__(self) -> int:
        return len(self.action)

    @property
    def next_row(self) -> np.ndarray:
        """int64 [N]: the row of the next state; a row without one points to itself."""
        rows = np.arange(len(self))
        return np.where(self.terminal | self.truncated, rows, np.minimum(rows + 1, len(self) - 1))

    def returns(self, rows: np.ndarray, rewards: np.ndarray, discounts: np.ndarray) -> np.ndarray:
        """float32 [len(rows)]: discounted sums of the rewards [N] from these rows to their MDPs' ends.

        NaN where the log breaks off before, unless what came later counts for less than a hundredth. `discounts` [N]
        are those of `discount`. The rows must differ.
        """
        ends = np.flatnonzero(self.terminal | self.truncated)
        found = np.full(len(rows), np.nan, np.float32)
        later, total, ahead = len(self), 0.0, 0.0
        # From the last row to the first, so that each goes on from the one after it in its MDP.
        for i in np.argsort(rows)[::-1].tolist():
            row, end = int(rows[i]), int(ends[np.searchsorted(ends, rows[i])])
            reached = min(later, end + 1)
            factors = np.cumprod(discounts[row:reached], dtype=np.float64)
            own = rewards[row] + factors[:-1] @ rewards[row + 1 : reached]
            # `total` is the return of the row `later`, and `ahead` what a value after its MDP's end counts for there.
            total, ahead = (own + factors[-1] * total, factors[-1] * ahead) if later <= end else (own, factors[-1])
            later = row
            if self.terminal[end] or ahead < UNKNOWN:
                found[i] = total
        return found

    def discount(self, reward: Reward) -> np.ndarray:
        """float32 [N]: what a value at the next decision counts for at this one; any number where there is none."""
        if not reward.discount_interval:
            return np.full(len(self), reward.discount, np.float32)
        return np.power(reward.discount, np.nan_to_num(self.time_diff) / reward.discount_interval).astype(np.float32)

    def discount_from_start(self, reward: Reward) -> np.ndarray:
        """float64 [N]: what a value at each row counts for at the first row of its MDP."""
        first = np.diff(self.mdp, prepend=-1) != 0
        steps = np.ones(len(self)) if not reward.discount_interval else self.time_diff / reward.discount_interval
        # What lies between a row and the one before it; where a row was rejected, nothing is known of it.
        since = np.where(first, 0.0, np.nan_to_num(np.roll(steps, 1)))
        elapsed = np.cumsum(since)
        return np.asarray(reward.discount ** (elapsed - elapsed[np.flatnonzero(first)][np.cumsum(first) - 1]))

    def reward(self, weights: dict[str, float]) -> np.ndarray:
        """float32 [N]: dot product of metrics and weights; `StageError` for a metric that the log does not have."""
        return np.asarray(self.metrics @ self.weight_vector(weights))

    def weight_vector(self, weights: dict[str, float]) -> np.ndarray:
        """float32 [M]: the weights in the order of `metric_names`."""
        for name in weights:
            self.metric_index(name, "reward.metricWeights")
        return np.array([weights.get(name, 0.0) for name in self.metric_names], np.float32)

    def metric_index(self, name: str, field: str) -> int:
        if name not in self.metric_names:
            raise StageError(f"{field}: no metric {name!r} in the log; there are {', '.join(self.metric_names)}")
        return self.metric_names.index(name)

    def select(self, rows: np.ndarray) -> Transitions:
        """The given rows; they must keep MDPs whole and in order."""
        fields = (
            "state",
            "action",
            "propensity",
            "metrics",
            "time_diff",
            "terminal",
            "truncated",
            "ordinal",
            "mdp",
        )
        arrays = {name: getattr(self, name)[rows] for name in fields}
        possible = self.possible
        if possible is not None:
            possible = possible.select(rows) if isinstance(possible, Lists) else possible[rows]
        if self.chosen is not None:
            arrays["chosen"] = self.chosen[rows]
        return Transitions(
            self.features, self.actions, self.metric_names, mdp_ids=self.mdp_ids, possible=possible, **arrays
        )

    def split(self, spec: JobSpec) -> tuple[Transitions, Transitions]:
        """Training and held-out transitions, by the MDP's hash and the seed; raises when one of them is empty."""
        rows = check_held_out(self.mdp_ids, spec)[self.mdp]
        return self.select(np.flatnonzero(~rows)), self.select(np.flatnonzero(rows))


def held_out(mdp_ids: list[str], spec: JobSpec) -> np.ndarray:
    """bool: which MDPs are kept out of training, by the hash of their ids and the seed."""
    return np.array([unit_interval(f"holdout-{spec.seed}", m) < spec.data.holdout_fraction for m in mdp_ids], bool)


def check_held_out(mdp_ids: list[str], spec: JobSpec) -> np.ndarray:
    """The same; raises `StageError` where all are, or none is."""
    out = held_out(mdp_ids, spec)
    if out.all() or not out.any():
        raise StageError(
            f"data.holdoutFraction {spec.data.holdout_fraction}: of {len(mdp_ids)} MDPs "
            f"{out.sum()} are held out; both sides need some: log more MDPs"
        )
    return out


def sample_mdps(
    mdp_ids: list[str], lengths: np.ndarray, among: np.ndarray, rows: int, key: str, fewest: int = 1
) -> np.ndarray:
    """bool: which MDPs `among` them are taken, by the hash of their ids, until they have about as many rows.

    No fewer than `fewest` of them are, however long.
    """
    places = np.flatnonzero(among)
    if lengths[places].sum() > rows:
        order = places[np.argsort([unit_interval(key, mdp_ids[i]) for i in places])]
        within = np.cumsum(lengths[order]) - lengths[order] < rows
        places = order[within | (np.arange(len(order)) < fewest)]
    chosen = np.zeros(len(mdp_ids), bool)
    chosen[places] = True
    return chosen
