"""What a run on one machine finds of the attempts before it."""

from pathlib import Path

from pipelines.local import broken_off_trainings


def attempt(root: Path, day: int, finished: bool = False) -> str:
    directory = root / f"shop-2026-01-{day:02}-10-00-00-000000" / "training"
    (directory / "policy").mkdir(parents=True)
    if finished:
        (directory / "executor_output.json").touch()
    return str(directory)


def test_trainings_that_did_not_end_are_those_since_the_last_that_did(tmp_path: Path) -> None:
    assert broken_off_trainings(tmp_path) == []
    attempt(tmp_path, 1)
    attempt(tmp_path, 2, finished=True)
    assert broken_off_trainings(tmp_path) == []
    third, fourth = attempt(tmp_path, 3), attempt(tmp_path, 4)
    (tmp_path / "shop-2026-01-05-10-00-00-000000" / "features").mkdir(parents=True)  # killed before it trained
    assert broken_off_trainings(tmp_path) == [fourth, third]
