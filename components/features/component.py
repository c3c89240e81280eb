"""The features stage: transitions in, transitions with their state as it was known at the decision out."""

from kfp import dsl

from components.image import SPARK_IMAGE


@dsl.component(base_image=SPARK_IMAGE, install_kfp_package=False)
def features(
    job: str,
    version: str,
    transitions: dsl.Input[dsl.Dataset],
    training_data: dsl.Output[dsl.Dataset],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Join each decision's state features point in time from Feast, and load the newest into the online store.

    Args:
        job: JSON of the job's sections actions and data.features.
        version: Digest of code and input; a finished stage is redone when it changes.
        transitions: The timeline's directory.

    Returns:
        training_data: Directory with `training` as Parquet and the Feast repository.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    from components.features.point_in_time import join_features
    from components.summary import passed_on, publish
    from contracts.job import JobSpec

    join_features(JobSpec.model_validate_json(job), transitions.path, training_data.path)
    publish(training_data, summary, record, version, **passed_on(transitions.metadata))
