"""What lint finds, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.client.lint import lint

JOB = """\
apiVersion: bluewhale.io/v1alpha1
kind: RLTrainingJob
metadata:
  name: shop
spec:
  actions: [left, right]
  data: {decisionLog: log.parquet}
"""


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (JOB.replace("shop", "Shop"), 4, "metadata.name: string should match pattern"),
        (
            JOB + "  deploy:\n    canary:\n      weights:\n        - 0.5\n        - 2\n",
            12,
            "spec.deploy.canary.weights.1",
        ),
        (JOB.replace("  data: {decisionLog: log.parquet}\n", ""), 1, "spec.data.decisionLog is missing"),
        (JOB.replace("shop", "s" * 42) + "  schedule: {cron: 0 3 * * *}\n", 1, "at most 41 characters"),
        (JOB.replace("  name: shop", "  labels: {}"), 3, "metadata.name: required, but missing"),
        ("a: 1\n---\n" + JOB.replace("RLTrainingJob", "RLTraining"), 4, "kind: input should be 'RLTrainingJob'"),
        (JOB + "---\n" + JOB.replace("shop", "Shop"), 12, "metadata.name"),
        (JOB + "x: [", 8, "not valid YAML"),
        ("- 1\n", 1, "expected an RLTrainingJob, found list"),
        ("kind: ConfigMap\n", 1, "holds no RLTrainingJob"),
        ("", 1, "holds no RLTrainingJob"),
    ],
)
def test_a_problem_stands_at_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    [problem] = lint(path)
    assert str(problem).startswith(f"{path}:{line}: ")
    assert said in str(problem)


def test_what_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "no such file" in str(lint(tmp_path / "none")[0]).lower()
    assert "is not text in UTF-8" in str(lint(tmp_path / "binary")[0])
    assert "cannot be read" in str(lint(tmp_path)[0])


def test_other_objects_in_the_file_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    service = "apiVersion: bluewhale.io/v1alpha1\nkind: PolicyService\n"
    path.write_text(f"kind: ConfigMap\n---\n{JOB}---\n{service}---\n")
    assert lint(path) == []
