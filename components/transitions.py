"""Training data in memory: each state once, the next state being the next row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from contracts.hashing import unit_interval
from contracts.job import JobSpec, Reward
from contracts.stage import StageError, read_record
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX


@dataclass(frozen=True)
class Lists:
    """What each of N decisions could choose among, of K different actions that G features each describe."""

    names: list[str]  # of the G features
    described: np.ndarray  # float32 [K, G], NaN = missing
    offsets: np.ndarray  # int64 [N + 1]: decision i lists the items from offsets[i] to offsets[i + 1]
    items: np.ndarray  # int64, which of the K actions
    logged: np.ndarray  # bool [N]: false where the log has no list, and what was taken stands alone

    def select(self, rows: np.ndarray) -> Lists:
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Lists(self.names, self.described, offsets, self.items[places], self.logged[rows])

    def taken(self, action: np.ndarray) -> np.ndarray:
        """int64 [N]: which of the K actions, of those that stand at these places in the lists."""
        return np.asarray(self.items[self.offsets[:-1] + action])


@dataclass(frozen=True)
class Transitions:
    """N transitions sorted by MDP and ordinal, over F features, A actions and M metrics.

    Actions are discrete, or D numbers each (`actions` names them), or described: then `action` is the place in the
    decision's own list.
    """

    features: list[str]
    actions: list[str]
    metric_names: list[str]
    state: np.ndarray  # float32 [N, F], NaN = missing
    action: np.ndarray  # int64 [N], index into actions; of continuous ones float32 [N, D]
    propensity: np.ndarray  # float64 [N], NaN = not logged
    possible: np.ndarray | Lists | None  # bool [N, A], actions possible at the decision; None of continuous ones
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
            "metrics",
            "returns",
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
        return Transitions(
            self.features, self.actions, self.metric_names, mdp_ids=self.mdp_ids, possible=possible, **arrays
        )

    def split(self, spec: JobSpec) -> tuple[Transitions, Transitions]:
        """Training and held-out transitions, by the MDP's hash and the seed; raises when one of them is empty."""
        out = held_out(self.mdp_ids, spec)
        if out.all() or not out.any():
            raise StageError(
                f"data.holdoutFraction {spec.data.holdout_fraction}: of {len(self.mdp_ids)} MDPs "
                f"{out.sum()} are held out; both sides need some: log more MDPs"
            )
        rows = out[self.mdp]
        return self.select(np.flatnonzero(~rows)), self.select(np.flatnonzero(rows))


def held_out(mdp_ids: list[str], spec: JobSpec) -> np.ndarray:
    """bool: which MDPs are kept out of training, by the hash of their ids and the seed."""
    return np.array([unit_interval(f"holdout-{spec.seed}", m) < spec.data.holdout_fraction for m in mdp_ids], bool)


def load_transitions(features: str | Path, spec: JobSpec) -> Transitions:
    """Read the features stage's training data; raises `StageError` where there is none."""
    record = read_record(features)
    names: list[str] = record["features"]
    table = ds.dataset(Path(features) / "training", format="parquet").to_table()
    table = table.sort_by([("mdp_id", "ascending"), ("ordinal", "ascending")])
    if len(table) == 0:
        raise StageError(f"{features}: there is no transition to learn from")
    ids = table["mdp_id"].combine_chunks().dictionary_encode()
    metric_names, returns = _map_columns(table["returns"])
    _, metrics = _map_columns(table["metrics"], metric_names)
    actions, action, possible = {
        "discrete": _named_actions, "parametric": _described_actions, "continuous": _continuous_actions
    }[spec.action_space](table, spec, record)  # fmt: skip
    return Transitions(
        features=names,
        actions=actions,
        metric_names=metric_names,
        state=np.stack([_floats(table[STATE_PREFIX + name]) for name in names], 1).astype(np.float32),
        action=action,
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


Read = tuple[list[str], np.ndarray, np.ndarray | Lists | None]
"""The names, what was taken, and what was possible."""


def _named_actions(table: pa.Table, spec: JobSpec, _: dict[str, Any]) -> Read:
    possible = np.ones((len(table), len(spec.actions)), bool)
    lists = table["possible_actions"].combine_chunks()
    if lists.null_count < len(table):
        listed = lists.is_valid().to_numpy(zero_copy_only=False)
        possible[listed] = False
        parents = pc.list_parent_indices(lists).to_numpy()
        indices = pc.index_in(pc.list_flatten(lists), value_set=pa.array(spec.actions)).fill_null(-1).to_numpy()
        possible[parents[indices >= 0], indices[indices >= 0]] = True
    action = pc.index_in(table["action"], value_set=pa.array(spec.actions)).to_numpy()
    return list(spec.actions), action.astype(np.int64), possible


def _continuous_actions(table: pa.Table, _: JobSpec, record: dict[str, Any]) -> Read:
    names: list[str] = record["action_features"]
    action = np.stack([_floats(table[ACTION_PREFIX + name]) for name in names], 1).astype(np.float32)
    missing = np.isnan(action).sum(0)
    if missing.any():
        most = int(missing.argmax())
        raise StageError(
            f"action: {names[most]} is missing in {missing[most]:,} of "
            f"{len(action):,} decisions; a continuous action has all of its numbers each time"
        )
    return names, action, None


def _described_actions(table: pa.Table, _: JobSpec, record: dict[str, Any]) -> Read:
    """The lists of described actions; a decision without one lists what was taken alone."""
    names: list[str] = record["action_features"]
    chosen = np.stack([_floats(table[ACTION_PREFIX + name]) for name in names], 1).astype(np.float32)
    lists = table["possible_actions"].combine_chunks()
    unlisted = lists.is_null().to_numpy(zero_copy_only=False)
    lengths = np.where(unlisted, 1, pc.list_value_length(lists).fill_null(1).to_numpy())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    offered = np.empty((offsets[-1], len(names)), np.float32)
    alone = np.repeat(unlisted, lengths)
    offered[alone] = chosen[unlisted]
    if not unlisted.all():
        offered[~alone] = _map_columns(pa.chunked_array([pc.list_flatten(lists)]), names, absent=np.nan)[1]
    # Compared by their bytes: what is missing is missing alike, and 0 has no sign.
    everything = np.concatenate([offered, chosen]) + np.float32(0)
    everything[np.isnan(everything)] = np.nan
    as_bytes = np.ascontiguousarray(everything).view(np.dtype((np.void, 4 * len(names)))).ravel()
    _values, first, which = np.unique(as_bytes, return_index=True, return_inverse=True)
    items, taken = which[: len(offered)], which[len(offered) :]
    row = np.repeat(np.arange(len(table)), lengths)
    same = np.flatnonzero(items == taken[row])
    rows, at = np.unique(row[same], return_index=True)
    if len(rows) < len(table):
        raise StageError("possible_actions: a decision's own action is not among them as it was logged")
    action = same[at] - offsets[:-1]
    return [], action.astype(np.int64), Lists(names, everything[first], offsets, items.astype(np.int64), ~unlisted)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    """float64, null as NaN."""
    values: np.ndarray = column.cast(pa.float64()).fill_null(float("nan")).to_numpy()
    return values


def _map_columns(
    column: pa.ChunkedArray, names: list[str] | None = None, absent: float = 0.0
) -> tuple[list[str], np.ndarray]:
    """The keys of a map column (or those given) and its values as float32 [rows, keys], `absent` where none is."""
    maps = column.combine_chunks()
    # A row's entries lie between its offsets; a null row has none.
    counts = np.diff(maps.offsets.to_numpy())
    start, stop = maps.offsets[0].as_py(), maps.offsets[-1].as_py()
    keys = maps.keys.slice(start, stop - start)
    if names is None:
        names = sorted(pc.unique(keys).to_pylist())
    values = np.full((len(maps), len(names)), absent, np.float32)
    rows = np.repeat(np.arange(len(maps)), counts)
    columns = pc.index_in(keys, value_set=pa.array(names, pa.string())).fill_null(-1).to_numpy()
    known = columns >= 0
    values[rows[known], columns[known]] = maps.items.slice(start, stop - start).fill_null(absent).to_numpy()[known]
    return names, values
