"""Put a policy that passed the gate where its service finds it, and ask the PolicyService to try it."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from components.export.repository import DESCRIPTION, MODEL, read_policies
from contracts.job import JobSpec
from contracts.policy_service import Candidate, PolicyServiceSpec
from contracts.stage import StageError, stage

GROUP, VERSION, PLURAL, KIND = "bluewhale.io", "v1alpha1", "policyservices", "PolicyService"
PASSED = ("pass", "disabled")
ATTEMPTS = 5


def request_rollout(
    spec: JobSpec,
    job: str,
    namespace: str,
    evaluation: dict[str, Any],
    exported: str | Path,
    trained: str | Path,
    behaviour_policy: str,
    output: str | Path,
    api: client.ApiClient | None = None,
) -> None:
    """Ask for a rollout of the exported policy, unless the gate stopped it; either way the record in `output` says so.

    `evaluation` is that stage's compact record, `exported` and `trained` are directories of their stages, and
    `behaviour_policy`, if not empty, is the version directory of the policy that made the log: the first in service.
    Repeated, it changes nothing more. Raises `StageError` when the service cannot take this policy.
    """
    service = spec.deploy.service or job
    with stage("rollout", output) as (_, facts):
        facts |= {"service": service, "rollout": "skipped"}
        if evaluation["cpe"]["verdict"] not in PASSED:
            facts["reason"] = f"not asked for: {evaluation['message']}"
            return
        if spec.action_space != "discrete":
            reason = f"no canary: it is for discrete actions, and these are {spec.action_space}"
            facts |= {"rollout": "exported", "reason": reason}
            return
        root = Path(spec.storage.mount_path) / "services" / service
        repository = Path(exported) / "model_repository"
        (version,) = read_policies(repository)
        policy = place_version(repository / MODEL / str(version), root)
        place(Path(trained) / "policy", root / "bundles" / policy["digest"])
        first = place_version(Path(behaviour_policy), root) if behaviour_policy else None
        facts |= {"policy_digest": policy["digest"], "policy_version": str(policy["version"])}
        facts["rollout"], facts["reason"] = ask(spec, job, namespace, service, policy, first, api or _in_cluster())


def ask(
    spec: JobSpec,
    job: str,
    namespace: str,
    service: str,
    policy: dict[str, Any],
    first: dict[str, Any] | None,
    api: client.ApiClient,
) -> tuple[str, str]:
    """Make the policy the service's candidate, or make the service; returns `requested` or `created`, and why.

    `policy` and `first` are descriptions from their version directories; a new service begins with `first`, which the
    policy must then be better than, or with the policy itself when there is none.
    """
    objects = client.CustomObjectsApi(api)
    where = (GROUP, VERSION, namespace, PLURAL)
    called = f"policy {policy['digest'][:12]} (version {policy['version']})"
    candidate = Candidate(**_reference(policy), attempt=0, job=job)
    for _ in range(ATTEMPTS):
        try:
            found = _get(objects, where, service)
            if found is None:
                body = new_service(spec, service, policy, first, candidate)
                objects.create_namespaced_custom_object(*where, body)
                if first:
                    return "requested", f"made PolicyService {service} with the behaviour policy, to try {called}"
                return "created", f"made PolicyService {service} with {called}: nothing served to compare it with"
            _check_alike(found, policy)
            if policy["digest"] == _in_service(found):
                return "requested", f"{called} is in service at PolicyService {service} already"
            if (found["spec"].get("candidate") or {}).get("digest") != policy["digest"]:
                # The version that was looked at must still be the one: else 409, and another look.
                patch = {
                    "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
                    "spec": {"candidate": candidate.model_dump(by_alias=True)},
                }
                objects.patch_namespaced_custom_object(*where, service, patch)
            return "requested", f"asked PolicyService {service} to try {called}"
        except ApiException as error:
            if error.status != 409:
                raise _explained(error, f"PolicyService {namespace}/{service}") from error
    raise RuntimeError(f"PolicyService {namespace}/{service}: changed by others at each of {ATTEMPTS} attempts")


def new_service(
    spec: JobSpec, name: str, policy: dict[str, Any], first: dict[str, Any] | None, candidate: Candidate
) -> dict[str, Any]:
    """The PolicyService of a job's first policy."""
    body = PolicyServiceSpec.model_validate(
        {
            "features": policy["features"],
            "actions": policy["actions"],
            "stable": _reference(first or policy),
            "metricWeights": spec.reward.metric_weights,
            "canary": spec.deploy.canary,
            "storage": spec.storage,
            "imagePullPolicy": spec.images.pull_policy,
            "imagePullSecrets": spec.images.pull_secrets,
            **({"candidate": candidate} if first else {}),
        }
    )
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": name},
        "spec": body.model_dump(by_alias=True, exclude_unset=True, exclude_none=True),
    }


def place_version(source: Path, root: Path) -> dict[str, Any]:
    """Copy a version directory into the service's repository, unless it is there; returns its description."""
    description: dict[str, Any] = json.loads((source / DESCRIPTION).read_text())
    target = root / "model_repository" / MODEL / source.name
    place(source, target)
    there = json.loads((target / DESCRIPTION).read_text())["digest"]
    if there != description["digest"]:
        raise StageError(
            f"{target}: policy {there[:12]} has this version already, so {description['digest'][:12]} cannot; "
            "train with another seed"
        )
    return description


def place(source: Path, target: Path) -> None:
    """Copy a directory to where there is none yet: whole, or not at all."""
    if target.exists():
        return
    unfinished = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    shutil.copytree(source, unfinished)
    try:
        unfinished.rename(target)
    except OSError:
        shutil.rmtree(unfinished)
        if not target.exists():
            raise


def _reference(policy: dict[str, Any]) -> dict[str, str]:
    return {"digest": policy["digest"], "version": str(policy["version"])}


def _get(objects: client.CustomObjectsApi, where: tuple[str, ...], name: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = objects.get_namespaced_custom_object(*where, name)
    except ApiException as error:
        if error.status != 404:
            raise
        return None
    return found


def _check_alike(service: dict[str, Any], policy: dict[str, Any]) -> None:
    for field in ("features", "actions"):
        if service["spec"][field] != policy[field]:
            raise StageError(
                f"PolicyService {service['metadata']['name']}: its {field} are {service['spec'][field]}, the policy's "
                f"{policy[field]}: another deploy.service is needed for it"
            )


def _in_service(service: dict[str, Any]) -> str:
    stable = service.get("status", {}).get("stable") or service["spec"]["stable"]
    return str(stable["digest"])


def _explained(error: ApiException, what: str) -> Exception:
    """What a person can mend is a `StageError`; the rest may pass."""
    try:
        message = json.loads(error.body)["message"]
    except (ValueError, TypeError, KeyError):
        message = error.reason
    hints = {
        403: f"let the pipeline's service account get, create and patch {PLURAL}.{GROUP}",
        404: f"is the CustomResourceDefinition {PLURAL}.{GROUP} installed?",
        422: "the job's deploy section and the policy must fit the service",
    }
    return StageError(f"{what}: {message}; {hints[error.status]}") if error.status in hints else error


def _in_cluster() -> client.ApiClient:
    configuration = client.Configuration()
    config.load_incluster_config(client_configuration=configuration)
    return client.ApiClient(configuration)
