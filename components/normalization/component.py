"""The normalization stage: training data in, a normalization spec out."""

from kfp import dsl

from components.image import SPARK_IMAGE


@dsl.component(base_image=SPARK_IMAGE, install_kfp_package=False)
def normalization(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    normalization: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Identify each feature's type and how to normalize it.

    Args:
        job: JSON of the job's sections actions and normalization.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.

    Returns:
        normalization: Directory with `spec.json` and, where actions have features, `action_spec.json`.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    from components.normalization.identify import identify_features
    from components.summary import passed_on, publish
    from contracts.job import JobSpec

    identify_features(JobSpec.model_validate_json(job), training_data.path, normalization.path)
    publish(normalization, summary, record, version, **passed_on(training_data.metadata))
