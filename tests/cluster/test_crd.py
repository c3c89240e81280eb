"""The CRDs before a real API server: does it take them, and does it judge by their rules?

Runs against the cluster of `KUBECONFIG`, whose CRDs of BlueWhale it replaces by this tree's.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from bluewhale_operator import crd
from contracts.job import JobSpec
from contracts.policy_service import PolicyServiceSpec
from tests.operator.bluewhale_operator.cel_cases import (
    CASES,
    FIXED_IN_A_JOB,
    NIGHTLY,
    PRICE,
    SLATES,
    Case,
    Object,
    job,
    policy,
    service,
)  # fmt: skip

EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"
NOT_ALONE = ("actionSpace", "slate", "actionBounds")
"""Fields that other fields must go with."""
MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"

pytestmark = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")


class Api:
    """The API server's paths for BlueWhale's kinds in one namespace; unknown fields are refused."""

    def __init__(self) -> None:
        self.client = config.new_client_from_config(os.environ["KUBECONFIG"])
        self.namespace = ""

    def call(self, method: str, path: str, body: Object | None = None, **options: str) -> Any:
        content_type = options.pop("content_type", "application/json")
        return self.client.call_api(
            path,
            method,
            body=body,
            query_params=list({"fieldValidation": "Strict", **options}.items()) if body else list(options.items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            auth_settings=["BearerToken"],
            response_type="object",
            _return_http_data_only=True,
        )

    def path(self, document: Object, *, subresource: str = "", named: bool = True) -> str:
        plural = f"{document['kind'].lower()}s"
        path = f"/apis/{crd.GROUP}/{crd.VERSION}/namespaces/{self.namespace}/{plural}"
        return f"{path}/{document['metadata']['name']}{subresource}" if named else path

    def create(self, document: Object, **options: str) -> Any:
        return self.call("POST", self.path(document, named=False), document, **options)

    def replace(self, document: Object, **options: str) -> Any:
        return self.call("PUT", self.path(document), document, **options)

    def apply(self, document: Object, manager: str, **options: str) -> Any:
        subresource = options.pop("subresource", "")
        return self.call(
            "PATCH", self.path(document, subresource=subresource), document, content_type=APPLY, fieldManager=manager,
            **options,
        )  # fmt: skip

    def merge(self, document: Object, patch: Object, subresource: str = "") -> Any:
        return self.call("PATCH", self.path(document, subresource=subresource), patch, content_type=MERGE)

    def read(self, document: Object) -> Any:
        return self.call("GET", self.path(document))

    def delete(self, document: Object) -> None:
        self.call("DELETE", self.path(document))


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    api = Api()
    core = client.CoreV1Api(api.client)
    generated = client.V1ObjectMeta(generate_name="bluewhale-crd-")
    api.namespace = core.create_namespace(client.V1Namespace(metadata=generated)).metadata.name
    try:
        for name, text in crd.files().items():
            if name.startswith(crd.GROUP):
                install(api, yaml.safe_load(text))
        yield api
    finally:
        core.delete_namespace(api.namespace)


def install(api: Api, document: Object) -> None:
    """Apply a CRD, and wait until the API server answers by it: which it does a little after it says so."""
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{document['metadata']['name']}"
    api.call("PATCH", path, document, content_type=APPLY, fieldManager="make-crds", force="true")
    for _ in range(100):
        conditions = {c["type"]: c["status"] for c in api.call("GET", path)["status"]["conditions"] or ()}
        if conditions.get("Established") == "True":
            break
        time.sleep(0.1)
    assert conditions == {"NamesAccepted": "True", "Established": "True"}, conditions
    time.sleep(2)


def refusal(error: pytest.ExceptionInfo[ApiException]) -> str:
    assert error.value.status in (400, 422), error.value.body
    return json.loads(error.value.body)["message"]


@pytest.fixture
def created(api: Api) -> Iterator[Any]:
    """Creates objects that the test's end deletes."""
    documents = []

    def create(document: Object) -> Any:
        documents.append(document)
        return api.create(document)

    yield create
    for document in documents:
        api.delete(document)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rule_lets_pass_what_keeps_it_and_refuses_what_does_not(api: Api, created: Any, case: Case) -> None:
    if case.old:
        version = created(case.old)["metadata"]["resourceVersion"]

    def send(document: Object) -> None:
        if case.old:
            metadata = {**document["metadata"], "resourceVersion": version}
            api.replace({**document, "metadata": metadata}, dryRun="All")
        else:
            api.create(document, dryRun="All")

    send(case.good)
    with pytest.raises(ApiException) as error:
        send(case.bad)
    assert case.says in refusal(error)


@pytest.mark.parametrize("name", [name for name in FIXED_IN_A_JOB if name not in NOT_ALONE])
def test_a_job_with_a_schedule_may_be_changed_for_its_next_runs(api: Api, created: Any, name: str) -> None:
    old = created(job(schedule=NIGHTLY))
    changed = api.replace({**old, "spec": old["spec"] | {name: FIXED_IN_A_JOB[name]}}, dryRun="All")
    assert changed["metadata"]["generation"] == 2


@pytest.mark.parametrize("spec", [PRICE, SLATES], ids=lambda spec: spec["actionSpace"])
def test_the_next_runs_of_a_schedule_may_be_of_another_action_space(api: Api, created: Any, spec: Object) -> None:
    old = created(job(schedule=NIGHTLY))
    assert api.replace({**old, "spec": old["spec"] | spec}, dryRun="All")["metadata"]["generation"] == 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_accepted(api: Api, path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] in {kind.name for kind in crd.KINDS}:
            api.create(document, dryRun="All")


def test_defaults_are_filled_in_as_the_models_do_it(api: Api) -> None:
    for document, model in ((job(), JobSpec), (service(), PolicyServiceSpec)):
        filled = api.create(document, dryRun="All")["spec"]
        assert model.model_validate_json(json.dumps(filled)) == model.model_validate(document["spec"])
        assert filled == model.model_validate(document["spec"]).model_dump(
            mode="json", by_alias=True, exclude_none=True
        )


def test_null_is_a_field_left_out(api: Api) -> None:
    stored = api.create(job(simulation=None, training={"stepsPerEpoch": None, "epochs": None}), dryRun="All")
    assert "simulation" not in stored["spec"]
    assert "stepsPerEpoch" not in stored["spec"]["training"]
    assert stored["spec"]["training"]["epochs"] == 10


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"trainning": {}}, 'unknown field "spec.trainning"'),
        ({"training": {"epoch": 1}}, 'unknown field "spec.training.epoch"'),
        ({"algorithm": {"dqn": {"lerningRate": 0.1}}}, 'unknown field "spec.algorithm.dqn.lerningRate"'),
        ({"algorithm": {"dqn": {"learningRate": 0}}}, "spec.algorithm.dqn.learningRate"),
        ({"training": {"epochs": "ten"}}, "spec.training.epochs"),
        ({"evaluation": {"gate": {"estimator": "guess"}}}, "spec.evaluation.gate.estimator: Unsupported value"),
        ({"schedule": {"cron": "@daily"}}, "spec.schedule.cron"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(api: Api, spec: Object, said: str) -> None:
    with pytest.raises(ApiException) as error:
        api.create(job(**spec), dryRun="All")
    assert said in refusal(error)


def test_keys_of_the_online_store_are_passed_on(api: Api) -> None:
    store = {"type": "redis", "connection_string": "redis:6379", "nested": {"a": [1]}}
    data = {"decisionLog": "log.parquet", "features": {"onlineStore": store}}
    kept = api.create(job(data=data), dryRun="All")["spec"]["data"]["features"]["onlineStore"]
    assert kept == store


def test_a_key_of_the_online_store_is_as_fixed_as_any_field(api: Api, created: Any) -> None:
    def at(address: str) -> Any:
        store = {"type": "redis", "connection_string": address}
        return job(data={"decisionLog": "log.parquet", "features": {"onlineStore": store}})

    old = created(at("a:1"))
    changed = at("b:1")
    with pytest.raises(ApiException) as error:
        api.replace({**changed, "metadata": old["metadata"]}, dryRun="All")
    assert "data of a job that runs once" in refusal(error)


def test_the_status_is_written_apart_from_the_spec(api: Api, created: Any) -> None:
    document = job("apart")
    assert "status" not in created({**document, "status": {"phase": "Running"}})

    api.merge(document, {"status": {"phase": "Running"}, "spec": {"suspend": True}}, "/status")
    stored = api.read(document)
    assert stored["status"] == {"phase": "Running"}
    assert stored["spec"]["suspend"] is False
    assert stored["metadata"]["generation"] == 1

    api.merge(document, {"status": {"phase": "Failed"}, "spec": {"suspend": True}})
    stored = api.read(document)
    assert stored["status"] == {"phase": "Running"}
    assert stored["metadata"]["generation"] == 2


def condition(kind: str) -> Object:
    return {
        "type": kind,
        "status": "True",
        "reason": "Valid",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }


def test_two_managers_each_keep_their_own_conditions(api: Api, created: Any) -> None:
    document = job("shared")
    created(document)
    head = {key: document[key] for key in ("apiVersion", "kind", "metadata")}
    for manager, kind in (("one", "Accepted"), ("two", "Complete"), ("one", "Accepted")):
        api.apply({**head, "status": {"conditions": [condition(kind)]}}, manager, subresource="/status")
    assert [c["type"] for c in api.read(document)["status"]["conditions"]] == ["Accepted", "Complete"]

    api.apply({**head, "status": {"conditions": []}}, "one", subresource="/status")
    assert [c["type"] for c in api.read(document)["status"]["conditions"]] == ["Complete"]


def test_two_managers_share_a_service_until_both_want_one_field(api: Api, created: Any) -> None:
    document = service("rollout", replicas=2)
    created({**document, "spec": service()["spec"]})
    api.apply(document, "person", force="true")
    head = {key: document[key] for key in ("apiVersion", "kind", "metadata")}
    api.apply({**head, "spec": {"candidate": policy("b")}}, "job")

    api.apply(service("rollout", replicas=3), "person", force="true")
    stored = api.read(document)
    assert stored["spec"]["replicas"] == 3
    assert stored["spec"]["candidate"]["digest"] == policy("b")["digest"]

    with pytest.raises(ApiException) as error:
        api.apply({**head, "spec": {"replicas": 5}}, "job")
    assert error.value.status == 409
    assert re.search("conflict with .person.", json.loads(error.value.body)["message"])


def test_what_is_applied_replaces_a_default_map(api: Api, created: Any) -> None:
    document = service("weights")
    created(document)
    changed = api.apply(service("weights", metricWeights={"clicks": 2.0}), "person", force="true")
    assert changed["spec"]["metricWeights"] == {"clicks": 2.0}


def test_columns_show_the_status(api: Api, created: Any) -> None:
    document = job("shown")
    created(document)
    api.merge(document, {"status": {"phase": "RollingOut", "rollout": {"service": "s", "weight": "50%"}}}, "/status")
    table = api.client.call_api(
        api.path(document), "GET", response_type="object", auth_settings=["BearerToken"], _return_http_data_only=True,
        header_params={"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"},
    )  # fmt: skip
    shown = dict(zip((c["name"] for c in table["columnDefinitions"]), table["rows"][0]["cells"], strict=True))
    assert (shown["Phase"], shown["Weight"]) == ("RollingOut", "50%")
    [kind] = [kind for kind in crd.KINDS if kind.name == "RLTrainingJob"]
    assert list(shown) == ["Name", *(column.name for column in kind.columns)]
