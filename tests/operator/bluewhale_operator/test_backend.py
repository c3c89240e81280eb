"""What the Kubeflow Pipelines API answers, and what it means."""

from __future__ import annotations

from typing import Any

import pytest

from bluewhale_operator.backend import BackendError, KfpBackend, PipelineRun


class Answers(KfpBackend):
    """A backend whose API answers by method and path; an exception is raised."""

    def __init__(self, **answers: Any) -> None:
        super().__init__("http://kfp")
        self.answers = answers

    def _call(self, method: str, path: str, *_: Any, **__: Any) -> Any:
        answer = self.answers[method]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(("state", "lets_it_be"), [("CANCELED", True), ("CANCELING", True), ("RUNNING", False)])
def test_a_run_that_cannot_be_ended_matters_only_while_it_goes_on(state: str, lets_it_be: bool) -> None:
    backend = Answers(GET={"run_id": "r1", "state": state}, POST=BackendError("row not found", refused=True))
    if lets_it_be:
        backend.terminate("r1")
    else:
        with pytest.raises(BackendError, match="row not found"):
            backend.terminate("r1")


def test_a_task_without_a_state_was_left_out() -> None:
    details = {"task_details": [{"task_id": "t", "display_name": "training"}]}
    run = Answers(GET={"run_id": "r1", "state": "FAILED", "run_details": details}).get("r1")
    assert isinstance(run, PipelineRun)
    assert [t.state for t in run.tasks] == ["SKIPPED"]


def test_a_backend_that_nobody_answers_for_is_named() -> None:
    with pytest.raises(
        BackendError, match=r"no Kubeflow Pipelines API server answers at http://127\.0\.0\.1:1"
    ) as told:
        KfpBackend("http://127.0.0.1:1").check()
    assert not told.value.refused
