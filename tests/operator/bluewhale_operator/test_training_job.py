"""What a job's state and what is seen of its run lead to."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from bluewhale_operator.backend import PipelineRun
from bluewhale_operator.outcome import Reference, get_condition, is_true, timestamp
from bluewhale_operator.training_job import (
    CLAIM_SECONDS,
    CLEANUP_SECONDS,
    FINALIZER,
    RETRY_ANNOTATION,
    STAGES,
    STALL_SECONDS,
    JobOutcome,
    Observed,
    at_rest,
    reconcile,
)
from tests.operator.bluewhale_operator.worlds import (
    DIGEST,
    NOW,
    OTHER,
    later,
    make_job,
    make_run,
    make_service,
    record,
    stage_pod,
    unschedulable_pod,
    waiting_pod,
)

ME = "operator-a"


class Life:
    """A job whose status is kept from look to look, as the API server would."""

    def __init__(self, job: dict[str, Any] | None = None) -> None:
        self.job = job or make_job()
        self.events: list[str] = []

    def look(self, at: float = 0, identity: str = ME, **seen: Any) -> JobOutcome:
        outcome = reconcile(copy.deepcopy(self.job), Observed(**seen), later(at), identity)
        assert outcome is not None
        self.job["status"] = outcome.status.model_dump(by_alias=True, exclude_none=True, mode="json")
        finalizers = [FINALIZER] if outcome.finalizer else []
        self.job["metadata"]["finalizers"] = finalizers
        self.events += [event.reason.value for event in outcome.events]
        return outcome

    def begin(self) -> PipelineRun:
        """Claim and submit; the run as it then stands."""
        self.look()
        assert self.look().submit
        run = make_run(self.status["run"]["name"])
        self.look(run=run)
        return run

    def run(self, *args: Any, **kwargs: Any) -> PipelineRun:
        return make_run(self.status["run"]["name"], *args, **kwargs)

    def finish_run(self, at: float = 60, **rollout: Any) -> JobOutcome:
        pods = [stage_pod(s, record(s, **(rollout if s == "rollout" else {}))) for s in STAGES]
        service = rollout.pop("seen_service", make_service())
        return self.look(at, run=self.run(7, "SUCCEEDED"), pods=pods, service=service)

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.job["status"]
        return found

    def stage(self, name: str) -> dict[str, Any]:
        return next(s for s in self.status["stages"] if s["name"] == name)


def condition(outcome: JobOutcome, type: str) -> tuple[str, str]:
    found = get_condition(outcome.status.conditions, type)
    assert found is not None, f"no condition {type}"
    return found.status, found.reason


# -- submission --------------------------------------------------------------------------------------------------------


def test_a_new_job_is_claimed_before_it_is_submitted() -> None:
    life = Life()
    first = life.look()
    assert (first.submit, first.finalizer) == (False, True)
    assert life.status["run"]["claimedBy"] == ME
    second = life.look()
    assert second.submit
    assert second.status.run == first.status.run


def test_the_name_of_a_run_tells_job_generation_and_attempt() -> None:
    life = Life()
    life.look()
    assert life.status["run"]["name"] == f"shop-{life.job['metadata']['uid'][:8]}-g1-a1"


def test_a_run_that_is_found_under_the_claimed_name_is_not_submitted_again() -> None:
    life = Life()
    life.look()
    outcome = life.look(run=make_run(life.status["run"]["name"]))
    assert not outcome.submit
    assert life.status["run"]["id"] == "r1"


def test_another_controllers_claim_is_respected_until_it_expires() -> None:
    life = Life()
    life.look(identity="operator-b")
    outcome = life.look(at=1, identity=ME)
    assert not outcome.submit
    assert outcome.requeue == pytest.approx(CLAIM_SECONDS - 1)
    taken_over = life.look(at=CLAIM_SECONDS + 1, identity=ME)
    assert not taken_over.submit  # the claim is written down first
    assert life.look(at=CLAIM_SECONDS + 1, identity=ME).submit


def test_a_job_of_another_controller_is_left_alone() -> None:
    assert reconcile(make_job(managedBy="kueue.x-k8s.io/multikueue"), Observed(), NOW, ME) is None


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"actions": ["left", "left"]}, "distinct"),
        ({"data": {"decisionLog": None}}, "decisionLog"),
        ({"training": {"epohcs": 3}}, "did you mean epochs"),
        ({"training": {"workers": {"min": 3, "max": 2}}}, "min 3"),
    ],
)
def test_a_spec_that_cannot_be_used_is_refused_in_the_status(spec: dict[str, Any], words: str) -> None:
    life = Life(make_job(**spec))
    outcome = life.look()
    assert condition(outcome, "Accepted") == ("False", "InvalidSpec")
    found = get_condition(outcome.status.conditions, "Accepted")
    assert found
    assert words in found.message
    assert (outcome.status.phase, outcome.status.reason) == ("Failed", "InvalidSpec")
    assert not outcome.submit
    assert not outcome.finalizer


def test_a_spec_that_is_mended_is_taken_up() -> None:
    life = Life(make_job(actions=["left", "left"]))
    life.look()
    life.job["spec"]["actions"] = ["left", "right"]
    life.job["metadata"]["generation"] = 2
    life.look()
    assert life.look().submit


def test_without_a_backend_nothing_is_lost_and_the_job_goes_on_by_itself() -> None:
    life = Life()
    outcome = life.look(backend_error="no Kubeflow Pipelines API server answers at http://x")
    assert condition(outcome, "PipelineBackendAvailable") == ("False", "Unreachable")
    assert (outcome.status.phase, outcome.status.reason) == ("Pending", "Unreachable")
    assert outcome.status.run is None
    life.look(at=10)
    assert life.look(at=10).submit
    assert life.events[0] == "BackendUnavailable"
    assert "BackendAvailable" in life.events


def test_what_the_backend_refuses_for_good_fails_the_job_with_its_words() -> None:
    life = Life()
    life.look()
    outcome = life.look(submission_refused="invalid pipeline spec")
    assert outcome.status.phase == "Failed"
    assert "invalid pipeline spec" in get_condition(outcome.status.conditions, "Failed").message  # type: ignore[union-attr]


# -- the run -----------------------------------------------------------------------------------------------------------


def test_stages_follow_the_run() -> None:
    life = Life()
    life.begin()
    pods = [stage_pod("timeline", record("timeline")), stage_pod("features")]
    outcome = life.look(20, run=life.run(1), pods=pods)
    assert [s["state"] for s in life.status["stages"]][:3] == ["Succeeded", "Running", "Pending"]
    assert outcome.status.stage == "features"
    assert outcome.status.phase == "Running"
    timeline = life.stage("timeline")
    assert (timeline["attempts"], timeline["message"], timeline["artifact"]) == (
        1, "timeline is done", "minio://timeline",
    )  # fmt: skip


def test_a_stage_from_the_cache_is_called_cached() -> None:
    life = Life()
    life.begin()
    life.look(20, run=life.run(2))
    assert life.stage("timeline")["state"] == "Cached"


def test_records_of_cached_stages_come_with_the_last_component() -> None:
    life = Life()
    life.begin()
    records = {"evaluation": record("evaluation"), "export": record("export")}
    pods = [stage_pod("rollout", record("rollout", records=records))]
    life.look(20, run=life.run(7, "SUCCEEDED"), pods=pods, service=make_service())
    assert life.status["cpe"]["summary"] == "1.40 [1.20, 1.60] pass"
    assert life.status["policy"] == DIGEST[:12]


def test_workers_are_counted_while_they_train() -> None:
    life = Life(make_job(training={"workers": {"min": 1, "max": 4}}))
    life.begin()
    workers = [stage_pod("training") for _ in range(2)]
    for number, worker in enumerate(workers):
        worker["metadata"]["labels"] = {"bluewhale.io/job": "shop", "bluewhale.io/role": "worker"}
        worker["metadata"]["name"] = f"w{number}"
    life.look(20, run=life.run(3), pods=[stage_pod("training"), *workers])
    assert life.status["workers"] == {"current": 2, "max": 4, "summary": "2/4"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_for_no_lasting_reason_is_tried_again_until_the_limit(stage: str) -> None:
    life = Life()
    life.begin()
    failing = stage_pod(stage, record(stage, "failed", message="the node went away", retryable=True))
    outcome = life.look(20, run=life.run(STAGES.index(stage), "FAILED", failed=stage), pods=[failing])
    assert outcome.status.run is None
    assert outcome.status.phase == "Pending"
    assert outcome.status.reason == "Retrying"
    assert not life.look(25).submit  # not before its time
    life.look(31)
    assert life.look(31).submit
    assert life.status["run"]["name"].endswith("-a2")
    outcome = life.look(40, run=life.run(STAGES.index(stage), "FAILED", failed=stage), pods=[failing])
    assert condition(outcome, "Failed") == ("True", "BackoffLimitExceeded")
    assert "the node went away" in get_condition(outcome.status.conditions, "Failed").message  # type: ignore[union-attr]
    assert outcome.status.stage == stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_says_that_trying_again_is_useless_fails_the_job_at_once(stage: str) -> None:
    life = Life()
    life.begin()
    failing = stage_pod(stage, record(stage, "failed", message="17 % of rows quarantined", retryable=False))
    outcome = life.look(20, run=life.run(STAGES.index(stage), "FAILED", failed=stage), pods=[failing])
    assert condition(outcome, "Failed") == ("True", "StageFailed")
    assert "17 % of rows quarantined" in get_condition(outcome.status.conditions, "Failed").message  # type: ignore[union-attr]
    assert life.status["attempts"] == 1


def test_a_retried_stage_shows_the_times_of_its_new_attempt() -> None:
    life = Life()
    life.begin()
    failing = stage_pod("features", record("features", "failed", retryable=True))
    life.look(
        20, run=life.run(1, "FAILED", failed="features"), pods=[stage_pod("timeline", record("timeline")), failing]
    )
    assert "startTime" not in life.stage("features")
    assert "completionTime" not in life.stage("features")
    assert life.stage("features")["message"] == ""
    life.look(31)
    life.look(31)
    again = stage_pod("features", startTime="2026-05-04T12:01:00Z")
    life.look(70, run=life.run(1, run_id="r2"), pods=[again])
    assert life.stage("features")["startTime"] == "2026-05-04T12:01:00Z"
    assert life.stage("features")["attempts"] == 2
    assert life.stage("timeline")["state"] == "Succeeded"


def test_a_container_that_was_killed_says_so() -> None:
    life = Life(make_job(backoffLimit=0))
    life.begin()
    pod = stage_pod("training", phase="Failed")
    pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    outcome = life.look(20, run=life.run(3, "FAILED", failed="training"), pods=[pod])
    assert "OOMKilled" in get_condition(outcome.status.conditions, "Failed").message  # type: ignore[union-attr]


def test_a_container_that_died_without_a_word_is_quoted_from_its_log() -> None:
    life = Life(make_job(backoffLimit=0))
    life.begin()
    pod = stage_pod("timeline", phase="Failed")
    pod["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 1, "reason": "Error"}}
    logs = {pod["metadata"]["name"]: "mkdir /minio: permission denied"}
    outcome = life.look(20, run=life.run(0, "FAILED", failed="timeline"), pods=[pod], logs=logs)
    assert "mkdir /minio: permission denied" in get_condition(outcome.status.conditions, "Failed").message  # type: ignore[union-attr]


def test_a_stage_that_could_not_hand_over_its_work_says_why_and_is_tried_again() -> None:
    life = Life()
    life.begin()
    pod = stage_pod("training", record("training"), phase="Failed")
    pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] = 1
    logs = {pod["metadata"]["name"]: "unable to open weights.safetensors: permission denied"}
    outcome = life.look(20, run=life.run(3, "FAILED", failed="training"), pods=[pod], logs=logs)
    assert condition(outcome, "Stalled") == ("False", "Retrying")
    assert "permission denied" in get_condition(outcome.status.conditions, "Stalled").message  # type: ignore[union-attr]


def test_stages_after_the_failed_one_were_not_started() -> None:
    life = Life()
    life.begin()
    life.look(20, run=life.run(2, "FAILED", failed="normalization"))
    assert [s["attempts"] for s in life.status["stages"]] == [1, 0, 1, 0, 0, 0, 0, 0]
    assert life.events.count("StageStarted") == 2


def test_a_run_that_was_deleted_is_submitted_anew() -> None:
    life = Life()
    life.begin()
    life.look(20, run=None)
    assert life.status.get("run") is None
    life.look(40)
    assert life.look(40).submit


def test_a_run_that_was_ended_by_hand_ends_the_job() -> None:
    life = Life()
    life.begin()
    outcome = life.look(20, run=life.run(1, "CANCELED"))
    assert condition(outcome, "Failed") == ("True", "Aborted")


@pytest.mark.parametrize(
    ("pod", "messages", "reason", "words"),
    [
        (waiting_pod("timeline", "ImagePullBackOff", "not found"), [], "ImagePullFailed", "registry/none:1"),
        (waiting_pod("timeline", "ErrImagePull", "unauthorized"), [], "ImagePullFailed", "pull secrets"),
        (waiting_pod("timeline", "CreateContainerConfigError", "no secret x"), [], "MissingDependency", "no secret x"),
        (unschedulable_pod("timeline", "0/1 nodes: 1 Insufficient cpu"), [], "Unschedulable", "Insufficient cpu"),
        (
            unschedulable_pod("timeline", 'persistentvolumeclaim "bluewhale" not found'),
            [], "MissingDependency", "persistentvolumeclaim",
        ),
        (
            waiting_pod("timeline", "ErrImagePull", "unauthorized"),
            ["Unable to retrieve some image pull secrets (registry); attempting to pull the image may not succeed."],
            "ImagePullFailed", "pull secrets (registry)",
        ),
        (
            waiting_pod("timeline", "ContainerCreating"),
            ['pod p: MountVolume.SetUp failed for volume "key": secret "key" not found'],
            "MissingDependency", 'secret "key" not found',
        ),
        (None, ["pods is forbidden: exceeded quota: small"], "QuotaExceeded", "exceeded quota"),
        (None, ['serviceaccount "bluewhale-pipeline" not found'], "MissingDependency", "serviceaccount"),
    ],
)  # fmt: skip
def test_children_that_cannot_start_are_told_in_a_condition(
    pod: dict[str, Any] | None, messages: list[str], reason: str, words: str
) -> None:
    life = Life()
    life.begin()
    outcome = life.look(20, run=life.run(0), pods=[pod] if pod else [], messages=messages)
    assert condition(outcome, "Stalled") == ("True", reason)
    assert words in get_condition(outcome.status.conditions, "Stalled").message  # type: ignore[union-attr]
    assert outcome.status.reason == reason
    mended = life.look(40, run=life.run(0), pods=[stage_pod("timeline")])
    assert condition(mended, "Stalled") == ("False", "Moving")


def test_an_image_that_cannot_be_pulled_does_not_hang_forever() -> None:
    life = Life()
    life.begin()
    pods = [waiting_pod("timeline", "ImagePullBackOff")]
    life.look(20, run=life.run(0), pods=pods)
    assert life.look(20 + STALL_SECONDS - 1, run=life.run(0), pods=pods).terminate is None
    outcome = life.look(21 + STALL_SECONDS, run=life.run(0), pods=pods)
    assert outcome.terminate == "r1"
    assert condition(outcome, "Failed") == ("True", "ImagePullFailed")


def test_a_pod_that_waits_for_room_may_wait() -> None:
    life = Life()
    life.begin()
    pods = [unschedulable_pod("timeline", "Insufficient cpu")]
    life.look(20, run=life.run(0), pods=pods)
    outcome = life.look(86_400, run=life.run(0), pods=pods)
    assert not is_true(outcome.status.conditions, "Failed")


def test_the_deadline_ends_the_run() -> None:
    life = Life(make_job(activeDeadlineSeconds=100))
    life.begin()
    assert life.look(99, run=life.run(1)).terminate is None
    outcome = life.look(101, run=life.run(1))
    assert outcome.terminate == "r1"
    assert condition(outcome, "Failed") == ("True", "DeadlineExceeded")


def test_a_job_that_fails_says_what_held_it_and_leaves_nothing_at_work() -> None:
    life = Life(make_job(activeDeadlineSeconds=100))
    life.begin()
    pods = [unschedulable_pod("features", "Insufficient cpu")]
    life.look(50, run=life.run(1), pods=pods)
    outcome = life.look(101, run=life.run(1), pods=pods)
    assert "Insufficient cpu" in get_condition(outcome.status.conditions, "Failed").message  # type: ignore[union-attr]
    assert condition(outcome, "Stalled") == ("False", "Moving")
    assert (life.stage("features")["state"], life.stage("training")["state"]) == ("Failed", "Pending")
    assert life.stage("features")["completionTime"] == timestamp(later(101))


# -- suspension --------------------------------------------------------------------------------------------------------


def test_a_long_wait_for_room_does_not_count_as_one_for_an_image() -> None:
    life = Life()
    life.begin()
    life.look(10, run=life.run(), pods=[unschedulable_pod("timeline", "Insufficient cpu")])
    outcome = life.look(10 + 2 * STALL_SECONDS, run=life.run(), pods=[waiting_pod("timeline", "ErrImagePull")])
    assert condition(outcome, "Stalled") == ("True", "ImagePullFailed")
    assert outcome.terminate is None


def test_a_run_that_is_deleted_during_the_canary_is_not_missed() -> None:
    life = Life()
    life.begin()
    life.finish_run()
    outcome = life.look(90, service=make_service())
    assert (outcome.status.phase, outcome.submit) == ("RollingOut", False)


def test_a_reconcile_that_failed_once_is_forgotten_when_it_succeeds() -> None:
    life = Life()
    life.look(backend_error="gone")
    told = {"type": "Stalled", "status": "True", "reason": "ReconcileFailed", "lastTransitionTime": timestamp(NOW)}
    life.status["conditions"].append(told)
    assert condition(life.look(5, backend_error="gone"), "Stalled") == ("False", "Moving")


def test_suspension_ends_the_run_and_keeps_finished_stages() -> None:
    life = Life()
    life.begin()
    life.look(20, run=life.run(1), pods=[stage_pod("timeline", record("timeline")), stage_pod("features")])
    life.job["spec"]["suspend"] = True
    outcome = life.look(30, run=life.run(1))
    assert outcome.terminate == "r1"
    assert outcome.status.phase == "Suspended"
    assert life.look(31, run=life.run(1, "CANCELED")).terminate is None
    assert life.stage("timeline")["state"] == "Succeeded"
    assert life.stage("features")["state"] == "Pending"
    life.job["spec"]["suspend"] = False
    life.look(50)
    assert life.look(50).submit
    assert life.status["run"]["name"].endswith("-a2")
    assert life.status["startTime"] == "2026-05-04T12:00:50Z"


def test_a_job_that_is_applied_suspended_submits_nothing() -> None:
    life = Life(make_job(suspend=True))
    assert not life.look().submit
    assert "run" not in life.status


# -- gate and rollout --------------------------------------------------------------------------------------------------


def test_a_policy_that_the_gate_stops_ends_the_job_without_a_rollout() -> None:
    life = Life()
    life.begin()
    outcome = life.finish_run(rollout="skipped", message="lower bound 0.7 is below 1")
    assert (outcome.status.phase, outcome.status.reason) == ("StoppedByGate", "StoppedByGate")
    assert "RolledOut" not in [c.type for c in outcome.status.conditions]


def test_a_policy_that_is_exported_alone_completes_the_job_without_a_rollout() -> None:
    life = Life()
    life.begin()
    outcome = life.finish_run(rollout="exported", message="no canary: it is for discrete actions")
    assert (outcome.status.phase, outcome.status.reason) == ("Succeeded", "Exported")
    assert condition(outcome, "Complete") == ("True", "Exported")
    assert "RolledOut" not in [c.type for c in outcome.status.conditions]


def test_the_first_policy_of_a_service_is_adopted() -> None:
    life = Life()
    life.begin()
    outcome = life.finish_run(rollout="created")
    assert condition(outcome, "Complete") == ("True", "Adopted")
    assert life.status["rollout"]["weight"] == "100%"


def test_the_canary_is_mirrored_until_it_is_promoted() -> None:
    life = Life()
    life.begin()
    outcome = life.finish_run()
    assert (outcome.status.phase, outcome.status.reason) == ("RollingOut", "InProgress")
    pods = [stage_pod(s, record(s)) for s in STAGES]
    under_way = make_service(status={"candidate": {"digest": DIGEST, "version": "17"}, "weight": "50%", "step": 1})
    life.look(80, run=life.run(7, "SUCCEEDED"), pods=pods, service=under_way)
    assert life.status["rollout"]["weight"] == "50%"
    tried = {"digest": DIGEST, "attempt": 0, "outcome": "Promoted", "message": "every check of every step passed"}
    promoted = make_service(status={"stable": {"digest": DIGEST, "version": "17"}, "tried": tried})
    outcome = life.look(90, run=life.run(7, "SUCCEEDED"), pods=pods, service=promoted)
    assert condition(outcome, "Complete") == ("True", "Promoted")
    assert (life.status["phase"], life.status["rollout"]["weight"]) == ("Succeeded", "100%")


@pytest.mark.parametrize(("word", "phase"), [("RolledBack", "RolledBack"), ("Aborted", "Failed")])
def test_a_canary_that_is_turned_back_ends_the_job(word: str, phase: str) -> None:
    life = Life()
    life.begin()
    life.finish_run()
    tried = {"digest": DIGEST, "attempt": 0, "outcome": word, "message": "the check of reward failed"}
    service = make_service(status={"stable": {"digest": OTHER, "version": "3"}, "tried": tried})
    outcome = life.look(90, run=life.run(7, "SUCCEEDED"), service=service)
    assert condition(outcome, "Failed") == ("True", word)
    assert outcome.status.phase == phase


@pytest.mark.parametrize(("service", "reason"), [(None, "Aborted"), (make_service(candidate=OTHER), "Superseded")])
def test_a_rollout_that_nobody_works_on_any_more_ends_the_job(service: Any, reason: str) -> None:
    life = Life()
    life.begin()
    life.finish_run()
    outcome = life.look(90, run=life.run(7, "SUCCEEDED"), service=service)
    assert condition(outcome, "Failed") == ("True", reason)


# -- the end -----------------------------------------------------------------------------------------------------------


def ended(life: Life) -> Life:
    life.begin()
    life.finish_run(rollout="created")
    return life


def test_a_finished_job_stays_finished_when_its_children_are_gone() -> None:
    life = ended(Life())
    before = copy.deepcopy(life.status)
    for seen in ({}, {"run": None, "pods": []}, {"backend_error": "gone"}, {"service": None}):
        outcome = life.look(3600, **seen)
        assert life.status == before
        assert not outcome.submit
        assert not outcome.events


def test_a_finished_job_lets_go_of_its_finalizer() -> None:
    assert not ended(Life()).look(70).finalizer


def test_time_to_live_deletes_the_job_and_not_before() -> None:
    life = ended(Life(make_job(ttlSecondsAfterFinished=100)))
    early = life.look(100)
    assert not early.delete
    assert early.requeue == pytest.approx(60)
    assert [r.name for r in life.look(161).delete] == ["shop"]


def test_a_failed_job_is_tried_again_when_somebody_asks_once() -> None:
    life = Life()
    life.begin()
    life.finish_run(rollout="skipped", message="no")
    life.look(99, run=life.run(7, "SUCCEEDED"))
    life.job["metadata"]["annotations"] = {RETRY_ANNOTATION: "1"}
    life.look(100)
    outcome = life.look(100)
    assert outcome.submit
    assert "Failed" not in [c.type for c in outcome.status.conditions]
    assert "completionTime" not in life.status
    life.look(110, run=life.run(0, run_id="r2"))
    life.finish_run(200, rollout="skipped", message="no")
    assert not life.look(300).submit
    assert life.status["phase"] == "StoppedByGate"


def test_a_job_is_not_tried_again_while_its_last_run_may_go_on() -> None:
    life = Life(make_job(activeDeadlineSeconds=60))
    life.begin()
    life.look(61, backend_error="gone")
    life.job["metadata"]["annotations"] = {RETRY_ANNOTATION: "1"}
    assert life.look(62, backend_error="gone").status.phase == "Failed"
    assert life.look(63, run=life.run(1)).terminate == "r1"
    life.look(64, run=life.run(1, "CANCELED"))
    assert life.look(65).status.phase == "Pending"


def test_a_job_that_succeeded_is_not_tried_again() -> None:
    life = ended(Life())
    life.job["metadata"]["annotations"] = {RETRY_ANNOTATION: "1"}
    life.look(100)
    assert life.status["phase"] == "Succeeded"


# -- deletion ----------------------------------------------------------------------------------------------------------


def deleted(life: Life, at: float = 0) -> Life:
    life.job["metadata"]["deletionTimestamp"] = later(at).strftime("%Y-%m-%dT%H:%M:%SZ")
    return life


@pytest.mark.parametrize("done", range(len(STAGES)))
def test_a_job_deleted_in_any_stage_ends_its_run_first(done: int) -> None:
    life = Life()
    life.begin()
    life.look(5, run=life.run(done))
    outcome = deleted(life, 10).look(10, run=life.run(done))
    assert (outcome.terminate, outcome.finalizer) == ("r1", True)
    assert not life.look(12, run=life.run(done, "CANCELED")).finalizer


def test_a_failed_job_whose_run_may_go_on_holds_its_deletion_like_any_other() -> None:
    life = Life(make_job(activeDeadlineSeconds=60))
    life.begin()
    life.look(61, backend_error="gone")
    assert life.status["phase"] == "Failed"
    assert deleted(life, 62).look(63, backend_error="gone").finalizer


def test_a_run_that_is_being_ended_is_not_told_again() -> None:
    life = Life()
    life.begin()
    outcome = deleted(life, 10).look(11, run=life.run(2, "CANCELING"))
    assert (outcome.terminate, outcome.finalizer) == (None, True)


def test_deletion_does_not_hang_on_a_backend_that_is_gone() -> None:
    life = Life()
    life.begin()
    deleted(life, 10)
    assert life.look(11, backend_error="gone").finalizer
    outcome = life.look(11 + CLEANUP_SECONDS, backend_error="gone")
    assert not outcome.finalizer
    assert life.events[-1] == "CleanupGaveUp"


def test_a_claim_that_was_never_submitted_does_not_hold_a_deletion() -> None:
    life = Life()
    life.look()
    assert not deleted(life).look(1).finalizer


LEFT = [Reference("batch/v1", "Job", "shop-train")]


def test_workers_and_executors_that_outlive_their_run_are_deleted_with_the_job() -> None:
    life = Life()
    run = life.begin()
    deleted(life)
    assert life.look(run=run, at_work=LEFT).delete == []  # the run goes first, and may clean up itself
    outcome = life.look(run=life.run(0, "CANCELED"), at_work=LEFT)
    assert (outcome.delete, outcome.finalizer) == (LEFT, False)


def test_what_is_left_of_a_failed_attempt_is_deleted_before_the_next() -> None:
    life = Life()
    life.begin()
    run = life.run(3, "FAILED", failed="training")
    assert life.look(run=run, at_work=LEFT).delete == LEFT


def test_a_job_at_rest_is_not_observed_any_more() -> None:
    life = Life()
    life.begin()
    assert not at_rest(life.job)
    life.finish_run(rollout="created")
    life.look(at=61, run=life.run(7, "SUCCEEDED"))
    assert at_rest(life.job)


def test_a_job_without_a_log_shows_its_simulation_as_the_first_stage() -> None:
    simulation = {"environment": "CartPole-v1", "behaviourPolicy": {"weights": {"x": 1.0}}}
    life = Life(make_job(data={}, simulation=simulation))
    life.begin()
    life.look(run=life.run(), pods=[stage_pod("simulation")])
    assert life.stage("simulation")["state"] == "Running"
    assert life.status["stage"] == "simulation"


# -- words -------------------------------------------------------------------------------------------------------------


def test_phase_does_not_depend_on_the_order_of_conditions() -> None:
    from bluewhale_operator.training_job import derive_phase

    life = Life()
    life.begin()
    status = life.finish_run(rollout="skipped", message="no").status
    expected = derive_phase(status)
    status.conditions.reverse()
    assert derive_phase(status) == expected == ("StoppedByGate", "StoppedByGate")


def test_a_look_that_finds_nothing_new_changes_nothing() -> None:
    life = Life()
    life.begin()
    pods = [stage_pod("timeline", record("timeline")), stage_pod("features")]
    life.look(20, run=life.run(1), pods=pods)
    before, events = copy.deepcopy(life.status), len(life.events)
    life.look(25, run=life.run(1), pods=pods)
    assert life.status == before
    assert len(life.events) == events
