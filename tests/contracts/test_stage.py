"""A stage leaves its work finished, with a record, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest

from contracts.job import JobError
from contracts.stage import RECORD, StageError, TransientError, alone, compact, digest_files, read_record, stage, tell


def test_the_record_is_written_last_and_holds_the_facts(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with stage("timeline", output) as (directory, facts):
        (directory / "data").write_text("x")
        facts["rows"] = 3
        assert not (output / RECORD).exists()
    record = read_record(output)
    assert record["stage"] == "timeline"
    assert record["status"] == "succeeded"
    assert record["rows"] == 3
    assert record["seconds"] >= 0
    assert sorted(p.name for p in output.iterdir()) == ["data", RECORD]


def test_a_failed_stage_leaves_no_record(tmp_path: Path) -> None:
    def fail() -> None:
        with stage("training", tmp_path / "out") as (_, facts):
            facts["rows"] = 3
            raise StageError("lower the batch size")

    with pytest.raises(StageError, match="lower the batch size"):
        fail()
    with pytest.raises(StageError):
        read_record(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StageError("data.decisionLog x: gone"), ["data.decisionLog x: gone"]),
        (FileNotFoundError("no log"), ["no log"]),
        (ZeroDivisionError("surprise"), ["Traceback", "ZeroDivisionError: surprise"]),
    ],
)
def test_what_failed_is_told_to_the_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: list[str]
) -> None:
    monkeypatch.setenv("BLUEWHALE_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(type(error)), stage("features", tmp_path / "out"):
        raise error
    written = json.loads((tmp_path / "error.json").read_text())
    assert written["stage"] == "features"
    for part in told:
        assert part in written["error"]
    if isinstance(error, StageError):
        assert "Traceback" not in written["error"]


def test_a_stage_that_succeeds_writes_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLUEWHALE_ERROR_FILE", str(tmp_path / "error.json"))
    with stage("features", tmp_path / "out"):
        pass
    assert not (tmp_path / "error.json").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_linked_output_is_replaced_and_its_target_left_alone(tmp_path: Path, fails: bool) -> None:
    target, output = tmp_path / "target", tmp_path / "out"
    target.mkdir()
    (target / "kept").write_text("kept")
    (target / RECORD).write_text("{}")
    output.symlink_to(target)
    try:
        with stage("export", output) as (directory, _):
            (directory / "new").write_text("new")
            if fails:
                raise StageError("no")
    except StageError:
        pass
    assert not output.is_symlink()
    assert sorted(p.name for p in output.iterdir()) == (["new"] if fails else ["new", RECORD])
    assert sorted(p.name for p in target.iterdir()) == ["kept", RECORD]
    assert (target / "kept").read_text() == "kept"


def test_what_an_earlier_run_left_is_removed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with stage("export", output) as (directory, _):
        (directory / "old").mkdir()
        (directory / "old" / "file").write_text("old")
    with stage("export", output):
        assert list(output.iterdir()) == []


def test_a_file_in_the_place_of_the_output_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with stage("export", tmp_path / "out"):
        pass
    assert read_record(tmp_path / "out")["status"] == "succeeded"


def test_an_unfinished_stage_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no finished stage here.*run the stage before"):
        read_record(tmp_path)


def test_a_digest_changes_with_content_and_with_names(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    (directory / "sub").mkdir(parents=True)
    file = directory / "sub" / "x.bin"
    file.write_bytes(b"one")
    first = digest_files(directory)
    assert digest_files(directory) == first
    file.write_bytes(b"two")
    second = digest_files(directory)
    file.rename(directory / "sub" / "y.bin")
    third = digest_files(directory)
    (directory / "z").write_bytes(b"")
    assert len({first, second, third, digest_files(directory)}) == 4


def test_a_digest_does_not_depend_on_where_a_directory_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x").write_text("same")
    assert digest_files(tmp_path / "here") == digest_files(tmp_path / "there")


def test_bytes_moved_from_one_file_to_the_next_change_the_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12")
    (tmp_path / "b").write_text("3")
    before = digest_files(tmp_path)
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("23")
    assert digest_files(tmp_path) != before


def test_a_digest_leaves_stage_records_and_markers_out(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    before = digest_files(tmp_path)
    for name in (RECORD, "_SUCCESS", ".x.crc"):
        (tmp_path / name).write_text("anything")
    assert digest_files(tmp_path) == before


def test_a_directory_is_worked_in_by_one_command_at_a_time(tmp_path: Path) -> None:
    with (
        alone(tmp_path / "run"),
        pytest.raises(StageError, match="another command is at work here"),
        alone(tmp_path / "run"),
    ):
        pass
    with alone(tmp_path / "run"):
        pass


class TestTheTerminationMessage:
    """A stage's end, as a controller reads it from the pod."""

    @pytest.fixture
    def log(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("BLUEWHALE_TERMINATION_LOG", str(tmp_path / "termination-log"))
        return tmp_path / "termination-log"

    def test_of_a_stage_that_succeeded_names_what_it_made(self, tmp_path: Path, log: Path) -> None:
        with stage("export", tmp_path / "out") as (_, facts):
            facts |= {"version": 17, "digest": "d" * 64, "largest_difference": 1e-7}
        assert json.loads(log.read_text()) == {
            "stage": "export",
            "status": "succeeded",
            "message": "version 17, within 1e-07 of torch",
            "retryable": False,
            "policy": {"digest": "d" * 64, "version": "17"},
        }

    @pytest.mark.parametrize(
        ("error", "message", "retryable"),
        [
            (StageError("batchSize 9:\n  lower it"), "batchSize 9: lower it", False),
            (JobError("spec.data: no"), "spec.data: no", False),
            (FileNotFoundError("no log"), "no log", False),
            (ConnectionError("reset"), "ConnectionError: reset", True),
            (TransientError("no store"), "no store", True),
        ],
    )
    def test_of_a_stage_that_failed_says_whether_to_try_again(
        self, tmp_path: Path, log: Path, error: Exception, message: str, retryable: bool
    ) -> None:
        with pytest.raises(type(error)), stage("training", tmp_path / "out"):
            raise error
        told = {"stage": "training", "status": "failed", "message": message, "retryable": retryable}
        assert json.loads(log.read_text()) == told

    def test_is_not_left_where_nobody_asks_for_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BLUEWHALE_TERMINATION_LOG", raising=False)
        tell({"stage": "training"})
        assert list(tmp_path.iterdir()) == []

    def test_is_cut_to_what_kubernetes_keeps(self, log: Path) -> None:
        tell({"stage": "training", "status": "failed", "message": "é" * 9000})
        told = json.loads(log.read_text())
        assert log.stat().st_size <= 4096
        assert told["message"].endswith("é…")
        assert told["status"] == "failed"

    def test_repeats_the_records_of_all_stages_as_far_as_there_is_room(self, log: Path) -> None:
        def told(records: int) -> dict[str, Any]:
            of_a_stage = {"status": "succeeded", "message": "m" * 3000, "artifact": "minio://" + "a" * 150}
            tell({"stage": "rollout", "records": {f"stage-{k}": of_a_stage for k in range(records)}, "message": "m"})
            assert log.stat().st_size <= 4096
            return json.loads(log.read_text())

        seven = told(7)["records"]
        assert len(seven) == 7
        assert all(len(record["message"]) >= 100 and record["message"].endswith("…") for record in seven.values())
        assert told(70) == {"stage": "rollout", "message": "m"}

    @pytest.mark.parametrize(
        ("path", "uri"),
        [
            ("/minio/mlpipeline/v2/run/policy", "minio://mlpipeline/v2/run/policy"),
            ("/gcs/bucket/run/policy", "gs://bucket/run/policy"),
            ("/s3/bucket/run/policy", "s3://bucket/run/policy"),
            ("/home/me/runs/policy", None),
        ],
    )
    def test_names_the_artifact_as_kfp_does(self, path: str, uri: str | None) -> None:
        assert compact({"stage": "training", "status": "succeeded"}, path).get("artifact") == uri
