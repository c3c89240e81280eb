"""The normalization stage: training data in, a normalization spec out."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def normalization(
    job: str, version: str, training_data: dsl.Input[dsl.Dataset], normalization: dsl.Output[dsl.Artifact]
) -> None:  # fmt: skip
    """Identify each state feature's type and how to normalize it.

    Args:
        job: JSON of the job's sections actions and normalization.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.
        normalization: Directory with `spec.json`.
    """
    from components.normalization.identify import identify_features
    from contracts.job import JobSpec

    identify_features(JobSpec.model_validate_json(job), training_data.path, normalization.path)
    normalization.metadata["version"] = version
