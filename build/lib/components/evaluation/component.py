"""The evaluation stage: policy bundles and held-out MDPs in, counterfactual estimates and a verdict out."""

from kfp import dsl

from components.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluation(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
) -> None:
    """Estimate what each epoch's policy would have earned on MDPs that training never saw, and judge the last one.

    Args:
        job: JSON of the job's sections actions, data, evaluation, reward.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.
        policy: The training stage's directory.
        evaluation: Directory with `report.json`.
    """
    from components.evaluation.evaluate import evaluate
    from contracts.job import JobSpec

    evaluate(JobSpec.model_validate_json(job), training_data.path, policy.path, evaluation.path)
    evaluation.metadata["version"] = version
