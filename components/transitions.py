"""Training data in memory: each state once, the next state being the next row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from contracts.hashing import unit_interval
from contracts.job import JobSpec, Reward
from contracts.stage import StageError, read_record
from contracts.transitions import STATE_PREFIX


@dataclass(frozen=True)
class Transitions:
    """N transitions sorted by MDP and ordinal, over F features, A actions and M metrics."""

    features: list[str]
    actions: list[str]
    metric_names: list[str]
    state: np.ndarray  # float32 [N, F], NaN = missing
    action: np.ndarray  # int64 [N], index into actions
    propensity: np.ndarray  # float64 [N], NaN = not logged
    possible: np.ndarray  # bool [N, A], actions possible at the decision
    metrics: np.ndarray  # float32 [N, M]
    returns: np.ndarray  # float32 [N, M], discounted sums to the MDP's last logged step
    time_diff: (
        np.ndarray
    )  # float64 [N], from a decision to the next, in units of sequence_number; NaN where none is known
    terminal: np.ndarray  # bool [N]
    truncated: np.ndarray  # bool [N], what followed is not known: no transition to learn from
    ordinal: np.ndarray  # int64 [N], 1-based place among all decisions of the MDP, rejected ones counted
    mdp: np.ndarray  # int64 [N], index of the MDP
    mdp_ids: list[str]

    def __len__(self) -> int:
        return len(self.action)

    @property
    def next_row(self) -> np.ndarray:
        """int64 [N]: the row of the next state; a row without one points to itself."""
        rows = np.arange(len(self))
        return np.where(self.terminal | self.truncated, rows, np.minimum(rows + 1, len(self) - 1))

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
            "possible",
            "metrics",
            "returns",
            "time_diff",
            "terminal",
            "truncated",
            "ordinal",
            "mdp",
        )
        arrays = {name: getattr(self, name)[rows] for name in fields}
        return Transitions(self.features, self.actions, self.metric_names, mdp_ids=self.mdp_ids, **arrays)

    def split(self, spec: JobSpec) -> tuple[Transitions, Transitions]:
        """Training and held-out transitions, by the MDP's hash and the seed; raises when one of them is empty."""
        held_out = np.array(
            [unit_interval(f"holdout-{spec.seed}", m) < spec.data.holdout_fraction for m in self.mdp_ids]
        )
        if held_out.all() or not held_out.any():
            raise StageError(
                f"data.holdoutFraction {spec.data.holdout_fraction}: of {len(self.mdp_ids)} MDPs "
                f"{held_out.sum()} are held out; both sides need some: log more MDPs"
            )
        rows = held_out[self.mdp]
        return self.select(np.flatnonzero(~rows)), self.select(np.flatnonzero(rows))


def load_transitions(features: str | Path, spec: JobSpec) -> Transitions:
    """Read the features stage's training data; `StageError` for actions that are not discrete."""
    if spec.action_space != "discrete":
        raise StageError(
            f"actionSpace {spec.action_space}: timeline, features and normalization take such actions, but no "
            "algorithm here learns them yet: set actionSpace: discrete and name the actions"
        )
    names: list[str] = read_record(features)["features"]
    table = ds.dataset(Path(features) / "training", format="parquet").to_table()
    table = table.sort_by([("mdp_id", "ascending"), ("ordinal", "ascending")])
    ids = table["mdp_id"].combine_chunks().dictionary_encode()
    n = len(table)
    metric_names, returns = _map_columns(table["returns"])
    _, metrics = _map_columns(table["metrics"], metric_names)
    possible = np.ones((n, len(spec.actions)), bool)
    lists = table["possible_actions"].combine_chunks()
    if lists.null_count < n:
        listed = lists.is_valid().to_numpy(zero_copy_only=False)
        possible[listed] = False
        parents = pc.list_parent_indices(lists).to_numpy()
        indices = pc.index_in(pc.list_flatten(lists), value_set=pa.array(spec.actions)).fill_null(-1).to_numpy()
        possible[parents[indices >= 0], indices[indices >= 0]] = True
    action = pc.index_in(table["action"], value_set=pa.array(spec.actions)).to_numpy()
    if n == 0:
        raise StageError(f"{features}: there is no transition to learn from")
    return Transitions(
        features=names,
        actions=list(spec.actions),
        metric_names=metric_names,
        state=np.stack([_floats(table[STATE_PREFIX + name]) for name in names], 1).astype(np.float32),
        action=action.astype(np.int64),
        propensity=_floats(table["action_probability"]),
        possible=possible,
        metrics=metrics,
        returns=returns,
        time_diff=_floats(table["time_diff"]),
        terminal=table["terminal"].to_numpy(),
        truncated=table["truncated"].to_numpy(),
        ordinal=table["ordinal"].to_numpy().astype(np.int64),
        mdp=ids.indices.to_numpy().astype(np.int64),
        mdp_ids=ids.dictionary.to_pylist(),
    )


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64, null as NaN."""
    values: np.ndarray = column.cast(pa.float64()).fill_null(float("nan")).to_numpy()
    return values


def _map_columns(column: pa.ChunkedArray, names: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """The keys of a map column (or those given) and its values as float32 [rows, keys], 0 where absent."""
    maps = column.combine_chunks()
    # A row's entries lie between its offsets; a null row has none.
    counts = np.diff(maps.offsets.to_numpy())
    start, stop = maps.offsets[0].as_py(), maps.offsets[-1].as_py()
    keys = maps.keys.slice(start, stop - start)
    if names is None:
        names = sorted(pc.unique(keys).to_pylist())
    values = np.zeros((len(maps), len(names)), np.float32)
    rows = np.repeat(np.arange(len(maps)), counts)
    columns = pc.index_in(keys, value_set=pa.array(names, pa.string())).fill_null(-1).to_numpy()
    known = columns >= 0
    values[rows[known], columns[known]] = maps.items.slice(start, stop - start).fill_null(0.0).to_numpy()[known]
    return names, values
