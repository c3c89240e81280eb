"""The export stage: a policy bundle in, a Triton model repository out."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    model_repository: dsl.Output[dsl.Model],
) -> None:
    """Export the last epoch's policy to ONNX, check it against torch, and lay it out for Triton.

    Args:
        job: JSON of the job's sections actions, data and export.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory: its states check the exported graph.
        policy: The training stage's directory.
        model_repository: Directory with `model_repository` in Triton's layout.
    """
    from components.export.repository import export_policy
    from contracts.job import JobSpec

    export_policy(JobSpec.model_validate_json(job), training_data.path, policy.path, model_repository.path)
    model_repository.metadata["version"] = version
