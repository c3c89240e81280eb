"""The Triton Inference Server with the policy service's models."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sysconfig
from pathlib import Path

import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from components.export.repository import MODEL, read_policies, write_config
from serving.processes import Server, ServerError, free_ports

HOME_VARIABLE = "BLUEWHALE_TRITON"
MODELS = Path(__file__).parent / "models"
ARM_AND_SERVICE = (MODEL, "policy", "feedback")
RESTRICTED = "model-repository,shared-memory,trace,logging"
"""What no client of the service may do to Triton."""
KEY_HEADER = "bluewhale-key"
CONNECTION_SECONDS = 10
"""Clients connect anew after this: so they come to other replicas, and leave one that is about to end."""
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
    write_arm_config(repository)
    log.mkdir(parents=True, exist_ok=True)
    first = next(iter(read_policies(repository).values()))
    write_models(repository, first["features"], first["actions"], state_file, log)


def write_arm_config(repository: Path) -> None:
    """Have Triton's next load of `arm` take in the versions that are there."""
    write_config(repository, "python" if list((repository / MODEL).glob("[0-9]*/model.py")) else "onnxruntime")


def write_models(
    repository: Path, features: list[str], actions: list[str], state_file: Path, log: Path, service: str = "",
    replica: str = "",
) -> None:  # fmt: skip
    """Add the models `policy` and `feedback`, which write to `log`.

    `service` becomes a label of their metrics; a `replica` has a label and log files of its own.
    """
    suffix = f"-{replica}" if replica else ""
    labels = {"policy_service": service, "replica": replica}
    common = {"labels": json.dumps({name: value for name, value in labels.items() if value})}
    _write_model(
        repository / "policy",
        f"""max_batch_size: 64
input [
  {{ name: "mdp_id" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "sequence_number" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "state" data_type: TYPE_FP32 dims: [ {len(features)} ] }},
  {{ name: "possible" data_type: TYPE_BOOL dims: [ {len(actions)} ] }}
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
        common
        | {
            "features": json.dumps(features),
            "actions": json.dumps(actions),
            "state_file": str(state_file.absolute()),
            "decision_log": str(log.absolute() / f"decisions{suffix}.jsonl"),
        },
    )
    shutil.copy(HASHING, repository / "policy" / "1" / "hashing.py")
    _write_model(
        repository / "feedback",
        """input [ { name: "outcome" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "rows" data_type: TYPE_INT64 dims: [ 1 ] } ]
""",
        common | {"outcomes": str(log.absolute() / f"outcomes{suffix}.jsonl")},
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
    """Triton serving an assembled repository by gRPC: on free ports of 127.0.0.1, or on given ones.

    Its models can be loaded and unloaded by this process alone.
    """

    def __init__(
        self,
        repository: Path,
        log: Path | None,
        models: tuple[str, ...] = ARM_AND_SERVICE,
        address: str = "127.0.0.1",
        ports: tuple[int, int, int] | None = None,
        exit_seconds: int = 5,
    ) -> None:
        """`ports`: gRPC, HTTP, metrics. `exit_seconds`: how long requests in flight may take when it ends."""
        home = triton_home()
        server = home / "server" / "pytriton" / "tritonserver"
        python = home / "python"
        if not (server / "bin" / "tritonserver").is_file() or not (python / "bin" / "python3").is_file():
            raise ServerError(f"no Triton server in {home}: run `make install`, or name its place in {HOME_VARIABLE}")
        grpc_port, http_port, metrics_port = ports or free_ports(3)
        reachable = "127.0.0.1" if address == "0.0.0.0" else address
        self.models = models
        self.grpc_address = f"{reachable}:{grpc_port}"
        self.metrics_address = f"{reachable}:{metrics_port}"
        self.shared_memory = f"bluewhale_{os.getpid()}_{grpc_port}_"
        self._sweep()
        key = secrets.token_hex(16)
        self._authority = {f"triton-grpc-protocol-{KEY_HEADER}": key}
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
            *[f"--load-model={name}" for name in models],
            "--disable-auto-complete-config",
            f"--grpc-address={address}", f"--grpc-port={grpc_port}",
            f"--grpc-max-connection-age={CONNECTION_SECONDS * 1000}",
            f"--grpc-max-connection-age-grace={exit_seconds * 1000}",
            f"--http-address={address}", f"--http-port={http_port}",
            f"--metrics-address={address}", f"--metrics-port={metrics_port}",
            f"--grpc-restricted-protocol={RESTRICTED}:{KEY_HEADER}={key}",
            f"--http-restricted-api={RESTRICTED}:{KEY_HEADER}={key}",
            "--allow-gpu-metrics=false", "--log-info=false", "--log-warning=false",
            # Below five seconds, Triton leaves its model processes and shared memory behind.
            f"--exit-timeout-secs={exit_seconds}",
            f"--backend-config=python,shm-region-prefix-name={self.shared_memory}",
        ]  # fmt: skip
        super().__init__("Triton", command, log, environment)
        self.client = grpc.InferenceServerClient(self.grpc_address)

    def wait_until_ready(self) -> None:
        """Until every model answers; raises `ServerError` with Triton's words when one cannot be loaded."""
        self.wait_ready(lambda: all(self.client.is_model_ready(m) for m in self.models))

    def load(self, model: str) -> None:
        """Load a model, or load it anew while it goes on answering; raises `ServerError` and leaves it as it was."""
        try:
            self.client.load_model(model, headers=self._authority)
        except InferenceServerException as error:
            raise ServerError(f"Triton cannot load {model}: {error.message()}") from None

    def stop(self, seconds: float = 15.0) -> None:
        self.client.close()
        super().stop(seconds)
        self._sweep()

    def _sweep(self) -> None:
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
