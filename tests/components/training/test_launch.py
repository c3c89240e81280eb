"""Where the workers run, and that nobody's workers go on."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torchx.specs import AppState

from components.normalization.spec import SPECS, NormalizationSpec
from components.training import launch
from components.training.actions import Actions
from components.training.algorithms.build import build_network
from components.training.bundle import DESCRIPTION, write_bundle
from components.training.figures import LOSSES
from components.training.kubernetes_scheduler import Opts, render
from components.training.launch import _follow, at_volume_root, cluster_config, pod_resource
from components.training.worker import CHECKPOINTS
from contracts.job import JobSpec, PolicyHead, Resources, Workers
from contracts.stage import EARLIER_VARIABLE, RECORD, StageError, TransientError, read_record
from contracts.transitions import STATE_PREFIX

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


SmallLog = Callable[..., tuple[JobSpec, tuple[Path, Path]]]


@pytest.fixture
def small_log(tmp_path: Path, write_stages: Callable[..., None]) -> SmallLog:
    """Makes a job, and the features and normalization stages of a log of 200 walks of two steps."""

    def make(
        actions: tuple[str, str] = ("left", "right"), workers: int = 1, epochs: int = 1
    ) -> tuple[JobSpec, tuple[Path, Path]]:
        n, rng = 400, np.random.default_rng(0)
        action = [actions[i] for i in rng.integers(2, size=n)]
        write_stages(tmp_path, 2, action, rng.normal(size=n), rng.normal(size=n))
        training = {"workers": {"min": 1, "max": workers}, "batchSize": 32, "epochs": epochs, "stepsPerEpoch": 100}
        job = {"actions": ["left", "right"], "algorithm": {"dqn": {"hiddenLayers": [16]}}, "training": training}
        return JobSpec.model_validate(job), (tmp_path / "features", tmp_path / "normalization")

    return make


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
    _follow(FakeRunner(["epoch 1\n"]), "app", "", Path("refused"))
    assert capsys.readouterr().err == "epoch 1\n"


def test_failed_workers_are_explained_in_their_own_words(tmp_path: Path) -> None:
    error = json.dumps({"message": {"message": "StageError: lower the batch size"}})
    refused = tmp_path / "refused.txt"
    said = r"ended as FAILED: StageError: lower the batch size\n  look there"
    with pytest.raises(TransientError, match=said):
        _follow(FakeRunner([], AppState.FAILED, error), "app", "look there", refused)
    refused.touch()
    with pytest.raises(StageError, match=said):
        _follow(FakeRunner([], AppState.FAILED, error), "app", "look there", refused)


@pytest.mark.parametrize(
    ("resources", "nodes", "threads"),
    [
        ({"cpu": "8"}, "1:2x1", "8"),
        ({"cpu": "8", "gpus": 4}, "1:2x4", "2"),
        ({"cpu": "500m"}, "1:2x1", "1"),
        # In the stage's own pod.
        ({"cpu": "8"}, "1x2", "4"),
        ({"cpu": "8", "gpus": 2}, "1x4", "2"),
    ],
)
def test_a_pod_has_a_process_for_each_gpu_and_threads_for_its_own_cores(
    small_log: SmallLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resources: dict[str, Any], nodes: str,
    threads: str,
) -> None:  # fmt: skip
    class Refusing:
        def run(self, app: Any, scheduler: str, cfg: Any) -> str:
            (role,) = app.roles
            assert role.env["OMP_NUM_THREADS"] == threads
            assert f"--nnodes {nodes.split('x')[0]} --nproc_per_node {nodes.split('x')[1]}" in " ".join(role.args)
            raise TransientError("seen")

    spec, stages = small_log(workers=2)
    training = spec.training.model_copy(update={"resources": Resources.model_validate(resources)})
    if ":" in nodes:
        monkeypatch.setenv(launch.SCHEDULER_VARIABLE, "bluewhale")
        monkeypatch.setenv("BLUEWHALE_TRAINING_IMAGE", "image")
    monkeypatch.setattr(launch, "get_runner", lambda: contextlib.nullcontext(Refusing()))
    with pytest.raises(TransientError, match="seen"):
        launch.train(spec.model_copy(update={"training": training}), *stages, tmp_path / "policy")


def test_workers_that_cannot_be_followed_are_ended() -> None:
    runner = FakeRunner([ConnectionError("gone")])
    with pytest.raises(ConnectionError):
        _follow(runner, "app", "", Path("refused"))
    assert runner.cancelled


def wait_for_a_checkpoint(output: Path) -> None:
    deadline = time.monotonic() + 240
    while not list((output / CHECKPOINTS).glob("[0-9]*")):
        assert time.monotonic() < deadline, "no checkpoint is written"
        time.sleep(0.01)


def test_a_worker_that_is_killed_is_replaced_and_training_goes_on(
    tmp_path: Path, small_log: SmallLog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two workers under a real torchrun, one of which dies in mid-training."""
    spec, stages = small_log(workers=2, epochs=20)
    monkeypatch.delenv("BLUEWHALE_VOLUMES")
    output = tmp_path / "training"

    def kill_one() -> None:
        wait_for_a_checkpoint(output)
        found = [p for p in psutil.process_iter(["cmdline"]) if str(output) in " ".join(p.info["cmdline"] or [])]
        workers = [p for p in found if "torch.distributed.run" not in " ".join(p.info["cmdline"]) and not p.children()]
        killed.append(workers[-1].pid)
        workers[-1].kill()

    killed: list[int] = []
    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    launch.train(spec, *stages, output)
    thread.join()
    assert len(killed) == 1
    assert [path.name for path in (output / "logs").rglob("attempt_1")], "the workers were started again"
    record = read_record(output)
    assert (record["epochs"], record["workers"]) == (20, 2)
    steps = [json.loads(line)["step"] for line in (output / LOSSES).read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_training_that_was_broken_off_goes_on_and_one_with_other_settings_begins_anew(
    tmp_path: Path, small_log: SmallLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, stages = small_log(epochs=30)
    output = tmp_path / "training"

    def broken_off(runner: Any, handle: str, *_: Any) -> None:
        wait_for_a_checkpoint(output)
        runner.cancel(handle)
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_follow", broken_off)
    with pytest.raises(KeyboardInterrupt):
        launch.train(spec, *stages, output)
    monkeypatch.setattr(launch, "_follow", _follow)
    written = (output / "epochs" / "001" / DESCRIPTION).stat().st_mtime_ns
    # In another place, as each of KFP's attempts has.
    monkeypatch.setenv(EARLIER_VARIABLE, str(tmp_path))
    output = tmp_path / "later" / "training"
    output.parent.mkdir()
    launch.take_over(output)
    larger = {"workers": Workers(max=2), "resources": Resources(memory="8Gi")}
    launch.train(spec.model_copy(update={"training": spec.training.model_copy(update=larger)}), *stages, output)
    first = output / "epochs" / "001" / DESCRIPTION
    assert first.stat().st_mtime_ns == written
    assert read_record(output)["workers"] == 2
    weights, losses = read_record(output)["weights_digest"], (output / LOSSES).read_text()

    # A launcher that died when all but the record was written.
    (output / RECORD).unlink()
    launch.train(spec, *stages, output)
    assert first.stat().st_mtime_ns == written
    assert (read_record(output)["weights_digest"], (output / LOSSES).read_text()) == (weights, losses)
    assert read_record(output)["workers"] == 2, "who has trained, not who was asked for"

    (output / RECORD).unlink()
    launch.train(spec.model_copy(update={"seed": 5}), *stages, output)
    assert first.stat().st_mtime_ns != written
    assert read_record(output)["weights_digest"] != weights
    assert [path.name for path in output.parent.iterdir()] == ["training"]


def test_a_policy_that_does_not_fit_to_begin_with_is_told_of_in_the_record(tmp_path: Path, small_log: SmallLog) -> None:
    spec, stages = small_log(epochs=1)
    launch.train(spec, *stages, tmp_path / "training", warm_start=str(tmp_path / "gone"))
    record = read_record(tmp_path / "training")
    assert record["warm_start"] is None
    [warning] = record["warnings"]
    assert re.match(r"no warm start, training begins anew: .*gone", warning)


def test_a_policy_of_other_actions_is_nothing_to_begin_with(tmp_path: Path, small_log: SmallLog) -> None:
    spec, stages = small_log(epochs=1)
    normalization, actions = NormalizationSpec.read(stages[1] / SPECS[STATE_PREFIX]), Actions(["up", "down"])
    network = build_network(spec.algorithm, normalization, actions)
    write_bundle(tmp_path / "policy", network, spec.algorithm, normalization, actions, PolicyHead(), {})
    with pytest.raises(
        StageError, match=r"no warm start: .*actions are up, down, this job's are left, right.* run the job once"
    ):
        launch.train(spec, *stages, tmp_path / "training", warm_start=str(tmp_path / "policy"))


def test_what_several_attempts_have_left_is_put_together_the_last_one_s_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))
    for place in (first / "policy", first / "policy.sweep", second / "policy", second / ".policy.before", third):
        place.mkdir(parents=True)
        (place / "whose").write_text(place.parent.name)
    monkeypatch.setenv(EARLIER_VARIABLE, f"{second}:{first}")
    launch.take_over(third / "policy", third / "policy.sweep")
    found = {path.name: (path / "whose").read_text() for path in third.iterdir() if path.is_dir()}
    assert found == {"policy": "2", ".policy.before": "2", "policy.sweep": "1"}
    launch.take_over(third / "policy")  # as if it was killed right then, and began again in its place
    assert (third / "policy" / "whose").read_text() == "2"


def test_in_a_cluster_the_jobs_other_runs_are_where_what_was_broken_off_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(EARLIER_VARIABLE, raising=False)
    first, finished, third, fourth, now = (
        tmp_path / "artifacts" / run / "training" / f"task-{run}" for run in ("9", "8", "7", "6", "5")
    )
    for age, place in enumerate((fourth, third, finished, first)):
        (place / "policy").mkdir(parents=True)
        (place / "policy" / "whose").write_text(place.name)
        if place is finished:
            (place / "policy" / RECORD).write_text("{}")
        os.utime(place / "policy", (1e9 - age, 1e9 - age))
    shutil.rmtree(fourth / "policy")  # it had not got that far
    (first / "policy.sweep").mkdir()
    os.utime(first / "policy.sweep", (1e9 - 9, 1e9 - 9))
    now.mkdir(parents=True)
    launch.take_over(now / "policy", now / "policy.sweep")
    assert (now / "policy" / "whose").read_text() == "task-7"
    assert not (now / "policy.sweep").exists(), "a training has finished since"

    # One that finished and was not handed over: it stays for those that may read it.
    for place in (now, third):
        shutil.rmtree(place)
    now.mkdir()
    launch.take_over(now / "policy")
    assert [path.name for path in now.iterdir()] == ["policy"]
    assert (now / "policy" / "whose").read_text() == (finished / "policy" / "whose").read_text() == "task-8"
    assert (finished / "policy" / RECORD).exists()
    assert not (now / "policy" / RECORD).exists()


def test_a_kill_while_what_was_left_is_taken_up_loses_nothing(tmp_path: Path) -> None:
    output, parts = tmp_path / "policy", ("identity", CHECKPOINTS, "epochs")
    for killed_after in range(len(parts) + 1):
        before = launch._aside(output)
        for i, name in enumerate(parts):
            place = output if i < killed_after else before
            place.mkdir(exist_ok=True)
            (place / name).write_text("[]")
        assert launch._set_aside(output) == before
        assert sorted(path.name for path in before.iterdir()) == sorted(parts)
        for name in parts:
            (before / name).unlink()


def test_a_log_that_cannot_be_learned_from_is_refused_before_workers_begin(tmp_path: Path, small_log: SmallLog) -> None:
    spec, stages = small_log(actions=("left", "left"))
    with pytest.raises(StageError, match="the log takes only 'left' of left, right"):
        launch.train(spec, *stages, tmp_path / "training")
    assert not (tmp_path / "training" / "logs").exists()


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

_follow(Runner(), "app", "", Path("refused"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "following\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "cancelled").exists()
