"""Servers that run beside a command and end with it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class ServerError(RuntimeError):
    """A server that did not come up or went away; the message holds the end of its log."""


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Server:
    """A child process that is ready when its probe says so; without a log, it writes where this process does."""

    def __init__(
        self, name: str, command: list[str], log: Path | None, environment: dict[str, str] | None = None
    ) -> None:
        self.name, self.log = name, log
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") if log else contextlib.nullcontext() as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )

    def wait_ready(self, probe: Callable[[], bool], seconds: float = 60.0) -> None:
        """Raises `ServerError` when the process ends or is not ready in time."""
        deadline = time.monotonic() + seconds
        while True:
            self.check()
            try:
                if probe():
                    return
            except Exception:  # not up yet: every client library has errors of its own for that
                pass
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} is not ready after {seconds:g} s{self._tail()}")
            time.sleep(0.1)

    def check(self) -> None:
        """Raises `ServerError` when the process has ended."""
        if (code := self.process.poll()) is not None:
            raise ServerError(f"{self.name} ended with exit code {code}{self._tail()}")

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, and wait until it has; kill it when it does not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _tail(self) -> str:
        if not self.log:
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return f"; the end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)
