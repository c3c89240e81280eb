"""What a person sees of jobs: a tree of one job's stages and its canary, a table of many, lines where nobody looks."""

from __future__ import annotations

from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from contracts.status import JobStatus, PolicyServed, RolloutStatus, StageStatus
from pipelines.client.protocol import Job
from pipelines.display import Display

PHASES = {
    "Succeeded": "green", "Failed": "red", "StoppedByGate": "red", "RolledBack": "red", "Suspended": "yellow",
    "RollingOut": "cyan", "Running": "cyan",
}  # fmt: skip
MARKS = {
    "Pending": ("○", "dim"), "Running": ("●", "cyan"), "Succeeded": ("✓", "green"), "Cached": ("✓", "green"),
    "Failed": ("✗", "red"), "Skipped": ("–", "dim"),
}  # fmt: skip
VERDICTS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "error": "yellow"}
BAR = 20


def tree(job: Job, now: datetime | None = None) -> Tree:
    """The job, its stages, and its canary below the rollout."""
    now = now or datetime.now(UTC)
    status = job.status
    root = Tree(_head(job, now), guide_style="dim")
    for each in status.stages:
        stage = _judged(each, status)
        line = root.add(_stage(stage, status, now))
        if stage.state == "Failed" and stage.message:
            line.add(Text(stage.message, "red"))
        if stage.name == "rollout" and status.rollout:
            _add_canary(line, job, status.rollout)
    for text in _words(status):
        root.add(text)
    return root


def table(jobs: list[Job], now: datetime | None = None) -> Table:
    """A line for each job."""
    now = now or datetime.now(UTC)
    grid = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("NAME", "PHASE", "STAGE", "WORKERS", "CPE", "WEIGHT", "AGE"):
        grid.add_column(name, no_wrap=True, overflow="ellipsis" if name == "CPE" else "fold")
    for job in jobs:
        status = job.status
        grid.add_row(
            Text(job.name),
            Text(status.phase, PHASES.get(status.phase, "")),
            Text(status.stage),
            Text(status.workers.summary if status.workers else ""),
            Text(status.cpe.summary if status.cpe else ""),
            Text(status.rollout.weight if status.rollout else ""),
            Text(_span(job.created, now) if job.created else ""),
        )
    return grid


class Lines:
    """A job's changes as lines, for output that no terminal shows."""

    def __init__(self, console: Console) -> None:
        self._display = Display(console)
        self._seen: dict[str, str] = {}
        self._said = ""

    def show(self, job: Job) -> None:
        """Say what is new since the last time."""
        for each in job.status.stages:
            stage = _judged(each, job.status)
            if self._seen.get(stage.name) == stage.state:
                continue
            self._seen[stage.name] = stage.state
            if stage.state in ("Succeeded", "Cached"):
                seconds = _seconds(stage.start_time, stage.completion_time)
                self._display.finish(stage.name, seconds, escape(stage.message), cached=stage.state == "Cached")
            elif stage.state == "Failed":
                self._display.fail(stage.name)
        text = f"{job.name}: {job.status.phase}"
        if rollout := job.status.rollout:
            text += f", canary at {rollout.weight}"
        text = "\n  ".join([text, *(words.plain for words in _words(job.status))])
        if text != self._said:
            self._said = text
            self._display.say(escape(text))


def _head(job: Job, now: datetime) -> Text:
    status = job.status
    text = Text.assemble((job.name, "bold"), "  ", (status.phase, f"bold {PHASES.get(status.phase, '')}".strip()))
    if status.reason and status.reason != status.phase:
        text.append(f"  {status.reason}")
    if start := status.start_time or (job.created if not job.ended else None):
        text.append(f"  {_span(start, _time(status.completion_time) or now)}", "dim")
    text.append(f"  {job.place}", "dim")
    return text


def _judged(stage: StageStatus, status: JobStatus) -> StageStatus:
    """A rollout is not over when its stage has asked for it, and not good when the canary said no."""
    rolled_out = next((c for c in status.conditions if c.type == "RolledOut"), None)
    if stage.name != "rollout" or rolled_out is None:
        return stage
    state = {"Unknown": "Running", "False": "Failed"}.get(rolled_out.status, stage.state)
    end = None if rolled_out.status == "Unknown" else rolled_out.last_transition_time
    return stage.model_copy(update={"state": state, "completion_time": end, "message": ""})


def _stage(stage: StageStatus, status: JobStatus, now: datetime) -> Text:
    mark, style = MARKS[stage.state]
    took = "cached" if stage.state == "Cached" else ""
    if stage.start_time and stage.state != "Cached":
        took = _span(stage.start_time, _time(stage.completion_time) or now)
    text = Text.assemble((mark, style), f" {stage.name:<14}", (f"{took:>7}", "dim"), no_wrap=True, overflow="ellipsis")
    if stage.state in ("Pending", "Skipped"):
        text = Text.assemble((f"{mark} {stage.name}", "dim"))
    if stage.attempts > 1:
        text.append(f"  attempt {stage.attempts}", "yellow")
    if stage.name == "training" and stage.state == "Running" and status.workers:
        text.append(f"  {status.workers.summary} workers", "cyan")
    if stage.name == "evaluation" and status.cpe:
        text.append(f"  {status.cpe.metric} {status.cpe.summary}")
    elif stage.state in ("Succeeded", "Cached", "Running") and stage.message:
        text.append(f"  {stage.message}", "dim")
    return text


def _add_canary(line: Tree, job: Job, rollout: RolloutStatus) -> None:
    share = float(rollout.weight.rstrip("%") or 0) / 100
    full = round(share * BAR)
    bar = Text.assemble(
        ("━" * full, "green"), ("─" * (BAR - full), "dim"), f" {rollout.weight} of MDPs", no_wrap=True,
        overflow="ellipsis",
    )  # fmt: skip
    if not job.ended:
        bar.append(f"  step {rollout.step + 1}")
    bar.append(f"  PolicyService {rollout.service}", "dim")
    canary = line.add(bar)
    if job.service:
        arms = (("stable", job.service.stable), ("candidate", job.service.candidate))
        for name, policy in arms:
            if policy:
                canary.add(_arm(name, policy))
    if rollout.verdicts and (checks := rollout.verdicts[-1].checks):
        for check in checks:
            words = (f"{check.name:<9} ", (f"{check.verdict:<12}  ", VERDICTS[check.verdict]), (check.message, "dim"))
            canary.add(Text.assemble(*words, no_wrap=check.verdict != "fail", overflow="ellipsis"))


def _arm(name: str, policy: PolicyServed) -> Text:
    return Text.assemble(f"{name:<9} {policy.digest[:12]}", (f"  version {policy.version}", "dim"), no_wrap=True)


def _words(status: JobStatus) -> list[Text]:
    """What the conditions have to say to a person, and the schedule."""
    found = []
    failed = [stage.message for stage in status.stages if stage.state == "Failed" and stage.message]
    for condition in status.conditions:
        bad = condition.type == "Failed" and condition.status == "True"
        held = condition.type == "Stalled" and (condition.status == "True" or condition.reason == "Retrying")
        refused = condition.type in ("Accepted", "PipelineBackendAvailable") and condition.status == "False"
        if not (bad or held or refused) or not condition.message:
            continue
        if bad and any(text in condition.message for text in failed):
            continue
        found.append(Text(f"{condition.reason}: {condition.message}", "red" if bad else "yellow"))
    if status.next_schedule_time:
        found.append(Text(f"next run at {status.next_schedule_time}", "dim"))
    if status.active:
        found.append(Text(f"at work: {', '.join(status.active)}"))
    return found


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _seconds(start: str | None, end: str | None) -> float:
    begun, ended = _time(start), _time(end)
    return max(0.0, (ended - begun).total_seconds()) if begun and ended else 0.0


def _span(start: str, end: datetime) -> str:
    """A time span in two units, as kubectl writes it."""
    seconds = max(0, int((end - datetime.fromisoformat(start)).total_seconds()))
    for large, small, size, part in (("d", "h", 86_400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if seconds >= size:
            rest = seconds % size // part
            return f"{seconds // size}{large}" + (f"{rest}{small}" if rest else "")
    return f"{seconds}s"
