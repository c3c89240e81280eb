"""The PolicyService: a policy in service, its candidate, and how traffic moves between them. It outlives jobs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from contracts.job import Canary, Model, Quantity, Resources, Storage, Toleration

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PolicyReference(Model):
    """One immutable version in the model repository."""

    digest: Digest = Field(description="SHA-256 of the policy bundle.")
    version: str = Field(pattern="^[1-9][0-9]*$", max_length=19, description="Its directory: Triton's model version.")


class Candidate(PolicyReference):
    """A policy that asks for the stable one's place."""

    attempt: int = Field(0, ge=0, description="Raise it to try a candidate again that was rolled back or aborted.")
    job: str | None = Field(None, description="The RLTrainingJob that asked.")


class ModelRepository(Model):
    """Where the policies lie, on the shared volume: one directory for each version."""

    path: str | None = Field(
        None, description="Directory below the shared volume; `services/<name>/model_repository` when left out."
    )


class DecisionLog(Model):
    """Where served decisions and their outcomes are written: the log that the next timeline reads."""

    path: str | None = Field(None, description="Directory below the shared volume; `services/<name>/log` if left out.")


class Autoscaling(Model):
    """Let the number of replicas follow the load."""

    max_replicas: int = Field(ge=1, le=1000, description="Most replicas; `replicas` is the fewest.")
    target_cpu_percent: int = Field(70, ge=1, le=100, description="Mean CPU use, of what is asked for, to aim at.")


class Monitoring(Model):
    """Who counts: the Prometheus that scrapes the service and answers the canary's questions."""

    prometheus_url: str | None = Field(
        None, pattern="^https?://", description="Its address; the operator's own setting when left out."
    )
    scrape_interval: str = Field("5s", pattern="^[1-9][0-9]*s$", description="Of the ServiceMonitor.")


class PolicyServiceSpec(Model):
    """What is served, where, and how a candidate takes over."""

    model_repository: ModelRepository = Field(ModelRepository(), description="Where the policies lie.")
    features: list[str] = Field(min_length=1, max_length=4096, description="State features, in the order of the model.")
    actions: list[str] = Field(min_length=2, max_length=4096, description="Discrete actions, in the model's order.")
    stable: PolicyReference = Field(description="The policy to begin with; after a promotion, status.stable is served.")
    candidate: Candidate | None = Field(None, description="The policy to roll out.")
    head: Literal["sampled", "greedy"] = Field(
        "sampled", description="Draw from the policy's distribution, or take its best action (which explores nothing)."
    )
    metric_weights: dict[str, float] = Field(
        {"reward": 1.0}, description="The metric `reward`, when not reported, is the sum of metrics by these weights."
    )
    canary: Canary = Field(Canary(), description="How traffic moves to a candidate.")
    paused: bool = Field(False, description="Hold the canary's weight where it is.")
    replicas: int = Field(1, ge=1, le=1000, description="Triton pods.")
    autoscaling: Autoscaling | None = Field(None, description="Let the number of replicas follow the load.")
    resources: Resources = Field(Resources(), description="Of each Triton pod.")
    shared_memory: Quantity = Field("256Mi", description="/dev/shm of each pod, which Triton's Python backend uses.")
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes that may serve.")
    tolerations: list[Toleration] = Field([], max_length=16, description="Taints that the pods tolerate.")
    image: str | None = Field(
        None, description="Of Triton with BlueWhale's models; the operator's default if left out."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        "IfNotPresent", description="As in a pod's spec."
    )
    image_pull_secrets: list[str] = Field([], max_length=16, description="Secrets in the service's namespace.")
    storage: Storage = Field(Storage(), description="The volume that holds repository and log.")
    decision_log: DecisionLog = Field(DecisionLog(), description="Where decisions and outcomes are written.")
    monitoring: Monitoring = Field(Monitoring(), description="Who counts.")

    @model_validator(mode="after")
    def _consistent(self) -> PolicyServiceSpec:
        if self.autoscaling and self.autoscaling.max_replicas < self.replicas:
            raise ValueError(
                f"autoscaling.maxReplicas {self.autoscaling.max_replicas} is below replicas {self.replicas}"
            )
        return self
