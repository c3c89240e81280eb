"""Start the training workers with TorchX, follow them, and keep what they made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torchx.components.dist import torchrun
from torchx.runner import Runner, get_runner
from torchx.specs import AppState, Resource, VolumeMount

from components.columns import check_split, open_columns, write_columns
from components.training.bundle import DESCRIPTION
from components.training.figures import LOSSES
from components.training.fits import check_fits
from components.training.worker import CHECKPOINTS, REFUSED, rewards_to_learn_from
from contracts.job import JobSpec
from contracts.progress import VARIABLE, parse, report
from contracts.stage import (
    EARLIER_VARIABLE,
    RECORD,
    StageError,
    TransientError,
    code_version,
    read_record,
    stage,
)

ROLE = "worker"
SCHEDULER_VARIABLE = "BLUEWHALE_TRAINING_SCHEDULER"
IDENTITY = "identity"
ELASTIC = {"PET_MAX_RESTARTS": "3", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Workers go on without one that is lost, and with another in its place, from the last checkpoint. Not with the store
that agents share, though: of that one a replacement never learns (torch 2.13 makes it known in the first round only).
"""


def train(
    spec: JobSpec,
    features: str | Path,
    normalization: str | Path,
    output: str | Path,
    warm_start: str = "",
    known: dict[str, Any] | None = None,
    part: str = "",
    laid_out: Path | None = None,
) -> None:
    """Train on workers under torchrun; raises with the workers' own words `StageError` where one has refused, and
    `TransientError` where they were lost or failed otherwise.

    They are `spec.training.workers.max` processes here, or as many pods, of which `workers.min` will do, where
    BLUEWHALE_TRAINING_SCHEDULER names a TorchX scheduler of a cluster; in a pod with GPUs, a process for each. With
    `warm_start`, the directory of a policy bundle, they begin with its weights. What is `known` besides is put into the
    stage's record. A stage that trains more than once names each `part` in a few letters, and may have `laid_out` the
    features' columns for all. Where the same training was broken off at `output`, it goes on after its
    last checkpoint.
    """
    read_record(features), read_record(normalization)
    before = _set_aside(Path(output))
    scheduler = os.environ.get(SCHEDULER_VARIABLE) or "local_cwd"
    workers = spec.training.workers
    cores, processes = float(len(os.sched_getaffinity(0))), 1
    if "POD_UID" in os.environ:
        pod = pod_resource(spec)
        # Of its own cores: a node may have many more, and numbers must not depend on which one it is.
        cores, processes = pod.cpu, max(1, pod.gpu)
    if scheduler == "local_cwd":
        processes *= workers.max
    nodes = f"1x{processes}" if scheduler == "local_cwd" else f"{workers.min}:{workers.max}x{processes}"
    threads = max(1, int(cores / processes))
    seen = at_volume_root if scheduler == "kubernetes" else str
    with (
        stage("training", output) as (directory, facts),
        _sigterm_raises(),
        _laid_out(features, spec, directory / "columns", laid_out) as columns,
    ):
        (directory / "job.json").write_text(spec.model_dump_json(by_alias=True))
        if not laid_out:
            check_split(features, spec)
        data, digest = open_columns(columns)
        warnings = check_fits(data, spec, rewards_to_learn_from(data, spec))
        for warning in warnings:
            print(warning, file=sys.stderr, flush=True)
        files = sorted(Path(normalization).glob("*spec.json"))
        files += Path(warm_start).glob(DESCRIPTION) if warm_start else []
        texts = [file.read_text() for file in files]
        _take_up(before, directory, [spec.deciding(), digest, *texts, code_version()])
        app = torchrun(
            "--job", seen(directory / "job.json"), "--columns", seen(columns),
            "--normalization", seen(Path(normalization).absolute()), "--output", seen(directory),
            *(["--warm-start", warm_start] if warm_start else []),
            m=f"components.training.{ROLE}", j=nodes,
            env=ELASTIC
            | {"OMP_NUM_THREADS": str(threads), VARIABLE: "1"}
            | {"PET_LOCAL_RANKS_FILTER": "0", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )  # fmt: skip
        where = f"the workers' logs are in {directory / 'logs'}"
        if scheduler == "local_cwd":
            # torchrun is found through PATH, which need not name this interpreter's environment.
            os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            cfg: dict[str, Any] = {"log_dir": str(directory / "logs")}
        else:
            cfg = cluster_config(spec, scheduler, part)
            app.roles[0].image = os.environ["BLUEWHALE_TRAINING_IMAGE"]
            app.roles[0].resource = pod_resource(spec)
            if scheduler == "kubernetes":
                app.roles[0].mounts = [VolumeMount(v["claimName"], v["mountPath"]) for v in _volumes() if whole(v)]
            where = f"look at the pods of {cfg.get('job_name', app.name)}"
        with get_runner() as runner:
            handle = runner.run(app, scheduler=scheduler, cfg=cfg)
            _follow(runner, handle, where, directory / REFUSED)
        bundle = json.loads((directory / "policy" / DESCRIPTION).read_text())
        facts |= {
            "digest": bundle["digest"],
            "weights_digest": bundle["weights_digest"],
            "epochs": spec.training.epochs,
            "workers": bundle["provenance"]["workers"],
            "transitions": bundle["provenance"]["transitions"],
            "warm_start": bundle["provenance"]["warm_start"],
            "warnings": warnings + bundle["provenance"]["warnings"],
            **(known or {}),
        }


def take_over(*outputs: str | Path) -> None:
    """Move here what attempts that were broken off have left beside each other, for `train` to go on with.

    BLUEWHALE_EARLIER_TRAINING names their directories, the last one's first. Where it is not set, as in a cluster,
    they are looked for among the job's other runs: of one that has finished, which others may read, a copy is taken, in
    case that it could not be handed over.
    """
    places = [part for output in map(Path, outputs) for part in (output, _aside(output))]
    told = os.environ.get(EARLIER_VARIABLE)
    earlier = _broken_off(places[0]) if told is None else [Path(each) for each in told.split(os.pathsep) if each]
    for directory in earlier:
        for place in places:
            if (left := directory / place.name).exists() and not place.exists():
                if told is None and (left / RECORD).exists():
                    draft = place.with_name(f".{place.name}.draft")
                    shutil.rmtree(draft, ignore_errors=True)
                    left = shutil.copytree(left, draft, ignore=shutil.ignore_patterns(RECORD))
                left.rename(place)
                (place / RECORD).unlink(missing_ok=True)


def _broken_off(output: Path) -> list[Path]:
    """Where other runs have trained since one of them has finished, and where that did, the last first.

    KFP has a directory for each run, in it one for each task, and below that as many again for every one.
    """
    task = next((parent for parent in output.parents if parent.name == "training"), None)
    if task is None:
        return []
    below = output.parent.relative_to(task).parts
    found = task.parents[1].glob("/".join(["*", task.name, *["*" for _ in below]]))
    others = [place for place in found if place.is_dir() and place != output.parent]
    others.sort(key=lambda place: max((path.stat().st_mtime for path in place.iterdir()), default=0.0), reverse=True)
    finished = [i for i, place in enumerate(others) if (place / output.name / RECORD).exists()]
    return others[: finished[0] + 1] if finished else others


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.before")


def _set_aside(output: Path) -> Path:
    """Where that is which a training that was broken off has left at `output`, if it has: a stage begins afresh."""
    before = _aside(output)
    if not (output / RECORD).exists():
        _move(output, before)
    return before


def _move(source: Path, target: Path) -> None:
    """What training goes on with, but for what is there already: a kill may have come between."""
    for name in (IDENTITY, CHECKPOINTS, "epochs", "policy", LOSSES, "tensorboard"):
        if (source / name).exists() and not (target / name).exists():
            target.mkdir(exist_ok=True)
            (source / name).rename(target / name)


def _take_up(before: Path, directory: Path, identity: list[str]) -> None:
    """Bring back what is left of the same training, by all that decides it; of another one nothing is kept."""
    mine = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    known = before / IDENTITY
    if known.is_file() and known.read_text() == mine:
        _move(before, directory)
    else:
        (directory / IDENTITY).write_text(mine)
    if before.exists():
        # At once: what a kill leaves of it must not be taken for this training's.
        unwanted = before.with_suffix(".unwanted")
        shutil.rmtree(unwanted, ignore_errors=True)
        before.rename(unwanted)
        shutil.rmtree(unwanted, ignore_errors=True)


@contextlib.contextmanager
def _laid_out(features: str | Path, spec: JobSpec, directory: Path, before: Path | None = None) -> Iterator[Path]:
    """Lay the data out once, for all workers to map; whatever becomes of them, the files are gone at the end.

    What was laid out `before` is taken as it is, and stays.
    """
    if before:
        yield before.absolute()
        return
    try:
        write_columns(features, spec, directory)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def cluster_config(spec: JobSpec, scheduler: str, part: str = "") -> dict[str, Any]:
    """The scheduler's configuration, from the stage pod's environment and the job: its pods see the same volumes."""
    job, namespace, uid = (os.environ[name] for name in ("BLUEWHALE_JOB", "BLUEWHALE_NAMESPACE", "POD_UID"))
    queue_labels = json.loads(os.environ.get("BLUEWHALE_QUEUE_LABELS", "{}"))
    if scheduler == "kubernetes":
        return {"namespace": namespace, "queue": queue_labels.get("volcano.sh/queue-name", "default")}
    training = spec.training
    return {
        "namespace": namespace,
        # With the replica's index after it, the name must be a label of 63 characters.
        "job_name": f"bw-{job[: 37 - len(part)].rstrip('-')}-train-{uid[:8]}{part}",
        # Workers that nobody follows any more go with this pod.
        "owner": {"apiVersion": "v1", "kind": "Pod", "name": os.environ["POD_NAME"], "uid": uid},
        "labels": {
            **queue_labels,
            "bluewhale.io/job": job,
            "bluewhale.io/role": ROLE,
        },
        "image_pull_policy": os.environ.get("BLUEWHALE_PULL_POLICY", "IfNotPresent"),
        "image_pull_secrets": json.loads(os.environ.get("BLUEWHALE_PULL_SECRETS", "[]")),
        "run_as_user": os.getuid() or None,
        "node_selector": training.node_selector,
        "tolerations": [t.model_dump_json(exclude_none=True) for t in training.tolerations],
        "volumes": [json.dumps(volume) for volume in _volumes()],
    }


def at_volume_root(path: Path) -> str:
    """Where a path lies for pods that can only mount claims whole, as TorchX's Volcano scheduler's."""
    for part in _volumes():
        if not whole(part) and path.is_relative_to(part["mountPath"]):
            root = next(v for v in _volumes() if whole(v) and v["claimName"] == part["claimName"])
            return str(Path(root["mountPath"]) / part["subPath"] / path.relative_to(part["mountPath"]))
    return str(path)


def whole(volume: dict[str, str]) -> bool:
    return not volume.get("subPath")


def _volumes() -> list[dict[str, str]]:
    """What this pod mounts of the job's claims."""
    volumes: list[dict[str, str]] = json.loads(os.environ.get("BLUEWHALE_VOLUMES", "[]"))
    return volumes


def pod_resource(spec: JobSpec) -> Resource:
    """What each worker's pod asks for."""
    from kubernetes.utils.quantity import parse_quantity

    asked = spec.training.resources
    return Resource(float(parse_quantity(asked.cpu)), asked.gpus, int(parse_quantity(asked.memory)) >> 20)


def _follow(runner: Runner, handle: str, where: str, refused: Path) -> None:
    """Pass on progress and words of replica 0 until the app's end; an app that nobody follows any more is ended.

    Workers that would fail again have left the reason at `refused`.
    """
    try:
        with _sigterm_raises():
            for line in runner.log_lines(handle, ROLE, k=0, should_tail=True):
                if done := parse(line):
                    report(*done)
                else:
                    print(line.rstrip("\n"), file=sys.stderr, flush=True)
            status = runner.wait(handle, wait_interval=0.2)
    except BaseException:
        runner.cancel(handle)
        raise
    if status is None or status.state != AppState.SUCCEEDED:
        message = f"training: the workers ended as {status.state.name if status else 'unknown'}"
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            message += f": {json.loads(status.structured_error_msg)['message']['message']}"
        raise (StageError if refused.exists() else TransientError)(f"{message}\n  {where}")


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM, by which a pod is told to end, unwind the stack; where somebody else handles it, they do."""

    def end(_: int, __: FrameType | None) -> None:
        raise SystemExit(143)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
