"""What a finished stage tells KFP, people and a controller."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kfp import dsl

from components.summary import data_window, passed_on, publish
from contracts.stage import stage


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dsl.Artifact, str, dict, dict]:
    """An export's artifact, summary, record and termination message."""
    monkeypatch.setenv("BLUEWHALE_TERMINATION_LOG", str(tmp_path / "termination-log"))
    artifact = dsl.Model(uri=str(tmp_path / "out"))
    summary = dsl.Markdown(uri=str(tmp_path / "summary.md"))
    with stage("export", artifact.path) as (_, facts):
        facts |= {"version": 17, "digest": "d" * 64, "largest_difference": 1e-7, "actions": ["left|right"] * 13}
        facts["warm_start"] = None
    publish(artifact, summary, str(tmp_path / "record"), "v1", {"more": 1}, first_event_time="2026-01-01T00:00:00")
    return (
        artifact,
        Path(summary.path).read_text(),
        json.loads((tmp_path / "record").read_text()),
        json.loads((tmp_path / "termination-log").read_text()),
    )


def test_the_artifact_carries_the_stage_s_facts(told: tuple[dsl.Artifact, str, dict, dict]) -> None:
    metadata = told[0].metadata
    assert metadata["digest"] == "d" * 64
    assert metadata["first_event_time"] == "2026-01-01T00:00:00"
    assert (metadata["version"], metadata["policy_version"]) == ("v1", 17)
    assert "seconds" not in metadata
    assert None not in metadata.values(), "KFP's metadata store refuses a null"


def test_the_summary_is_a_table_for_people(told: tuple[dsl.Artifact, str, dict, dict]) -> None:
    summary = told[1]
    assert summary.startswith("### Export\n\n**version 17, within 1e-07 of torch**")
    assert "| largest difference | 1e-07 |" in summary
    assert "left\\|right" in summary
    assert summary.count("left") == 12, "long lists are cut"
    assert "… (13)" in summary


def test_the_record_is_the_termination_message(told: tuple[dsl.Artifact, str, dict, dict]) -> None:
    _, _, record, message = told
    assert record == message
    assert (record["stage"], record["status"], record["more"]) == ("export", "succeeded", 1)


def test_the_data_s_window_is_passed_on(tmp_path: Path) -> None:
    days = [datetime(2026, 1, day, tzinfo=UTC) for day in (3, 1, 2)]
    for k, part in enumerate((days[:1], days[1:], [])):
        pq.write_table(pa.table({"event_time": pa.array(part, pa.timestamp("us", "UTC"))}), tmp_path / f"{k}.parquet")
    window = data_window(tmp_path)
    assert window == {
        "first_event_time": "2026-01-01T00:00:00+00:00", "last_event_time": "2026-01-03T00:00:00+00:00",
    }  # fmt: skip
    assert passed_on(window | {"rows": 3}) == window
    assert data_window(tmp_path / "2.parquet") == {}
