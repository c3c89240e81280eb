"""Every form that a decision log comes in, read to one table; on a real Spark."""

from __future__ import annotations

import csv
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest

from components.timeline.outcomes import join_outcomes
from components.timeline.quarantine import REASON, with_reason
from components.timeline.read import AS_IT_WAS, UNREADABLE, read_log, read_outcomes
from contracts.job import Data, JobSpec
from contracts.stage import StageError, TransientError

JOB = JobSpec.model_validate({"actions": ["left", "right"]})

ROW: dict[str, Any] = {
    "mdp_id": "7",
    "sequence_number": 3,
    "event_time": "2026-01-01T12:00:00Z",
    "state_features": {"x": 1.5, "y": -2.0},
    "action": "left",
    "action_probability": 0.25,
    "possible_actions": ["left", "right"],
    "metrics": {"clicks": 2.0},
}
READ = ROW | {"event_time": datetime(2026, 1, 1, 12)}


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(spark, path: str, **data: Any) -> list[dict[str, Any]]:
    rows = read_log(spark, path, Data.model_validate(data)).orderBy("mdp_id", "sequence_number").collect()
    return [row.asDict(recursive=True) for row in rows]


def contract(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in READ}


class TestTheForms:
    def test_json_lines(self, spark, tmp_path):
        [row] = read(spark, jsonl(tmp_path / "log.jsonl", ROW))
        assert contract(row) == READ
        assert json.loads(row[AS_IT_WAS]) == ROW
        assert row[UNREADABLE] is None

    def test_csv_with_maps_as_json(self, spark, tmp_path):
        with (tmp_path / "log.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(ROW)
            writer.writerow([json.dumps(v) if isinstance(v, (dict, list)) else v for v in ROW.values()])
        [row] = read(spark, str(tmp_path / "log.csv"))
        assert contract(row) == READ

    @pytest.mark.parametrize("form", ["parquet", "orc"])
    def test_columnar_files_with_types_of_their_own(self, spark, tmp_path, form):
        table = pa.table(
            {
                "mdp_id": pa.array([7], pa.int64()),
                "sequence_number": pa.array([3], pa.int32()),
                "event_time": pa.array([datetime(2026, 1, 1, 12)], pa.timestamp("us")),
                "state_features": pa.array([[("x", 1.5), ("y", -2.0)]], pa.map_(pa.string(), pa.float32())),
                "action": ["left"],
                "action_probability": pa.array([0.25], pa.float32()),
                "possible_actions": [["left", "right"]],
                "metrics": [{"clicks": 2}],
            }
        )
        path = tmp_path / f"log.{form}"
        pq.write_table(table, path) if form == "parquet" else orc.write_table(table, path)
        assert [contract(row) for row in read(spark, str(path))] == [READ]

    def test_a_table_by_its_name(self, spark, tmp_path):
        read_log(spark, jsonl(tmp_path / "log.jsonl", ROW)).drop(AS_IT_WAS, UNREADABLE).createOrReplaceTempView(
            "decided"
        )
        assert [contract(row) for row in read(spark, "decided", format="table")] == [READ]
        with pytest.raises(StageError, match=r"data\.decisionLog nowhere: no such table"):
            read(spark, "nowhere", format="table")

    def test_what_the_suffix_does_not_tell_the_job_does(self, spark, tmp_path):
        path = jsonl(tmp_path / "log.txt", ROW)
        assert [contract(row) for row in read(spark, path, format="json")] == [READ]

    def test_several_paths_and_globs(self, spark, tmp_path):
        paths = [jsonl(tmp_path / f"{day}.jsonl", ROW | {"mdp_id": day}) for day in "abc"]
        assert [row["mdp_id"] for row in read(spark, ",".join(paths[:2]))] == ["a", "b"]
        assert [row["mdp_id"] for row in read(spark, f"{tmp_path}/[bc].jsonl")] == ["b", "c"]

    def test_a_pattern_with_braces_and_a_path_with_a_space(self, spark, tmp_path):
        for day in "abc":
            jsonl(tmp_path / "a log" / f"{day}.jsonl", ROW | {"mdp_id": day})
        found = read(spark, f"{tmp_path}/a log/{{a,b}}.jsonl, {tmp_path}/a log/c.jsonl")
        assert [row["mdp_id"] for row in found] == ["a", "b", "c"]
        (tmp_path / "a log" / "d.csv").write_text("mdp_id,sequence_number,action\nd,1,left\n")
        assert [row["mdp_id"] for row in read(spark, f"file://{tmp_path}/a log/d.csv")] == ["d"]

    def test_several_partitioned_roots_and_globs_over_partitions(self, spark, tmp_path):
        for root in ("decisions", "backfill"):
            for day in ("2026-01-01", "2026-01-02"):
                jsonl(tmp_path / root / f"ds={day}" / "part.json", ROW | {"mdp_id": f"{root} {day}"})
            (tmp_path / root / "_SUCCESS").touch()
        window = {"first": "2026-01-02", "last": "2026-01-02"}
        both = f"{tmp_path}/decisions,{tmp_path}/backfill"
        assert [r["mdp_id"] for r in read(spark, both, partition=window)] == [
            "backfill 2026-01-02",
            "decisions 2026-01-02",
        ]
        found = read(spark, f"{tmp_path}/decisions/ds=2026-01-0[12]", partition=window)
        assert [row["mdp_id"] for row in found] == ["decisions 2026-01-02"]

    def test_csv_files_whose_columns_stand_in_another_order(self, spark, tmp_path):
        (tmp_path / "log").mkdir()
        (tmp_path / "log" / "a.csv").write_text("mdp_id,sequence_number,action\na,1,left\n")
        (tmp_path / "log" / "b.csv").write_text("action,reward,mdp_id,sequence_number\nright,2.5,b,1\n")
        first, second = read(spark, str(tmp_path / "log"))
        assert (first["mdp_id"], first["action"], first["metrics"]) == ("a", "left", None)
        assert (second["mdp_id"], second["action"], second["metrics"]) == ("b", "right", {"reward": 2.5})

    def test_a_missing_one_of_several_is_named(self, spark, tmp_path):
        path = jsonl(tmp_path / "log.jsonl", ROW)
        with pytest.raises(StageError, match=r"data\.decisionLog .*nowhere: no such file"):
            read(spark, f"{path},{tmp_path}/nowhere")

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_what_lies_in_another_file_system(self, spark, tmp_path, suffix):
        """Hadoop's view of several: URIs with a scheme and a place, as those of object stores."""
        settings = spark._jsc.hadoopConfiguration()
        settings.set(f"fs.viewfs.mounttable.{suffix}.link./lake", f"file://{tmp_path}")
        day = tmp_path / "the logs" / "ds=2026-01-02"
        day.mkdir(parents=True)
        rows = [{"mdp_id": "a", "sequence_number": 1, "action": "left"}]
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), day / "a.parquet")
        elif suffix == "csv":
            (day / "a.csv").write_text("mdp_id,sequence_number,action\na,1,left\n")
        else:
            jsonl(day / "a.jsonl", *rows)
        for path in ("the logs", "the logs/ds=2026-*", f"the logs/ds=2026-01-02/a.{suffix}"):
            [row] = read(spark, f"viewfs://{suffix}/lake/{path}")
            assert (row["mdp_id"], row["action"]) == ("a", "left"), path

    @pytest.mark.parametrize("uri", ["s3a://logs/decisions", "unheard-of://logs/decisions"])
    def test_a_store_without_its_connector_is_refused(self, spark, uri):
        with pytest.raises(StageError, match=rf"data\.decisionLog {uri}: Spark has no connector for it among its jars"):
            read(spark, uri)

    def test_a_store_that_cannot_be_reached_may_be_at_another_time(self, spark):
        uri = "hdfs://no-such-host.invalid/log"
        with pytest.raises(TransientError, match=rf"data\.decisionLog {uri}: it cannot be reached: .*no-such-host"):
            read(spark, uri)

    def test_reagent_s_rows_as_they_are(self, spark, tmp_path):
        rows = [
            {
                "ds": "2019-01-01", "mdp_id": "0", "sequence_number": n, "state_features": {"0": 0.1 * n, "1": -1.0},
                "action": "1", "reward": 1.0, "action_probability": 0.98, "possible_actions": [] if n else ["0", "1"],
                "metrics": {"reward": 1.0} if n else {},
            }
            for n in (0, 1)
        ]  # fmt: skip
        first, second = read(spark, jsonl(tmp_path / "cartpole.json", *rows))
        assert first["metrics"] == second["metrics"] == {"reward": 1.0}
        assert second["state_features"] == {"0": 0.1, "1": -1.0}
        assert (first["possible_actions"], second["possible_actions"]) == (["0", "1"], None), "it leaves out an end's"
        assert datetime(2019, 1, 1) <= first["event_time"] < second["event_time"] < datetime(2019, 1, 2)


class TestTheColumns:
    def test_have_the_names_that_the_job_gives_them(self, spark, tmp_path):
        row = {"user": "u", "at": 1, "chosen": "left", "gain": 2.0, "age": 30, "city": None}
        columns = {"mdpId": "user", "sequenceNumber": "at", "action": "chosen", "reward": "gain"}
        path = jsonl(tmp_path / "log.jsonl", row)
        [found] = read(spark, path, columns=columns, stateColumns=["age", "city"])
        assert (found["mdp_id"], found["sequence_number"], found["action"]) == ("u", 1, "left")
        assert found["metrics"] == {"reward": 2.0}
        assert found["state_features"] == {"age": 30.0, "city": None}

    def test_that_a_log_lacks_are_named(self, spark, tmp_path):
        pq.write_table(pa.table({"mdp_id": ["a"], "action": ["left"]}), tmp_path / "log.parquet")
        with pytest.raises(StageError, match="column sequence_number is missing; found mdp_id, action"):
            read(spark, str(tmp_path / "log.parquet"))
        with pytest.raises(StageError, match=r"column when \(data\.columns\.sequenceNumber\) is missing"):
            read(spark, str(tmp_path / "log.parquet"), columns={"sequenceNumber": "when"})
        with pytest.raises(StageError, match=r"data\.stateColumns: age is missing"):
            read(spark, str(tmp_path / "log.parquet"), columns={"sequenceNumber": "action"}, stateColumns=["age"])

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (pa.array([5, 9], pa.int16()), [5, 9]),
            (pa.array([5.0, 9.0]), [5, 9]),
            (pa.array(["5", "9"]), [5, 9]),
            (pa.array([datetime(1970, 1, 1, 0, 0, 5), datetime(1970, 1, 1, 0, 0, 9)]), [5_000_000, 9_000_000]),
            (pa.array(["1970-01-01T00:00:05Z", "1970-01-01 00:00:09"]), [5_000_000, 9_000_000]),
            (pa.array([date(1970, 1, 1), date(1970, 1, 2)]), [0, 86_400_000_000]),
        ],
    )
    def test_a_sequence_number_is_anything_that_orders(self, spark, tmp_path, values, expected):
        table = pa.table({"mdp_id": ["a", "a"], "sequence_number": values, "action": ["left", "left"]})
        pq.write_table(table, tmp_path / "log.parquet")
        assert [row["sequence_number"] for row in read(spark, str(tmp_path / "log.parquet"))] == expected

    def test_a_log_without_times_is_given_some_in_its_order(self, spark, tmp_path):
        rows = [ROW | {"sequence_number": n} for n in (1, 2)]
        for row in rows:
            del row["event_time"]
        first, second = read(spark, jsonl(tmp_path / "log.jsonl", *rows))
        assert first["event_time"] < second["event_time"]

    def test_a_sequence_number_that_is_a_time_is_the_time_of_a_log_without(self, spark, tmp_path):
        row = {"mdp_id": "a", "sequence_number": "2026-01-01T12:00:00Z", "action": "left", "ds": "2026-01-01"}
        [found] = read(spark, jsonl(tmp_path / "log.jsonl", row))
        assert found["event_time"] == datetime(2026, 1, 1, 12)

    @pytest.mark.parametrize(
        ("number", "time"),
        [
            (-5_000_000, datetime(1969, 12, 31, 23, 59, 55)),
            (1_767_225_600_000_001, datetime(2026, 1, 1, 0, 0, 0, 1)),
            (1_767_225_600_000_001_999, datetime(2026, 1, 1, 0, 0, 0, 1)),
        ],
        ids=["before the first", "microseconds", "nanoseconds"],
    )
    def test_any_whole_number_makes_a_time(self, spark, tmp_path, number, time):
        row = {"mdp_id": "a", "sequence_number": number, "action": "left"}
        [found] = with_reason(read_log(spark, jsonl(tmp_path / "log.jsonl", row)), JOB).collect()
        assert (found["event_time"], found[REASON]) == (time, None)

    @pytest.mark.parametrize("form", ["parquet", "jsonl"])
    def test_numbers_with_fractions_are_counted_in_millionths(self, spark, tmp_path, form):
        rows = [{"mdp_id": "a", "sequence_number": n, "action": "left"} for n in (1767225600.25, 1767225601.0)]
        path, outcomes = tmp_path / f"log.{form}", [{"mdp_id": "a", "sequence_number": 1767225601, "reward": 1.0}]
        pq.write_table(pa.Table.from_pylist(rows), path) if form == "parquet" else jsonl(path, *rows)
        log = read_log(spark, str(path))
        found = sorted(row["sequence_number"] for row in log.collect())
        assert found == [1_767_225_600_250_000, 1_767_225_601_000_000]
        joined, counts = join_outcomes(spark, log, jsonl(tmp_path / "outcomes.jsonl", *outcomes))
        assert counts["unmatched"] == 0
        assert [row["metrics"] for row in joined.orderBy("sequence_number").collect()] == [None, {"reward": 1.0}]

    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
    def test_an_event_time_that_is_a_number_is_of_seconds(self, spark, tmp_path, form):
        row = {"mdp_id": "a", "sequence_number": 1, "action": "left", "event_time": 1767225600}
        path = tmp_path / f"log.{form}"
        if form == "jsonl":
            jsonl(path, row)
        elif form == "csv":
            path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
        else:
            pq.write_table(pa.Table.from_pylist([row]), path)
        assert read(spark, str(path))[0]["event_time"] == datetime(2026, 1, 1)

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            ({"stateColumns": ["agee"]}, r"data\.stateColumns: agee is missing"),
            (
                {"columns": {"actionProbability": "prop"}},
                r"column prop \(data\.columns\.actionProbability\) is missing",
            ),
            (
                {"features": {"service": "s", "repository": "r", "keys": ["k"]}},
                r"data\.features\.keys: k is missing",
            ),
        ],
    )
    def test_a_name_that_no_json_line_has_is_refused(self, spark, tmp_path, data, said):
        with pytest.raises(StageError, match=said):
            read(spark, jsonl(tmp_path / "log.jsonl", *[ROW | {"age": None}] * 3), **data)

    def test_a_last_step_that_a_column_should_tell_needs_the_column(self, spark, tmp_path):
        pq.write_table(pa.table({"mdp_id": ["a"], "sequence_number": [1], "action": ["l"]}), tmp_path / "l.parquet")
        with pytest.raises(StageError, match=r"data\.lastStep column: .* has no column truncated"):
            read(spark, str(tmp_path / "l.parquet"), lastStep="column")
        [row] = read(spark, jsonl(tmp_path / "log.jsonl", ROW), lastStep="column")
        assert row["truncated"] is None, "a line may leave out what is false"

    def test_a_service_needs_event_times_to_join_at(self, spark, tmp_path):
        path = jsonl(tmp_path / "log.jsonl", {"mdp_id": "a", "sequence_number": 1, "action": "left"})
        with pytest.raises(StageError, match=r"data\.features\.service: .* has no event times"):
            read(spark, path, features={"service": "s", "repository": "r"})

    def test_the_day_comes_along(self, spark, tmp_path):
        jsonl(tmp_path / "log" / "ds=2026-01-01" / "part.jsonl", ROW)
        assert [row["ds"] for row in read(spark, str(tmp_path / "log"))] == ["2026-01-01"]

    def test_a_wait_for_outcomes_needs_event_times(self, spark, tmp_path):
        path = jsonl(tmp_path / "log.jsonl", {"mdp_id": "a", "sequence_number": 1, "action": "left"})
        with pytest.raises(StageError, match=r"data\.outcomeWaitSeconds: .* has no event times"):
            read(spark, path, outcomeWaitSeconds=60)

    def test_large_decimals_keep_every_digit(self, spark, tmp_path):
        numbers = pa.array([1767225600000000001, 1767225600000000002], pa.uint64())
        pq.write_table(
            pa.table({"mdp_id": ["a", "a"], "sequence_number": numbers, "action": ["l", "l"]}), tmp_path / "l.parquet"
        )
        assert [row["sequence_number"] for row in read(spark, str(tmp_path / "l.parquet"))] == numbers.to_pylist()

    def test_a_metric_of_the_name_reward_counts_for_more_than_the_column(self, spark, tmp_path):
        [row] = read(spark, jsonl(tmp_path / "log.jsonl", ROW | {"reward": 1.0, "metrics": {"reward": 3.0}}))
        assert row["metrics"] == {"reward": 3.0}

    def test_partitions_are_read_from_the_first_to_the_last(self, spark, tmp_path):
        for day in ("2026-01-01", "2026-01-02", "2026-01-03"):
            jsonl(tmp_path / "log" / f"ds={day}" / "part.jsonl", ROW | {"mdp_id": day})
        window = {"first": "2026-01-02", "last": "2026-01-03"}
        found = [row["mdp_id"] for row in read(spark, str(tmp_path / "log"), partition=window)]
        assert found == ["2026-01-02", "2026-01-03"]
        pq.write_table(pa.table({"mdp_id": ["a"]}), tmp_path / "flat.parquet")
        with pytest.raises(StageError, match=r"data\.partition\.column day: no such column"):
            read(spark, str(tmp_path / "flat.parquet"), partition=window | {"column": "day"})

    def test_the_last_partition_is_read_to_its_end(self, spark, tmp_path):
        hours = ["2026-01-01 23:00:00", "2026-01-02 00:00:00", "2026-01-02 23:00:00", "2026-01-03 00:00:00"]
        rows = pa.table({"mdp_id": hours, "sequence_number": [1] * 4, "action": ["left"] * 4, "at": hours})
        window = {"column": "at", "first": "2026-01-02", "last": "2026-01-02"}
        for kind in (pa.string(), pa.timestamp("us", "UTC")):
            times = rows["at"] if kind == pa.string() else rows["at"].cast(pa.timestamp("us")).cast(kind)
            pq.write_table(rows.set_column(3, "at", times), tmp_path / "log.parquet")
            assert [r["mdp_id"] for r in read(spark, str(tmp_path / "log.parquet"), partition=window)] == hours[1:3]
        window = {"column": "mdp_id", "first": "exp-3", "last": "exp-3"}
        names = pa.table({"mdp_id": ["exp-3", "exp-3-b"], "sequence_number": [1] * 2, "action": ["left"] * 2})
        pq.write_table(names, tmp_path / "names.parquet")
        assert [r["mdp_id"] for r in read(spark, str(tmp_path / "names.parquet"), partition=window)] == ["exp-3"]

    def test_a_row_that_does_not_tell_its_partition_is_set_aside(self, spark, tmp_path):
        path = tmp_path / "log.jsonl"
        days = ("2026-01-01", "2026-01-02", None)
        jsonl(path, *[ROW | {"ds": day} for day in days])
        with path.open("a") as file:
            file.write('{"mdp_id": "torn", "ds": "2026-0')
        log = read_log(spark, str(path), Data(partition={"first": "2026-01-02", "last": "2026-01-02"}))
        found = [row[REASON] for row in with_reason(log, JOB).collect()]
        assert found == [None, "unreadable_ds", "unparsable"]

    def test_a_time_without_its_day_is_none(self, spark, tmp_path):
        log = read_log(spark, jsonl(tmp_path / "log.jsonl", ROW | {"event_time": "12:30:00"}))
        assert [row[REASON] for row in with_reason(log, JOB).collect()] == ["unreadable_event_time"]


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("sequence_number", "soon"),
            ("sequence_number", 1.5),
            ("event_time", 1e12),
            ("event_time", "20260101"),
            ("event_time", "yesterday"),
            ("state_features", {"x": "tall"}),
            ("action_probability", "likely"),
            ("metrics", {"clicks": True}),
            ("reward", "much"),
            ("truncated", "perhaps"),
        ],
    )
    def test_is_set_aside_whole_and_named(self, spark, tmp_path, column, value):
        bad = ROW | {"mdp_id": "bad", column: value, "agent": "robot"}
        path = jsonl(tmp_path / "log.jsonl", *[ROW] * 3, bad)
        checked = with_reason(read_log(spark, path), JOB).collect()
        reasons = {row["mdp_id"]: row[REASON] for row in checked}
        assert reasons == {"7": None, "bad": f"unreadable_{column}"}
        kept = next(json.loads(row[AS_IT_WAS]) for row in checked if row["mdp_id"] == "bad")
        assert (kept["action"], kept["agent"]) == ("left", "robot")
        assert str(value if not isinstance(value, dict) else "").lower() in json.dumps(kept[column]).lower()

    def test_a_feature_that_is_a_column_is_named_as_the_state(self, spark, tmp_path):
        path = jsonl(tmp_path / "log.jsonl", ROW | {"age": "old"}, ROW | {"mdp_id": "fine", "age": 30})
        rows = with_reason(read_log(spark, path, Data(stateColumns=["age"])), JOB).collect()
        assert {row["mdp_id"]: row[REASON] for row in rows} == {"7": "unreadable_state_features", "fine": None}

    @pytest.mark.parametrize("value", ["left", '["left"]', "", {"left": 1}, 3])
    def test_possible_actions_that_are_no_list_are_not_all_actions(self, spark, tmp_path, value):
        path = jsonl(tmp_path / "log.jsonl", ROW, ROW | {"mdp_id": "bad", "possible_actions": value})
        found = {row["mdp_id"]: row[REASON] for row in with_reason(read_log(spark, path), JOB).collect()}
        assert found.pop("7") is None
        assert list(found.values()) == ["unparsable"]

    @pytest.mark.parametrize("form", ["jsonl", "parquet"])
    def test_a_null_is_no_number(self, spark, tmp_path, form):
        rows = [
            ROW | {"mdp_id": "a", "metrics": {"clicks": None, "orders": 2.0}},
            ROW | {"mdp_id": "b", "metrics": {"reward": None}, "reward": 3.0},
        ]
        if form == "jsonl":
            path = jsonl(tmp_path / "log.jsonl", *rows)
        else:
            path = str(tmp_path / "log.parquet")
            maps = [r | {name: list(r[name].items()) for name in ("metrics", "state_features")} for r in rows]
            kinds = {name: pa.map_(pa.string(), pa.float64()) for name in ("metrics", "state_features")}
            known = ("mdp_id", "sequence_number", "action", "metrics", "state_features", "reward")
            columns = {name: pa.array([r.get(name) for r in maps], kinds.get(name)) for name in known}
            pq.write_table(pa.table(columns), path)
        assert [row["metrics"] for row in read(spark, path)] == [{"orders": 2.0}, {"reward": 3.0}]

    @pytest.mark.parametrize(
        ("action", "possible", "reason"),
        [
            ({"price": None}, None, "missing_action"),
            ({"price": 1.0}, [None, {"price": 1.0}], "unreadable_possible_actions"),
            ({"price": 1.0}, [{"price": "dear"}, {"price": 1.0}], "unreadable_possible_actions"),
            ({"price": 1.0}, [{"price": None}, {"price": 1.0}], "missing_possible_actions"),
            ({"price": 1.0, "size": None}, [{"price": "1.0"}], None),
        ],
    )
    def test_items_that_are_no_numbers(self, spark, tmp_path, action, possible, reason):
        job = JobSpec.model_validate({"actionSpace": "parametric", "algorithm": {"dqn": {}}})
        path = jsonl(tmp_path / "log.jsonl", ROW | {"action": action, "possible_actions": possible})
        [row] = with_reason(read_log(spark, path, action_space="parametric"), job).collect()
        assert row[REASON] == reason

    def test_a_value_that_is_none_leaves_the_others_of_its_line(self, spark, tmp_path):
        bad = {"x": "1.5", "y": True, "z": 2.0}
        path = jsonl(tmp_path / "log.jsonl", {"state_features": bad} | ROW | {"state_features": bad}, ROW)
        checked = {row[REASON]: row for row in with_reason(read_log(spark, path), JOB).collect()}
        assert set(checked) == {None, "unreadable_state_features"}
        row = checked["unreadable_state_features"].asDict(recursive=True)
        assert {name: row[name] for name in ("mdp_id", "action", "metrics")} == {
            name: ROW[name] for name in ("mdp_id", "action", "metrics")
        }
        [row] = read(spark, jsonl(tmp_path / "texts.jsonl", ROW | {"state_features": {"x": "1.5", "y": 2}}))
        assert row["state_features"] == {"x": 1.5, "y": 2.0}

    def test_a_name_that_is_there_twice(self, spark, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text(json.dumps(ROW).replace('{"clicks": 2.0}', '{"clicks": 1, "clicks": 2}') + "\n")
        [row] = with_reason(read_log(spark, str(path)), JOB).collect()
        assert row[REASON] == "unreadable_metrics"

    def test_one_number_beyond_all_others_is_set_aside_alone(self, spark, tmp_path):
        rows = [ROW | {"sequence_number": n + 0.5} for n in range(5)]
        path = jsonl(tmp_path / "log.jsonl", *rows, ROW | {"mdp_id": "bad", "sequence_number": 1e28})
        found = {row["mdp_id"]: row[REASON] for row in with_reason(read_log(spark, path), JOB).collect()}
        assert found == {"7": None, "bad": "unreadable_sequence_number"}

    def test_a_line_that_holds_a_number_that_is_none_is_a_row(self, spark, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text(json.dumps(ROW | {"state_features": {"x": float("nan")}}) + "\n\t\n")
        assert [row[REASON] for row in with_reason(read_log(spark, str(path)), JOB).collect()] == ["non_finite_feature"]

    def test_an_array_of_rows_is_refused_with_what_is_wanted(self, spark, tmp_path):
        (tmp_path / "log.json").write_text(json.dumps([ROW, ROW]))
        with pytest.raises(StageError, match="no JSON object; one is wanted in each line"):
            read(spark, str(tmp_path / "log.json"))

    def test_a_partition_s_column_may_be_in_its_csv_files_too_and_a_file_may_be_empty(self, spark, tmp_path):
        for day, text in (("01", "mdp_id,ds,sequence_number,action\na,2026-01-01,1,left\n"), ("02", "")):
            directory = tmp_path / "log" / f"ds=2026-01-{day}"
            directory.mkdir(parents=True)
            (directory / "part.csv").write_text(text)
        [row] = with_reason(read_log(spark, str(tmp_path / "log")), JOB).collect()
        assert (row["mdp_id"], row["sequence_number"], row["ds"], row[REASON]) == ("a", 1, "2026-01-01", None)

    def test_lines_of_more_cells_than_the_header_or_fewer(self, spark, tmp_path):
        path = tmp_path / "log.csv"
        path.write_text("mdp_id,sequence_number,action,reward\na,1,left,2.5\na,2,left,2,5\na,3,left\n")
        rows = with_reason(read_log(spark, str(path)), JOB).orderBy("sequence_number").collect()
        assert [(row[REASON], row[AS_IT_WAS]) for row in rows if row[REASON]] == [
            ("unparsable", "a,2,left,2,5"),
            ("unparsable", "a,3,left"),
        ]
        assert [row["metrics"] for row in rows if not row[REASON]] == [{"reward": 2.5}]

    def test_files_of_several_formats_are_refused(self, spark, tmp_path):
        (tmp_path / "log" / "old").mkdir(parents=True)
        first = jsonl(tmp_path / "log" / "a.jsonl", ROW)
        second = str(tmp_path / "log" / "b.parquet")
        pq.write_table(pa.table({"mdp_id": ["b"], "sequence_number": [1], "action": ["left"]}), second)
        for path in (f"{first},{second}", str(tmp_path / "log")):
            with pytest.raises(StageError, match=r"is (parquet|json), and other files are (json|parquet)"):
                read(spark, path)

    def test_lines_that_are_no_json(self, spark, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text(json.dumps(ROW) + '\n{"mdp_id": "b", "sequ\n[1, 2]\n')
        reasons = [row[REASON] for row in with_reason(read_log(spark, str(path)), JOB).collect()]
        assert sorted(reasons, key=str) == [None, "unparsable", "unparsable"]

    def test_a_column_whose_type_differs_between_files_stops_the_stage_with_its_name(self, spark, tmp_path):
        for name, probability in (("a", pa.array([0.5])), ("b", pa.array(["half"]))):
            row = {"mdp_id": ["a"], "sequence_number": [1], "action": ["left"], "action_probability": probability}
            pq.write_table(pa.table(row), tmp_path / f"{name}.parquet")
        with pytest.raises(StageError, match=r"cannot be read together as parquet.*action_probability"):
            read(spark, str(tmp_path))

    def test_ids_that_are_numbers_in_one_place_and_texts_in_another_are_not_made_alike(self, spark, tmp_path):
        times = (datetime(2026, 1, 1), "soon")
        for name, ids, number, time in (("a", [7], [1], times[0]), ("b", ["007"], [1.0], times[1])):
            row = {"mdp_id": ids, "sequence_number": [1], "action": ["left"], "reward": number, "event_time": [time]}
            pq.write_table(pa.table(row), tmp_path / f"{name}.parquet")
        log = read_log(spark, f"{tmp_path}/a.parquet,{tmp_path}/b.parquet")
        found = {row["mdp_id"]: (row["metrics"], row[REASON]) for row in with_reason(log, JOB).collect()}
        assert found == {"7": ({"reward": 1.0}, None), "007": ({"reward": 1.0}, "unreadable_event_time")}

    def test_a_column_that_only_some_files_have_is_missing_in_the_others(self, spark, tmp_path):
        for name, more in (("a", {}), ("b", {"action_probability": [0.5]})):
            row = {"mdp_id": [name], "sequence_number": [1], "action": ["left"], **more}
            pq.write_table(pa.table(row), tmp_path / f"{name}.parquet")
        assert [row["action_probability"] for row in read(spark, str(tmp_path))] == [None, 0.5]

    @pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "table"])
    def test_outcomes_may_have_names_of_their_own(self, spark, tmp_path, form):
        log = read_log(spark, jsonl(tmp_path / "log.jsonl", ROW, ROW | {"mdp_id": "8"}))
        rows = [{"user": "7", "place": 3, "paid": 9.5, "left_us": True}, {"user": "9", "place": 3, "paid": 1.0}]
        path = str(tmp_path / f"outcomes.{form}")
        if form == "jsonl":
            jsonl(tmp_path / "outcomes.jsonl", *rows)
        elif form == "csv":
            Path(path).write_text("user,place,paid,left_us\n7,3,9.5,true\n9,3,1.0,\n")
        elif form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path = "outcomes_table"
            spark.createDataFrame(rows).createOrReplaceTempView(path)
        columns = {"mdpId": "user", "sequenceNumber": "place", "reward": "paid", "ended": "left_us"}
        stored = {"outcomeFormat": "table"} if form == "table" else {}
        joined, counts = join_outcomes(spark, log, path, Data(outcomeColumns=columns, **stored))
        assert counts == {"reports": 2, "unparsable": 0, "unmatched": 1, "late": 0, "open": 0}
        found = {row["mdp_id"]: (row["metrics"], row["ended"]) for row in joined.collect()}
        assert found == {"7": ({"clicks": 2.0, "reward": 9.5}, True), "8": ({"clicks": 2.0}, False)}

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            ({"reward": "payed"}, r"column payed \(data\.outcomeColumns\.reward\) is missing; found mdp_id, seq"),
            ({"mdpId": "user"}, r"column user \(data\.outcomeColumns\.mdpId\) is missing"),
            (
                {"sequenceNumber": "event_time"},
                r"column event_time \(data\.outcomeColumns\.sequenceNumber\) is missing",
            ),
        ],
    )
    def test_outcomes_without_a_column_that_the_job_names_are_refused(self, spark, tmp_path, columns, said):
        path = jsonl(tmp_path / "outcomes.jsonl", {"mdp_id": "7", "sequence_number": 3, "paid": 1.0})
        with pytest.raises(StageError, match=said):
            read_outcomes(spark, path, Data(outcomeColumns=columns))

    def test_outcomes_without_a_key_are_refused(self, spark, tmp_path):
        pq.write_table(pa.table({"mdp_id": ["a"]}), tmp_path / "outcomes.parquet")
        with pytest.raises(StageError, match=r"data\.outcomes .*: column sequence_number is missing"):
            read_outcomes(spark, str(tmp_path / "outcomes.parquet"))


def test_times_are_read_in_utc(spark, tmp_path):
    [row] = read(spark, jsonl(tmp_path / "log.jsonl", ROW | {"event_time": "2026-01-01T13:00:00+01:00"}))
    assert row["event_time"].replace(tzinfo=UTC) == datetime(2026, 1, 1, 12, tzinfo=UTC)
