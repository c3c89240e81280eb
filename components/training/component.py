"""The training stage: training data and a normalization spec in, a policy bundle per epoch out."""

from kfp import dsl

from components.image import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def training(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    normalization: dsl.Input[dsl.Artifact],
    policy: dsl.Output[dsl.Model],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
    warm_start: str = "",
) -> None:
    """Learn a policy from the training MDPs, on as many workers as the job says.

    Args:
        job: JSON of the job's sections actions, algorithm, data, export, reward and training.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.
        normalization: The normalization stage's directory.
        warm_start: Directory of the policy bundle whose weights to begin with; empty to begin anew.

    Returns:
        policy: Directory with `policy`, the last bundle, `epochs`, one for each, and TensorBoard's logs.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    from components.summary import passed_on, publish
    from components.training.launch import take_over, train
    from contracts.job import JobSpec

    take_over(policy.path)
    train(JobSpec.model_validate_json(job), training_data.path, normalization.path, policy.path, warm_start)
    publish(policy, summary, record, version, **passed_on(training_data.metadata))
