"""What runs in a Triton pod: serves the policies that the state file names, and follows it as it changes.

The state file is a mounted ConfigMap that the controller writes. A policy is loaded first, while the others go on
answering, and only then named to the `policy` model; it is unloaded some seconds after it was last named. A candidate
that cannot be loaded is left out, and stable goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from components.export.repository import DESCRIPTION, MODEL
from contracts.stage import StageError
from serving.processes import ServerError
from serving.state import read_state, write_state
from serving.triton import CONNECTION_SECONDS, TritonServer, write_arm_config, write_models

POLL_SECONDS = 0.5
RETIRE_SECONDS = 5.0
"""A policy is unloaded this long after the state named it last: requests that it was to answer are over by then."""
RETRY_SECONDS = 5.0
"""Between the first two attempts to load a policy; then twice as long each time."""
ATTEMPTS = 3
"""Failed attempts after which a candidate is given up; the shared volume may show its files late."""
DRAIN_SECONDS = CONNECTION_SECONDS + 5.0
"""Requests still come for so long after a pod was told to end: clients keep to their connections."""
EXIT_SECONDS = 10
"""What Triton grants requests in flight when it ends."""

State = dict[str, Any]
Policy = dict[str, Any]


class Replica:
    """The policies of one pod, brought in line with what is wished."""

    def __init__(self, repository: Path, work: Path) -> None:
        self.repository, self.models, self.state_file = repository, work / "model_repository", work / "state.json"
        self.incoming = work / "incoming"
        self.triton: TritonServer | None = None
        self.state: State = {}
        self.loaded: dict[int, str] = {}
        """Digests by version."""
        self._since = 0.0
        self._failed: dict[tuple[str, str], tuple[int, float]] = {}

    def follow(self, wished: State) -> None:
        """Put the wished state in force, as far as its policies can be loaded."""
        if not self._ready(wished["stable"], wished):
            return  # what is in force goes on; a candidate's weight ends with its lease
        candidate = wished["candidate"]
        if candidate and not self._ready(candidate, wished):
            failures, _ = self._failed[candidate["digest"], wished["salt"]]
            wished = wished | {"candidate": None, "weight": 0.0}
            if failures >= ATTEMPTS:
                wished["given_up"] = wished["salt"]
        if wished != self.state:
            write_state(self.state_file, wished)
            self.state, self._since = wished, time.monotonic()
        elif time.monotonic() > self._since + RETIRE_SECONDS:
            self._retire()

    def add(self, policy: Policy, wished: State) -> None:
        """Have Triton serve the policy; raises when it cannot, and leaves the others as they were."""
        version, arm = policy["version"], self.models / MODEL
        place = arm / str(version)
        self._copy(policy, wished)
        place.parent.mkdir(parents=True, exist_ok=True)
        self.incoming.rename(place)
        try:
            write_arm_config(self.models)
            if self.triton:
                self.triton.load(MODEL)
        except BaseException:
            shutil.rmtree(place)
            if self.loaded:
                write_arm_config(self.models)
            raise
        self.loaded[version] = policy["digest"]

    def _ready(self, policy: Policy, wished: State) -> bool:
        if self.loaded.get(policy["version"]) == policy["digest"]:
            return True
        key = policy["digest"], wished["salt"]
        failures, last = self._failed.get(key, (0, 0.0))
        if failures and time.monotonic() < last + RETRY_SECONDS * 2 ** (failures - 1):
            return False
        try:
            self.add(policy, wished)
        except (ServerError, StageError, OSError, ValueError, KeyError) as error:
            self._failed[key] = failures + 1, time.monotonic()
            name = f"policy {policy['digest'][:12]}, version {policy['version']}"
            _say(f"{name}: attempt {failures + 1} to load it failed, the others go on: {type(error).__name__} {error}")
            return False
        _say(f"policy {policy['digest'][:12]}, version {policy['version']}: loaded")
        return True

    def _copy(self, policy: Policy, wished: State) -> None:
        """Take a version from the shared volume, on which what is served must not depend; check that it is right."""
        source = self.repository / MODEL / str(policy["version"])
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file():
                shutil.copyfile(file, self.incoming / file.name)
        description = json.loads((self.incoming / DESCRIPTION).read_text())
        onnx = hashlib.sha256((self.incoming / "model.onnx").read_bytes()).hexdigest()
        right = {
            "digest": policy["digest"], "features": wished["features"], "actions": wished["actions"],
            "onnx_digest": onnx,
        }  # fmt: skip
        for name, value in right.items():
            if description[name] != value:
                raise ServerError(f"{source}: {name} is {description[name]} there, but must be {value}")

    def _retire(self) -> None:
        named = {policy["version"] for policy in (self.state["stable"], self.state["candidate"]) if policy}
        old = self.loaded.keys() - named
        if not old:
            return
        for version in old:
            del self.loaded[version]
            shutil.rmtree(self.models / MODEL / str(version))
        write_arm_config(self.models)
        try:
            assert self.triton
            self.triton.load(MODEL)
        except ServerError as error:
            _say(f"versions {sorted(old)} stay loaded for now: {error}")


def end_torn_line(path: Path) -> None:
    """A line that a crash cut off must not spoil the next one."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as stream:
        stream.seek(-1, 2)
        if stream.read(1) != b"\n":
            stream.write(b"\n")


def run(options: argparse.Namespace) -> None:
    """Serve until told to end; raises when the stable policy cannot be served, or when Triton ends by itself."""
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    wished = read_state(options.state)
    shutil.rmtree(options.work / "model_repository", ignore_errors=True)
    options.log.mkdir(parents=True, exist_ok=True)
    for kind in ("decisions", "outcomes"):
        end_torn_line(options.log / f"{kind}-{options.replica}.jsonl")
    replica = Replica(options.repository, options.work)
    replica.add(wished["stable"], wished)
    write_models(
        replica.models, wished["features"], wished["actions"], replica.state_file, options.log,
        options.service, options.replica,
    )  # fmt: skip
    ports = options.grpc_port, options.http_port, options.metrics_port
    triton = TritonServer(replica.models, None, (MODEL, "feedback"), options.address, ports, EXIT_SECONDS)
    try:
        triton.wait_until_ready()
        replica.triton = triton
        replica.follow(wished)
        # Last of all: this model is the pod's readiness.
        triton.load("policy")
        _say("ready")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ending.set())
        last = float("inf")
        while time.monotonic() < last:
            time.sleep(POLL_SECONDS)
            triton.check()
            try:
                wished = read_state(options.state)
            except (OSError, ValueError) as error:
                _say(f"{options.state}: cannot be read, what is in force goes on: {error}")
            replica.follow(wished)
            if ending.is_set() and last == float("inf"):
                last = time.monotonic() + options.drain_seconds
    finally:
        triton.stop(EXIT_SECONDS + 5)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serving.pod", description="Serve policies from a pod.")
    parser.add_argument("--state", type=Path, required=True, help="the mounted rollout state")
    parser.add_argument("--repository", type=Path, required=True, help="model repository on the shared volume")
    parser.add_argument("--log", type=Path, required=True, help="directory of the decision log on the shared volume")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bluewhale"), help="the pod's own directory")
    parser.add_argument("--service", default="", help="label of its metrics: NAMESPACE/NAME")
    parser.add_argument("--replica", default=socket.gethostname(), help="label of its metrics, and part of log names")
    parser.add_argument("--address", default="0.0.0.0")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--drain-seconds", type=float, default=DRAIN_SECONDS)
    try:
        run(parser.parse_args(arguments))
    except (ServerError, StageError, OSError, ValueError, KeyError) as error:
        _say(f"{type(error).__name__} {error}", sys.stderr)
        return 1
    return 0


def _say(text: str, stream: Any = None) -> None:
    print(f"serving.pod: {text}", file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
