"""The Triton Inference Server with the policy service's models."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import tritonclient.grpc as grpc

from components.export.repository import MODEL, read_policies, write_config
from serving.processes import Server, ServerError, free_ports

HOME_VARIABLE = "BLUEWHALE_TRITON"
MODELS = Path(__file__).parent / "models"
HASHING = Path(__file__).parent.parent / "contracts" / "hashing.py"


def triton_home() -> Path:
    """Where `make install` put the server (`server/`) and its Python environment (`python/`)."""
    return Path(os.environ.get(HOME_VARIABLE) or Path(__file__).parent.parent / ".triton").absolute()


def assemble_repository(repository: Path, exported: list[Path], state_file: Path, log: Path) -> None:
    """Lay out what Triton serves: the policies of the exported repositories, `policy` and `feedback`.

    `state_file` is the rollout's state; decisions and outcomes are appended to `log`.
    """
    shutil.rmtree(repository, ignore_errors=True)
    for source in exported:
        shutil.copytree(source / MODEL, repository / MODEL, dirs_exist_ok=True)
    first = next(iter(read_policies(repository).values()))
    write_config(repository, "python" if list((repository / MODEL).glob("*/model.py")) else "onnxruntime")
    log.mkdir(parents=True, exist_ok=True)
    features, actions = len(first["features"]), len(first["actions"])
    _write_model(
        repository / "policy",
        f"""max_batch_size: 64
input [
  {{ name: "mdp_id" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "sequence_number" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "state" data_type: TYPE_FP32 dims: [ {features} ] }},
  {{ name: "possible" data_type: TYPE_BOOL dims: [ {actions} ] }}
]
output [
  {{ name: "action" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "action_index" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "action_probability" data_type: TYPE_FP32 dims: [ 1 ] }},
  {{ name: "policy_version" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "arm" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "fallback" data_type: TYPE_BOOL dims: [ 1 ] }}
]
dynamic_batching {{ }}
""",
        {
            "features": json.dumps(first["features"]),
            "actions": json.dumps(first["actions"]),
            "state_file": str(state_file.absolute()),
            "decision_log": str(log.absolute() / "decisions.jsonl"),
        },
    )
    shutil.copy(HASHING, repository / "policy" / "1" / "hashing.py")
    _write_model(
        repository / "feedback",
        """input [ { name: "outcome" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "rows" data_type: TYPE_INT64 dims: [ 1 ] } ]
""",
        {"outcomes": str(log.absolute() / "outcomes.jsonl")},
    )


def _write_model(directory: Path, config: str, parameters: dict[str, str]) -> None:
    (directory / "1").mkdir(parents=True)
    shutil.copy(MODELS / f"{directory.name}.py", directory / "1" / "model.py")
    text = "".join(
        f"parameters {{ key: {json.dumps(k)} value {{ string_value: {json.dumps(v)} }} }}\n"
        for k, v in parameters.items()
    )
    (directory / "config.pbtxt").write_text(
        f'name: "{directory.name}"\nbackend: "python"\n{config}instance_group [ {{ count: 1 kind: KIND_CPU }} ]\n{text}'
    )


class TritonServer(Server):
    """Triton on free ports of 127.0.0.1, serving an assembled repository by gRPC."""

    def __init__(self, repository: Path, log: Path) -> None:
        home = triton_home()
        server = home / "server" / "pytriton" / "tritonserver"
        python = home / "python"
        if not (server / "bin" / "tritonserver").is_file() or not (python / "bin" / "python3").is_file():
            raise ServerError(f"no Triton server in {home}: run `make install`, or name its place in {HOME_VARIABLE}")
        grpc_port, http_port, metrics_port = free_ports(3)
        self.grpc_address = f"127.0.0.1:{grpc_port}"
        self.metrics_address = f"127.0.0.1:{metrics_port}"
        self.shared_memory = f"bluewhale_{os.getpid()}_{grpc_port}_"
        # Triton's Python backend embeds the interpreter that it finds on PATH, and must load that one's own libpython.
        environment = {
            "PATH": f"{python / 'bin'}:/usr/bin:/bin",
            "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
            "HOME": os.environ.get("HOME", "/tmp"),
            "OMP_NUM_THREADS": "1",
            **{k: v for k, v in os.environ.items() if k.startswith("BLUEWHALE_")},
        }
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={repository.absolute()}",
            f"--backend-directory={backends(home)}",
            "--model-control-mode=explicit",
            *[f"--load-model={name}" for name in (MODEL, "policy", "feedback")],
            "--disable-auto-complete-config",
            "--grpc-address=127.0.0.1", f"--grpc-port={grpc_port}",
            "--http-address=127.0.0.1", f"--http-port={http_port}",
            "--metrics-address=127.0.0.1", f"--metrics-port={metrics_port}",
            "--allow-gpu-metrics=false", "--log-info=false", "--log-warning=false",
            # Shorter, and Triton leaves its model processes and shared memory behind.
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory}",
        ]  # fmt: skip
        super().__init__("Triton", command, log, environment)
        self.client = grpc.InferenceServerClient(self.grpc_address)

    def wait_until_ready(self) -> None:
        """Until every model answers; raises `ServerError` with Triton's words when one cannot be loaded."""
        self.wait_ready(lambda: all(self.client.is_model_ready(m) for m in (MODEL, "policy", "feedback")))

    def stop(self, seconds: float = 15.0) -> None:
        self.client.close()
        super().stop(seconds)
        for left in Path("/dev/shm").glob(f"{self.shared_memory}*"):
            left.unlink(missing_ok=True)


def backends(home: Path) -> Path:
    """Triton's backend directory with the Python backend for this Python version, made of links into the wheel."""
    version = f"{sysconfig.get_python_version()}"
    directory = home / "backends" / "python"
    directory.mkdir(parents=True, exist_ok=True)
    wheel = home / "server" / "pytriton" / "tritonserver"
    stub = wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
    for source in [*(wheel / "backends" / "python").iterdir(), stub]:
        link = directory / source.name
        # A link, not a copy: the stub finds its libraries from where it lies.
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(source)
    return directory.parent


def read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the rollout's state at once: a reader sees the old or the new one, never a part."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(state, indent=2))
    os.replace(temporary, path)
