"""No process outlives the command that started it, however that command ends.

Every process started below the command carries a mark in its environment. A small watcher, in a session of its own,
waits for the command to be gone, even by SIGKILL, and then ends whatever still carries the mark: Spark's JVM, torchrun
and its workers, Triton and its model processes, Prometheus.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

MARK = "BLUEWHALE_COMMAND_ID"
GRACE_SECONDS = 6.0


def watch() -> None:
    """Mark this process's children to come, and start the watcher over them."""
    os.environ[MARK] = uuid.uuid4().hex
    reading, writing = os.pipe()
    # The writing end stays open here, and only here, for as long as this process lives.
    os.set_inheritable(writing, False)
    environment = {k: v for k, v in os.environ.items() if k != MARK}
    subprocess.Popen(
        [sys.executable, "-m", "pipelines.reaper", os.environ[MARK]],
        stdin=reading, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(reading)
    globals()["_writing_end"] = writing


def marked(mark: str) -> list[psutil.Process]:
    """The living processes that carry the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def reap(mark: str, grace_seconds: float = GRACE_SECONDS) -> None:
    """Ask what carries the mark to end, and kill what has not after the grace."""
    for signal, seconds in (("terminate", grace_seconds), ("kill", 2.0), ("kill", 2.0)):
        processes = marked(mark)
        for process in processes:
            try:
                getattr(process, signal)()
            except psutil.Error:
                continue
        psutil.wait_procs(processes, timeout=seconds)


def succeed(directory: Path) -> None:
    """Let nothing be at work in a directory any more of the command that was there before this one."""
    file, mine = directory / ".command", os.environ[MARK]
    if file.exists() and (former := file.read_text()) != mine:
        reap(former)
    file.write_text(mine)


if __name__ == "__main__":
    sys.stdin.buffer.read()  # returns when the command is gone
    reap(sys.argv[1])
