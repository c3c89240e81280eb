"""Two torchrun agents, as two pods have them: one dies in mid-epoch, the other goes on alone, a third joins."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from components.columns import write_columns
from components.training.launch import ELASTIC
from components.training.worker import CHECKPOINTS, LOOK_ROWS
from contracts.job import JobSpec

ROOT = Path(__file__).parents[3]
EPOCHS, STEPS = 30, 250
SPEC = JobSpec.model_validate(
    {
        "actions": ["left", "right"],
        "algorithm": {"dqn": {"hiddenLayers": [16], "learningRate": 1e-3, "targetUpdateRate": 0.02}},
        "training": {"batchSize": 32, "epochs": EPOCHS, "stepsPerEpoch": STEPS},
    }
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_stages: Callable[..., None]) -> Path:
    """Columns and normalization of a log whose MDPs are walks of five steps: to the right pays."""
    root, n = tmp_path_factory.mktemp("elastic"), 2_000
    rng = np.random.default_rng(0)
    action = rng.integers(2, size=n)
    x = np.arange(n) % 5 + rng.normal(scale=0.1, size=n)
    write_stages(root, 5, [SPEC.actions[a] for a in action], action, x)
    write_columns(root / "features", SPEC, root / "columns")
    (root / "job.json").write_text(SPEC.model_dump_json(by_alias=True))
    return root


def worker(place: Path, output: Path) -> list[str | Path]:
    return [
        "-m", "components.training.worker", "--job", place / "job.json", "--columns", place / "columns",
        "--normalization", place / "normalization", "--output", output,
    ]  # fmt: skip


Start = Callable[[Path, str], subprocess.Popen[bytes]]


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    """Starts an agent with one worker; the first one's port is where they meet."""
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def begin(output: Path, nodes: str) -> subprocess.Popen[bytes]:
        output.mkdir(exist_ok=True)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test",
            "--rdzv-conf", f"is_host={int(not started)},last_call_timeout=1,keep_alive_interval=1,join_timeout=60",
            *worker(place, output),
        ]  # fmt: skip
        environment = os.environ | ELASTIC | {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        started.append(process)
        return process

    yield begin
    for process in started:
        kill(process)


def kill(agent: subprocess.Popen[bytes]) -> None:
    """End an agent and its worker at once, as a pod's end does."""
    if agent.poll() is None:
        for each in [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        agent.wait()


def finished(output: Path) -> int:
    return max((int(path.name) // STEPS for path in (output / CHECKPOINTS).glob("[0-9]*")), default=0)


def wait_until(done: Callable[[], bool], *agents: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if done():
            return
        assert all(agent.poll() is None for agent in agents), "an agent ended too early"
        time.sleep(0.05)
    raise AssertionError("nothing came of it in five minutes")


def test_one_of_two_dies_in_mid_epoch_and_another_takes_its_place(place: Path, start: Start, tmp_path: Path) -> None:
    output = tmp_path / "disturbed"
    first, victim = start(output, "1:2"), start(output, "1:2")
    wait_until(lambda: finished(output) >= 2, first, victim)
    kill(victim)
    left = finished(output)
    wait_until(lambda: finished(output) >= left + 2, first)
    # It waits, so that it is not done before the other has come.
    (alone,) = psutil.Process(first.pid).children()
    alone.suspend()
    third = start(output, "1:2")
    wait_until(lambda: any(c.status == "ESTABLISHED" for c in psutil.Process(third.pid).net_connections()), first)
    alone.resume()
    assert first.wait(300) == 0
    assert third.wait(120) == 0
    workers = [
        json.loads((output / "epochs" / f"{epoch:03}" / "bundle.json").read_text())["provenance"]["workers"]
        for epoch in (left, left + 2, EPOCHS)
    ]
    assert workers == [2, 1, 2]
    # No step is left out or done twice in what counts.
    steps = [json.loads(line)["step"] for line in (output / "losses.jsonl").read_text().splitlines()]
    looks = LOOK_ROWS // SPEC.training.batch_size
    assert steps == [step for step in range(1, EPOCHS * STEPS + 1) if step % looks == 0 or step % STEPS == 0]

    (tmp_path / "alone").mkdir()
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1", "RANK": "0"}
    subprocess.run([sys.executable, *worker(place, tmp_path / "alone")], cwd=ROOT, env=os.environ | one, check=True)
    undisturbed = load_file(tmp_path / "alone" / "policy" / "weights.safetensors")
    for name, weights in load_file(output / "policy" / "weights.safetensors").items():
        np.testing.assert_allclose(weights, undisturbed[name], atol=0.02, err_msg=name)
