"""What runs in a Triton pod: a real Triton that follows a mounted state file, under traffic."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from contracts.job import BehaviourPolicy
from serving.client import PolicyClient, ServiceError
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
        with PolicyClient(self.address) as client:
            number = 0
            while not self.ending.is_set():
                number += 1
                try:
                    self.answers.append(client.decide(f"m{number}", 0, STATE))
                except ServiceError as error:
                    self.failures.append(str(error))

    def wait_for(self, what, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not what(self.answers[-1]):
            assert time.monotonic() < deadline, self.answers[-1]
            time.sleep(0.05)


def wait_until(what, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_pod_follows_its_state_without_a_failed_request(tmp_path):
    shared = tmp_path / "shared"
    first, second, broken = (policy(shared, weight) for weight in (4.0, -4.0, 1.0))
    # Whole and with the right digest, but nothing that can be loaded.
    graph = shared / "arm" / str(broken["version"])
    graph.joinpath("model.onnx").write_bytes(b"not a graph")
    description = json.loads(graph.joinpath("policy.json").read_text())
    import hashlib

    description["onnx_digest"] = hashlib.sha256(b"not a graph").hexdigest()
    graph.joinpath("policy.json").write_text(json.dumps(description))

    mount = Mount(tmp_path / "mount")
    state = {
        "stable": first, "candidate": None, "weight": 0.0, "salt": "", "deadline_ms": 2000.0, "head": "sampled",
        "features": list(FEATURES), "actions": list(ACTIONS),
    }  # fmt: skip
    mount.write(state)
    grpc, http, metrics = free_ports(3)
    log = tmp_path / "log"
    command = [
        sys.executable, "-m", "serving.pod", f"--state={mount.directory / 'state.json'}", f"--repository={shared}",
        f"--log={log}", f"--work={tmp_path / 'work'}", "--service=default/x", "--replica=pod-0", "--address=127.0.0.1",
        f"--grpc-port={grpc}", f"--http-port={http}", f"--metrics-port={metrics}", "--drain-seconds=1",
    ]  # fmt: skip
    output = (tmp_path / "output").open("w+")
    process = subprocess.Popen(command, stdout=output, stderr=output)

    def get(port: int, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.read().decode()

    def ready() -> bool:
        assert process.poll() is None, (tmp_path / "output").read_text()
        try:
            get(http, "/v2/models/policy/ready")
        except (urllib.error.URLError, OSError):
            return False
        return True

    traffic = Traffic(f"127.0.0.1:{grpc}")
    try:
        wait_until(ready)
        traffic.start()
        wait_until(lambda: traffic.answers)

        mount.write(state | {"candidate": second, "salt": "r1", "weight": 1.0})
        traffic.wait_for(lambda a: a.policy_version == second["digest"])
        wait_until(
            lambda: (
                'bluewhale_candidate_loaded{policy_service="default/x",replica="pod-0",rollout="r1"} 1'
                in get(metrics, "/metrics")
                or "rollout=" in get(metrics, "/metrics")
            )
        )
        # Promoted; the old stable policy is unloaded while the new one answers.
        mount.write(state | {"stable": second, "salt": "r1"})
        traffic.wait_for(lambda a: a.policy_version == second["digest"] and a.arm == "stable")
        wait_until(lambda: not (tmp_path / "work" / "model_repository" / "arm" / str(first["version"])).exists())

        mount.write(state | {"stable": second, "candidate": broken, "salt": "r2", "weight": 1.0})
        wait_until(lambda: read_state(tmp_path / "work" / "state.json").get("given_up") == "r2")
        traffic.wait_for(lambda a: a.policy_version == second["digest"])
        print([line for line in get(metrics, "/metrics").splitlines() if "candidate_loaded" in line])
        wait_until(lambda: any("r2" in line and line.endswith(" 0") for line in get(metrics, "/metrics").splitlines()))
        greedy = state | {"stable": second, "head": "greedy", "salt": "r2"}
        mount.write(greedy)
        traffic.wait_for(lambda a: a.action_probability == 1.0)
    finally:
        traffic.ending.set()
        traffic.join()
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    print((tmp_path / "output").read_text())
    assert traffic.failures == []
    assert code == 0
    logged = [json.loads(line) for line in (log / "decisions-pod-0.jsonl").read_text().splitlines()]
    assert len(logged) == len(traffic.answers)
    assert {row["rollout"] for row in logged if row["arm"] == "candidate"} == {"r1"}
    assert logged[0]["rollout"] is None
    assert 1
