"""The timeline stage: a decision log in, transitions and quarantine out."""

from kfp import dsl

from components.image import SPARK_IMAGE


@dsl.component(base_image=SPARK_IMAGE, install_kfp_package=False)
def timeline(
    job: str,
    decision_log: str,
    outcomes: str,
    version: str,
    transitions: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Order each MDP's decisions, find what follows each, and quarantine the rows that cannot be used.

    Args:
        job: JSON of the job's actions, its section data, and how rewards are discounted.
        decision_log: Path of the decision log.
        outcomes: Path of outcomes reported later; empty when there are none.
        version: Digest of code and input; a finished stage is redone when it changes.

    Returns:
        transitions: Directory with `transitions` and `quarantine` as Parquet, and `report.json`.
        page: The data report, for people.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    import shutil
    from pathlib import Path

    from components.summary import data_window, publish
    from components.timeline.build import build_timeline
    from contracts.job import JobSpec

    build_timeline(JobSpec.model_validate_json(job), decision_log, outcomes or None, transitions.path)
    shutil.copy(Path(transitions.path) / "report.html", page.path)
    publish(transitions, summary, record, version, **data_window(f"{transitions.path}/transitions"))
