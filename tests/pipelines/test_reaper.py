"""No process outlives its command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines import reaper

ROOT = Path(__file__).parents[2]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
COMMAND = f"""
import subprocess, sys, time
from pipelines import reaper
reaper.watch()
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(120)
"""


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_what_a_former_command_left_ends_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(reaper.MARK, "former")
    reaper.succeed(tmp_path)
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    time.sleep(0.2)
    reaper.succeed(tmp_path)
    assert left.poll() is None, "it is this command's own"
    monkeypatch.setenv(reaper.MARK, "next")
    reaper.succeed(tmp_path)
    assert not psutil.pid_exists(left.pid)


def test_a_killed_command_takes_its_most_stubborn_child_along_and_nobody_else():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert command.stdout
    child = int(command.stdout.readline())
    assert psutil.pid_exists(child)
    command.kill()
    command.wait()
    try:
        assert gone(child, 30)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
