"""What can be asked of a job, wherever it runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from pydantic import Field

from contracts.status import JobStatus, PolicyServiceStatus, StatusModel
from pipelines.client.lint import Problem, lint

ENDS = {"Succeeded": 0, "Failed": 1, "StoppedByGate": 3, "RolledBack": 4}
"""The phases that a job ends in, and their exit codes."""


class ClientError(RuntimeError):
    """What was asked could not be done; the message says what was wrong, where, and what to do."""

    exit_code = 1


class NotApplicableError(ClientError):
    """The job is not where the verb makes sense."""


class NotFoundError(ClientError):
    """There is no such job, stage or pod."""

    exit_code = 5


class UnavailableError(ClientError):
    """The cluster cannot be reached, does not know BlueWhale, or does not allow it."""

    exit_code = 6


class Job(StatusModel):
    """A job as it stands."""

    name: str = Field(description="Of the RLTrainingJob, or of the run.")
    place: str = Field(description="Its namespace, or the directory of its run.")
    created: str | None = Field(None, description="When it was made.")
    status: JobStatus = Field(JobStatus(), description="As its controller, or its run, left it.")
    service: PolicyServiceStatus | None = Field(None, description="Of its PolicyService, once a rollout has begun.")

    @property
    def ended(self) -> bool:
        return self.status.phase in ENDS


class Asked(StatusModel):
    """What a verb has asked for: controllers do it, and `watch` shows that they do."""

    kind: str = Field(description="Of the object that was changed.")
    name: str = Field(description="Of the object that was changed.")
    message: str = Field(description="What was asked.")


class Client(Protocol):
    """A job's verbs. Each raises `ClientError`, in words for people."""

    def jobs(self) -> list[Job]:
        """All jobs, without their services."""
        ...

    def get(self, name: str) -> Job:
        """One job; raises `NotFoundError`."""
        ...

    def watch(self, name: str) -> Iterator[Job]:
        """The job now, and after each change until it has ended."""
        ...

    def logs(self, name: str, stage: str, follow: bool = False, worker: int | None = None) -> Iterator[str]:
        """Lines of a stage's newest attempt, or of one training worker; `follow` waits for more until it ends.

        Raises `NotFoundError` when there are none.
        """
        ...

    def promote(self, name: str) -> Asked:
        """Give all traffic to the job's candidate now; raises `NotApplicableError` when no canary is under way."""
        ...

    def abort(self, name: str) -> Asked:
        """Give all traffic back to the stable policy; raises `NotApplicableError` when no canary is under way."""
        ...

    def pause(self, name: str) -> Asked:
        """Hold the canary's weight or, before the rollout, end the pipeline run and keep what is finished."""
        ...

    def resume(self, name: str) -> Asked:
        """Go on from where `pause` stopped; raises `NotApplicableError` when the job is not paused."""
        ...

    def retry(self, name: str) -> Asked:
        """Start a failed job again from its failed stage, a rolled back candidate from the first step of the canary."""
        ...

    def lint(self, file: str | Path) -> list[Problem]:
        """What the API would refuse in a job file, without asking it."""
        return lint(file)

    def submit(self, file: str | Path) -> Job:
        """Start the job of a file; raises `JobError` when it is not valid."""
        ...

    def delete(self, name: str) -> None:
        """End the job if it is at work, and remove it; its service stays."""
        ...


def unknown(what: str, name: str, known: Iterable[str], where: str) -> NotFoundError:
    """That there is no such thing, with the names that may have been meant."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(close)}?"
    if not close:
        hint = f"known: {', '.join(names[:10])}{', ...' if names[10:] else ''}" if names else "there is none at all"
    return NotFoundError(f"no {what} {name} in {where}; {hint}")
