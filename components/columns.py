"""The features stage's training data as arrays: read batch by batch, into memory or into files that are mapped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from components.transitions import Lists, Transitions, check_held_out
from contracts.job import Bounds, JobSpec, Slate
from contracts.progress import report
from contracts.stage import StageError, digest_files, read_record
from contracts.transitions import ACTION_PREFIX, STATE_PREFIX

BATCH_ROWS = 65_536
DESCRIPTION, LISTS = "columns.json", ("described", "offsets", "items", "logged")
Make = Callable[[str, type, tuple[int, ...]], np.ndarray]
"""(name, type, shape) -> room for an array."""
Choose = Callable[[list[str], np.ndarray], np.ndarray]
"""(ids of MDPs, sorted, and how many rows each has) -> bool, which of them are read."""


def load_transitions(features: str | Path, spec: JobSpec, choose: Choose | None = None) -> Transitions:
    """The training data in memory, all or the chosen MDPs of it; raises `StageError` where there is none."""
    return _read(Path(features), spec, lambda _, dtype, shape: np.empty(shape, dtype), choose)


def check_split(features: str | Path, spec: JobSpec) -> None:
    """Raise `StageError` for training data of which nothing is held out, or no MDP that evaluation could read.

    It leaves out those with quarantined decisions before their last. Where there are no rows at all, nothing is said.
    """
    keys = ds.dataset(Path(features) / "training", format="parquet").to_table(["mdp_id", "ordinal"])
    mdps = keys.group_by("mdp_id").aggregate([("ordinal", "max"), ("ordinal", "count")])
    if len(mdps) == 0:
        return
    out = check_held_out(mdps["mdp_id"].to_pylist(), spec)
    if not pc.equal(mdps["ordinal_max"], mdps["ordinal_count"]).to_numpy()[out].any():
        raise StageError(
            "evaluation: every held-out MDP has quarantined decisions before its last; mend the log, or set "
            "data.holdoutFraction higher"
        )


def write_columns(features: str | Path, spec: JobSpec, directory: Path) -> None:
    """Lay out the rows of the MDPs that are not held out, a file for each column.

    In memory are about a hundred bytes a row meanwhile, and all lists of described actions. Raises `StageError` where
    there are no rows, none is held out, or there is no room for the files.
    """
    directory.mkdir(parents=True)
    made: list[np.memmap] = []

    def in_file(name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        path = directory / f"{name}.npy"
        made.append(np.lib.format.open_memmap(path, "w+", dtype, shape))
        size = path.stat().st_size
        # Space that is missing would end the process when a page is written.
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise StageError(f"training: no room to lay out {size:,} bytes in {path}: {error.strerror}") from None
        return made[-1]

    found = _read(Path(features), spec, in_file, lambda mdp_ids, _: ~check_held_out(mdp_ids, spec), say=True)
    for array in made:
        array.flush()
    description: dict[str, Any] = {name: getattr(found, name) for name in ("features", "actions", "metric_names")}
    if isinstance(lists := found.possible, Lists):
        description["lists"] = lists.names
        for name in LISTS:
            np.save(directory / f"{name}.npy", getattr(lists, name))
    description["digest"] = digest_files(Path(features) / "training")
    (directory / DESCRIPTION).write_text(json.dumps(description))


def open_columns(directory: Path) -> tuple[Transitions, str]:
    """What `write_columns` has laid out, mapped, and the digest of the training data that it is from.

    MDPs have numbers and no ids. What is not asked for is not read; what is written into the arrays stays with the
    process.
    """
    description = json.loads((directory / DESCRIPTION).read_text())
    digest, names = description.pop("digest"), description.pop("lists", None)
    arrays = {file.stem: np.load(file, mmap_mode="c") for file in directory.glob("*.npy")}
    if names is not None:
        arrays["possible"] = Lists(names, *(arrays.pop(name) for name in LISTS))
    return Transitions(**description, **{"possible": None, **arrays}, mdp_ids=[]), digest


def action_bounds(features: Path) -> dict[str, Bounds]:
    """Between which each number of continuous actions lies in the training data; none for one that never changes.

    Raises `StageError` where a decision lacks a number.
    """
    numbers = _Numbers(read_record(features)["action_features"])
    table = ds.dataset(features / "training", format="parquet").to_table(numbers.columns)
    action = numbers.read(table)["action"]
    numbers.finish(action)
    known = zip(numbers.names, action.min(0).tolist(), action.max(0).tolist(), strict=True)
    return {name: Bounds(low=low, high=high) for name, low, high in known if low < high}


def _read(features: Path, spec: JobSpec, make: Make, choose: Choose | None, say: bool = False) -> Transitions:
    """The rows sorted by MDP and ordinal, in two passes: their keys, which say where each row goes, and the rest."""
    record = read_record(features)
    data = ds.dataset(features / "training", format="parquet")
    total = data.count_rows()
    if total == 0:
        raise StageError(f"{features}: there is no transition to learn from")
    mdp, ordinal, metrics, known = np.empty(total, np.int64), np.empty(total, np.int64), set[str](), dict[str, int]()
    for rows, batch in _batches(data, ["mdp_id", "ordinal", "returns"]):
        ids = batch["mdp_id"].dictionary_encode()
        numbers = [known.setdefault(mdp_id, len(known)) for mdp_id in ids.dictionary.to_pylist()]
        mdp[rows] = np.array(numbers, np.int64)[ids.indices.to_numpy()]
        ordinal[rows] = batch["ordinal"].to_numpy()
        metrics.update(pc.unique(_entries(batch["returns"])[1]).to_pylist())
    mdp_ids, metric_names = sorted(known), sorted(metrics - {spec.slate.choice} if spec.slate else metrics)
    mdp = np.argsort([known[mdp_id] for mdp_id in mdp_ids])[mdp]
    order = np.lexsort((ordinal, mdp))
    if choose:
        order = order[choose(mdp_ids, np.bincount(mdp))[mdp[order]]]
    place = np.full(total, -1)
    place[order] = np.arange(len(order))

    names: list[str] = record["features"]
    actions: _Named | _Numbers | _Described
    match spec.action_space:
        case "discrete":
            actions = _Named(list(spec.actions))
        case "continuous":
            actions = _Numbers(record["action_features"])
        case _:
            actions = _Described(record["action_features"], spec.slate)
    arrays: dict[str, np.ndarray] = {}
    wanted = [*(STATE_PREFIX + name for name in names), *actions.columns, "action_probability", "metrics"]
    for rows, batch in _batches(data, [*wanted, "time_diff", "terminal", "truncated"]):
        to = place[rows]
        if (to < 0).any():
            batch, to = batch.filter(pa.array(to >= 0)), to[to >= 0]
        columns = {
            "state": np.stack([_floats(batch[STATE_PREFIX + name]) for name in names], 1).astype(np.float32),
            "propensity": _floats(batch["action_probability"]),
            "metrics": _by_key(batch["metrics"], metric_names),
            "time_diff": _floats(batch["time_diff"]),
            "terminal": batch["terminal"].to_numpy(zero_copy_only=False),
            "truncated": batch["truncated"].to_numpy(zero_copy_only=False),
            **actions.read(batch),
        }
        for name, values in columns.items():
            if name not in arrays:
                arrays[name] = make(name, values.dtype.type, (len(order), *values.shape[1:]))
            arrays[name][to] = values
        if say:
            report(rows.stop, total, "laying out columns")
    for name, values in (("mdp", mdp), ("ordinal", ordinal)):
        arrays[name] = make(name, np.int64, (len(order),))
        arrays[name][:] = values[order]
    lists = actions.finish(place[place >= 0])
    return Transitions(
        names, actions.names, metric_names, possible=arrays.pop("possible", lists), mdp_ids=mdp_ids, **arrays
    )


class _Named:
    """Discrete actions: the place among the job's, and which of those were possible."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.columns = names, ["action", "possible_actions"]

    def read(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        values = pa.array(self.names)
        possible = np.ones((len(batch), len(self.names)), bool)
        lists = batch["possible_actions"]
        if lists.null_count < len(batch):
            listed = lists.is_valid().to_numpy(zero_copy_only=False)
            possible[listed] = False
            parents = pc.list_parent_indices(lists).to_numpy()
            indices = pc.index_in(pc.list_flatten(lists), value_set=values).fill_null(-1).to_numpy()
            possible[parents[indices >= 0], indices[indices >= 0]] = True
        action = pc.index_in(batch["action"], value_set=values).to_numpy()
        return {"action": action.astype(np.int64), "possible": possible}

    def finish(self, _: np.ndarray) -> None:
        """All is in its place."""


class _Numbers:
    """Continuous actions."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.columns = [ACTION_PREFIX + name for name in names]
        self.rows, self.missing = 0, np.zeros(len(names), np.int64)

    def read(self, batch: pa.RecordBatch | pa.Table) -> dict[str, np.ndarray]:
        action = np.stack([_floats(batch[column]) for column in self.columns], 1).astype(np.float32)
        self.rows += len(action)
        self.missing += np.isnan(action).sum(0)
        return {"action": action}

    def finish(self, _: np.ndarray) -> None:
        if self.missing.any():
            most = int(self.missing.argmax())
            raise StageError(
                f"action: {self.names[most]} is missing in {self.missing[most]:,} of "
                f"{self.rows:,} decisions; a continuous action has all of its numbers each time"
            )


class _Described:
    """Actions of lists, or slates of them; a decision without one lists what was taken alone.

    Each different item is held once.
    """

    def __init__(self, features: list[str], slate: Slate | None) -> None:
        self.names: list[str] = []
        self.features, self.slate = features, slate
        taken = ["action"] if slate else [ACTION_PREFIX + name for name in features]
        self.columns = [*taken, "possible_actions"]
        self.known: dict[bytes, int] = {}
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        """Of each batch its lists' lengths, their items, and which of them the log has."""

    def read(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        size = self.slate.size if self.slate else 1
        if self.slate:
            taken = _by_key(pc.list_flatten(batch["action"]), self.features, absent=np.nan)
        else:
            taken = np.stack([_floats(batch[ACTION_PREFIX + name]) for name in self.features], 1).astype(np.float32)
        lists = batch["possible_actions"]
        unlisted = lists.is_null().to_numpy(zero_copy_only=False)
        lengths = np.where(unlisted, size, pc.list_value_length(lists).fill_null(size).to_numpy())
        offered = np.empty((lengths.sum(), len(self.features)), np.float32)
        alone = np.repeat(unlisted, lengths)
        offered[alone] = taken[np.repeat(unlisted, size)]
        if not unlisted.all():
            offered[~alone] = _by_key(pc.list_flatten(lists), self.features, absent=np.nan)
        items = self._numbered(np.concatenate([offered, taken]))
        items, taken = items[: len(offered)], items[len(offered) :].reshape(-1, size)
        self.parts.append((lengths, items, ~unlisted))
        places = self._places(lengths, items, taken)
        if not self.slate:
            return {"action": places[:, 0]}
        choice = _by_key(batch["metrics"], [self.slate.choice])[:, 0].astype(np.int64)
        return {"action": places, "chosen": np.where(choice == 0, size, choice - 1)}

    def _places(self, lengths: np.ndarray, items: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """int64 [rows, k]: where in its row's list each item `taken` stands, of several alike each another one."""
        rows, different = np.arange(len(taken)), len(self.known)
        listed = np.repeat(rows, lengths) * different + items
        order = np.argsort(listed, kind="stable")
        wanted = rows[:, None] * different + taken
        before = [(taken[:, :j] == taken[:, j, None]).sum(1) for j in range(taken.shape[1])]
        at = np.minimum(np.searchsorted(listed[order], wanted) + np.stack(before, 1), len(order) - 1)
        if (listed[order[at]] != wanted).any():
            raise StageError("possible_actions: a decision's own action is not among them as it was logged")
        return np.asarray(order[at] - (np.cumsum(lengths) - lengths)[:, None])

    def _numbered(self, described: np.ndarray) -> np.ndarray:
        """int64: the number of each item, compared by its bytes: what is missing is missing alike, 0 has no sign."""
        described = described + np.float32(0)
        described[np.isnan(described)] = np.nan
        as_bytes = np.ascontiguousarray(described).view(np.dtype((np.void, 4 * len(self.features)))).ravel()
        different, which = np.unique(as_bytes, return_inverse=True)
        numbers = [self.known.setdefault(item, len(self.known)) for item in different.tolist()]
        return np.array(numbers, np.int64)[which]

    def finish(self, to: np.ndarray) -> Lists:
        """The lists, of which those read one after another belong to the rows `to`."""
        lengths, items, logged = map(np.concatenate, zip(*self.parts, strict=True))
        ordered = sorted(self.known)
        described = np.frombuffer(b"".join(ordered), np.float32).reshape(-1, len(self.features)).copy()
        items = np.argsort([self.known[item] for item in ordered])[items]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Lists(self.features, described, offsets, items, logged).select(np.argsort(to))


def _batches(data: ds.Dataset, columns: list[str]) -> Iterator[tuple[slice, pa.RecordBatch]]:
    """The columns of all rows in their order, and which rows those of each batch are."""
    start = 0
    for batch in data.to_batches(columns, batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1):
        yield slice(start, start + len(batch)), batch
        start += len(batch)


def _floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """float64, null as NaN."""
    values: np.ndarray = column.cast(pa.float64()).fill_null(float("nan")).to_numpy()
    return values


def _entries(maps: pa.MapArray) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """Of a map column's entries the row, the key and the value."""
    # A row's entries lie between its offsets; a null row has none.
    counts = np.diff(maps.offsets.to_numpy())
    start, length = maps.offsets[0].as_py(), int(counts.sum())
    return np.repeat(np.arange(len(maps)), counts), maps.keys.slice(start, length), maps.items.slice(start, length)


def _by_key(maps: pa.MapArray, names: list[str], absent: float = 0.0) -> np.ndarray:
    """float32 [rows, names]: a map column's values, `absent` where there is none."""
    rows, keys, items = _entries(maps)
    values = np.full((len(maps), len(names)), absent, np.float32)
    columns = pc.index_in(keys, value_set=pa.array(names, pa.string())).fill_null(-1).to_numpy()
    known = columns >= 0
    values[rows[known], columns[known]] = items.fill_null(absent).to_numpy()[known]
    return values
