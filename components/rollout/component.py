"""The rollout stage: an exported policy and the gate's verdict in, a request to the PolicyService out."""

from kfp import dsl

from components.image import TRAINING_IMAGE


@dsl.component(base_image=TRAINING_IMAGE, install_kfp_package=False)
def rollout(
    job: str,
    version: str,
    policy: dsl.Input[dsl.Model],
    model_repository: dsl.Input[dsl.Model],
    timeline: str,
    features: str,
    normalization: str,
    understanding: str,
    training: str,
    evaluation: str,
    export: str,
    rollout: dsl.Output[dsl.Artifact],
    summary: dsl.Output[dsl.Markdown],
    record: dsl.OutputPath(str),  # type: ignore[valid-type]
    behaviour_policy: str = "",
) -> None:
    """Ask the job's PolicyService to try the policy, if the gate let it pass.

    Args:
        job: JSON of the job's sections actions, deploy, images, reward and storage.
        version: Digest of code and input.
        policy: The training stage's directory; its bundle is kept for the next run to begin with.
        model_repository: The export stage's directory.
        timeline: That stage's record.
        features: That stage's record.
        normalization: That stage's record.
        understanding: That stage's record.
        training: That stage's record.
        evaluation: That stage's record, with the gate's verdict.
        export: That stage's record.
        behaviour_policy: Version directory of the policy that made the log, where it is known: first in service.

    Returns:
        rollout: Directory with the stage's record.
        summary: What was asked for, for people.
        record: The end of this stage and of all before it for a controller, as JSON.
    """
    import json
    import os

    from components.rollout.request import request_rollout
    from components.summary import publish
    from contracts.job import JobSpec

    texts = (timeline, features, normalization, understanding, training, evaluation, export)
    records = {told["stage"]: told for told in map(json.loads, texts)}
    request_rollout(
        JobSpec.model_validate_json(job),
        os.environ["BLUEWHALE_JOB"],
        os.environ["BLUEWHALE_NAMESPACE"],
        records["evaluation"],
        model_repository.path,
        policy.path,
        behaviour_policy,
        rollout.path,
    )
    # A stage that KFP took from its cache had no pod to tell its end: this one tells it.
    publish(rollout, summary, record, version, {"records": records})
