"""The pipeline as KFP gets it: valid, documented, cached where it may be, and every pod given what it needs."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml
from google.protobuf.json_format import ParseDict
from kfp import components
from kfp.pipeline_spec import pipeline_spec_pb2

from contracts.job import JobError, JobSpec, RLTrainingJob, load_job
from contracts.stage import EARLIER_VARIABLE
from pipelines.cluster import Cluster, compile_pipeline, run_spec
from pipelines.pipeline import SECTIONS, STAGES, build_pipeline, parameters

EXAMPLE = Path(__file__).parents[2] / "manifests" / "examples" / "cartpole.yaml"
ALL = ("simulation", *STAGES, "rollout")


def job(annotations: dict[str, str] | None = None, **spec: Any) -> RLTrainingJob:
    document = yaml.safe_load(EXAMPLE.read_text())
    document["metadata"]["annotations"] = annotations or {}
    for section, value in spec.items():
        if value is None:
            del document["spec"][section]
        else:
            document["spec"][section] = document["spec"].get(section, {}) | value
    return RLTrainingJob.model_validate(document)


def logged(path: str = "log.parquet", **more: Any) -> RLTrainingJob:
    return job(**{"simulation": None, "data": {"decisionLog": path}} | more)


def executors(body: dict[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("exec-"): executor["container"]
        for name, executor in body["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"].items()
    }


def pods(body: dict[str, Any]) -> dict[str, Any]:
    platform = body["pipeline_spec"]["platform_spec"]["platforms"]["kubernetes"]
    return {name.removeprefix("exec-"): pod for name, pod in platform["deploymentSpec"]["executors"].items()}


def environment(body: dict[str, Any], stage: str) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in executors(body)[stage]["env"]}


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    return run_spec(load_job(EXAMPLE), "uid-1", "lab", None)


def test_every_stage_can_read_its_part_of_a_job_that_names_a_feature_service() -> None:
    features = {"repository": "r", "service": "s", "keys": ["shop"], "actionKey": "item"}
    spec = JobSpec.model_validate({"actions": ["a", "b"], "data": {"decisionLog": "log", "features": features}})
    for sections in SECTIONS.values():
        JobSpec.model_validate_json(spec.only(*sections))


def test_kfp_s_own_loader_takes_what_compile_writes(tmp_path: Path) -> None:
    compile_pipeline(load_job(EXAMPLE), tmp_path / "pipeline.yaml")
    loaded = components.load_component_from_file(str(tmp_path / "pipeline.yaml"))
    assert set(loaded.pipeline_spec.root.dag.tasks) == set(ALL)
    defaults = loaded.component_spec.inputs
    assert all(parameter.default is not None for parameter in defaults.values()), "it can be started from the UI"
    assert json.loads(defaults["training_job"].default)["training"]["workers"] == {"min": 1, "max": 2}


OTHER_KFP = os.environ.get("BLUEWHALE_OTHER_KFP", "")


@pytest.mark.skipif(not OTHER_KFP, reason="BLUEWHALE_OTHER_KFP names no Python with another release of kfp")
def test_another_release_of_kfp_takes_it_too(tmp_path: Path) -> None:
    compile_pipeline(load_job(EXAMPLE), tmp_path / "pipeline.yaml")
    script = """if True:
        import sys, kfp
        from kfp import components
        loaded = components.load_component_from_file(sys.argv[1])
        print(kfp.__version__, *sorted(loaded.pipeline_spec.root.dag.tasks))
    """
    command = [OTHER_KFP, "-c", script, str(tmp_path / "pipeline.yaml")]
    told = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.split()
    assert told[0] != kfp.__version__
    assert told[1:] == sorted(ALL)


def test_the_body_of_a_run_is_a_pipeline_with_every_argument(body: dict[str, Any]) -> None:
    assert set(body) == {"pipeline_spec", "runtime_config", "service_account"}
    spec = ParseDict(body["pipeline_spec"]["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
    arguments = body["runtime_config"]["parameters"]
    assert set(spec.root.input_definitions.parameters) == set(arguments)
    assert all(isinstance(value, str) for value in arguments.values())
    assert body["runtime_config"]["pipeline_root"] == "minio://mlpipeline/v2/artifacts" == spec.default_pipeline_root
    assert body["service_account"] == "bluewhale-pipeline"
    assert json.loads(json.dumps(body)) == body


def test_every_input_and_output_is_explained(body: dict[str, Any]) -> None:
    spec = body["pipeline_spec"]["pipeline_spec"]
    for name, component in spec["components"].items():
        for side in ("inputDefinitions", "outputDefinitions"):
            for kind in component.get(side, {}).values():
                for port, definition in kind.items():
                    assert definition.get("description"), f"{name}.{port}"
    for parameter, definition in spec["root"]["inputDefinitions"]["parameters"].items():
        assert definition.get("description"), parameter


def test_each_stage_shows_a_table_and_the_evaluation_a_page_and_metrics(body: dict[str, Any]) -> None:
    outputs = {
        name.removeprefix("comp-"): component["outputDefinitions"]
        for name, component in body["pipeline_spec"]["pipeline_spec"]["components"].items()
    }
    for stage in ALL:
        assert outputs[stage]["artifacts"]["summary"]["artifactType"]["schemaTitle"] == "system.Markdown"
        assert "record" in outputs[stage]["parameters"]
    evaluation = {port: a["artifactType"]["schemaTitle"] for port, a in outputs["evaluation"]["artifacts"].items()}
    assert evaluation["page"] == "system.HTML"
    assert evaluation["metrics"] == "system.Metrics"


def test_only_what_acts_on_the_outside_is_never_taken_from_the_cache(body: dict[str, Any]) -> None:
    tasks = body["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]
    cached = {name for name, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == set(ALL) - {"simulation", "rollout"}


def test_the_rollout_comes_last_and_hears_of_every_stage(body: dict[str, Any]) -> None:
    task = body["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]["rollout"]
    assert set(STAGES) - {"timeline", "features", "normalization", "training"} <= set(task["dependentTasks"])
    for stage in STAGES:
        assert task["inputs"]["parameters"][stage]["taskOutputParameter"] == {
            "producerTask": stage,
            "outputParameterKey": "record",
        }


def test_tasks_have_names_for_people(body: dict[str, Any]) -> None:
    tasks = body["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]
    assert tasks["evaluation"]["taskInfo"]["name"] == "Counterfactual evaluation"
    assert len({task["taskInfo"]["name"] for task in tasks.values()}) == len(ALL)


def test_a_job_with_a_log_reads_it_from_the_volume_and_simulates_nothing() -> None:
    body = run_spec(logged("logs/today.parquet"), "u", "lab", None)
    assert "simulation" not in executors(body)
    assert body["runtime_config"]["parameters"]["decision_log"] == "/var/bluewhale/logs/today.parquet"
    assert json.loads(body["runtime_config"]["parameters"]["timeline_job"])["data"]["decisionLog"].startswith("/var")
    elsewhere = run_spec(logged("s3a://bucket/log"), "u", "lab", None)
    assert elsewhere["runtime_config"]["parameters"]["decision_log"] == "s3a://bucket/log"


def test_every_pod_is_the_job_s_unprivileged_and_sees_the_same_volumes(body: dict[str, Any]) -> None:
    for stage in ALL:
        pod = pods(body)[stage]
        assert pod["podMetadata"]["labels"] == {"bluewhale.io/job": "cartpole", "bluewhale.io/stage": stage}
        assert pod["securityContext"] == {"runAsUser": "65532", "runAsGroup": "65532", "runAsNonRoot": True}
        mounts = [(m["constant"], m["mountPath"], m.get("subPath", "")) for m in pod["pvcMount"]]
        assert mounts == [("bluewhale", "/var/bluewhale", ""), ("bluewhale", "/minio", "runs/uid-1")]
        fields = {f["name"]: f["fieldPath"] for f in pod["fieldPathAsEnv"]}
        assert fields == {"POD_NAME": "metadata.name", "POD_UID": "metadata.uid", "POD_IP": "status.podIP"}
        told = environment(body, stage)
        assert (told["BLUEWHALE_JOB"], told["BLUEWHALE_NAMESPACE"]) == ("cartpole", "lab")
        assert told["BLUEWHALE_TERMINATION_LOG"] == "/dev/termination-log"
        assert [
            (m["claimName"], m["mountPath"], m.get("subPath", "")) for m in json.loads(told["BLUEWHALE_VOLUMES"])
        ] == (mounts)


@pytest.mark.parametrize(
    ("root", "mount"), [("s3://bucket/p", "/s3"), ("gs://bucket", "/gcs"), ("minio://b", "/minio")]
)
def test_artifacts_lie_on_the_volume_wherever_the_launcher_keeps_them(root: str, mount: str) -> None:
    assert Cluster(load_job(EXAMPLE), "u", "lab", root).volumes[1]["mountPath"] == mount


def test_a_pipeline_root_that_is_no_bucket_is_refused() -> None:
    with pytest.raises(JobError, match="pipeline root /tmp"):
        build_pipeline("x", cluster=Cluster(load_job(EXAMPLE), "u", "lab", "/tmp"))


def test_images_pull_policy_and_secrets_come_from_the_job() -> None:
    images = {"spark": "reg/spark:1", "training": "reg/training:1", "pullPolicy": "Always", "pullSecrets": ["reg"]}
    body = run_spec(job(images=images), "u", "lab", None)
    for stage in ALL:
        of_spark = stage in ("timeline", "features", "normalization")
        assert executors(body)[stage]["image"] == f"reg/{'spark' if of_spark else 'training'}:1"
        assert pods(body)[stage]["imagePullPolicy"] == "Always"
        assert [s["secretName"] for s in pods(body)[stage]["imagePullSecret"]] == ["reg"]
        assert environment(body, stage)["BLUEWHALE_PULL_SECRETS"] == '["reg"]'


def test_one_worker_trains_in_the_stage_s_own_pod_with_what_the_job_asks_for() -> None:
    training = {
        "workers": {"max": 1}, "resources": {"cpu": "3", "memory": "5G", "gpus": 2}, "nodeSelector": {"gpu": "h200"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "volumes": [{"claimName": "scratch", "mountPath": "/scratch"}],
    }  # fmt: skip
    body = run_spec(job(training=training), "u", "lab", None)
    asked = executors(body)["training"]["resources"]
    assert asked["resourceCpuRequest"] == asked["resourceCpuLimit"] == "3000m"
    assert asked["resourceMemoryRequest"] == asked["resourceMemoryLimit"] == "4768Mi"
    assert asked["accelerator"] == {
        "type": "nvidia.com/gpu", "count": "2", "resourceType": "nvidia.com/gpu", "resourceCount": "2",
    }  # fmt: skip
    pod = pods(body)["training"]
    assert pod["nodeSelector"]["labels"] == {"gpu": "h200"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["pvcMount"][-1]["mountPath"] == "/scratch"
    assert "BLUEWHALE_TRAINING_SCHEDULER" not in environment(body, "training")


def test_runs_of_no_object_which_may_be_at_work_together_do_not_take_over_from_each_other() -> None:
    for uid, told in (("u", None), ("", "")):
        assert environment(run_spec(load_job(EXAMPLE), uid, "lab", None), "training").get(EARLIER_VARIABLE) == told


def test_the_workers_wait_in_the_queue_of_the_job() -> None:
    labels = {"kueue.x-k8s.io/queue-name": "gpus", "volcano.sh/queue-name": "night", "team": "search"}
    queued = load_job(EXAMPLE)
    queued = queued.model_copy(update={"metadata": queued.metadata.model_copy(update={"labels": labels})})
    told = environment(run_spec(queued, "u", "lab", None), "training")
    del labels["team"]
    assert json.loads(told["BLUEWHALE_QUEUE_LABELS"]) == labels


@pytest.mark.parametrize(
    ("memory", "sweep", "wanted"), [("512Mi", False, 1024), ("6Gi", False, 6144), ("2Gi", True, 4096)]
)
def test_who_lays_out_the_data_has_the_memory_of_a_worker(memory: str, sweep: bool, wanted: int) -> None:
    spec = {"training": {"workers": {"max": 2}, "resources": {"memory": memory}}}
    if sweep:
        spec["sweep"] = {"parameters": {"algorithm.dqn.learningRate": {"low": 1e-4, "high": 1e-2}}}
    asked = executors(run_spec(job(**spec), "u", "lab", None))["training"]["resources"]
    assert asked["resourceMemoryLimit"] == f"{wanted}Mi"


def test_several_workers_are_pods_of_their_own_and_the_stage_only_launches_them(body: dict[str, Any]) -> None:
    assert environment(body, "training")["BLUEWHALE_TRAINING_SCHEDULER"] == "kubernetes_indexed_job"
    assert executors(body)["training"]["resources"]["resourceCpuLimit"] == "250m"
    assert "nodeSelector" not in pods(body)["training"]


def test_spark_runs_in_the_stage_s_pod_or_in_executors(body: dict[str, Any]) -> None:
    assert "SPARK_MASTER" not in environment(body, "timeline")
    assert environment(body, "timeline")["SPARK_DRIVER_MEMORY"] == "1228m"
    spark = {"executors": 3, "executorCores": 2, "executorMemory": "4Gi", "driver": {"cpu": "500m", "memory": "1Gi"}}
    body = run_spec(job(spark=spark), "u", "lab", None)
    told = environment(body, "features")
    assert told["SPARK_MASTER"] == "k8s://https://kubernetes.default.svc"
    assert (told["BLUEWHALE_SPARK_EXECUTORS"], told["BLUEWHALE_SPARK_EXECUTOR_CORES"]) == ("3", "2")
    assert told["BLUEWHALE_SPARK_EXECUTOR_MEMORY"] == "4096m"
    assert executors(body)["features"]["resources"]["resourceCpuLimit"] == "500m"
    assert "SPARK_MASTER" not in environment(body, "export")


def test_finished_stages_are_redone_when_the_data_is_said_to_be_new() -> None:
    def version(job: RLTrainingJob) -> str:
        return run_spec(job, "u", "lab", None)["runtime_config"]["parameters"]["version"]

    today = {"bluewhale.io/scheduled-at": "2026-01-01T00:00:00Z"}
    versions = [
        version(logged()),
        version(logged("other.parquet")),
        version(logged(annotations={"bluewhale.io/data-version": "2"})),
        version(logged(annotations=today)),
    ]
    assert len(set(versions)) == 4
    assert version(logged()) == versions[0], "and only then"


def test_a_warm_start_reaches_training(body: dict[str, Any]) -> None:
    assert body["runtime_config"]["parameters"]["warm_start"] == ""
    warm = run_spec(load_job(EXAMPLE), "u", "lab", "/var/bluewhale/services/cartpole/bundles/abc")
    assert warm["runtime_config"]["parameters"]["warm_start"].endswith("bundles/abc")
    task = warm["pipeline_spec"]["pipeline_spec"]["root"]["dag"]["tasks"]["training"]
    assert task["inputs"]["parameters"]["warm_start"] == {"componentInputParameter": "warm_start"}


@pytest.mark.parametrize("source", [load_job(EXAMPLE), logged()])
def test_each_stage_is_given_its_own_part_of_the_job(source: RLTrainingJob) -> None:
    spec = run_spec(source, "u", "lab", None)["pipeline_spec"]["pipeline_spec"]
    for stage, task in spec["root"]["dag"]["tasks"].items():
        given = {port: value.get("componentInputParameter") for port, value in task["inputs"]["parameters"].items()}
        assert given["job"] == f"{stage}_job"
        assert given["version"] == "version"
        if stage == "timeline":
            assert given["outcomes"] == "outcomes"
            assert given["decision_log"] == (None if source.spec.simulation else "decision_log")


def test_on_one_machine_there_is_no_pod_to_furnish() -> None:
    pipeline: Any = build_pipeline("local")
    spec = pipeline.pipeline_spec
    assert set(spec.root.dag.tasks) == set(STAGES)
    assert not pipeline.platform_spec.platforms
    assert parameters(load_job(EXAMPLE).spec, "log", "v", warm_start="policy")["warm_start"] == "policy"
    for executor in spec.deployment_spec["executors"].values():
        assert "env" not in executor["container"]


def test_what_a_component_calls_can_be_imported_in_its_pod() -> None:
    """There, kfp.dsl has no decorators: a component may call nothing that lives beside one."""
    packages = ["simulation", *(f"components.{name}" for name in (*STAGES, "rollout"))]
    bodies = [importlib.import_module(f"{package}.component") for package in packages]
    called = {
        line.split()[1]
        for module in bodies
        for line in inspect.getsource(module).splitlines()
        if line.startswith("    from ")
    }
    script = "".join(f"import {name}\n" for name in sorted(called))
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"_KFP_RUNTIME": "true"}, check=True)
