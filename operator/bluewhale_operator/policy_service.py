"""PolicyService: from what is wished and what is seen to a status, and the objects that serve. Pure, but for the
questions that Prometheus is asked.

A candidate is loaded by every replica, goes through the steps of the canary, and is promoted, or loses all traffic.
Every step is decided from the status and from what is observed, so that a controller killed after any write goes on
where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from bluewhale_operator.outcome import (
    FIELD_MANAGER,
    GROUP,
    Event,
    EventReason,
    Object,
    Outcome,
    Reference,
    get_condition,
    is_true,
    parse_time,
    set_condition,
    timestamp,
)
from bluewhale_operator.pods import ROLE_LABEL, find_stall, last_words
from bluewhale_operator.service_objects import SERVER, endpoint, make_objects, service_label
from contracts.job import explain
from contracts.policy_service import Candidate, PolicyReference, PolicyServiceSpec
from contracts.status import LAST_VERDICTS, CheckStatus, LookStatus, PolicyServed, PolicyServiceStatus, Reason, Tried
from serving.analysis import Ask, Check, MeasuredReturns, check_all, check_loaded, read_returns
from serving.processes import ServerError
from serving.rollout import LEASE_SECONDS, advance, percent

ABORT_ANNOTATION = f"{GROUP}/abort"
PROMOTE_ANNOTATION = f"{GROUP}/promote"
"""Each value is granted once; a candidate's digest will do, or any word that was not used before."""

LOOK_SECONDS = 5.0
"""Between two looks at a candidate."""
RENEW_SECONDS = 10
"""How often the lease of the candidate's weight is renewed."""
IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class Observed:
    """What the controller saw, just now."""

    deployments: list[Object] = field(default_factory=list)
    pods: list[Object] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    """What Events say of pods that cannot start."""
    ask: Ask | None = None
    """Asks Prometheus; None where no Prometheus is named."""
    service_monitors: bool = False
    """Whether the API server knows the kind ServiceMonitor."""
    autoscaled: bool = False
    """Whether the service's autoscaler exists."""


def reconcile(service: Object, observed: Observed, now: datetime) -> Outcome:
    """Decide; a service that is being deleted needs nothing, since its objects go with it."""
    step = _Step(service, observed, now)
    if not service["metadata"].get("deletionTimestamp"):
        step.decide()
        step.derive()
    return step.outcome


class _Step:
    """One reconcile, written as the steps that it takes."""

    def __init__(self, service: Object, observed: Observed, now: datetime) -> None:
        self.service, self.observed, self.now = service, observed, now
        self.status = PolicyServiceStatus.model_validate(service.get("status") or {})
        self.generation = service["metadata"].get("generation", 1)
        self.outcome = Outcome(self.status)
        self.servers = [p for p in observed.pods if p["metadata"]["labels"].get(ROLE_LABEL) == SERVER]
        deployments = (d for d in observed.deployments if d["metadata"]["labels"].get(ROLE_LABEL) == SERVER)
        self.deployment: Object = next(deployments, {"metadata": {}})
        self.ready = sum(map(_is_ready, self.servers))

    # -- the decision ------------------------------------------------------------------------------------------------

    def decide(self) -> None:
        status = self.status
        status.observed_generation = self.generation
        try:
            self.spec = PolicyServiceSpec.model_validate(self.service["spec"])
        except ValidationError as error:
            # What serves goes on; a candidate's weight ends with its lease.
            text = "; ".join(f"spec.{explain(e)}" for e in error.errors())
            if self._condition("Accepted", False, Reason.INVALID_SPEC, text):
                self._event(EventReason.INVALID_SPEC, text, warning=True)
            return
        self._condition("Accepted", True, Reason.VALID, "")
        if status.stable is None:
            status.stable = _served(self.spec.stable)
            text = f"policy {_short(status.stable.digest)} is the first: nothing was in service to compare it with"
            self._condition("RolledOut", True, Reason.ADOPTED, text)
        self._stalled()
        self._count_replicas()
        self._roll_out()
        self.outcome.apply += make_objects(
            self.service, self.spec, self._state(), self._replicas(), self.servers, self.observed.service_monitors
        )
        if self.observed.autoscaled and not self.spec.autoscaling:
            name = self.service["metadata"]["name"]
            self.outcome.delete.append(Reference("autoscaling/v2", "HorizontalPodAutoscaler", name))
        settled = is_true(status.conditions, "Ready") and status.candidate is None
        self.outcome.requeue = IDLE_SECONDS if settled else LOOK_SECONDS

    def _stalled(self) -> None:
        conditions = [c for d in self.observed.deployments for c in d.get("status", {}).get("conditions") or []]
        messages = [c.get("message", "") for c in conditions if c["type"] == "ReplicaFailure" and c["status"] == "True"]
        if stall := find_stall(self.observed.pods, messages + self.observed.messages):
            if self._condition("Stalled", True, stall.reason, stall.message):
                self._event(EventReason.STALLED, stall.message, warning=True)
        elif get_condition(self.status.conditions, "Stalled"):
            self._condition("Stalled", False, Reason.MOVING, "")

    def _count_replicas(self) -> None:
        ready = self.deployment.get("status", {}).get("readyReplicas", 0)
        wanted = self.spec.replicas
        if self.spec.autoscaling:
            wanted = max(wanted, self.deployment.get("spec", {}).get("replicas", wanted))
        self.status.replicas = f"{ready}/{wanted}"
        self.status.endpoint = endpoint(self.service)
        text = f"{ready} of {wanted} replicas have their models loaded"
        if ready >= wanted:
            self._condition("Ready", True, Reason.MODELS_READY, text)
        else:
            words = next(filter(None, map(last_words, self.servers)), "")
            self._condition("Ready", False, Reason.MODELS_NOT_READY, f"{text}; {words}" if words else text)

    def _replicas(self) -> int | None:
        """What to ask of the Deployment; None leaves it to the autoscaler."""
        if not self.spec.autoscaling:
            return self.spec.replicas
        owners = [
            m["manager"]
            for m in self.deployment["metadata"].get("managedFields") or []
            if "f:replicas" in m.get("fieldsV1", {}).get("f:spec", {})
        ]
        # Let go of before the autoscaler has written it, the number would fall to one.
        return self.deployment["spec"]["replicas"] if owners == [FIELD_MANAGER] else None

    # -- the candidate -----------------------------------------------------------------------------------------------

    def _roll_out(self) -> None:
        status = self.status
        wanted, abort, promote = self._wanted(), self._asked(ABORT_ANNOTATION), self._asked(PROMOTE_ANNOTATION)
        under_way = status.candidate and (status.candidate.digest, status.attempt)
        if under_way and (wanted is None or under_way != (wanted.digest, wanted.attempt)):
            if self.spec.candidate is None:
                self._end(Reason.ABORTED, "spec.candidate was taken away")
            else:
                other = f"{_short(self.spec.candidate.digest)}, attempt {self.spec.candidate.attempt}"
                self._end(Reason.SUPERSEDED, f"spec.candidate is another one now: {other}")
        # A service that is not up yet, as while its image is pulled, must not cost the candidate its time.
        if wanted and status.candidate is None and self.ready:
            self._begin(wanted)
        if status.candidate is None:
            if wanted is None:
                # An order that finds no candidate is not kept for the next one.
                status.aborted, status.promoted = abort or status.aborted, promote or status.promoted
        elif abort:
            status.aborted = abort
            self._end(Reason.ABORTED, f"asked for by the annotation {ABORT_ANNOTATION}={abort}")
        elif promote and not self._loading:
            status.promoted = promote
            self._end(Reason.PROMOTED, f"asked for by the annotation {PROMOTE_ANNOTATION}={promote}")
        elif self.spec.paused:
            if self._condition("RolledOut", "Unknown", Reason.PAUSED, f"spec.paused is true, weight {status.weight}"):
                self._event(EventReason.PAUSED, f"weight {status.weight} is held")
        else:
            self._look()

    def _wanted(self) -> Candidate | None:
        """The candidate of the spec, unless it serves, or was decided on in this attempt."""
        asked, tried = self.spec.candidate, self.status.tried
        assert self.status.stable
        if asked is None or asked.digest == self.status.stable.digest:
            return None
        if tried and tried.digest == asked.digest and asked.attempt <= tried.attempt:
            return None
        return asked

    def _asked(self, annotation: str) -> str | None:
        """The value of an order's annotation, if it was not granted yet."""
        value: str = (self.service["metadata"].get("annotations") or {}).get(annotation, "")
        granted = {ABORT_ANNOTATION: self.status.aborted, PROMOTE_ANNOTATION: self.status.promoted}
        return value if value and value != granted[annotation] else None

    def _begin(self, wanted: Candidate) -> None:
        status = self.status
        status.candidate, status.attempt = _served(wanted), wanted.attempt
        status.salt = f"{wanted.digest[:12]}-{wanted.attempt}-{self.now.timestamp():.0f}"
        status.weight, status.step, status.step_time = percent(0.0), 0, timestamp(self.now)
        status.baseline, status.errors, status.verdicts = {}, 0, []
        text = f"policy {_short(wanted.digest)}, attempt {wanted.attempt}: begins when every replica has loaded it"
        self._condition("RolledOut", "Unknown", Reason.IN_PROGRESS, text)
        self._event(EventReason.ROLLOUT_STARTED, text)

    @property
    def _loading(self) -> bool:
        return self.status.weight == percent(0.0)

    @property
    def _weight(self) -> float:
        weights = self.spec.canary.weights
        return 0.0 if self._loading else weights[min(self.status.step, len(weights) - 1)]

    def _look(self) -> None:
        """Judge the candidate, unless it was judged a moment ago."""
        status, canary = self.status, self.spec.canary
        assert status.candidate
        assert status.step_time
        last = parse_time(status.verdicts[-1].time if status.verdicts else status.step_time)
        waited = (self.now - last).total_seconds()
        if 0 <= waited < LOOK_SECONDS:
            return
        if waited > LEASE_SECONDS:
            # Paused, or without a controller: the candidate had no traffic or no judge, so the step begins anew.
            status.step_time = timestamp(self.now)
        # The spec's weights may have been changed meanwhile.
        status.weight = percent(self._weight)
        seconds = (self.now - parse_time(status.step_time)).total_seconds()
        checks, mdps = self._check(max(LOOK_SECONDS, seconds))
        looked = [CheckStatus(name=c.name, verdict=c.verdict, message=c.message[:1024]) for c in checks]
        look = LookStatus(time=timestamp(self.now), weight=status.weight, checks=looked)
        status.verdicts = [*status.verdicts, look][-LAST_VERDICTS:]
        outcome, reason, status.errors = advance(canary, self._weight, checks, seconds, status.errors)
        words = "; ".join(f"{c.name} {c.verdict} ({c.message})" for c in checks)
        if reason:
            self._end(Reason.ROLLED_BACK, reason)
        elif outcome == "passed" and not self._loading and status.step + 1 >= len(canary.weights):
            self._end(Reason.PROMOTED, f"every check of every step passed; at last {words}")
        elif outcome == "passed":
            status.step = 0 if self._loading else status.step + 1
            status.weight, status.step_time = percent(canary.weights[status.step]), timestamp(self.now)
            status.baseline = {"candidate_mdps": mdps}
            self._event(EventReason.WEIGHT_RAISED, f"policy {_short(status.candidate.digest)}: {status.weight}")
        if status.candidate:
            text = f"policy {_short(status.candidate.digest)}, weight {status.weight}: {words}"
            if self._condition("RolledOut", "Unknown", Reason.IN_PROGRESS, text):
                self._event(EventReason.RESUMED, f"weight {status.weight}")

    def _check(self, seconds: float) -> tuple[list[Check], float]:
        """The checks of a look, and the candidate's finished MDPs."""
        canary, salt, selector = self.spec.canary, self.status.salt, service_label(self.service)
        ask = self.observed.ask or _ask_nobody
        returns: MeasuredReturns | ServerError
        try:
            returns = read_returns(ask, canary.metric, salt, selector)
        except ServerError as error:
            returns = error
        loaded = check_loaded(ask, salt, self.ready, selector)
        if self._loading:
            # The canary does not begin before it can be measured.
            unmeasured = [Check("reward", "error", str(returns))] if isinstance(returns, ServerError) else []
            return [loaded, *unmeasured], 0
        mdps = 0 if isinstance(returns, ServerError) else returns.arms["candidate"].count
        new = mdps - int(self.status.baseline.get("candidate_mdps", 0))
        return [loaded, *check_all(returns, canary, new, ask, seconds, selector)], mdps

    def _end(self, outcome: Reason, message: str) -> None:
        """The candidate takes stable's place, or goes; `step` and the verdicts stay, to be read."""
        status = self.status
        assert status.candidate
        text = f"policy {_short(status.candidate.digest)}, attempt {status.attempt}: {message}"
        status.tried = Tried(
            digest=status.candidate.digest, attempt=status.attempt, outcome=outcome, message=text[:4096]
        )
        if outcome == Reason.PROMOTED:
            status.stable = status.candidate
        status.candidate, status.weight, status.step_time, status.errors = None, percent(0.0), None, 0
        promoted = outcome == Reason.PROMOTED
        self._condition("RolledOut", promoted, outcome, text)
        reasons = {Reason.PROMOTED: EventReason.PROMOTED, Reason.ROLLED_BACK: EventReason.ROLLED_BACK}
        self._event(reasons.get(outcome, EventReason.ABORTED), text, warning=not promoted)

    # -- words -------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """What every replica is to serve: see serving.state."""
        status, spec = self.status, self.spec
        assert status.stable
        state: dict[str, Any] = {
            "stable": _policy(status.stable),
            "candidate": _policy(status.candidate) if status.candidate else None,
            "weight": self._weight,
            "salt": status.salt,
            "deadline_ms": spec.canary.deadline_ms,
            "head": spec.head,
            "features": spec.features,
            "actions": spec.actions,
        }
        if state["weight"]:
            # Rounded, so that looks in between change nothing.
            whole = int(self.now.timestamp()) // RENEW_SECONDS + 1
            state["weight_until"] = whole * RENEW_SECONDS + LEASE_SECONDS
        return state

    def _condition(
        self, type: str, value: Literal["True", "False", "Unknown"] | bool, reason: Reason, message: str
    ) -> bool:
        return set_condition(self.status.conditions, type, value, reason, message, self.generation, self.now)

    def _event(self, reason: EventReason, message: str, warning: bool = False) -> None:
        self.outcome.events.append(Event(reason, message, "Warning" if warning else "Normal"))

    def derive(self) -> None:
        """Phase and reason, from the conditions by type."""
        status = self.status
        conditions = {c.type: c for c in status.conditions}
        broken = [c for t in ("Accepted", "Ready") if (c := conditions.get(t)) and c.status == "False"]
        broken += [c for c in conditions.values() if c.type == "Stalled" and c.status == "True"]
        # The most telling first: a spec at fault, then what keeps replicas from starting.
        broken.sort(key=lambda c: ("Accepted", "Stalled", "Ready").index(c.type))
        if broken:
            status.phase, status.reason = ("Degraded" if self.ready else "Pending"), broken[0].reason
        elif status.candidate:
            paused = conditions["RolledOut"].reason == Reason.PAUSED
            status.phase, status.reason = ("Paused" if paused else "Canary"), conditions["RolledOut"].reason
        else:
            status.phase, status.reason = "Serving", conditions["RolledOut"].reason


def _served(policy: PolicyReference) -> PolicyServed:
    return PolicyServed(digest=policy.digest, version=policy.version)


def _policy(served: PolicyServed) -> dict[str, Any]:
    return {"version": int(served.version), "digest": served.digest}


def _short(digest: str) -> str:
    return digest[:12]


def _ask_nobody(_: str) -> float | None:
    raise ServerError("no Prometheus to ask: name one in spec.monitoring.prometheusUrl")


def _is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and not pod["metadata"].get("deletionTimestamp")
