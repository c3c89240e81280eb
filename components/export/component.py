"""The export stage: a policy bundle in, a Triton model repository out."""

from kfp import dsl

from components.image import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def export(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    model_repository: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Export the last epoch's policy to ONNX, check it against torch, and lay it out for Triton.

    Args:
        job: JSON of the job's sections actions, data and export.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory: its states check the exported graph.
        policy: The training stage's directory.

    Returns:
        model_repository: Directory with `model_repository` in Triton's layout.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    from components.export.policy import export_policy
    from components.summary import passed_on, publish
    from contracts.job import JobSpec

    export_policy(JobSpec.model_validate_json(job), training_data.path, policy.path, model_repository.path)
    publish(model_repository, summary, record, version, **passed_on(policy.metadata))
