"""The generated CRDs say what the models say. What only an API server can judge is judged in tests/cluster."""

import copy
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from bluewhale_operator import crd
from contracts.job import RLTrainingJob
from contracts.policy_service import PolicyServiceSpec
from contracts.status import JobStatus, PolicyServiceStatus
from tests.operator.bluewhale_operator.cel_cases import CASES, Case, Object, job, policy, service

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "manifests" / "examples").glob("*.yaml"))
KINDS = {kind.name: kind for kind in crd.KINDS}
NOW = "2026-01-01T00:00:00Z"

CONDITION = {"type": "Accepted", "status": "True", "reason": "Valid", "message": "Fine.", "lastTransitionTime": NOW}
LOOK = {"time": NOW, "weight": "10%", "checks": [{"name": "reward", "verdict": "pass", "message": "2 > 1"}]}
STATUS: dict[str, Object] = {
    "RLTrainingJob": {
        "phase": "RollingOut", "reason": "InProgress", "stage": "rollout", "attempts": 1, "policy": "b" * 12,
        "conditions": [CONDITION], "stages": [{"name": "timeline", "state": "Succeeded", "attempts": 1}],
        "cpe": {"estimator": "e", "metric": "reward", "lower": 1.1, "verdict": "pass", "summary": "1.2 (1.1 to 1.3)"},
        "workers": {"current": 2, "max": 2, "summary": "2/2"},
        "rollout": {"service": "case", "weight": "10%", "step": 0, "verdicts": [LOOK]},
    },
    "PolicyService": {
        "phase": "Canary", "reason": "InProgress", "conditions": [CONDITION], "stable": policy("a"), "weight": "10%",
        "candidate": policy("b"), "replicas": "1/1", "endpoint": "case.default.svc:8001", "verdicts": [LOOK],
        "baseline": {"errors": 0.0},
    },
}  # fmt: skip


def schema_of(kind: crd.Kind) -> crd.Schema:
    [version] = crd.definition(kind)["spec"]["versions"]
    return version["schema"]["openAPIV3Schema"]


def objects_in(schema: crd.Schema, path: str = "") -> Iterator[tuple[str, crd.Schema]]:
    """The schema, and every schema in it, by path."""
    yield path, schema
    for name, field in schema.get("properties", {}).items():
        yield from objects_in(field, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if key in schema:
            yield from objects_in(schema[key], path + mark)


def fields_of(model: Any, path: str = "") -> Iterator[str]:
    """The path of every field of the model and of the models within."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        for field in model.model_fields.values():
            yield f"{path}.{field.alias}"
            yield from fields_of(field.annotation, f"{path}.{field.alias}")
    elif typing.get_origin(model) is list:
        yield from fields_of(typing.get_args(model)[0], f"{path}[]")
    elif typing.get_origin(model) is not dict:
        for choice in typing.get_args(model):
            yield from fields_of(choice, path)


def filled(schema: crd.Schema, value: Any) -> Any:
    """The value with the schema's defaults filled in, as the API server does it."""
    if isinstance(value, dict):
        fields = schema.get("properties", {})
        missing = {k: copy.deepcopy(f["default"]) for k, f in fields.items() if "default" in f and k not in value}
        of_map = schema.get("additionalProperties", {})
        return {k: filled(fields.get(k, of_map), v) for k, v in {**value, **missing}.items()}
    if isinstance(value, list):
        return [filled(schema["items"], item) for item in value]
    return value


TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
}  # fmt: skip


def faults(schema: crd.Schema, value: Any, path: str) -> Iterator[str]:
    """What strict validation by the API server would find, CEL rules left out."""
    if not isinstance(value, TYPES[schema["type"]]):
        yield f"{path}: not of type {schema['type']}"
    elif isinstance(value, dict):
        fields, of_map = schema.get("properties", {}), schema.get("additionalProperties")
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{path}.{name}: missing"
        for name, item in value.items():
            if name in fields or of_map:
                yield from faults(fields.get(name, of_map), item, f"{path}.{name}")
            elif not path.startswith(".metadata") and "x-kubernetes-preserve-unknown-fields" not in schema:
                yield f"{path}.{name}: unknown"
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from faults(schema["items"], item, f"{path}[{i}]")
    else:
        if value not in schema.get("enum", [value]):
            yield f"{path}: not one of {schema['enum']}"
        if not re.search(schema.get("pattern", ""), str(value)):
            yield f"{path}: does not match"


def sections_of(schema: crd.Schema, value: Object, path: str) -> Iterator[tuple[str, Object]]:
    """Every object in the value that is not open to unknown keys."""
    if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
        yield path, value
        for name, item in value.items():
            if isinstance(item, dict):
                yield from sections_of(schema["properties"][name], item, f"{path}.{name}")


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> crd.Kind:
    return request.param


def test_the_files_are_what_the_models_make() -> None:
    stored = {path.name: path.read_text() for path in (ROOT / crd.DIRECTORY).iterdir()}
    assert stored == crd.files(), "run make crds"


def test_the_command_writes_the_files_where_it_is_told(tmp_path: Path) -> None:
    crd.main(tmp_path / "new")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == crd.files()


def test_every_field_is_described(kind: crd.Kind) -> None:
    undescribed = [
        f"{path}.{name}"
        for path, schema in objects_in(schema_of(kind))
        for name, field in schema.get("properties", {}).items()
        if not field.get("description") and f"{path}.{name}" != ".metadata"  # of which a CRD may say nothing
    ]
    assert not undescribed


def test_no_field_of_the_models_is_missing_from_the_schema(kind: crd.Kind) -> None:
    paths = {path for path, _ in objects_in(schema_of(kind))}
    wanted = {*fields_of(kind.spec, ".spec"), *fields_of(kind.status, ".status")}
    assert len(wanted) > 50
    assert not wanted - paths


def test_the_schema_is_structural(kind: crd.Kind) -> None:
    for path, schema in objects_in(schema_of(kind)):
        assert "type" in schema, path
        assert not schema.keys() & {"$ref", "$defs", "anyOf", "const", "title"}, path
        assert schema.get("additionalProperties") is not False, path


@pytest.mark.parametrize(("path", "key"), [(".status.conditions", "type"), (".status.stages", "name")])
def test_lists_of_several_writers_are_maps(path: str, key: str) -> None:
    schema = dict(objects_in(schema_of(KINDS["RLTrainingJob"])))[path]
    assert schema["x-kubernetes-list-type"] == "map"
    assert schema["x-kubernetes-list-map-keys"] == [key]


def test_every_column_shows_a_field_of_the_status(kind: crd.Kind) -> None:
    model = {"RLTrainingJob": JobStatus, "PolicyService": PolicyServiceStatus}[kind.name]
    status = model.model_validate(STATUS[kind.name]).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert not list(faults(schema_of(kind), minimal(kind) | {"status": status}, ""))
    types = {path: schema["type"] for path, schema in objects_in(schema_of(kind))}
    for column in kind.columns:
        if column is crd.AGE:
            continue
        assert types[column.path] == column.type
        value: Any = {"status": status}
        for part in column.path.removeprefix(".").split("."):
            value = value[part]
        assert value not in (None, "")


def minimal(kind: crd.Kind) -> Object:
    return {"RLTrainingJob": job, "PolicyService": service}[kind.name]()


def test_the_schema_fills_in_what_the_models_do(kind: crd.Kind) -> None:
    spec = minimal(kind)["spec"]
    from_schema = filled(schema_of(kind)["properties"]["spec"], spec)
    assert from_schema == kind.spec.model_validate(spec).model_dump(mode="json", by_alias=True, exclude_none=True)


def test_a_default_lacks_nothing_that_is_required_and_keeps_its_schema(kind: crd.Kind) -> None:
    for path, schema in objects_in(schema_of(kind)):
        if "default" in schema:
            assert not list(faults(schema, filled(schema, schema["default"]), path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_keep_the_schema(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] in KINDS:
            assert not list(faults(schema_of(KINDS[document["kind"]]), document, ""))


def test_a_typo_is_refused_in_every_section() -> None:
    schema = schema_of(KINDS["RLTrainingJob"])
    document = filled(schema, yaml.safe_load((ROOT / "manifests/examples/cartpole.yaml").read_text()))
    sections = list(sections_of(schema["properties"]["spec"], document["spec"], ".spec"))
    assert len(sections) > 20
    for path, section in sections:
        section["typo"] = 1
        assert list(faults(schema, document, "")) == [f"{path}.typo: unknown"]
        del section["typo"]


@pytest.mark.parametrize("cron", ["0 3 * * *", "*/5  0-6 1,15 jan mon"])
def test_a_schedule_has_five_fields(cron: str) -> None:
    assert not list(faults(schema_of(KINDS["RLTrainingJob"]), job(schedule={"cron": cron}), ""))


@pytest.mark.parametrize("cron", ["@daily", "0 3 * *", "0 0 3 * * *", " 0 3 * * *"])
def test_a_schedule_of_other_than_five_fields_is_refused(cron: str) -> None:
    assert list(faults(schema_of(KINDS["RLTrainingJob"]), job(schedule={"cron": cron}), ""))
    with pytest.raises(ValidationError, match="cron"):
        RLTrainingJob.model_validate(job(schedule={"cron": cron}))


PAIRS = re.compile(r"self\.(\w+)\.all\((\w), self\.\1\.exists_one\(")


def test_lists_whose_items_a_rule_compares_with_each_other_are_bounded() -> None:
    """An API server bounds the cost of a CRD's rules: to compare 256 strings of 128 characters is not too much."""
    compared = [
        (f"{path}.{found[1]}", schema["properties"][found[1]])
        for kind in KINDS.values()
        for path, schema in objects_in(schema_of(kind))
        for rule in schema.get("x-kubernetes-validations", ())
        for found in PAIRS.finditer(rule["rule"])
    ]
    assert {path for path, _ in compared} >= {".spec.actions", ".spec.data.features.keys"}
    for path, field in compared:
        length = field["items"].get("maxLength", math.inf) if field["items"]["type"] == "string" else 1
        assert field.get("maxItems", math.inf) ** 2 * length <= 256**2 * 128, path


def test_every_cel_rule_has_a_case(kind: crd.Kind) -> None:
    messages = {
        rule["message"]
        for _, schema in objects_in(schema_of(kind))
        for rule in schema.get("x-kubernetes-validations", ())
    }
    cases = [case for case in CASES if case.good["kind"] == kind.name]
    assert not {message for message in messages if not any(case.says in message for case in cases)}
    assert not [case for case in cases if not any(case.says in message for message in messages)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_breaks_no_more_than_its_rule(case: Case) -> None:
    for document in filter(None, (case.old, case.good, case.bad)):
        assert not list(faults(schema_of(KINDS[document["kind"]]), document, ""))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_models_accept_and_refuse_what_the_rules_do(case: Case) -> None:
    check(case.good)
    # The models know nothing of an object's past, nor of its name where that depends on the kind or the spec; and an
    # empty algorithm is DQN to them.
    if case.old is None and not case.says.startswith(("metadata.name", "set exactly one of")):
        with pytest.raises(ValidationError):
            check(case.bad)


def check(document: Object) -> None:
    if document["kind"] == "RLTrainingJob":
        RLTrainingJob.model_validate(document)
    else:
        PolicyServiceSpec.model_validate(document["spec"])
