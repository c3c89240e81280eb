"""Where the workers run, and that nobody's workers go on."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torchx.specs import AppState

from components.training import launch
from components.training.kubernetes_scheduler import Opts, render
from components.training.launch import _follow, at_volume_root, cluster_config, pod_resource
from contracts.job import JobSpec
from contracts.stage import StageError

SPEC = JobSpec.model_validate(
    {
        "actions": ["left", "right"],
        "training": {
            "workers": {"min": 1, "max": 4},
            "resources": {"cpu": "1500m", "memory": "3Gi", "gpus": 1},
            "nodeSelector": {"gpu": "h200"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        },
    }
)
VOLUMES = [
    {"claimName": "bluewhale", "mountPath": "/var/bluewhale"},
    {"claimName": "bluewhale", "mountPath": "/minio", "subPath": "runs/u"},
]
ENVIRONMENT = {
    "BLUEWHALE_JOB": "shop-" * 9 + "x",
    "BLUEWHALE_NAMESPACE": "rl",
    "BLUEWHALE_VOLUMES": json.dumps(VOLUMES),
    "BLUEWHALE_QUEUE_LABELS": '{"kueue.x-k8s.io/queue-name": "gpus"}',
    "BLUEWHALE_PULL_SECRETS": '["registry"]',
    "POD_NAME": "launcher-1",
    "POD_UID": "0123456789abcdef",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_the_workers_belong_to_the_launcher_s_pod_and_see_what_it_sees() -> None:
    cfg = cluster_config(SPEC, "kubernetes_indexed_job")
    assert cfg["owner"] == {"apiVersion": "v1", "kind": "Pod", "name": "launcher-1", "uid": "0123456789abcdef"}
    assert [json.loads(volume) for volume in cfg["volumes"]] == VOLUMES
    assert cfg["node_selector"] == {"gpu": "h200"}
    assert cfg["tolerations"] == ['{"key":"gpu","operator":"Exists"}']
    assert cfg["image_pull_secrets"] == ["registry"]
    assert cfg["labels"] == {
        "kueue.x-k8s.io/queue-name": "gpus",
        "bluewhale.io/job": ENVIRONMENT["BLUEWHALE_JOB"],
        "bluewhale.io/role": "worker",
    }


def test_the_scheduler_takes_its_configuration_even_with_a_long_name() -> None:
    from torchx.components.dist import torchrun

    app = torchrun(m="components.training.worker", j="1:1024x1")
    job = render(app, Opts.from_cfg(cluster_config(SPEC, "kubernetes_indexed_job"))).job
    assert len(f"{job['metadata']['name']}-1023") <= 63
    assert job["spec"]["maxFailedIndexes"] == 1023


def test_volcano_is_told_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster_config(SPEC, "kubernetes") == {"namespace": "rl", "queue": "default"}
    monkeypatch.setenv("BLUEWHALE_QUEUE_LABELS", '{"volcano.sh/queue-name": "gpus"}')
    assert cluster_config(SPEC, "kubernetes")["queue"] == "gpus"


def test_a_worker_gets_what_the_job_says() -> None:
    asked = pod_resource(SPEC)
    assert (asked.cpu, asked.gpu, asked.memMB) == (1.5, 1, 3072)


@pytest.mark.parametrize(
    ("path", "there"),
    [
        ("/minio/bucket/policy", "/var/bluewhale/runs/u/bucket/policy"),
        ("/var/bluewhale/x", "/var/bluewhale/x"),
        ("/tmp/x", "/tmp/x"),
    ],
)
def test_who_mounts_claims_whole_finds_the_artifacts(path: str, there: str) -> None:
    assert at_volume_root(Path(path)) == there


class FakeRunner:
    """One app, whose replica 0 says some lines, and which ends in some state."""

    def __init__(self, lines: list[Any], state: AppState = AppState.SUCCEEDED, error: str = "") -> None:
        self.lines, self.cancelled = lines, False
        self.status: Any = type("Status", (), {"state": state, "structured_error_msg": error})()

    def log_lines(self, *_: Any, **__: Any) -> Any:
        for line in self.lines:
            if isinstance(line, Exception):
                raise line
            yield line

    def wait(self, *_: Any, **__: Any) -> Any:
        return self.status

    def cancel(self, _: str) -> None:
        self.cancelled = True


def test_words_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    _follow(FakeRunner(["epoch 1\n"]), "app", "")
    assert capsys.readouterr().err == "epoch 1\n"


def test_failed_workers_are_explained_in_their_own_words() -> None:
    error = json.dumps({"message": {"message": "StageError: lower the batch size"}})
    with pytest.raises(StageError, match=r"ended as FAILED: StageError: lower the batch size\n  look there"):
        _follow(FakeRunner([], AppState.FAILED, error), "app", "look there")


def test_workers_that_cannot_be_followed_are_ended() -> None:
    runner = FakeRunner([ConnectionError("gone")])
    with pytest.raises(ConnectionError):
        _follow(runner, "app", "")
    assert runner.cancelled


def test_laid_out_data_are_gone_when_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "write_columns", lambda _, __, directory: directory.mkdir())
    with pytest.raises(StageError), launch._laid_out(tmp_path, SPEC, tmp_path / "columns") as columns:  # noqa: PT012
        assert columns.is_dir()
        raise StageError("diverged")
    assert not columns.exists()


def test_sigterm_ends_the_workers(tmp_path: Path) -> None:
    """As a pod is told to end."""
    script = f"""
import time
from pathlib import Path
from components.training.launch import _follow

class Runner:
    def log_lines(self, *_, **__):
        print("following", flush=True)
        time.sleep(60)
        yield ""
    def cancel(self, _):
        Path({str(tmp_path / "cancelled")!r}).touch()

_follow(Runner(), "app", "")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "following\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "cancelled").exists()
