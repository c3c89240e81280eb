"""Training data laid out in files, against the same read into memory; both batch by batch, from rows in any order."""

import errno
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components import columns
from components.columns import action_bounds, check_split, load_transitions, open_columns, write_columns
from components.transitions import Lists, Transitions, held_out
from contracts.job import JobSpec
from contracts.stage import StageError, digest_files, stage

MDPS, STEPS = 40, 5
N = MDPS * STEPS
MAP = pa.map_(pa.string(), pa.float64())
SPECS: dict[str, dict[str, Any]] = {
    "discrete": {"actions": ["left", "right", "stay"]},
    "continuous": {"actionSpace": "continuous", "algorithm": {"iql": {}}},
    "parametric": {"actionSpace": "parametric"},
    "slate": {"actionSpace": "slate", "slate": {"size": 2}, "algorithm": {"slateQ": {}}},
}


@pytest.fixture(params=list(SPECS))
def spec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.setattr(columns, "BATCH_ROWS", 17)
    return JobSpec.model_validate(SPECS[request.param] | {"data": {"decisionLog": "log", "holdoutFraction": 0.3}})


@pytest.fixture
def features(tmp_path: Path, spec: JobSpec) -> Path:
    """The features stage, its rows shuffled over three files."""
    rng = np.random.default_rng(0)
    described = rng.integers(3, size=(N, 2)).astype(float)
    maps = pa.array([[("price", p), ("size", s)] for p, s in described.tolist()], MAP)
    if spec.action_space == "discrete":
        action: Any = pa.array([spec.actions[i] for i in rng.integers(3, size=N)])
        listed: Any = pa.array([None if i % 3 == 0 else spec.actions for i in range(N)], pa.list_(pa.string()))
    else:
        action, listed = maps, pa.nulls(N, pa.list_(MAP))
    if spec.action_space == "parametric":
        lists = [
            [own.as_py(), *(maps[int(i)].as_py() for i in rng.integers(N, size=i % 4))] for i, own in enumerate(maps)
        ]
        listed = pa.array([None if i % 5 == 0 else each for i, each in enumerate(lists)], pa.list_(MAP))
    metrics = [[("reward", x), ("clicks", 1.0)] for x in rng.normal(size=N).tolist()]
    if spec.action_space == "slate":
        lists = [[maps[int(i)].as_py() for i in rng.integers(N, size=2 + row % 4)] for row in range(N)]
        listed = pa.array(lists, pa.list_(MAP))
        action = pa.array([[each[-1], each[0]] for each in lists], pa.list_(MAP))
        metrics = [each + [("choice", i % 4)] * (i % 4 < 3) for i, each in enumerate(metrics)]
    table = pa.table(
        {
            "mdp_id": [f"mdp-{row // STEPS}" for row in range(N)],
            "ordinal": [row % STEPS + 1 for row in range(N)],
            "action": action, "possible_actions": listed, "action_probability": rng.uniform(size=N),
            "metrics": pa.array(metrics, MAP),
            "returns": pa.array([[(name, 2 * x) for name, x in each] for each in metrics], MAP),
            "time_diff": rng.uniform(size=N), "terminal": rng.random(N) < 0.2, "truncated": rng.random(N) < 0.1,
            "state_x": pa.array([None if i % 7 == 0 else float(i) for i in range(N)]), "state_y": rng.normal(size=N),
            "action_feature_price": described[:, 0], "action_feature_size": described[:, 1],
        }
    ).take(rng.permutation(N))  # fmt: skip
    with stage("features", tmp_path / "features") as (directory, facts):
        (directory / "training").mkdir()
        for i, (start, stop) in enumerate([(0, 90), (90, 91), (91, N)]):
            pq.write_table(table.slice(start, stop - start), directory / "training" / f"part-{i}.parquet")
        facts |= {"features": ["x", "y"], "action_features": ["price", "size"]}
    return tmp_path / "features"


def arrays(data: Transitions) -> dict[str, np.ndarray]:
    """All of its arrays by name, those of lists with the items as they are described."""
    found = {f.name: getattr(data, f.name) for f in fields(Transitions)}
    if isinstance(lists := found["possible"], Lists):
        found |= {"offsets": lists.offsets, "logged": lists.logged, "items": lists.described[lists.items]}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def test_what_is_mapped_is_what_would_be_read(tmp_path: Path, features: Path, spec: JobSpec) -> None:
    write_columns(features, spec, tmp_path / "columns")
    mapped, digest = open_columns(tmp_path / "columns")
    wanted, _ = load_transitions(features, spec).split(spec)
    assert digest == digest_files(features / "training")
    assert (mapped.features, mapped.actions, mapped.metric_names) == (
        wanted.features,
        wanted.actions,
        ["clicks", "reward"],
    )
    assert arrays(mapped).keys() == arrays(wanted).keys()
    assert mapped.mdp_ids == []
    for name, array in arrays(wanted).items():
        np.testing.assert_array_equal(arrays(mapped)[name], array, err_msg=name)
        assert arrays(mapped)[name].dtype == array.dtype
    assert isinstance(mapped.state, np.memmap)


@pytest.mark.parametrize("spec", ["continuous"], indirect=True)
def test_numbers_lie_between_the_extremes_of_all_rows(features: Path, spec: JobSpec) -> None:
    found = {name: (bounds.low, bounds.high) for name, bounds in action_bounds(features).items()}
    actions = load_transitions(features, spec).action
    assert found == dict(zip(["price", "size"], zip(actions.min(0), actions.max(0), strict=True), strict=True))


@pytest.mark.parametrize("spec", ["continuous"], indirect=True)
def test_a_number_that_never_changes_lies_between_nothing(tmp_path: Path, features: Path, spec: JobSpec) -> None:
    table = pq.read_table(features / "training")
    at = table.schema.get_field_index("action_feature_size")
    shutil.rmtree(features / "training")
    (features / "training").mkdir()
    pq.write_table(
        table.set_column(at, "action_feature_size", pa.array(np.ones(N))), features / "training" / "part.parquet"
    )
    assert action_bounds(features).keys() == {"price"}


@pytest.mark.parametrize("spec", ["continuous"], indirect=True)
def test_of_numbers_that_are_missing_nothing_is_told(features: Path, spec: JobSpec) -> None:
    part = features / "training" / "part-1.parquet"
    row = pq.read_table(part)
    at = row.schema.get_field_index("action_feature_size")
    pq.write_table(row.set_column(at, "action_feature_size", pa.nulls(1, pa.float64())), part)
    with pytest.raises(StageError, match=f"size is missing in 1 of {N} decisions"):
        action_bounds(features)


def test_no_mdp_that_is_held_out_is_laid_out(tmp_path: Path, features: Path, spec: JobSpec) -> None:
    write_columns(features, spec, tmp_path / "columns")
    mapped, _ = open_columns(tmp_path / "columns")
    out = held_out(load_transitions(features, spec).mdp_ids, spec)
    assert len(mapped) == STEPS * (~out).sum()
    assert not out[mapped.mdp].any()


def test_what_a_worker_writes_into_an_array_stays_with_it(tmp_path: Path, features: Path, spec: JobSpec) -> None:
    write_columns(features, spec, tmp_path / "columns")
    mapped, _ = open_columns(tmp_path / "columns")
    mapped.state[:] = 7.0
    assert not (open_columns(tmp_path / "columns")[0].state == 7.0).any()


def test_a_log_with_nothing_to_hold_out_is_refused(tmp_path: Path, features: Path, spec: JobSpec) -> None:
    none = spec.model_copy(update={"data": spec.data.model_copy(update={"holdout_fraction": 1e-9})})
    with pytest.raises(StageError, match="of 40 MDPs 0 are held out"):
        write_columns(features, none, tmp_path / "columns")


@pytest.mark.parametrize(
    ("ordinal", "but", "refused"), [(1, 0, True), (2, 0, True), (2, 1, False), (STEPS, 0, False), (STEPS + 1, 0, False)]
)
def test_a_log_whose_held_out_mdps_all_have_a_hole_is_refused(
    features: Path, spec: JobSpec, ordinal: int, but: int, refused: bool
) -> None:
    files = sorted((features / "training").iterdir())
    rows = pa.concat_tables([pq.read_table(file) for file in files])
    ids = sorted(set(rows["mdp_id"].to_pylist()))
    out = [mdp_id for mdp_id, kept_out in zip(ids, held_out(ids, spec), strict=True) if kept_out]
    hole = pc.and_(pc.equal(rows["ordinal"], ordinal), pc.is_in(rows["mdp_id"], pa.array(out[but:])))
    for file in files:
        file.unlink()
    pq.write_table(rows.filter(pc.invert(hole)), files[0])
    if refused:
        with pytest.raises(StageError, match="every held-out MDP has quarantined decisions before its last"):
            check_split(features, spec)
    else:
        check_split(features, spec)


def test_a_full_disk_is_told_and_not_died_of(
    tmp_path: Path, features: Path, spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StageError, match=r"no room to lay out [\d,]+ bytes in .*\.npy: No space left on device"):
        write_columns(features, spec, tmp_path / "columns")


@pytest.mark.parametrize("spec", ["slate"], indirect=True)
def test_a_slates_items_are_places_in_its_list_and_its_choice_is_no_metric(features: Path, spec: JobSpec) -> None:
    data = load_transitions(features, spec)
    lists, chosen = data.possible, data.chosen
    assert isinstance(lists, Lists)
    assert chosen is not None
    lengths = np.diff(lists.offsets)
    # Shown are the last item and the first, or what is described alike and stands before.
    ends = np.stack([lists.items[lists.offsets[1:] - 1], lists.items[lists.offsets[:-1]]], 1)
    np.testing.assert_array_equal(lists.taken(data.action), ends)
    assert ((data.action >= 0) & (data.action < lengths[:, None])).all()
    assert (data.action[:, 0] != data.action[:, 1]).all()
    assert (ends[:, 0] == ends[:, 1]).any()
    assert data.metric_names == ["clicks", "reward"]
    assert np.bincount(chosen).tolist() == [N // 4, N // 4, N // 2]


@pytest.mark.parametrize("spec", ["slate"], indirect=True)
def test_a_slate_of_what_is_not_listed_is_refused(features: Path, spec: JobSpec) -> None:
    file = features / "training" / "part-2.parquet"
    table = pq.read_table(file)
    action = [[[("price", 77.0)], each[1]] for each in table["action"].to_pylist()]
    table = table.set_column(table.schema.get_field_index("action"), "action", pa.array(action, pa.list_(MAP)))
    pq.write_table(table, file)
    with pytest.raises(StageError, match="own action is not among them"):
        load_transitions(features, spec)


@pytest.mark.parametrize("spec", ["discrete", "parametric"], indirect=True)
def test_of_chosen_mdps_no_other_is_read(features: Path, spec: JobSpec) -> None:
    whole = load_transitions(features, spec)

    def every_seventh(mdp_ids: list[str], lengths: np.ndarray) -> np.ndarray:
        assert mdp_ids == whole.mdp_ids
        assert lengths.tolist() == [STEPS] * MDPS
        return np.arange(MDPS) % 7 == 2

    some = load_transitions(features, spec, every_seventh)
    wanted = whole.select(np.flatnonzero(whole.mdp % 7 == 2))
    for name, array in arrays(wanted).items():
        np.testing.assert_array_equal(arrays(some)[name], array, err_msg=name)
