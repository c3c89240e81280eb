"""The features stage: transitions in, transitions with their state as it was known at the decision out."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def features(
    job: str, version: str, transitions: dsl.Input[dsl.Dataset], training_data: dsl.Output[dsl.Dataset]
) -> None:  # fmt: skip
    """Join each decision's state features point in time from Feast, and load the newest into the online store.

    Args:
        job: JSON of the job's sections actions and features.
        version: Digest of code and input; a finished stage is redone when it changes.
        transitions: The timeline's directory.
        training_data: Directory with `training` as Parquet and the Feast repository.
    """
    from components.features.point_in_time import join_features
    from contracts.job import JobSpec

    join_features(JobSpec.model_validate_json(job), transitions.path, training_data.path)
    training_data.metadata["version"] = version
