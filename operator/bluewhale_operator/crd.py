"""The CustomResourceDefinitions, made from the pydantic models: `python -m bluewhale_operator.crd [DIRECTORY]`.

The API server thereby checks and fills in what the models do. What JSON schema cannot say stands in `RULES` as CEL.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from bluewhale_operator.outcome import GROUP
from contracts.job import (
    ALGORITHMS,
    C51,
    SCHEDULED_NAME_LENGTH,
    SCHEDULED_NAME_TOO_LONG,
    Algorithm,
    Bounds,
    Canary,
    Features,
    JobSpec,
    Sweep,
    SweepParameter,
    Training,
    Workers,
)
from contracts.policy_service import Candidate, PolicyServiceSpec
from contracts.status import Condition, JobStatus, PolicyServiceStatus, StageStatus

VERSION = "v1alpha1"
DIRECTORY = Path("manifests/crd")

Schema = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A CEL expression that must hold, what is said when it does not, and the field at fault."""

    expression: str
    message: str
    field: str | None = None

    def schema(self) -> Schema:
        path = {"fieldPath": f".{self.field}"} if self.field else {}
        return {"rule": self.expression, "message": self.message, **path}


def _aliases(model: type[BaseModel]) -> dict[str, str]:
    return {name: field.alias or name for name, field in model.model_fields.items()}


def _same(model: type[BaseModel], name: str) -> str:
    """The field is as it was. (`self.?x == oldSelf.?x` says the same, at a cost that CEL cannot bound.)"""
    field = model.model_fields[name]
    alias = field.alias or name
    same = f"self.{alias} == oldSelf.{alias}"
    if field.is_required() or field.default is not None:
        return same
    return f"(has(self.{alias}) ? has(oldSelf.{alias}) && {same} : !has(oldSelf.{alias}))"


CHANGEABLE = {"suspend", "schedule", "ttl_seconds_after_finished", "active_deadline_seconds", "backoff_limit"}
"""Fields of a JobSpec that steer the job and do not say what it is."""

ONE_OF: list[type[BaseModel]] = [Algorithm]
"""Models of which exactly one field is to be set. A default of that field would set a second one: so the default, the
first field, is given to the whole."""

LIST_KEYS: dict[type[BaseModel], str] = {Condition: "type", StageStatus: "name"}
"""What tells apart the items of a list that several writers share."""

RULES: dict[type[BaseModel], list[Rule]] = {
    Features: [
        Rule("has(self.repository) == has(self.service)", "repository and service go together", "service"),
        Rule(
            "has(self.service) || (self.keys.size() == 0 && !has(self.actionKey))",
            "keys and actionKey are join keys of a service",
            "keys",
        ),
        Rule("self.keys.all(k, self.keys.exists_one(j, j == k))", "keys must be distinct", "keys"),
    ],
    Workers: [Rule("self.min <= self.max", "min must not exceed max", "min")],
    Training: [
        Rule("self.batchSize % self.workers.max == 0", "batchSize must be a multiple of workers.max", "batchSize")
    ],
    SweepParameter: [
        Rule(
            "self.choices.size() > 0 ? !has(self.low) && !has(self.high) : has(self.low) && has(self.high)",
            "set low and high, or choices",
        ),
        Rule("!(has(self.low) && has(self.high)) || self.low < self.high", "low must be below high", "low"),
        Rule("!self.log || (has(self.low) && self.low > 0.0)", "log needs a low above 0", "log"),
    ],
    Sweep: [
        Rule(
            "self.parameters.all(p, (p.startsWith('algorithm.') || p.startsWith('training.')) && "
            "p != 'training.epochs' && !p.startsWith('training.workers'))",
            "only settings of algorithm and training are searched",
            "parameters",
        )
    ],
    Bounds: [Rule("self.low < self.high", "low must be below high", "low")],
    C51: [Rule("self.lowestReturn < self.highestReturn", "lowestReturn must be below highestReturn", "lowestReturn")],
    Canary: [
        Rule(
            "self.weights.isSorted() && self.weights.all(w, self.weights.exists_one(v, v == w))",
            "weights must rise from step to step",
            "weights",
        )
    ],
    JobSpec: [
        Rule(
            "self.actionSpace == 'discrete' ? self.actions.size() >= 2 : self.actions.size() == 0",
            "actions must name two or more discrete actions, and none in another actionSpace",
            "actions",
        ),
        Rule(
            "!self.training.compile || (self.actionSpace == 'discrete' && !has(self.algorithm.linUcb) && "
            "!has(self.algorithm.linearThompson) && !has(self.algorithm.logisticBandit))",
            "training.compile is for algorithms over named actions, except bandits",
            "training",
        ),
        Rule(
            "self.actionSpace == 'discrete' || !has(self.data.features.actionKey)",
            "data.features.actionKey stands for a discrete action's name",
            "data",
        ),
        Rule(
            "self.actionSpace == 'continuous' || self.actionBounds.size() == 0",
            "actionBounds are those of continuous actions",
            "actionBounds",
        ),
        Rule(
            "has(self.slate) == (self.actionSpace == 'slate')",
            "slate and actionSpace slate go together",
            "slate",
        ),
        Rule(
            "!has(self.slate) || !(self.slate.choice in self.reward.metricWeights)",
            "slate.choice is a place in the slate, and earns nothing",
            "reward",
        ),
        Rule(
            " && ".join(
                f"(self.actionSpace != '{space}' || {' || '.join(f'has(self.algorithm.{name})' for name in fit)})"
                for space, fit in ALGORITHMS.items()
            ),
            "the algorithm cannot learn from actions of this actionSpace",
            "algorithm",
        ),
        Rule(
            "self.actionSpace != 'continuous' || self.evaluation.gate.estimator.endsWith('direct_method') || "
            "!(self.evaluation.gate.enabled || has(self.sweep))",
            "a policy over continuous actions has no propensities: the gate wants a direct method",
            "evaluation",
        ),
        Rule(
            "self.actionSpace == 'discrete' || !has(self.deploy.service)",
            "only a policy over named actions is rolled out, others are exported",
            "deploy",
        ),
        Rule(
            "self.export.policy != 'threshold' || self.actions.size() == 2",
            "export.policy threshold is for two actions",
            "export",
        ),
        Rule("self.actions.all(a, self.actions.exists_one(b, a == b))", "actions must be distinct", "actions"),
        Rule(
            "has(self.simulation) != (self.data.?decisionLog.orValue('') != '')",
            "set either simulation or data.decisionLog: a simulation makes its own log",
        ),
        Rule(
            "has(self.schedule) == has(oldSelf.schedule)",
            "schedule may be changed, but neither added nor removed: make a new job, or suspend this one",
            "schedule",
        ),
        *(
            Rule(
                f"has(oldSelf.schedule) || {_same(JobSpec, name)}",
                f"{alias} of a job that runs once cannot be changed: make a new job",
                alias,
            )
            for name, alias in _aliases(JobSpec).items()
            if name not in CHANGEABLE
        ),
    ],
    PolicyServiceSpec: [
        Rule(
            "!has(self.autoscaling) || self.autoscaling.maxReplicas >= self.replicas",
            "autoscaling.maxReplicas must not be below replicas",
            "autoscaling",
        ),
        *(
            Rule(_same(PolicyServiceSpec, name), f"{name} cannot be changed: make a new PolicyService", name)
            for name in ("features", "actions", "storage")
        ),
        Rule(
            _same(PolicyServiceSpec, "stable"),
            "stable cannot be changed: name the policy in candidate, and status.stable will follow",
            "stable",
        ),
    ],
    Candidate: [
        Rule(
            "self.digest != oldSelf.digest || self.attempt >= oldSelf.attempt",
            "attempt may only be raised while the digest stays",
            "attempt",
        )
    ],
    **{
        model: [
            Rule(
                f"[{', '.join(f'has(self.{alias})' for alias in _aliases(model).values())}].exists_one(x, x)",
                f"set exactly one of {', '.join(_aliases(model).values())}",
            )
        ]
        for model in ONE_OF
    },
}

NAME = Rule(
    "self.metadata.name.size() <= 52 && !self.metadata.name.contains('.')",
    "metadata.name must have at most 52 characters and no dot: names of pods and services are made from it",
)


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; a wide one is shown by `-o wide` alone."""

    name: str
    path: str
    description: str
    type: str = "string"
    wide: bool = False

    def schema(self) -> Schema:
        return {
            "name": self.name, "type": self.type, "jsonPath": self.path, "description": self.description,
            "priority": int(self.wide),
        }  # fmt: skip


AGE = Column("Age", ".metadata.creationTimestamp", "Time since it was made.", "date")


@dataclass(frozen=True)
class Kind:
    """A custom resource: its names, its two halves, and what `kubectl get` shows of it."""

    name: str
    short: str
    description: str
    spec: type[BaseModel]
    status: type[BaseModel]
    rules: list[Rule]
    columns: list[Column]

    @property
    def plural(self) -> str:
        return f"{self.name.lower()}s"


KINDS = [
    Kind(
        name="RLTrainingJob",
        short="rltj",
        description="From logged decisions to a policy in service: the data, the reward, the algorithm, the gate and "
        "the canary.",
        spec=JobSpec,
        status=JobStatus,
        rules=[
            NAME,
            Rule(
                f"!has(self.spec.schedule) || self.metadata.name.size() <= {SCHEDULED_NAME_LENGTH}",
                SCHEDULED_NAME_TOO_LONG,
            ),
        ],
        columns=[
            Column("Phase", ".status.phase", "How it stands."),
            Column("Stage", ".status.stage", "The stage at work, or the last one."),
            Column("Workers", ".status.workers.summary", "Training workers: at work/at most."),
            Column("CPE", ".status.cpe.summary", "Counterfactual estimate, relative to the logged policy."),
            Column("Weight", ".status.rollout.weight", "Share of MDPs that the candidate answers."),
            AGE,
            Column("Attempts", ".status.attempts", "Pipeline runs submitted.", "integer", wide=True),
            Column("Policy", ".status.policy", "The exported policy's digest.", wide=True),
            Column("Reason", ".status.reason", "Why it stands so.", wide=True),
        ],
    ),
    Kind(
        name="PolicyService",
        short="psvc",
        description="A policy in service, its candidate, and how traffic moves between them. It outlives jobs.",
        spec=PolicyServiceSpec,
        status=PolicyServiceStatus,
        rules=[NAME],
        columns=[
            Column("Phase", ".status.phase", "How it stands."),
            Column("Stable", ".status.stable.version", "Version of the policy that serves."),
            Column("Weight", ".status.weight", "Share of MDPs that the candidate answers."),
            Column("Replicas", ".status.replicas", "Pods: ready/wanted."),
            AGE,
            Column("Candidate", ".status.candidate.digest", "The policy that is being tried.", wide=True),
            Column("Reason", ".status.reason", "Why it stands so.", wide=True),
            Column("Endpoint", ".status.endpoint", "gRPC address inside the cluster.", wide=True),
        ],
    ),
]

COPIED = (
    "description", "type", "format", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems",
    "minProperties", "maxProperties", "minimum", "maximum", "default", "required",
)  # fmt: skip
TRANSLATED = {"const", "exclusiveMinimum", "exclusiveMaximum", "items", "properties", "additionalProperties"}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return value


def structural(model: type[BaseModel], defaults: bool = True) -> Schema:
    """The model as a structural schema: nothing referred to, and null nowhere allowed.

    Raises ValueError for what such a schema cannot hold.
    """
    document = model.model_json_schema()
    definitions = document.pop("$defs", {})
    models = {m.__name__: m for m in (*RULES, *ONE_OF, *LIST_KEYS)}

    def named(node: Schema) -> str:
        return str(node.get("$ref", "")).rpartition("/")[2]

    def translate(node: Schema, path: str, of: type[BaseModel] | None = None) -> Schema:
        if "anyOf" in node:  # `X | None`: a field that may be left out
            [some] = [choice for choice in node["anyOf"] if choice != {"type": "null"}]
            node = some | {k: v for k, v in node.items() if k != "anyOf" and (k, v) != ("default", None)}
        if name := named(node):
            of = models.get(name)
            node = definitions[name] | {k: v for k, v in node.items() if k != "$ref"}
        if unknown := node.keys() - {*COPIED, *TRANSLATED, "title"}:
            raise ValueError(f"{path}: a structural schema cannot hold {', '.join(sorted(unknown))}")

        if node["type"] == "integer":
            node["format"] = "int64"
        out = {key: node[key] for key in COPIED if key in node}
        if "const" in node:
            out["enum"] = [node["const"]]
        for bound in ("Minimum", "Maximum"):
            if f"exclusive{bound}" in node:
                out |= {bound.lower(): node[f"exclusive{bound}"], f"exclusive{bound}": True}
        if "items" in node:
            out["items"] = translate(node["items"], f"{path}[]")
            if (item := models.get(named(node["items"]))) in LIST_KEYS:
                out |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [LIST_KEYS[item]]}
        if "properties" in node:
            out["properties"] = {k: translate(v, f"{path}.{k}") for k, v in node["properties"].items()}
            if "default" in node:
                if "required" in node:
                    raise ValueError(f"{path}: has a default, but must be given {', '.join(node['required'])}")
                # Fields fill in their own defaults, but too late for the rules on a default, which see it as it stands.
                out["default"] = _without_null(node["default"]) if of in RULES else {}
            if of in ONE_OF:
                for field in out["properties"].values():
                    field.pop("default", None)
                out |= {"default": {next(iter(out["properties"])): {}}, "x-kubernetes-map-type": "atomic"}
        if node.get("additionalProperties") is True:
            out["x-kubernetes-preserve-unknown-fields"] = True
        elif node.get("additionalProperties"):
            out["additionalProperties"] = translate(node["additionalProperties"], f"{path}{{}}")
            if node.get("default"):
                # What is applied later is to replace the default, not to be added to it.
                out["x-kubernetes-map-type"] = "atomic"
        if of in RULES:
            out["x-kubernetes-validations"] = [rule.schema() for rule in RULES[of]]
        if not defaults:
            out.pop("default", None)
        return out

    return translate(document, model.__name__, model)


def definition(kind: Kind) -> Schema:
    """The kind's CustomResourceDefinition."""
    schema: Schema = {
        "description": kind.description,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": "Group and version of this schema.", "type": "string"},
            "kind": {"description": "The resource that this object is.", "type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(kind.spec),
            # The controllers write the whole status: a default would be a second writer.
            "status": structural(kind.status, defaults=False),
        },
        "x-kubernetes-validations": [rule.schema() for rule in kind.rules],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short],
                "categories": ["bluewhale"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [column.schema() for column in kind.columns],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Block style, long text folded, no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = ">" if len(text) > 80 or "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def files() -> dict[str, str]:
    """Every generated file by its name."""
    definitions = {f"{GROUP}_{kind.plural}.yaml": definition(kind) for kind in KINDS}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(definitions),
    }
    documents = {**definitions, "kustomization.yaml": kustomization}
    return {
        name: "# Generated by `make crds`: change the models, not this file.\n"
        + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
        for name, document in documents.items()
    }


def main(directory: Path = DIRECTORY) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
