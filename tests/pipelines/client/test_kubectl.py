"""The plugin's manners: screens, JSON, exit codes, and for each thing that goes wrong what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kmock
import pytest
import yaml
from click.testing import CliRunner, Result

from pipelines.client.kubectl import bluewhale
from tests.operator.bluewhale_operator.servers import Servers
from tests.pipelines.client.worlds import canary, condition, failed, rolling_out, training

Run = Callable[..., Result]
EXAMPLES = Path(__file__).parents[3] / "manifests" / "examples"
VERBS = ("get", "logs", "promote", "abort", "pause", "resume", "retry", "lint")


def told(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb: str) -> None:
    done = CliRunner().invoke(bluewhale, [verb, "--help"])
    assert done.exit_code == 0
    assert f"kubectl bluewhale {verb}" in done.output


def test_the_help_lists_the_exit_codes() -> None:
    done = CliRunner().invoke(bluewhale, ["--help"])
    assert "the evaluation's gate stopped the policy" in done.output


def test_get_shows_the_stages_as_a_tree(world: Servers, run: Run) -> None:
    world.put(training())
    lines = run("get", "shop").stdout.splitlines()
    assert lines[0].startswith("shop  Running")
    assert "✓ timeline       cached" in lines[1]
    assert "✓ features         1m5s  features is done" in lines[2]
    assert "● training" in lines[5]
    assert "attempt 2  1/2 workers" in lines[5]
    assert [line[4:] for line in lines[6:]] == ["○ evaluation", "○ export", "○ rollout"]


def test_get_shows_the_canary_below_the_rollout(world: Servers, run: Run) -> None:
    world.put(rolling_out())
    world.put(canary())
    text = run("get", "shop").stdout
    assert "● rollout" in text  # its stage has only asked
    assert "━━━━━─────────────── 25% of MDPs  step 2  PolicyService shop" in text
    assert "stable    cdcdcdcdcdcd  version 3" in text
    assert "candidate abababababab  version 17" in text
    assert "reward    inconclusive  12 candidate and 34 stable MDPs of 30 each" in text
    assert "✓ evaluation       1m5s  reward 1.40 [1.20, 1.60] pass" in text


def test_get_says_why_a_job_failed_or_stands_still(world: Servers, run: Run) -> None:
    world.put(failed("Failed", "StageFailed", "timeline: no column [action]"))
    assert "StageFailed: timeline: no column [action]" in run("get", "shop").stdout
    world.put(training(conditions=[condition("Stalled", "True", "ImagePullFailed", "pod x: image y")]))
    assert "ImagePullFailed: pod x: image y" in run("get", "shop").stdout


def test_get_without_a_name_shows_all(world: Servers, run: Run) -> None:
    assert run("get").exit_code == 0
    assert "no jobs in namespace team" in run("get").stderr
    world.put(rolling_out())
    header, line = run("get").stdout.splitlines()
    assert header.split() == ["NAME", "PHASE", "STAGE", "WORKERS", "CPE", "WEIGHT", "AGE"]
    assert line.split()[:3] == ["shop", "RollingOut", "rollout"]
    assert "1.40 [1.20, 1.60] pass  25%" in line


def test_get_for_programs(world: Servers, run: Run) -> None:
    world.put(rolling_out())
    world.put(canary())
    found = told(run("get", "shop", "-o", "json"))
    assert (found["name"], found["place"]) == ("shop", "team")
    assert found["status"]["rollout"]["weight"] == "25%"
    assert found["service"]["stable"]["version"] == "3"
    assert yaml.safe_load(run("get", "shop", "-o", "yaml").stdout) == found
    assert [job["name"] for job in told(run("get", "-o", "json"))["items"]] == ["shop"]


@pytest.mark.parametrize(
    ("phase", "reason", "code"),
    [
        ("Succeeded", "Promoted", 0),
        ("Failed", "StageFailed", 1),
        ("StoppedByGate", "StoppedByGate", 3),
        ("RolledBack", "RolledBack", 4),
    ],
)
def test_get_w_ends_as_the_job_does(world: Servers, run: Run, phase: str, reason: str, code: int) -> None:
    world.put(failed(phase, reason, "so it was"))
    done = run("get", "shop", "-w")
    assert done.exit_code == code
    assert f"shop: {phase}" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[:2]] == ["timeline", "features"]
    line = json.loads(run("get", "shop", "-w", "-o", "json").stdout)
    assert line["status"]["phase"] == phase


def test_a_verb_says_what_it_asked_for(world: Servers, run: Run) -> None:
    world.put(rolling_out())
    world.put(canary())
    assert run("promote", "shop").stdout == (
        "PolicyService shop: asked to promote policy abababababab (version 17), now at 25%\n"
    )
    assert told(run("pause", "shop", "-o", "json")) == {
        "kind": "PolicyService",
        "name": "shop",
        "message": "its canary is held at 25%",
    }


def test_a_verb_that_does_not_fit_the_phase_is_refused(world: Servers, run: Run) -> None:
    world.put(training())
    done = run("promote", "shop")
    assert done.exit_code == 1
    assert "no canary of job shop is under way (Running, stage training)" in done.stderr
    assert "only a job that has failed" in run("retry", "shop").stderr
    assert "is not paused" in run("resume", "shop").stderr


def test_a_name_that_is_not_there_brings_the_near_ones(world: Servers, run: Run) -> None:
    world.put(training())
    done = run("get", "shopp")
    assert done.exit_code == 5
    assert "no job shopp in namespace team; did you mean shop?" in done.stderr
    assert "known: shop" in run("pause", "other").stderr
    assert "there is none at all" in run("get", "shop", "-n", "elsewhere").stderr


def test_a_log_that_is_not_there_says_why(world: Servers, run: Run) -> None:
    world.put(training())
    for stage, why in (
        ("trainin", "did you mean training?"),
        ("export", "has not started yet"),
        ("timeline", "came from the cache"),
        ("features", "its pod is gone; look among the archived logs of run r1"),
    ):
        done = run("logs", "shop", "--stage", stage)
        assert done.exit_code == 5
        assert why in done.stderr
    done = run("logs", "shop", "--stage", "export", "--worker", 1)
    assert done.exit_code == 2
    assert "only training has" in done.stderr


def test_a_cluster_without_blue_whale_says_how_to_install_it(world: Servers, run: Run) -> None:
    for plural in ("rltrainingjobs", "policyservices"):
        del world.api.resources[f"bluewhale.io/v1alpha1/{plural}"]
    done = run("get", "shop")
    assert done.exit_code == 6
    assert "kubectl apply -k manifests/crd" in done.stderr


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not know who asks"),
        (403, "not allowed to list rltrainingjobs in namespace team: no; the cluster role view holds it"),
        (503, "cannot serve this now: no"),
    ],
)
def test_a_cluster_that_refuses_is_told_apart(world: Servers, run: Run, status: int, said: str) -> None:
    world.api[kmock.method.GET] << kmock.Response(status=status, payload={"message": "no"})
    done = run("get")
    assert done.exit_code == 6
    assert said in done.stderr


def test_a_cluster_that_is_away(tmp_path: Path, kubeconfig: Path) -> None:
    away = tmp_path / "away"
    document = yaml.safe_load(kubeconfig.read_text())
    document["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:1"
    away.write_text(yaml.safe_dump(document))
    done = CliRunner().invoke(bluewhale, ["get", "--kubeconfig", str(away)])
    assert done.exit_code == 6
    assert "http://127.0.0.1:1 cannot be reached" in done.stderr


@pytest.mark.parametrize("options", [["--kubeconfig", "/nowhere"], ["--context", "none"]])
def test_no_cluster_at_all(options: list[str], kubeconfig: Path) -> None:
    done = CliRunner().invoke(bluewhale, ["get", *options], env={"KUBECONFIG": str(kubeconfig)})
    assert done.exit_code == 6
    assert "name one by --kubeconfig and --context" in done.stderr


def test_lint_finds_nothing_in_the_examples(run: Run) -> None:
    files = sorted(EXAMPLES.glob("*.yaml"))
    assert run("lint", *files).stdout == f"{len(files)} files: nothing wrong\n"


def test_lint_names_file_line_and_field(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text((EXAMPLES / "cartpole.yaml").read_text().replace("  epochs: 9", "  epoch: 9"))
    line = path.read_text().splitlines().index("    epoch: 9") + 1
    done = run("lint", path)
    assert done.exit_code == 2
    assert f"{path}:{line}: spec.training.epoch: unknown field; did you mean epochs?" in done.stderr
    [problem] = json.loads(run("lint", path, "-o", "json").stdout)["problems"]
    assert (problem["line"], problem["field"]) == (line, "spec.training.epoch")
