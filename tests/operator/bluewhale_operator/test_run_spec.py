"""The body of a run, for one job and for many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from bluewhale_operator.run_spec import build_run
from tests.operator.bluewhale_operator.worlds import make_job


def test_many_jobs_are_compiled_at_once_and_each_is_its_own() -> None:
    jobs = [make_job(f"job-{number}") for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda job: build_run(job, None), jobs))
    names = [body["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] for body in bodies]
    assert names == [job["metadata"]["name"] for job in jobs]


def test_labels_and_annotations_reach_the_pipeline() -> None:
    job = make_job()
    job["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "night"}
    assert "night" in str(build_run(job, None)["pipeline_spec"])
    before = build_run(make_job(), None)["runtime_config"]["parameters"]["version"]
    job["metadata"]["annotations"] = {"bluewhale.io/data-version": "2026-05-04"}
    assert build_run(job, None)["runtime_config"]["parameters"]["version"] != before
