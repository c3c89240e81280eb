"""The stage as a whole: files in, files out, and every row accounted for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.timeline import build
from components.timeline.build import HEAD_ROWS, build_timeline
from contracts.job import JobSpec
from contracts.stage import RECORD, StageError, TransientError

pytestmark = pytest.mark.usefixtures("spark")

ROWS = [
    {
        "mdp_id": f"m{i % 40}",
        "sequence_number": i // 40,
        "event_time": f"2026-01-01T00:{i // 40:02d}:00Z",
        "state_features": {"x": i / 7},
        "action": "left" if i % 3 else "right",
        "action_probability": 0.5,
        "metrics": {"reward": float(i)},
    }
    for i in range(400)
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec(**data: object) -> JobSpec:
    return JobSpec.model_validate({"actions": ["left", "right"], "data": data})


def test_rows_in_are_rows_out_plus_quarantined_and_mdps_stay_whole(tmp_path):
    rows = [*reversed(ROWS), ROWS[0] | {"action": None, "sequence_number": 99}, ROWS[5]]
    log = write(tmp_path / "log.jsonl", rows)
    build_timeline(spec(), log, None, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["rows_in"] == 402
    assert record["rows_out"] == 400
    assert record["reasons"] == {"missing_action": 1, "duplicate_step": 1}
    assert record["out_of_order"] == 0
    assert "before_its_time" not in pq.read_table(tmp_path / "out" / "transitions").column_names
    quarantined = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    bad = next(row for row in quarantined if row["quarantine_reason"] == "missing_action")
    assert dict(bad["state_features"]) == {"x": 0.0}
    assert bad["sequence_number"] == 99
    seen: dict[str, Path] = {}
    for file in (tmp_path / "out" / "transitions").glob("*.parquet"):
        part = pq.read_table(file).select(["mdp_id", "ordinal"]).to_pylist()
        keys = [(row["mdp_id"], row["ordinal"]) for row in part]
        assert keys == sorted(keys)
        for mdp in {mdp for mdp, _ in keys}:
            assert seen.setdefault(mdp, file) == file, f"{mdp} is split over two files"
    assert len(seen) == 40


def test_a_duplicate_is_set_aside_with_columns_that_are_not_of_the_contract(tmp_path):
    log = write(tmp_path / "log.jsonl", [*ROWS, ROWS[5] | {"event_time": "2026-01-02T00:00:00Z", "shelf": "upper"}])
    outcome = {"mdp_id": "m5", "sequence_number": 0, "metrics": {"sale": 1.0}}
    build_timeline(spec(), log, write(tmp_path / "outcomes.jsonl", [outcome]), tmp_path / "out")
    [duplicate] = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert duplicate["quarantine_reason"] == "duplicate_step"
    assert json.loads(duplicate["_as_it_was"])["shelf"] == "upper"


def test_too_many_outcomes_that_cannot_be_read_fail_with_a_table_and_none_that_match_are_warned_of(tmp_path):
    log = write(tmp_path / "log.jsonl", ROWS)
    good = {"mdp_id": "m5", "sequence_number": 0, "metrics": {"sale": 1.0}}
    broken = write(tmp_path / "broken.jsonl", [good, good | {"metrics": {"sale": "much"}}])
    with pytest.raises(StageError, match=r"broken\.jsonl: 1 of 2 rows .*\n +unreadable_metrics +1 +e\.g\. mdp_id m5"):
        build_timeline(spec(), log, broken, tmp_path / "out")
    elsewhere = write(tmp_path / "elsewhere.jsonl", [good | {"mdp_id": "m5.0"}])
    build_timeline(spec(), log, elsewhere, tmp_path / "warned")
    warnings = json.loads((tmp_path / "warned" / RECORD).read_text())["warnings"]
    assert any("none of 1 outcomes is of a decision in the log" in warning for warning in warnings)
    assert "<td>of no decision in the log</td><td>1</td>" in (tmp_path / "warned" / "report.html").read_text()


def test_too_many_rejected_rows_fail_with_a_table_of_reasons_and_examples(tmp_path):
    broken = [row | {"action_probability": 2.0} if i < 40 else row for i, row in enumerate(ROWS)]
    with pytest.raises(StageError) as raised:
        build_timeline(spec(), write(tmp_path / "log.jsonl", broken), None, tmp_path / "out")
    text = str(raised.value)
    assert "40 of 400 rows were rejected" in text
    assert "data.maxQuarantineFraction 0.01" in text
    assert "probability_out_of_range" in text
    assert re.search(r"e\.g\. mdp_id m\d+, sequence_number \d+", text)
    assert not (tmp_path / "out" / RECORD).exists()


def test_decisions_that_lie_before_their_time_are_counted(tmp_path):
    rows = [ROWS[0], ROWS[40] | {"event_time": "2025-12-31T00:00:00Z"}, ROWS[80]]
    build_timeline(spec(), write(tmp_path / "log.jsonl", rows), None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / RECORD).read_text())["out_of_order"] == 1


def test_torn_lines_are_sampled_as_mdps_are(tmp_path):
    log = write(tmp_path / "log.jsonl", ROWS)
    with Path(log).open("a") as stream:
        stream.writelines(f'{{"mdp_id": "torn {i}\n' for i in range(40))
    build_timeline(spec(sampleFraction=0.2, maxQuarantineFraction=0.3), log, None, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["rows_in"] == len(ROWS) + 40
    assert 0 < record["reasons"]["unparsable"] < 20


def test_a_rejected_row_is_kept_with_columns_that_nobody_asked_for(tmp_path):
    rows = [row | {"agent": "robot"} for row in ROWS[:100]]
    rows[7] |= {"action_probability": 2.0}
    bare = [{name: row[name] for name in row if name not in ("state_features", "metrics")} for row in rows]
    pq.write_table(pa.Table.from_pylist(bare), tmp_path / "l.parquet")
    build_timeline(spec(), str(tmp_path / "l.parquet"), None, tmp_path / "out")
    [kept] = pq.read_table(tmp_path / "out" / "quarantine").to_pylist()
    assert json.loads(kept["_as_it_was"])["agent"] == "robot"
    assert "agent" not in pq.read_table(tmp_path / "out" / "transitions").column_names


def test_the_same_log_gives_the_same_transitions_also_when_outcomes_are_told_twice(tmp_path):
    outcomes = [{k: row[k] for k in ("mdp_id", "sequence_number")} | {"metrics": {"sale": 1.0}} for row in ROWS[::3]]
    found = []
    for name, told in (("once", outcomes), ("twice", [*outcomes, *reversed(outcomes)])):
        log, late = write(tmp_path / "log.jsonl", ROWS), write(tmp_path / f"{name}.jsonl", told)
        build_timeline(spec(), log, late, tmp_path / name)
        rows = pq.read_table(tmp_path / name / "transitions").to_pylist()
        found.append(sorted(rows, key=lambda row: (row["mdp_id"], row["ordinal"])))
    assert found[0] == found[1]
    assert sum("sale" in dict(row["metrics"]) for row in found[0]) == len(outcomes)


def test_a_log_that_changes_while_it_is_read_fails_the_stage(tmp_path, monkeypatch):
    broken = [ROWS[0] | {"action_probability": 2.0, "sequence_number": 99}, *ROWS]
    monkeypatch.setattr("components.timeline.build.count_reasons", lambda *_: ({}, {}))
    with pytest.raises(TransientError, match="401 rows in, but 400 out and 0 quarantined; the log changed"):
        build_timeline(spec(), write(tmp_path / "log.jsonl", broken), None, tmp_path / "out")


def test_a_word_of_the_log_that_the_job_overrules_is_told(tmp_path):
    rows = [row | {"truncated": row["sequence_number"] == 9 and row["mdp_id"] < "m2"} for row in ROWS]
    build_timeline(spec(lastStep="terminal"), write(tmp_path / "log.jsonl", rows), None, tmp_path / "out")
    [said] = json.loads((tmp_path / "out" / RECORD).read_text())["warnings"]
    ends = sum(row["truncated"] for row in rows)
    assert said.startswith(f"{ends} MDPs end in a step that the log calls truncated, and that data.lastStep terminal")


@pytest.mark.parametrize("form", ["json", "parquet"])
@pytest.mark.parametrize("rows_that_tell", [0, 1])
def test_last_steps_that_no_row_tells_of_are_warned_of(tmp_path, rows_that_tell, form):
    """JSON lines may leave out what is false, a column may be null."""
    rows = [row | ({"truncated": False} if i < rows_that_tell else {}) for i, row in enumerate(ROWS)]
    log = (write_columns if form == "parquet" else write)(tmp_path / f"log.{form}", rows)
    build_timeline(spec(lastStep="column"), log, None, tmp_path / "out")
    said = json.loads((tmp_path / "out" / RECORD).read_text())["warnings"]
    assert [text[:36] for text in said] == ["no row of the log has truncated, whi"] * (1 - rows_that_tell)


def write_columns(path: Path, rows: list[dict]) -> str:
    """As Parquet."""
    numbers = pa.map_(pa.string(), pa.float64())
    kinds = {
        "mdp_id": pa.string(), "sequence_number": pa.int64(), "event_time": pa.string(), "state_features": numbers,
        "action": pa.string(), "action_probability": pa.float64(), "metrics": numbers, "truncated": pa.bool_(),
    }  # fmt: skip
    maps = [{name: list(row[name].items()) for name in ("state_features", "metrics")} for row in rows]
    columns = pa.schema(list(kinds.items()))
    pq.write_table(pa.Table.from_pylist([row | of for row, of in zip(rows, maps, strict=True)], columns), path)
    return str(path)


@pytest.mark.parametrize("value", [None, 2.0])
def test_a_metric_that_is_null_is_none(tmp_path, monkeypatch, value):
    monkeypatch.setattr(build, "HEAD_ROWS", 5)
    if value is None:
        monkeypatch.setattr(build, "all_names", lambda used: pytest.fail("there is nothing that the first rows lack"))
    rows = [row | {"metrics": {"reward": 1.0, "late": value if i == 7 else None}} for i, row in enumerate(ROWS)]
    build_timeline(spec(), write_columns(tmp_path / "log", rows), None, tmp_path / "out")
    written = pq.read_table(tmp_path / "out" / "transitions").to_pylist()
    found = {"late"} if value else set()
    assert sum(dict(row["metrics"]).keys() == {"reward"} for row in written) == 400 - len(found)
    assert all(dict(row["returns"]).keys() == {"reward"} | found for row in written)


def test_what_last_steps_are_is_not_guessed_silently(tmp_path):
    log = write(tmp_path / "log.jsonl", ROWS)
    build_timeline(spec(), log, None, tmp_path / "unsaid")
    [said] = json.loads((tmp_path / "unsaid" / RECORD).read_text())["warnings"]
    assert said.startswith("data.lastStep is not set: all last steps are taken for ends of their MDPs")
    build_timeline(spec(lastStep="terminal"), log, None, tmp_path / "said")
    assert json.loads((tmp_path / "said" / RECORD).read_text())["warnings"] == []
    # Of one decision each, there is nothing that a window could cut off.
    alone = write(tmp_path / "alone.jsonl", [row | {"mdp_id": f"m{i}"} for i, row in enumerate(ROWS)])
    build_timeline(spec(), alone, None, tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / RECORD).read_text())["warnings"] == []


def test_keys_and_times_too_far_out_to_be_counted_with_are_set_aside(tmp_path):
    """Such as stand for none: the least number, the first day of the calendar."""
    bad = [{"sequence_number": -(2**63)}, {"sequence_number": 2**63 - 1}, {"event_time": "0001-01-01T00:00:00Z"}]
    rows = [*ROWS, *[ROWS[0] | {"sequence_number": 100} | change for change in bad]]
    build_timeline(spec(), write(tmp_path / "log.jsonl", rows), None, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["reasons"] == {"unreadable_sequence_number": 2, "unreadable_event_time": 1}
    assert record["rows_out"] == len(ROWS)


def test_features_that_only_rejected_rows_have_are_none(tmp_path):
    bad = ROWS[0] | {"sequence_number": 99, "state_features": {"X": float("nan")}}
    for place, rows in (("first", [bad, *ROWS]), ("late", [*ROWS * (HEAD_ROWS // len(ROWS) + 1), bad])):
        rows = [row | {"mdp_id": f"{row['mdp_id']}-{i // len(ROWS)}"} for i, row in enumerate(rows)]
        build_timeline(spec(), write(tmp_path / f"{place}.jsonl", rows), None, tmp_path / place)
        names = pq.read_table(tmp_path / place / "transitions").column_names
        assert [name for name in names if name.startswith("state_")] == ["state_x"], place


def test_every_reason_is_counted(tmp_path):
    """Also one that no list of reasons would name: a row is never lost."""
    bad = [{"action_probability": "half"}, {"event_time": "soon"}, {"reward": "much"}, {"state_features": {"x": "y"}}]
    rows = [*ROWS, *[ROWS[0] | {"sequence_number": 100 + i} | change for i, change in enumerate(bad)]]
    build_timeline(spec(maxQuarantineFraction=0.5), write(tmp_path / "log.jsonl", rows), None, tmp_path / "out")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["rows_in"] == 404
    assert record["reasons"] == {
        f"unreadable_{name}": 1 for name in ("action_probability", "event_time", "reward", "state_features")
    }


def test_the_limit_is_a_share_of_the_rows_that_the_job_uses(tmp_path):
    broken = [row | {"action_probability": 2.0} if i % 2 else row for i, row in enumerate(ROWS)]
    limits = {"sampleFraction": 0.2, "maxQuarantineFraction": 0.3}
    with pytest.raises(StageError, match="rows were rejected"):
        build_timeline(spec(**limits), write(tmp_path / "log.jsonl", broken), None, tmp_path / "out")


def test_names_that_only_a_later_row_has_are_found_all_the_same(tmp_path):
    """The first rows all have one feature and one metric: the last one has two of each."""
    late = {"state_features": {"x": 0.5, "rare": 7.0}, "metrics": {"reward": 1.0, "sale": 3.0}}
    rows = [*(ROWS * 4), ROWS[-1]]
    rows = [row | {"mdp_id": f"n{i // 20}", "sequence_number": i % 20} for i, row in enumerate(rows)]
    rows[-1] |= late
    build_timeline(spec(), write(tmp_path / "log.jsonl", rows), None, tmp_path / "out")
    written = pq.read_table(tmp_path / "out" / "transitions").to_pylist()
    assert len(written) == len(rows) > HEAD_ROWS
    [found] = [row for row in written if row["state_rare"] is not None]
    assert (found["state_rare"], dict(found["returns"])) == (7.0, {"reward": 1.0, "sale": 3.0})
    assert json.loads((tmp_path / "out" / "report.json").read_text())["coverage"]["rare"] == 1 / len(rows)


def test_a_log_without_states_or_metrics_is_one_of_keys(tmp_path):
    rows = [{k: v for k, v in row.items() if k not in ("state_features", "metrics")} for row in ROWS]
    build_timeline(spec(), write(tmp_path / "log.jsonl", rows), None, tmp_path / "out")
    columns = pq.read_table(tmp_path / "out" / "transitions").column_names
    assert not [name for name in columns if name.startswith("state_")]


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(StageError, match="the log is empty"):
        build_timeline(spec(), write(tmp_path / "log.jsonl", []), None, tmp_path / "out")
