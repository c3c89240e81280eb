"""The simulation stage: an environment in, a decision log and the policy that made it out."""

from kfp import dsl

from components.image import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def simulation(
    job: str,
    version: str,
    directory: str,
    decisions: dsl.Output[dsl.Dataset],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
    decision_log: dsl.OutputPath(str),  # type: ignore[valid-type]
    behaviour_policy: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Play the job's environment with its behaviour policy, in place of a product that logs decisions.

    Args:
        job: JSON of the job's sections actions, export and simulation.
        version: Digest of code and input; a finished stage is redone when it changes.
        directory: Where on the shared volume the log is put, below a name of its own.

    Returns:
        decisions: Directory with `log/decisions.parquet` and the behaviour policy's `model_repository`.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
        decision_log: Path of the log on the shared volume.
        behaviour_policy: Path of the behaviour policy's version directory on the shared volume.
    """
    from pathlib import Path

    from components.summary import publish
    from contracts.job import JobSpec
    from simulation.simulate import write_simulation

    log, policy = write_simulation(JobSpec.model_validate_json(job), decisions.path, directory)
    Path(decision_log).write_text(str(log))
    Path(behaviour_policy).write_text(str(policy))
    publish(decisions, summary, record, version)
