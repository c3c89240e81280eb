"""The training stage of a job with a sweep: the same in and out, the policy being that of the best settings."""

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
    """Try settings on a part of the training MDPs, judge each on the rest, and learn a policy with the best.

    Args:
        job: JSON of the job's sections actions, algorithm, data, evaluation, export, reward, sweep and training.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.
        normalization: The normalization stage's directory.
        warm_start: Directory of the policy bundle whose weights to begin with; empty to begin anew.

    Returns:
        policy: Directory with `policy`, the last bundle, `epochs`, TensorBoard's logs, `sweep.json` and `sweep.html`.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    from components.summary import passed_on, publish
    from components.sweep.sweep import sweep_and_train
    from components.training.launch import take_over
    from contracts.job import JobSpec

    spec = JobSpec.model_validate_json(job)
    take_over(policy.path, f"{policy.path}.sweep")
    sweep_and_train(spec, training_data.path, normalization.path, policy.path, warm_start)
    publish(policy, summary, record, version, **passed_on(training_data.metadata))
