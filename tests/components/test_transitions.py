"""Training data in memory, as read from the features stage's files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.columns import load_transitions
from components.transitions import Transitions
from contracts.hashing import unit_interval
from contracts.job import JobSpec, Reward
from contracts.stage import StageError, stage

SPEC = JobSpec.model_validate({"actions": ["left", "right", "stay"]})
MAP = pa.map_(pa.string(), pa.float64())
SCHEMA = pa.schema(
    {
        "mdp_id": pa.string(),
        "ordinal": pa.int32(),
        "action": pa.string(),
        "action_probability": pa.float64(),
        "possible_actions": pa.list_(pa.string()),
        "metrics": MAP,
        "returns": MAP,
        "time_diff": pa.int64(),
        "terminal": pa.bool_(),
        "truncated": pa.bool_(),
        "state_speed": pa.float64(),
        "state_tilt": pa.float64(),
    }
)


def row(mdp_id: str, ordinal: int, **changes: Any) -> dict[str, Any]:
    return {
        "mdp_id": mdp_id,
        "ordinal": ordinal,
        "action": "left",
        "action_probability": 0.5,
        "possible_actions": None,
        "metrics": {"gain": 1.0},
        "returns": {"gain": 1.0},
        "time_diff": 1,
        "terminal": False,
        "truncated": False,
        "state_speed": 0.0,
        "state_tilt": 0.0,
    } | changes


def load(directory: Path, *files: list[dict[str, Any]], spec: JobSpec = SPEC) -> Transitions:
    with stage("features", directory / "features") as (output, facts):
        (output / "training").mkdir()
        for i, rows in enumerate(files):
            maps = [{k: list(v.items()) if isinstance(v, dict) else v for k, v in r.items()} for r in rows]
            pq.write_table(pa.Table.from_pylist(maps, SCHEMA), output / "training" / f"part-{i}.parquet")
        facts["features"] = ["speed", "tilt"]
    return load_transitions(directory / "features", spec)


def test_shuffled_rows_come_back_sorted_by_mdp_and_ordinal(tmp_path: Path) -> None:
    rows = [row(m, o, state_speed=10.0 * i + o) for i, m in enumerate("abc") for o in range(1, 12)]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    data = load(tmp_path, shuffled[:20], shuffled[20:])
    assert data.mdp_ids == ["a", "b", "c"]
    assert data.mdp.tolist() == [0] * 11 + [1] * 11 + [2] * 11
    assert data.state[:, 0].tolist() == [r["state_speed"] for r in rows]
    assert len(data) == 33


def test_a_row_is_read_as_it_was_written(tmp_path: Path) -> None:
    data = load(tmp_path, [row("a", 1, action="stay", state_speed=0.25, state_tilt=-2.0, terminal=True)])
    assert data.features == ["speed", "tilt"]
    assert data.actions == ["left", "right", "stay"]
    assert data.state.tolist() == [[0.25, -2.0]]
    assert data.action.tolist() == [2]
    assert data.propensity.tolist() == [0.5]
    assert data.metrics.tolist() == [[1.0]]
    assert (data.terminal.tolist(), data.truncated.tolist()) == ([True], [False])
    assert [a.dtype for a in (data.state, data.metrics, data.action, data.propensity, data.possible)] == [
        np.float32,
        np.float32,
        np.int64,
        np.float64,
        np.bool_,
    ]


def test_missing_features_and_propensities_are_nan(tmp_path: Path) -> None:
    data = load(tmp_path, [row("a", 1, state_tilt=None), row("a", 2, action_probability=None)])
    np.testing.assert_array_equal(np.isnan(data.state), [[False, True], [False, False]])
    np.testing.assert_array_equal(np.isnan(data.propensity), [False, True])


def test_absent_metrics_and_absent_maps_count_as_zero(tmp_path: Path) -> None:
    metrics = [{"gain": 1.0, "cost": 2.0}, {}, None, {"cost": 3.0}, None]
    returns = {"gain": 9.0, "cost": 8.0}
    data = load(tmp_path, [row("a", i, metrics=m, returns=returns) for i, m in enumerate(metrics)])
    assert data.metric_names == ["cost", "gain"]
    assert data.metrics.tolist() == [[2, 1], [0, 0], [0, 0], [3, 0], [0, 0]]


def test_a_metric_without_a_value_counts_as_zero(tmp_path: Path) -> None:
    data = load(tmp_path, [row("a", 1, metrics={"gain": None}), row("a", 2)])
    assert data.metrics.tolist() == [[0], [1]]


def test_no_list_of_possible_actions_means_all_of_them(tmp_path: Path) -> None:
    lists = [None, ["left", "stay"], None, ["left"], ["stay", "left", "right"]]
    data = load(tmp_path, [row("a", i, possible_actions=p) for i, p in enumerate(lists)])
    wanted = [[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert data.possible.astype(int).tolist() == wanted


def test_possible_actions_that_the_job_does_not_have_are_ignored(tmp_path: Path) -> None:
    data = load(tmp_path, [row("a", 1, possible_actions=["left", "jump"])])
    assert data.possible.tolist() == [[True, False, False]]


def test_the_next_row_never_crosses_into_another_mdp(tmp_path: Path) -> None:
    data = load(
        tmp_path,
        [
            row("a", 1),
            row("a", 2, truncated=True),
            row("a", 3),
            row("a", 4, terminal=True),
            row("b", 1, truncated=True),
            row("c", 1),
            row("c", 2, terminal=True),
        ],
    )
    assert data.next_row.tolist() == [1, 1, 3, 3, 4, 6, 6]
    assert (data.mdp[data.next_row] == data.mdp).all()


def test_the_reward_is_the_weighted_sum_of_the_metrics(tmp_path: Path) -> None:
    data = load(tmp_path, [row("a", 1, metrics={"gain": 3.0, "cost": 4.0}, returns={"gain": 1.0, "cost": 1.0})])
    assert data.reward({"gain": 2.0, "cost": -0.5}).tolist() == [4.0]
    assert data.reward({"cost": 1.0}).tolist() == [4.0]
    assert data.weight_vector({"gain": 2.0}).tolist() == [0.0, 2.0]


def test_returns_are_known_where_the_log_goes_on_to_the_end_or_for_long_enough(tmp_path: Path) -> None:
    ends = {2: {"truncated": True}, 4: {"terminal": True}}
    rows = [row("a", i, **ends.get(i, {})) for i in range(1, 5)] + [row("b", 1, terminal=True)]
    long = [row("c", i, truncated=i == 3) for i in range(1, 4)]
    data = load(tmp_path, rows + long)
    rewards = np.array([1, 2, 4, 8, 16, 32, 64, 128], np.float32)
    discounts = np.array([0.5, 1.0, 0.25, 9.0, 9.0, 0.1, 0.05, 1.0], np.float32)
    # Of the first MDP's first two nothing is known two steps on; what comes after c counts for half a hundredth there.
    wanted = np.array([np.nan, np.nan, 6, 8, 16, 32 + 6.4 + 0.64, np.nan, np.nan])
    np.testing.assert_allclose(data.returns(np.arange(8), rewards, discounts), wanted, rtol=1e-6)
    for some in ([5, 3], [0], [7, 5, 2], [4, 6]):
        np.testing.assert_allclose(data.returns(np.array(some), rewards, discounts), wanted[some], rtol=1e-6)


def test_a_metric_that_the_log_does_not_have_is_refused_with_those_it_has(tmp_path: Path) -> None:
    data = load(tmp_path, [row("a", 1)])
    with pytest.raises(StageError, match=r"reward\.metricWeights: no metric 'sales' in the log; there are gain"):
        data.reward({"sales": 1.0})
    with pytest.raises(StageError, match=r"evaluation\.gate\.metric: no metric 'sales'"):
        data.metric_index("sales", "evaluation.gate.metric")


def test_no_rows_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no transition to learn from"):
        load(tmp_path, [])


@pytest.fixture
def many(tmp_path: Path) -> Transitions:
    return load(tmp_path, [row(f"mdp-{m:03}", o, state_speed=float(o)) for m in range(400) for o in (1, 2, 3)])


def job(fraction: float, seed: int = 0) -> JobSpec:
    return SPEC.model_copy(update={"seed": seed, "data": SPEC.data.model_copy(update={"holdout_fraction": fraction})})


def ids(data: Transitions) -> set[str]:
    return {data.mdp_ids[m] for m in data.mdp}


def test_a_split_is_by_mdp_and_loses_nothing(many: Transitions) -> None:
    train, held_out = many.split(job(0.3))
    assert not ids(train) & ids(held_out)
    assert len(ids(train) | ids(held_out)) == 400
    assert len(train) + len(held_out) == len(many)
    for side in (train, held_out):
        assert side.state[:, 0].tolist() == [1, 2, 3] * len(ids(side))


def test_a_split_holds_out_about_the_asked_share(many: Transitions) -> None:
    _, held_out = many.split(job(0.3))
    assert abs(len(ids(held_out)) - 120) < 4 * np.sqrt(400 * 0.3 * 0.7)


def test_an_mdps_side_depends_on_seed_and_id_alone(many: Transitions) -> None:
    _, held_out = many.split(job(0.3))
    half, _ = many.split(job(0.5, seed=9))
    _, again = half.split(job(0.3))
    assert ids(again) == ids(half) & ids(held_out)
    assert ids(held_out) == {m for m in many.mdp_ids if unit_interval("holdout-0", m) < 0.3}
    assert ids(many.split(job(0.3, seed=1))[1]) != ids(held_out)


def test_a_larger_share_keeps_what_was_held_out_held_out(many: Transitions) -> None:
    assert ids(many.split(job(0.3))[1]) < ids(many.split(job(0.5))[1])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_split_with_an_empty_side_is_refused(many: Transitions, fraction: float) -> None:
    with pytest.raises(StageError, match=r"data\.holdoutFraction .*400 MDPs.*both sides need some"):
        many.split(job(fraction))


class TestDiscount:
    def test_is_the_same_for_every_step_where_the_job_says_no_more(self, tmp_path: Path) -> None:
        data = load(tmp_path, [row("a", 1), row("a", 2), row("b", 1)])
        reward = Reward(discount=0.5)
        assert data.discount(reward).tolist() == [0.5] * 3
        assert data.discount_from_start(reward).tolist() == [1.0, 0.5, 1.0]

    def test_counts_what_lies_between_decisions(self, tmp_path: Path) -> None:
        rows = [row("a", 1, time_diff=20), row("a", 2, time_diff=5), row("a", 3, time_diff=None, terminal=True)]
        data = load(tmp_path, [*rows, row("b", 1, time_diff=None, terminal=True)])
        reward = Reward(discount=0.5, discountInterval=10.0)
        assert data.discount(reward)[:2].tolist() == pytest.approx([0.25, 0.5**0.5])
        assert data.discount_from_start(reward).tolist() == pytest.approx([1.0, 0.25, 0.25 * 0.5**0.5, 1.0])


def test_a_continuous_action_without_one_of_its_numbers_is_refused(tmp_path: Path) -> None:
    table = pa.table(
        {
            "mdp_id": ["a", "a"], "ordinal": [1, 2], "action_feature_price": [1.0, 2.0],
            "action_feature_size": [None, 3.0], "action_probability": [None, 0.5], "state_x": [0.0, 1.0],
            "metrics": pa.array([[("reward", 1.0)]] * 2, pa.map_(pa.string(), pa.float64())),
            "returns": pa.array([[("reward", 1.0)]] * 2, pa.map_(pa.string(), pa.float64())),
            "time_diff": [1, None], "terminal": [False, True], "truncated": [False, False],
        }
    )  # fmt: skip
    with stage("features", tmp_path / "features") as (directory, facts):
        (directory / "training").mkdir()
        pq.write_table(table, directory / "training" / "part.parquet")
        facts |= {"features": ["x"], "action_features": ["price", "size"]}
    spec = JobSpec.model_validate({"actionSpace": "continuous", "algorithm": {"iql": {}}})
    with pytest.raises(StageError, match="action: size is missing in 1 of 2 decisions"):
        load_transitions(tmp_path / "features", spec)
