"""What runs in a Triton pod: a real Triton that follows a mounted state file, under traffic."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from contracts.job import BehaviourPolicy
from serving.client import PolicyClient, ServiceError
from serving.pod import end_torn_line
from serving.processes import free_ports
from serving.state import read_state
from simulation.cartpole import ACTIONS, FEATURES
from simulation.policies import export_behaviour

STATE = dict.fromkeys(FEATURES, 0.1)


def policy(repository: Path, weight: float) -> dict:
    made = export_behaviour(BehaviourPolicy(weights={"pole_angle": weight}, exploration=0.1), repository)
    return {"version": made["version"], "digest": made["digest"]}


class Mount:
    """A ConfigMap as kubelet mounts it: the file is reached by a link that is swapped for another at once."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0
        directory.mkdir()
        (directory / "state.json").symlink_to("..data/state.json")

    def write(self, state: dict) -> None:
        self.count += 1
        whole = self.directory / f"..{self.count}"
        whole.mkdir()
        (whole / "state.json").write_text(json.dumps(state))
        (self.directory / "..new").symlink_to(whole.name)
        (self.directory / "..new").rename(self.directory / "..data")


class Traffic(threading.Thread):
    """Decisions without a pause; every one must be answered."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address, self.answers, self.failures = address, [], []
        self.ending = threading.Event()

    def run(self) -> None:
        with PolicyClient(self.address, timeout_seconds=30) as client:
            number = 0
            while not self.ending.is_set():
                number += 1
                try:
                    self.answers.append(client.decide(f"m{number}", 0, STATE))
                except ServiceError as error:
                    self.failures.append(str(error))

    def wait_for(self, what, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not what(self.answers[-1]):
            assert time.monotonic() < deadline, self.answers[-1]
            time.sleep(0.05)


def wait_until(what, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def broken_policy(repository: Path) -> dict:
    """Whole and with the right digests, but nothing that can be loaded."""
    made = policy(repository, 1.0)
    version = repository / "arm" / str(made["version"])
    (version / "model.onnx").write_bytes(b"not a graph")
    description = json.loads((version / "policy.json").read_text())
    description["onnx_digest"] = hashlib.sha256(b"not a graph").hexdigest()
    (version / "policy.json").write_text(json.dumps(description))
    return made


class Pod:
    """`serving.pod` in a process of its own, and the state that it follows."""

    def __init__(self, directory: Path, shared: Path, state: dict) -> None:
        self.directory, self.mount = directory, Mount(directory / "mount")
        self.mount.write(state)
        self.grpc, self.http, self.metrics = free_ports(3)
        command = [
            sys.executable, "-m", "serving.pod", f"--state={directory / 'mount' / 'state.json'}",
            f"--repository={shared}", f"--log={directory / 'log'}", f"--work={directory / 'work'}",
            "--service=default/x", "--replica=pod-0", "--address=127.0.0.1", f"--grpc-port={self.grpc}",
            f"--http-port={self.http}", f"--metrics-port={self.metrics}", "--drain-seconds=1",
        ]  # fmt: skip
        with (directory / "output").open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output)

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text()

    def ready(self) -> bool:
        """As kubelet asks."""
        assert self.process.poll() is None, self.output
        try:
            get(self.http, "/v2/models/policy/ready")
        except OSError:
            return False
        return True

    def loaded(self, rollout: str) -> float | None:
        """What Prometheus is told of the rollout's candidate."""
        try:
            lines = get(self.metrics, "/metrics").splitlines()
        except OSError:
            return None
        series = (line for line in lines if line.startswith("bluewhale_candidate_loaded{") and f'"{rollout}"' in line)
        return next((float(line.split()[-1]) for line in series), None)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
        return response.read().decode()


@contextmanager
def traffic_to(pod: Pod) -> Iterator[Traffic]:
    traffic = Traffic(f"127.0.0.1:{pod.grpc}")
    traffic.start()
    try:
        wait_until(lambda: traffic.answers)
        yield traffic
    finally:
        traffic.ending.set()
        traffic.join()


def state_of(stable: dict) -> dict:
    return {
        "stable": stable, "candidate": None, "weight": 0.0, "salt": "", "deadline_ms": 2000.0, "head": "sampled",
        "features": list(FEATURES), "actions": list(ACTIONS),
    }  # fmt: skip


def test_a_pod_follows_its_state_without_a_failed_request(tmp_path):
    shared = tmp_path / "shared"
    first, second, broken = policy(shared, 4.0), policy(shared, -4.0), broken_policy(shared)
    state = state_of(first)
    pod = Pod(tmp_path, shared, state)
    try:
        wait_until(pod.ready)
        with traffic_to(pod) as traffic:
            pod.mount.write(state | {"candidate": second, "salt": "r1", "weight": 1.0})
            traffic.wait_for(lambda a: a.policy_version == second["digest"])
            wait_until(lambda: pod.loaded("r1") == 1)

            # Promoted; the old stable policy is unloaded while the new one answers.
            pod.mount.write(state | {"stable": second, "salt": "r1"})
            traffic.wait_for(lambda a: a.policy_version == second["digest"] and a.arm == "stable")
            wait_until(lambda: not (tmp_path / "work/model_repository/arm" / str(first["version"])).exists())

            pod.mount.write(state | {"stable": second, "candidate": broken, "salt": "r2", "weight": 1.0})
            wait_until(lambda: pod.loaded("r2") == 0)
            assert read_state(tmp_path / "work" / "state.json")["candidate"] is None
            assert traffic.answers[-1].policy_version == second["digest"]

            pod.mount.write(state | {"stable": second, "head": "greedy", "salt": "r2"})
            traffic.wait_for(lambda a: a.action_probability == 1.0)
    finally:
        code = pod.end()
    assert (traffic.failures, code) == ([], 0), pod.output
    logged = [json.loads(line) for line in (tmp_path / "log" / "decisions-pod-0.jsonl").read_text().splitlines()]
    # Some are logged twice: a call that its connection's end overtakes is sent again.
    assert {row["mdp_id"] for row in logged} == {f"m{i + 1}" for i in range(len(traffic.answers))}
    assert {row["rollout"] for row in logged if row["arm"] == "candidate"} == {"r1"}
    assert logged[0]["rollout"] is None


def test_a_pod_whose_stable_policy_cannot_be_served_says_why_and_ends(tmp_path):
    shared = tmp_path / "shared"
    made = policy(shared, 4.0)
    pod = Pod(tmp_path, shared, state_of(made | {"digest": "0" * 64}))
    assert pod.process.wait(60) == 1
    assert f"digest is {made['digest']} there, but must be {'0' * 64}" in pod.output


@pytest.mark.parametrize(
    ("held", "then"),
    [("", ""), ('{"a": 1}\n', '{"a": 1}\n'), ('{"a": 1}\n{"b"', '{"a": 1}\n{"b"\n')],
)
def test_a_torn_line_is_ended_so_that_the_next_one_is_whole(tmp_path, held, then):
    file = tmp_path / "decisions.jsonl"
    file.write_text(held)
    end_torn_line(file)
    assert file.read_text() == then
