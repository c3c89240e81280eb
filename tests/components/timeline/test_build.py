"""From a decision log to transitions, on a real Spark."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.timeline.build import (
    LEFT_OUT,
    Plan,
    add_what_followed,
    all_names,
    check_names,
    compact,
    in_sample,
    look_at,
    make_plan,
    number_steps,
)
from components.timeline.outcomes import join_outcomes
from components.timeline.quarantine import REASON, with_reason
from components.timeline.read import read_log
from contracts.decision_log import SCHEMA
from contracts.job import Data, JobSpec
from contracts.stage import StageError

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAN, INFINITY = float("nan"), float("inf")


def decision(mdp: str = "a", step: int = 0, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "mdp_id": mdp,
        "sequence_number": step,
        "event_time": NOON + timedelta(seconds=step),
        "state_features": {"x": float(step)},
        "action": "left",
        "action_probability": 0.5,
        "possible_actions": ["left", "right"],
        "metrics": {"reward": 1.0},
        "truncated": False,
        "policy_version": "p",
    }
    return row | changes


def spec(**sections: Any) -> JobSpec:
    return JobSpec.model_validate({"actions": ["left", "right"], **sections})


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    as_maps = [
        {k: list(v.items()) if isinstance(v, dict) else v for k, v in row.items()} for row in rows
    ]  # fmt: skip
    nullable = pa.schema([field.with_nullable(True) for field in SCHEMA])
    pq.write_table(pa.Table.from_pylist(as_maps, schema=nullable), path)
    return str(path)


def placed(log: Any, job: JobSpec) -> tuple[Any, Plan]:
    """The log's rows in their places, and the plan that put them there."""
    used = in_sample(with_reason(log, job), job)
    plan = make_plan(used, job, look_at(used) or all_names(used))
    return number_steps(compact(used, plan), plan), plan


@pytest.fixture
def checked(spark, tmp_path):
    def check(*rows: dict[str, Any], **sections: Any) -> Any:
        log = read_log(spark, write_parquet(tmp_path / "log.parquet", list(rows)))
        return placed(log, spec(**sections))[0].select("*", "row.*")

    return check


@pytest.fixture
def followed(spark, tmp_path):
    def follow(*rows: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
        job = spec(**sections)
        frame, plan = placed(read_log(spark, write_parquet(tmp_path / "log.parquet", list(rows))), job)
        found = add_what_followed(frame, job, plan).orderBy("mdp_id", "ordinal")
        return [row.asDict(recursive=True) for row in found.collect()]

    return follow


ROWS: list[tuple[str | None, dict[str, Any]]] = [
    ("missing_mdp_id", {"mdp_id": ""}),
    ("missing_mdp_id", {"mdp_id": None}),
    ("missing_event_time", {"event_time": None}),
    ("missing_action", {"action": None}),
    ("missing_action", {"action": ""}),
    ("unknown_action", {"action": "jump"}),
    ("action_not_possible", {"possible_actions": ["right"]}),
    ("action_not_possible", {"possible_actions": [None]}),
    ("probability_out_of_range", {"action_probability": 0.0}),
    ("probability_out_of_range", {"action_probability": 1.5}),
    ("probability_out_of_range", {"action_probability": -0.1}),
    ("probability_out_of_range", {"action_probability": NAN}),
    ("non_finite_feature", {"state_features": {"x": NAN}}),
    ("non_finite_feature", {"state_features": {"x": 1.0, "y": -INFINITY}}),
    ("non_finite_metric", {"metrics": {"reward": INFINITY}}),
    ("non_finite_metric", {"metrics": {"reward": 1e39}}),  # more than float32 holds
    (None, {"action_probability": None}),
    (None, {"possible_actions": None}),
    (None, {"state_features": None}),
    (None, {"metrics": None}),
    (None, {"action_probability": 1.0}),
]


@pytest.fixture(scope="module")
def reasons(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str | None]:
    """By the sequence number: of row i that is 2 i + 1, and of a good one before it in its MDP 2 i."""
    good = [decision(f"mdp {i}", step=2 * i) for i in range(len(ROWS))]
    rows = [*good, *(decision(f"mdp {i}", step=2 * i + 1) | changes for i, (_, changes) in enumerate(ROWS))]
    log = read_log(spark, write_parquet(tmp_path_factory.mktemp("reasons") / "log.parquet", rows))
    found = placed(log, spec())[0].collect()
    assert len(found) == len(rows)
    return {row["sequence_number"]: row[REASON] for row in found}


@pytest.mark.parametrize("place", range(len(ROWS)), ids=lambda place: str(ROWS[place]))
def test_a_row_that_cannot_be_used_has_its_reason(reasons, place):
    assert reasons[2 * place + 1] == ROWS[place][0]
    assert reasons[2 * place] is None


def test_a_row_without_a_place_in_its_mdp_has_its_reason(checked):
    rows = checked(decision(step=0), decision() | {"sequence_number": None}).collect()
    assert {row["sequence_number"]: row[REASON] for row in rows} == {0: None, None: "missing_sequence_number"}


def test_a_name_that_is_there_twice_moves_no_other(spark, tmp_path):
    table = pa.Table.from_pylist([dict(decision(step=i), state_features=[], metrics=[]) for i in range(4)], SCHEMA)
    maps = [[("a", 1.0), ("b", 2.0)]] * 2 + [[("b", 2.0), ("a", 1.0)], [("a", 1.0), ("a", 1.0), ("b", 2.0)]]
    place = table.column_names.index("state_features")
    table = table.set_column(place, "state_features", pa.array(maps, SCHEMA.field("state_features").type))
    pq.write_table(table, tmp_path / "log.parquet")
    frame, plan = placed(read_log(spark, str(tmp_path / "log.parquet")), spec())
    assert plan.features == ["a", "b"]
    assert [row["state"] for row in frame.collect()] == [[1.0, 2.0]] * 4


def test_of_a_step_logged_twice_the_earliest_good_row_stays(checked):
    rows = checked(
        decision(step=1, event_time=NOON + timedelta(seconds=9), action_probability=0.3),
        decision(step=1, event_time=NOON, action_probability=0.4),
        decision(step=1, event_time=NOON - timedelta(seconds=9), action_probability=7.0),
    ).collect()
    reasons = {row["action_probability"]: row[REASON] for row in rows}
    assert reasons == {0.3: "duplicate_step", 0.4: None, 7.0: "probability_out_of_range"}


def test_a_json_line_that_does_not_parse_is_kept_whole(spark, tmp_path):
    good = decision() | {"event_time": NOON.isoformat()}
    (tmp_path / "log.jsonl").write_text(json.dumps(good) + '\n{"mdp_id": "b", "sequence_nu\n')
    rows = with_reason(read_log(spark, str(tmp_path / "log.jsonl")), spec()).collect()
    torn = next(row for row in rows if row[REASON])
    assert torn[REASON] == "unparsable"
    assert torn["_as_it_was"] == '{"mdp_id": "b", "sequence_nu'
    kept = next(row for row in rows if not row[REASON])
    assert kept["state_features"] == {"x": 0.0}
    assert kept["event_time"] == NOON.replace(tzinfo=None)


def test_each_decision_knows_what_followed_it(followed):
    first, second, third = followed(
        decision(step=25, action="right", possible_actions=["right"]),
        decision(step=10),
        decision(step=15, action="right"),
    )
    assert [row["sequence_number"] for row in (first, second, third)] == [10, 15, 25]
    assert [row["ordinal"] for row in (first, second, third)] == [1, 2, 3]
    assert [row["time_diff"] for row in (first, second, third)] == [5, 10, None]
    assert [row["next_action"] for row in (first, second, third)] == ["right", "right", None]
    assert second["possible_next_actions"] == ["right"]
    assert [row["terminal"] for row in (first, second, third)] == [False, False, True]


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_returns_sum_every_metric_to_the_last_step_and_lose_no_reward(followed, discount):
    rewards = [1.0, 0.0, -2.0, 8.0]
    rows = followed(
        *[decision(step=i, metrics={"reward": r, "clicks": 1.0}) for i, r in enumerate(rewards)],
        reward={"discount": discount},
    )
    for i, row in enumerate(rows):
        expected = sum(r * discount**k for k, r in enumerate(rewards[i:]))
        assert row["returns"]["reward"] == pytest.approx(expected, abs=1e-9)
        assert row["returns"]["clicks"] == pytest.approx(sum(discount**k for k in range(len(rewards) - i)))
    assert rows[-1]["terminal"]
    assert rows[-1]["metrics"]["reward"] == 8.0


def test_a_rejected_row_cuts_its_mdp_instead_of_joining_across_it(followed):
    rows = followed(decision(step=0), decision(step=1), decision(step=2, action=None), decision(step=3))
    assert [row["sequence_number"] for row in rows] == [0, 1, 3]
    assert [row["ordinal"] for row in rows] == [1, 2, 4]
    assert [row["truncated"] for row in rows] == [False, True, False]
    assert rows[1]["next_action"] is None
    assert rows[1]["time_diff"] is None
    assert [row["terminal"] for row in rows] == [False, False, True]


def test_a_rejected_last_row_leaves_no_false_end(followed):
    rows = followed(decision(step=0), decision(step=1, metrics={"reward": NAN}))
    assert [(row["terminal"], row["truncated"]) for row in rows] == [(False, True)]


def test_a_rejected_copy_of_a_good_step_is_no_hole(followed):
    rows = followed(decision(step=0), decision(step=1, action_probability=0.0), decision(step=1), decision(step=2))
    assert [row["ordinal"] for row in rows] == [1, 2, 3]
    assert [row["truncated"] for row in rows] == [False, False, False]


def test_where_ends_are_reported_an_mdp_without_one_is_still_under_way(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision("done"), decision("open")]))
    done = {"mdp_id": "done", "sequence_number": 0, "metrics": {"reward": 1.0}, "ended": True}
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(done) + "\n")
    frame, _ = join_outcomes(spark, log, str(tmp_path / "outcomes.jsonl"))
    numbered, plan = placed(frame, spec())
    rows = add_what_followed(numbered, spec(), plan).orderBy("mdp_id").collect()
    assert [(row["terminal"], row["truncated"]) for row in rows] == [(True, False), (False, True)]


@pytest.mark.parametrize("discount", [0.3, 0.9])
def test_a_return_over_an_mdp_too_long_for_its_discount_to_be_a_number(followed, discount):
    """0.3^1500 is under the smallest double: the weights of such an MDP are summed in blocks."""
    rewards = [float(i % 7) for i in range(4000)]
    rows = followed(
        *[decision(step=i, metrics={"reward": r}) for i, r in enumerate(rewards)], decision("short"),
        reward={"discount": discount}, data={"nSteps": [3]},
    )  # fmt: skip
    expected = 0.0
    for row, reward in zip(reversed(rows[:4000]), reversed(rewards), strict=True):
        expected = reward + discount * expected
        assert row["returns"]["reward"] == pytest.approx(expected, rel=1e-12)
        ahead = rewards[row["sequence_number"] :][:3]
        assert row["returns_3"]["reward"] == pytest.approx(sum(r * discount**k for k, r in enumerate(ahead)), abs=1e-9)
    assert rows[4000]["returns"]["reward"] == 1.0


class TestDiscountByTime:
    SECTIONS = {"discount": 0.5, "discountInterval": 10.0}  # noqa: RUF012

    def test_counts_what_lies_between_decisions(self, followed):
        rows = followed(
            *[decision(step=at, metrics={"reward": r}) for at, r in ((0, 1.0), (10, 2.0), (15, 4.0), (100, 8.0))],
            reward=self.SECTIONS, data={"nSteps": [2]},
        )  # fmt: skip
        assert [row["returns"]["reward"] for row in rows] == pytest.approx(
            [1 + 2 * 0.5 + 4 * 0.5**1.5 + 8 * 0.5**10, 2 + 4 * 0.5**0.5 + 8 * 0.5**9, 4 + 8 * 0.5**8.5, 8]
        )
        assert [row["returns_2"]["reward"] for row in rows] == pytest.approx(
            [1 + 2 * 0.5, 2 + 4 * 0.5**0.5, 4 + 8 * 0.5**8.5, 8]
        )

    def test_over_gaps_that_discount_everything(self, followed):
        rows = followed(*[decision(step=10**6 * i, metrics={"reward": 2.0**i}) for i in range(4)], reward=self.SECTIONS)
        assert [row["returns"]["reward"] for row in rows] == [1.0, 2.0, 4.0, 8.0]


class TestStates:
    def test_are_columns_whatever_the_order_of_their_names(self, followed):
        rows = followed(
            decision(step=0, state_features={"y": 2.0, "x": 1.0, "a b": 0.5}),
            decision(step=1, state_features={"x": 3.0, "a b": 1.5, "y": 4.0}),
            decision(step=2, state_features={"y": 5.0}),
            decision(step=3, state_features=None),
        )
        assert [(row["state_x"], row["state_y"], row["state_a b"]) for row in rows] == [
            (1.0, 2.0, 0.5), (3.0, 4.0, 1.5), (None, 5.0, None), (None, None, None),
        ]  # fmt: skip
        assert "state_features" not in rows[0]

    def test_of_the_next_decision_are_written_where_they_are_asked_for(self, followed):
        rows = followed(
            *[decision(step=i, state_features={"x": float(i), "y": -1.0}) for i in range(3)],
            decision(step=3, action=None),
            data={"fullRows": True},
        )
        assert [(row["next_state_x"], row["next_state_y"]) for row in rows] == [(1.0, -1.0), (2.0, -1.0), (None, None)]


def test_a_duplicate_is_no_hole(followed):
    rows = followed(decision(step=0), decision(step=1), decision(step=1), decision(step=2))
    assert [row["truncated"] for row in rows] == [False, False, False]
    assert [row["time_diff"] for row in rows] == [1, 1, None]


@pytest.mark.parametrize(
    ("last_step", "expected"),
    [
        ("terminal", [(True, False), (True, False)]),
        ("truncated", [(False, True), (False, True)]),
        ("column", [(True, False), (False, True)]),
    ],
)
def test_the_job_says_what_the_last_step_is(followed, last_step, expected):
    rows = followed(decision("a"), decision("b", truncated=True), data={"lastStep": last_step})
    assert [(row["terminal"], row["truncated"]) for row in rows] == expected


def test_outcomes_reported_later_join_their_decision(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision(step=i) for i in range(3)]))
    outcomes = [
        {"mdp_id": "a", "sequence_number": 0, "metrics": {"reward": 5.0, "clicks": 2.0}},
        {"mdp_id": "a", "sequence_number": 1, "metrics": {"clicks": 3.0, "reward": None}, "truncated": True}
        | {"ended": True},
        {"mdp_id": "nobody", "sequence_number": 0, "metrics": {"clicks": 9.0}},
    ]
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(o) + "\n" for o in outcomes))
    with (tmp_path / "outcomes.jsonl").open("a") as stream:
        stream.write('{"mdp_id": "a", "sequ\n')
        for clicks, second in ((7.0, 2), (6.0, 1)):
            late = {"mdp_id": "a", "sequence_number": 2, "metrics": {"clicks": clicks}}
            stream.write(json.dumps(late | {"event_time": (NOON + timedelta(seconds=second)).isoformat()}) + "\n")
        stream.write('{"mdp_id": "a", "sequence_number": 0, "metrics": {"reward": "much"}}\n')
    aside = tmp_path / "aside"
    frame, counts = join_outcomes(spark, log, str(tmp_path / "outcomes.jsonl"), quarantine=aside)
    assert counts == {"reports": 7, "unparsable": 2, "unmatched": 1, "late": 0, "open": 0}
    joined = frame.orderBy("sequence_number").collect()
    assert [row["metrics"] for row in joined] == [
        {"reward": 5.0, "clicks": 2.0},
        {"reward": 1.0, "clicks": 3.0},
        {"reward": 1.0, "clicks": 7.0},
    ]
    assert [row["ended"] for row in joined] == [False, True, False]
    assert [row["truncated"] for row in joined] == [False, True, False]
    rejected = {row["quarantine_reason"]: row["_as_it_was"] for row in spark.read.parquet(str(aside)).collect()}
    assert rejected.keys() == {"unparsable", "unreadable_metrics"}
    assert rejected["unparsable"] == '{"mdp_id": "a", "sequ'


def test_a_metric_that_is_reported_as_no_number_rejects_its_decision(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision(step=i) for i in range(2)]))
    (tmp_path / "nan.jsonl").write_text('{"mdp_id": "a", "sequence_number": 1, "metrics": {"sale": NaN}}\n')
    joined, counts = join_outcomes(spark, log, str(tmp_path / "nan.jsonl"))
    assert counts["unparsable"] == 0
    found = with_reason(joined, spec()).orderBy("sequence_number").collect()
    assert [row["quarantine_reason"] for row in found] == [None, "non_finite_metric"]


def test_a_report_that_does_not_say_when_is_late_where_the_job_waits(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision(step=i) for i in range(3)]))
    decided = [row["event_time"] for row in log.orderBy("sequence_number").collect()]
    times = {0: None, 1: decided[1] + timedelta(seconds=60), 2: decided[2] + timedelta(seconds=61)}
    with (tmp_path / "outcomes.jsonl").open("w") as stream:
        for step, time in times.items():
            report = {"mdp_id": "a", "sequence_number": step, "metrics": {"sale": 1.0}}
            stream.write(json.dumps(report | {"event_time": time and time.isoformat()}) + "\n")
    joined, counts = join_outcomes(spark, log, str(tmp_path / "outcomes.jsonl"), Data(outcomeWaitSeconds=60))
    assert counts["late"] == 2
    assert ["sale" in row["metrics"] for row in joined.orderBy("sequence_number").collect()] == [False, True, False]
    (tmp_path / "timeless.jsonl").write_text('{"mdp_id": "a", "sequence_number": 0, "metrics": {"sale": 1.0}}\n')
    with pytest.raises(StageError, match=r"data\.outcomeWaitSeconds: no outcome of .* says when it came"):
        join_outcomes(spark, log, str(tmp_path / "timeless.jsonl"), Data(outcomeWaitSeconds=60))


class TestWhatTheJobLeavesOut:
    def test_a_sample_is_of_whole_mdps_and_the_same_every_day(self, checked):
        days = [[decision(f"m{m}", step) for m in range(200) for step in steps] for steps in ((0, 1), (1, 2))]
        kept = []
        for rows in days:
            frame = checked(*rows, data={"sampleFraction": 0.3})
            counts = {
                r["mdp_id"]: r["count"] for r in frame.where(f"not {LEFT_OUT}").groupBy("mdp_id").count().collect()
            }
            assert set(counts.values()) == {2}
            kept.append(set(counts))
        assert kept[0] == kept[1]
        assert 40 <= len(kept[0]) <= 80

    @pytest.mark.parametrize(
        ("data", "kept"),
        [
            ({"minLength": 3}, {"m3", "m4", "m9"}),
            ({"maxLength": 3}, {"m1", "m2", "m3"}),
            ({"maxLengthPercentile": 0.8}, {"m1", "m2", "m3", "m4"}),
            ({"minLength": 2, "maxLength": 4, "maxLengthPercentile": 0.99}, {"m2", "m3", "m4"}),
        ],
    )
    def test_limits_of_length(self, followed, data, kept):
        rows = followed(*[decision(f"m{n}", step) for n in (1, 2, 3, 4, 9) for step in range(n)], data=data)
        assert {row["mdp_id"] for row in rows} == kept


MOST_STEPS = 2**31 - 1
"""As many as Spark can look ahead."""


class TestReturnsAhead:
    def test_over_n_decisions(self, followed):
        rewards = [1.0, 2.0, 4.0, 8.0, 16.0]
        rows = followed(
            *[decision(step=i, metrics={"reward": r}) for i, r in enumerate(rewards)],
            reward={"discount": 0.5}, data={"nSteps": [1, 3, MOST_STEPS]},
        )  # fmt: skip
        assert [row["returns_1"]["reward"] for row in rows] == pytest.approx(rewards, rel=1e-12)
        expected = [sum(r * 0.5**k for k, r in enumerate(rewards[i : i + 3])) for i in range(5)]
        assert [row["returns_3"]["reward"] for row in rows] == pytest.approx(expected), "an end adds nothing more"
        assert [row[f"returns_{MOST_STEPS}"] for row in rows] == [row["returns"] for row in rows]

    def test_are_not_known_where_the_log_breaks_off_before(self, followed):
        cut = followed(*[decision(step=i) for i in range(4)], data={"nSteps": [2], "lastStep": "truncated"})
        assert [row["returns_2"] is None for row in cut] == [False, False, False, True]
        rows = [decision(step=0), decision(step=1), decision(step=2, action=None), decision(step=3), decision(step=4)]
        holed = followed(*rows, data={"nSteps": [2]})
        assert [(row["sequence_number"], row["returns_2"] is None) for row in holed] == [
            (0, False), (1, True), (3, False), (4, False),
        ]  # fmt: skip

    def test_metrics_to_come_end_where_the_log_breaks_off(self, followed):
        rows = followed(
            *[decision(step=i, metrics={"reward": float(i)}) for i in (0, 1)],
            decision(step=2, action=None), decision(step=3, metrics={"reward": 3.0}),
            data={"rewardTimelineSteps": 4},
        )  # fmt: skip
        ahead = [[metrics["reward"] for metrics in row["reward_timeline"]] for row in rows]
        assert ahead == [[0, 1], [1], [3]]

    def test_metrics_to_come_in_their_order(self, followed):
        rows = followed(
            *[decision(step=i, metrics={"reward": float(i)}) for i in range(4)], data={"rewardTimelineSteps": 3}
        )
        ahead = [[metrics["reward"] for metrics in row["reward_timeline"]] for row in rows]
        assert ahead == [[0, 1, 2], [1, 2, 3], [2, 3], [3]]


def test_outcomes_that_tell_of_no_end_leave_the_last_step_to_the_job(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision()]))
    (tmp_path / "outcomes.jsonl").write_text(
        json.dumps({"mdp_id": "a", "sequence_number": 0, "metrics": {"reward": 1.0}}) + "\n"
    )
    frame, _ = join_outcomes(spark, log, str(tmp_path / "outcomes.jsonl"))
    assert "ended" not in frame.columns


def test_of_two_rows_alike_but_for_their_metrics_the_same_one_stays(checked):
    rows = [decision(metrics={"reward": float(i)}) for i in range(6)]
    kept = [
        [r["metrics"]["reward"] for r in checked(*order).where(f"{REASON} is null").collect()]
        for order in (rows, rows[::-1], rows[3:] + rows[:3])
    ]
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0]) == 1


def test_of_two_rows_that_miss_different_features_the_same_one_stays(spark, tmp_path):
    """A hash leaves nulls out: what is missing must count as well."""
    kept = []
    for order in ((1, 2), (2, 1)):
        rows = [{"x": 1.0, "y": None}, {"x": None, "y": 1.0}]
        table = [decision(state_features=rows[i - 1]) for i in order]
        log = read_log(spark, write_parquet(tmp_path / f"{order[0]}.parquet", table))
        numbered, _ = placed(log, spec())
        [row] = numbered.where(f"{REASON} is null").collect()
        kept.append(row["state"])
    assert kept[0] == kept[1]


def test_reported_ends_outweigh_what_the_job_says_of_last_steps(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision("done"), decision("open")]))
    done = {"mdp_id": "done", "sequence_number": 0, "metrics": {"reward": 1.0}, "ended": True}
    (tmp_path / "outcomes.jsonl").write_text(json.dumps(done) + "\n")
    frame, _ = join_outcomes(spark, log, str(tmp_path / "outcomes.jsonl"))
    job = spec(data={"lastStep": "truncated"})
    numbered, plan = placed(frame, job)
    rows = add_what_followed(numbered, job, plan).orderBy("mdp_id").collect()
    assert [(row["terminal"], row["truncated"]) for row in rows] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("names", "said"),
    [(["Age", "age"], "are one column to Spark"), (["a", "a"], "is there twice"), (["a`b"], "a backtick cannot")],
)
def test_features_that_cannot_be_columns_are_refused_by_name(names, said):
    with pytest.raises(StageError, match=said):
        check_names(names)


def test_outcomes_that_come_late_are_counted_and_change_nothing(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision(step=0)]))
    reports = [(50.0, 59), (70.0, 61)]
    lines = [
        {
            "mdp_id": "a", "sequence_number": 0, "metrics": {"reward": value},
            "event_time": (NOON + timedelta(seconds=seconds)).isoformat(),
        }
        for value, seconds in reports
    ]  # fmt: skip
    (tmp_path / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for wait, expected, late, still in ((60, 50.0, 1, 0), (3600, 70.0, 0, 1), (None, 70.0, 0, 0)):
        frame, counts = join_outcomes(spark, log, str(tmp_path / "outcomes.jsonl"), Data(outcomeWaitSeconds=wait))
        assert [row["metrics"]["reward"] for row in frame.collect()] == [expected]
        assert (counts["late"], counts["open"]) == (late, still)


def test_whether_ends_are_reported_is_told_by_what_had_come_when_all_waits_were_over(spark, tmp_path):
    """Of others, too. Else a run over the same days would give another result once later outcomes are there."""
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision(step=0)]))
    mine = {"mdp_id": "a", "sequence_number": 0, "metrics": {"reward": 1.0}, "event_time": NOON.isoformat()}
    ended = mine | {"ended": True}
    other, late = {"mdp_id": "another day's"}, {"event_time": (NOON + timedelta(seconds=61)).isoformat()}
    reports = {
        "none": [mine],
        "late": [mine, ended | late, ended | other | late],
        "mine": [ended],
        "other": [mine, ended | other],
    }
    for told, lines in reports.items():
        outcomes = tmp_path / f"{told}.jsonl"
        outcomes.write_text("".join(json.dumps(line) + "\n" for line in lines))
        frame, _ = join_outcomes(spark, log, str(outcomes), Data(outcomeWaitSeconds=60))
        assert ("ended" in frame.columns) == (told in ("mine", "other"))


def test_last_steps_that_nobody_tells_of_are_not_guessed(spark, tmp_path):
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision(step=0, truncated=None)]))
    line = {"mdp_id": "a", "sequence_number": 0, "metrics": {"reward": 1.0}}
    for name, told in (("nobody", {}), ("end", {"ended": False}), ("cut", {"truncated": True})):
        outcomes = tmp_path / f"{name}.jsonl"
        outcomes.write_text(json.dumps(line | told) + "\n")
        if told:
            join_outcomes(spark, log, str(outcomes), Data(lastStep="column"))
            continue
        with pytest.raises(StageError, match=r"lastStep column: neither the log nor .* tells of last steps"):
            join_outcomes(spark, log, str(outcomes), Data(lastStep="column"))


def test_rows_are_sorted_once_before_all_that_takes_their_order_for_granted(spark, tmp_path):
    """What goes by (mdp_id, sequence_number) sees the rows of a step in their full order: nothing sorts in between."""
    log = read_log(spark, write_parquet(tmp_path / "log.parquet", [decision("a"), decision("b")]))
    job = spec(data={"minLength": 2, "nSteps": [2]}, reward={"discountInterval": 2.0})
    numbered, plan = placed(log, job)
    frame = add_what_followed(numbered, job, plan)
    plan_text = frame._sc._jvm.PythonSQLUtils.explainString(frame._jdf.queryExecution(), "simple")
    operators = re.findall(r"^[ +:-]*(Sort|Window|Exchange)\b.*$", plan_text, re.MULTILINE)
    # From the last to the first: the order that is written, windows, the one order below them, the one exchange.
    assert operators == ["Sort", *["Window"] * (len(operators) - 3), "Sort", "Exchange"]
    sorts = [line for line in plan_text.splitlines() if re.match(r"^[ +:-]*Sort\b", line)]
    assert "tie" in sorts[-1]
    assert "state" in sorts[-1]
