"""The understanding stage: training data and its normalization in, three checks of the problem out."""

from kfp import dsl

from components.image import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def understanding(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    normalization: dsl.Input[dsl.Artifact],
    understanding: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Ask whether what follows a decision depends on the state and the action, and on nothing before them.

    Args:
        job: JSON of the job's sections actions, data, reward, understanding, and the gate's metric.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.
        normalization: The normalization stage's directory.

    Returns:
        understanding: Directory with `understanding.json`.
        page: What it says, for people.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    import shutil
    from pathlib import Path

    from components.summary import passed_on, publish
    from components.understanding.understand import understand
    from contracts.job import JobSpec

    understand(JobSpec.model_validate_json(job), training_data.path, normalization.path, understanding.path)
    shutil.copy(Path(understanding.path) / "report.html", page.path)
    publish(understanding, summary, record, version, **passed_on(training_data.metadata))
