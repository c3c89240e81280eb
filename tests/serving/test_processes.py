"""Servers that do not come up, and servers that do not go."""

from __future__ import annotations

import sys
import time

import pytest

from serving.processes import Server, ServerError, free_ports


def python(code: str, tmp_path) -> Server:
    return Server("a server", [sys.executable, "-c", code], tmp_path / "log")


def test_a_server_that_ends_at_once_shows_the_end_of_its_log(tmp_path):
    server = python("import sys; print('the disk is full'); sys.exit(3)", tmp_path)
    with pytest.raises(ServerError, match=r"(?s)a server ended with exit code 3.*the disk is full"):
        server.wait_ready(lambda: False, seconds=30)


def test_a_server_that_never_gets_ready_is_given_up(tmp_path):
    server = python("import time; time.sleep(60)", tmp_path)
    with pytest.raises(ServerError, match=r"not ready after 0\.3 s"):
        server.wait_ready(lambda: False, seconds=0.3)
    server.stop()


def test_a_probe_that_raises_means_not_ready_yet(tmp_path):
    server = python("import time; time.sleep(60)", tmp_path)
    answers = iter([OSError(), False, True])

    def probe() -> bool:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    server.wait_ready(probe, seconds=30)
    server.stop()


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path):
    server = python(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
        tmp_path,
    )
    server.wait_ready(lambda: "up" in (tmp_path / "log").read_text(), seconds=30)
    started = time.monotonic()
    server.stop(seconds=0.5)
    assert server.process.poll() == -9
    assert time.monotonic() - started < 30


def test_free_ports_are_distinct():
    assert len(set(free_ports(20))) == 20
