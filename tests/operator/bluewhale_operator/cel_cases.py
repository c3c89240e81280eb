"""For every CEL rule of the CRDs an object that keeps it and one that breaks it; tests/cluster has them judged."""

from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`good` is accepted and `bad` refused with `says`: as new objects, or as changes of `old`."""

    says: str
    good: Object
    bad: Object
    old: Object | None = field(default=None, kw_only=True)

    def __str__(self) -> str:
        return f"{self.good['kind']}: {self.says}"


def job(name: str = "case", **spec: Any) -> Object:
    spec = {"actions": ["left", "right"], "data": {"decisionLog": "log.parquet"}, **spec}
    return {"apiVersion": "bluewhale.io/v1alpha1", "kind": "RLTrainingJob", "metadata": {"name": name}, "spec": spec}


def service(name: str = "case", **spec: Any) -> Object:
    spec = {"features": ["x"], "actions": ["left", "right"], "stable": policy("a"), **spec}
    return {"apiVersion": "bluewhale.io/v1alpha1", "kind": "PolicyService", "metadata": {"name": name}, "spec": spec}


def policy(letter: str, **fields: Any) -> Object:
    return {"digest": letter * 64, "version": "1", **fields}


SIMULATION = {"environment": "CartPole-v1", "behaviourPolicy": {"weights": {"pole_angle": 1.0}}}
NIGHTLY = {"cron": "0 3 * * *"}

DIRECT = {"gate": {"estimator": "sequential_direct_method"}}
PRICE: dict[str, Any] = {
    "actions": [],
    "actionSpace": "continuous",
    "algorithm": {"iql": {}},
    "actionBounds": {"price": {"low": 0.0, "high": 1.0}},
    "evaluation": DIRECT,
}


SLATES: dict[str, Any] = {
    "actions": [],
    "actionSpace": "slate",
    "slate": {"size": 2},
    "algorithm": {"slateQ": {}},
}


def sweep(**parameter: Any) -> Object:
    return {"parameters": {"algorithm.dqn.learningRate": parameter}}


# Of each field that stays as it is while a job runs: another value.
FIXED_IN_A_JOB: dict[str, Any] = {
    "actions": ["left", "stay", "right"],
    "seed": 1,
    "data": {"decisionLog": "other.parquet"},
    "actionSpace": "parametric",
    "slate": {"size": 2},
    "reward": {"metricWeights": {"clicks": 1.0}},
    "normalization": {"overrides": {"x": "enum"}},
    "understanding": {"require": ["action_effect"]},
    "actionBounds": {"price": {"low": 0.0, "high": 1.0}},
    "sweep": {"parameters": {"training.batchSize": {"choices": ["256", "512"]}}},
    "algorithm": {"dqn": {"double": False}},
    "training": {"epochs": 11},
    "evaluation": {"gate": {"enabled": False}},
    "export": {"temperature": 0.5},
    "deploy": {"service": "other"},
    "spark": {"executors": 2},
    "storage": {"claimName": "other"},
    "images": {"training": "other:1"},
    "managedBy": "example.com/other",
}
FIXED_IN_A_SERVICE: dict[str, Any] = {
    "features": ["x", "y"],
    "actions": ["left", "stay"],
    "storage": {"claimName": "o"},
}
RUNS_ONCE = "of a job that runs once cannot be changed: make a new job"

CASES = [
    Case(
        "min must not exceed max",
        job(training={"workers": {"min": 2, "max": 2}}),
        job(training={"workers": {"min": 3, "max": 2}}),
    ),
    Case(
        "batchSize must be a multiple of workers.max",
        job(training={"workers": {"max": 2}, "batchSize": 10}),
        job(training={"workers": {"max": 3}, "batchSize": 10}),
    ),
    Case(
        "training.compile is for algorithms over named actions",
        job(training={"compile": True}, algorithm={"cql": {}}),
        job(training={"compile": True}, algorithm={"linUcb": {}}),
    ),
    Case(
        "training.compile is for algorithms over named actions",
        job(actionSpace="parametric", actions=[]),
        job(actionSpace="parametric", actions=[], training={"compile": True}),
    ),
    Case(
        "weights must rise from step to step",
        job(deploy={"canary": {"weights": [0.1, 0.5, 1]}}),
        job(deploy={"canary": {"weights": [0.1, 0.5, 0.5]}}),
    ),
    Case(
        "weights must rise from step to step", service(canary={"weights": [1]}), service(canary={"weights": [1, 0.5]})
    ),
    Case(
        "actions must name two or more discrete actions, and none in another actionSpace",
        job(actionSpace="parametric", actions=[]),
        job(actionSpace="parametric"),
    ),
    Case("actions must name two or more discrete actions", job(), job(actions=["a"])),
    Case(
        "repository and service go together",
        job(data={"decisionLog": "l", "features": {"repository": "r", "service": "s", "keys": ["k"]}}),
        job(data={"decisionLog": "l", "features": {"service": "s"}}),
    ),
    Case(
        "keys and actionKey are join keys of a service",
        job(data={"decisionLog": "l", "features": {"repository": "r", "service": "s", "actionKey": "k"}}),
        job(data={"decisionLog": "l", "features": {"keys": ["k"]}}),
    ),
    Case(
        "data.features.actionKey stands for a discrete action's name",
        job(data={"decisionLog": "l", "features": {"repository": "r", "service": "s", "actionKey": "k"}}),
        job(
            actionSpace="parametric",
            actions=[],
            data={"decisionLog": "l", "features": {"repository": "r", "service": "s", "actionKey": "k"}},
        ),
    ),
    Case(
        "keys must be distinct",
        job(data={"decisionLog": "l", "features": {"repository": "r", "service": "s", "keys": ["j", "k"]}}),
        job(data={"decisionLog": "l", "features": {"repository": "r", "service": "s", "keys": ["k", "k"]}}),
    ),
    Case(
        "export.policy threshold is for two actions",
        job(export={"policy": "threshold"}),
        job(export={"policy": "threshold"}, actions=["a", "b", "c"]),
    ),
    Case("actions must be distinct", job(actions=["a", "b", "c"]), job(actions=["a", "b", "a"])),
    Case("set either simulation or data.decisionLog", job(simulation=SIMULATION, data={}), job(simulation=SIMULATION)),
    Case("set either simulation or data.decisionLog", job(), job(data={"decisionLog": ""})),
    Case("set exactly one of dqn", job(algorithm={"dqn": {}}), job(algorithm={})),
    Case(
        "lowestReturn must be below highestReturn",
        job(algorithm={"c51": {"lowestReturn": 0.0, "highestReturn": 1.0}}),
        job(algorithm={"c51": {"lowestReturn": 1.0, "highestReturn": 1.0}}),
    ),
    Case("set exactly one of dqn", job(algorithm={"cql": {}}), job(algorithm={"cql": {}, "bcq": {}})),
    Case(
        "the algorithm cannot learn from actions of this actionSpace",
        job(actions=[], actionSpace="continuous", algorithm={"sac": {}}, evaluation=DIRECT),
        job(actions=[], actionSpace="continuous", algorithm={"dqn": {}}, evaluation=DIRECT),
    ),
    Case(
        "the algorithm cannot learn from actions of this actionSpace",
        job(actions=[], actionSpace="parametric", algorithm={"cql": {}}),
        job(actions=[], actionSpace="parametric", algorithm={"linUcb": {}}),
    ),
    Case(
        "a policy over continuous actions has no propensities",
        job(**PRICE),
        job(**PRICE | {"evaluation": {}}),
    ),
    Case(
        "actionBounds are those of continuous actions",
        job(**PRICE),
        job(actionBounds=PRICE["actionBounds"]),
    ),
    Case(
        "slate and actionSpace slate go together",
        job(**SLATES),
        job(**{name: value for name, value in SLATES.items() if name != "slate"}),
    ),
    Case("slate and actionSpace slate go together", job(), job(slate={"size": 2})),
    Case(
        "slate.choice is a place in the slate",
        job(**SLATES),
        job(**SLATES | {"reward": {"metricWeights": {"choice": 1.0}}}),
    ),
    Case("low must be below high", job(**PRICE), job(**PRICE | {"actionBounds": {"price": {"low": 1.0, "high": 1.0}}})),
    Case(
        "only a policy over named actions is rolled out",
        job(deploy={"service": "shop"}),
        job(**PRICE, deploy={"service": "shop"}),
    ),
    Case(
        "set low and high, or choices",
        job(sweep=sweep(low=1.0, high=2.0)),
        job(sweep=sweep(low=1.0, high=2.0, choices=["1.0", "2.0"])),
    ),
    Case(
        "only settings of algorithm and training are searched",
        job(sweep=sweep(low=1.0, high=2.0)),
        job(sweep={"parameters": {"reward.discount": {"low": 0.5, "high": 0.9}}}),
    ),
    Case("set low and high, or choices", job(sweep=sweep(choices=["1.0", "2.0"])), job(sweep=sweep(low=1.0))),
    Case("low must be below high", job(sweep=sweep(low=1.0, high=2.0)), job(sweep=sweep(low=2.0, high=2.0))),
    Case(
        "log needs a low above 0",
        job(sweep=sweep(low=0.1, high=2.0, log=True)),
        job(sweep=sweep(low=0.0, high=2.0, log=True)),
    ),
    Case("metadata.name must have at most 52 characters", job("x" * 52), job("x" * 53)),
    Case("metadata.name must have at most 52 characters", service("x" * 52), service("x.y")),
    Case(
        "metadata.name of a job with a schedule must have at most 41 characters",
        job("x" * 41, schedule=NIGHTLY),
        job("x" * 42, schedule=NIGHTLY),
    ),
    Case(
        "schedule may be changed, but neither added nor removed",
        job(schedule={"cron": "0 4 * * *"}),
        job(),
        old=job(schedule=NIGHTLY),
    ),
    Case("schedule may be changed, but neither added nor removed", job(), job(schedule=NIGHTLY), old=job()),
    Case(
        f"simulation {RUNS_ONCE}",
        job(simulation=SIMULATION, data={}, suspend=True),
        job(),
        old=job(simulation=SIMULATION, data={}),
    ),
    *(
        Case(f"{name} {RUNS_ONCE}", job(suspend=True, backoffLimit=5), job(**{name: value}), old=job())
        for name, value in FIXED_IN_A_JOB.items()
    ),
    Case(
        "autoscaling.maxReplicas must not be below replicas",
        service(replicas=3, autoscaling={"maxReplicas": 3}),
        service(replicas=3, autoscaling={"maxReplicas": 2}),
    ),
    *(
        Case(f"{name} cannot be changed", service(replicas=2, paused=True), service(**{name: value}), old=service())
        for name, value in FIXED_IN_A_SERVICE.items()
    ),
    Case(
        "stable cannot be changed",
        service(candidate=policy("b", attempt=2)),
        service(stable=policy("b")),
        old=service(),
    ),
    Case(
        "attempt may only be raised while the digest stays",
        service(candidate=policy("b", attempt=2)),
        service(candidate=policy("b", attempt=0)),
        old=service(candidate=policy("b", attempt=1)),
    ),
    Case(
        "attempt may only be raised while the digest stays",
        service(candidate=policy("c")),
        service(candidate=policy("b")),
        old=service(candidate=policy("b", attempt=1)),
    ),
]
