"""The evaluation stage: policy bundles and held-out MDPs in, counterfactual estimates and a verdict out."""

from kfp import dsl

from components.image import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def evaluation(
    job: str,
    version: str,
    training_data: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
) -> None:
    """Estimate what each epoch's policy would have earned on MDPs that training never saw, and judge the last one.

    Args:
        job: JSON of the job's sections actions, data, evaluation, reward.
        version: Digest of code and input; a finished stage is redone when it changes.
        training_data: The features stage's directory.
        policy: The training stage's directory.

    Returns:
        evaluation: Directory with `report.json`.
        metrics: The last policy's estimates as scalars.
        page: The report for people.
        summary: The stage's figures for people.
        record: The stage's end for a controller, as JSON.
    """
    import json
    from pathlib import Path

    from components.evaluation.evaluate import evaluate
    from components.evaluation.page import judged, read_report, scalars, write_page
    from components.summary import passed_on, publish
    from contracts.job import JobSpec

    spec = JobSpec.model_validate_json(job)
    evaluate(spec, training_data.path, policy.path, evaluation.path)
    report = read_report(evaluation.path)
    write_page(spec, report, page.path)
    for name, value in scalars(report).items():
        metrics.log_metric(name, value)
    # Without a file, KFP's local cache takes the artifact for lost, and the stage for not done.
    Path(metrics.path).write_text(json.dumps(scalars(report), indent=2))
    cpe = judged(spec.evaluation.gate, report)
    more = {"cpe": cpe, "policy_digest": policy.metadata["digest"], **passed_on(policy.metadata)}
    publish(evaluation, summary, record, version, {"cpe": cpe}, **more)
