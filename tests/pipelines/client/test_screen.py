"""The tree on terminals of several widths."""

from __future__ import annotations

from datetime import UTC, datetime
from io import StringIO

import pytest
from rich.console import Console

from contracts.status import JobStatus, PolicyServiceStatus
from pipelines.client import Job
from pipelines.client.screen import Lines, table, tree
from tests.pipelines.client.worlds import canary, condition, failed, rolling_out, training

NOW = datetime(2026, 5, 4, 13, 2, 5, tzinfo=UTC)


def job_of(document: dict, service: dict | None = None) -> Job:
    return Job(
        name="shop",
        place="team",
        created="2026-05-04T11:59:00Z",
        status=JobStatus.model_validate(document["status"]),
        service=PolicyServiceStatus.model_validate(service["status"]) if service else None,
    )


def drawn(what: object, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width, highlight=False)
    console.print(what)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 140])
def test_a_stage_takes_one_line_however_long_its_message(width: int) -> None:
    job = job_of(rolling_out(), canary())
    job.status.stages[0].message = "many words " * 30
    lines = drawn(tree(job, NOW), width)
    assert len(lines) == 1 + len(job.status.stages) + 1 + 2 + 2
    assert max(map(len, lines)) <= width
    assert lines[1].rstrip().endswith("…")


def test_a_failure_is_told_whole_and_once() -> None:
    job = job_of(failed("Failed", "BackoffLimitExceeded", "timeline: " + "many words " * 20 + "(tried 3 times)"))
    stage = job.status.stages[0]
    stage.state, stage.message = "Failed", ("many words " * 20).strip()
    text = " ".join(" ".join(drawn(tree(job, NOW), 80)).replace("│", " ").split())
    assert text.count("many words") == 20


def test_times_go_on_until_the_end() -> None:
    assert "1h2m" in drawn(tree(job_of(training()), NOW), 80)[0]
    assert "  5m" in drawn(tree(job_of(failed("Failed", "StageFailed", "no")), NOW), 80)[0]


def test_the_rollout_s_mark_is_the_canary_s() -> None:
    for status, mark in (("Unknown", "●"), ("True", "✓"), ("False", "✗")):
        job = job_of(rolling_out(conditions=[condition("RolledOut", status, "InProgress")]))
        assert any(f"{mark} rollout" in line for line in drawn(tree(job, NOW), 80))


def test_square_brackets_are_words_not_markup() -> None:
    job = job_of(failed("Failed", "StageFailed", "container [main] of [/x]"))
    job.status.stages[0].message = "[red]"
    for what in (tree(job, NOW), table([job], NOW)):
        drawn(what, 80)
    console = Console(file=StringIO(), width=80)
    Lines(console).show(job)
    assert isinstance(console.file, StringIO)
    assert "container [main] of [/x]" in console.file.getvalue()


def test_lines_say_each_thing_once() -> None:
    console = Console(file=StringIO(), width=120)
    lines = Lines(console)
    for document in (training(), training(), rolling_out(), failed("RolledBack", "RolledBack", "reward failed")):
        lines.show(job_of(document))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue().splitlines()
    assert sum(line.strip().startswith("timeline") for line in text) == 1
    assert [line for line in text if line.startswith("shop")] == [
        "shop: Running",
        "shop: RollingOut, canary at 25%",
        "shop: RolledBack, canary at 25%",
    ]
    assert text[-1] == "  RolledBack: reward failed"
    assert "       rollout ✗" in text


def test_a_schedule_tells_its_next_run() -> None:
    status = {"phase": "Scheduled", "nextScheduleTime": "2026-05-05T03:00:00Z", "active": ["shop-28491840"]}
    text = "\n".join(drawn(tree(job_of({"status": status}), NOW), 80))
    assert "next run at 2026-05-05T03:00:00Z" in text
    assert "at work: shop-28491840" in text
