"""The command's manners: help with examples, clear errors before anything starts, stable exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from kfp import dsl
from pydantic.alias_generators import to_camel

from contracts.job import JobSpec, load_job
from pipelines import reaper
from pipelines.cli import main
from pipelines.pipeline import SECTIONS, STAGES, parameters

EXAMPLE = Path(__file__).parents[2] / "manifests" / "examples" / "cartpole.yaml"
COMMANDS = (
    "run", "compile", "log", "timeline", "features", "normalize", "understand", "train", "evaluate", "export",
    "serve", "rollout", "simulate", "reproduce", "gym",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Invoke the command in an empty directory, without a watcher of its own."""
    monkeypatch.setenv(reaper.MARK, "test")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(run, command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"bluewhale {command}" in done.output
    assert "Example:" in done.output


def test_a_wrong_field_stops_the_run_before_anything_starts(run, tmp_path):
    job = yaml.safe_load(EXAMPLE.read_text())
    job["spec"]["training"]["epoch"] = job["spec"]["training"].pop("epochs")
    job["spec"]["reward"]["discount"] = "high"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = run("run", "job.yaml")
    assert done.exit_code == 2
    assert "spec.training.epoch: unknown field; did you mean epochs?" in done.stderr
    assert "spec.reward.discount: input should be a valid number" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_simulation_that_does_not_fit_the_job_is_refused(run, tmp_path):
    job = yaml.safe_load(EXAMPLE.read_text())
    job["spec"]["actions"] = ["up", "down"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    done = run("log", "job.yaml")
    assert done.exit_code == 2
    assert "spec.actions" in done.stderr


@pytest.mark.parametrize("command", ["features", "normalize", "understand", "train", "evaluate", "export", "serve"])
def test_a_stage_without_the_one_before_says_so(run, command):
    done = run(command, EXAMPLE)
    assert done.exit_code == 1
    assert "run the stage before this one" in done.stderr


@pytest.mark.parametrize(
    ("option", "known"),
    [("--study", "offline, online, gridworld, pendulum, slates, bandits"), ("--only", "3-step CQL")],
)
def test_the_results_tables_tell_what_there_is(run, option, known):
    done = run("reproduce", option, "none")
    assert done.exit_code == 2
    assert known in " ".join(done.stderr.split())


def test_the_results_tables_are_printed(run):
    done = run("reproduce", "--study", "bandits", "--only", "500 decisions", "--only", "LinUCB, greedy", "--seeds", "2")
    assert done.exit_code == 0
    assert "mean over 2 seeds [95 %].\n\n| | 500 decisions |\n|---|---|\n| LinUCB, greedy | " in done.stdout


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_warm_start_wants_a_policy(run, command):
    done = run(command, EXAMPLE, "--warm-start", "yesterday")
    assert done.exit_code == 1
    assert "yesterday: no policy bundle here (bundle.json is missing)" in done.stderr


def test_an_environment_that_cannot_be_played_is_refused(run):
    done = run("gym", "Nowhere-v0")
    assert done.exit_code == 2
    assert "Nowhere-v0" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--algorithm", "sac"], "sac cannot act in CartPole-v1, whose actions are discrete"),
        (["--set", "alpha=1"], "dqn.alpha: unknown field"),
        (["--set", "learningRate=fast"], "valid number"),
        (["--set", "learningRate"], "write NAME=VALUE"),
        (["--set", "nextAction=logged"], "nextAction logged is of logs"),
        (["--set", "steps=200"], "too few to look 200 ahead"),
        (["--decisions", "20"], "too few to look 3 ahead"),
    ],
)
def test_what_cannot_be_learned_by_playing_is_refused(run, options, said):
    done = run("gym", "CartPole-v1", *options)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_a_policy_that_was_learned_by_playing_is_shown_and_kept(run, tmp_path):
    done = run("gym", "CartPole-v1", "--decisions", "2000", "--json", "--output", tmp_path / "learned")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["episodes"] == 100
    assert found["interval"][0] <= found["mean_return"] <= found["interval"][1]
    assert json.loads((tmp_path / "learned" / "result.json").read_text()) == found
    assert (tmp_path / "learned" / "policy" / "weights.safetensors").is_file()
    again = run("gym", "CartPole-v1", "--output", tmp_path / "learned")
    assert again.exit_code == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize("command", ["simulate", "rollout"])
def test_traffic_and_rollout_want_a_running_service(run, command):
    done = run(command, EXAMPLE)
    assert done.exit_code == 1
    assert "start one with `bluewhale serve`" in done.stderr


def test_compile_writes_the_stages_and_what_a_cluster_adds_as_kfp_components(run, tmp_path):
    done = run("compile", EXAMPLE, "-o", "pipeline.yaml")
    assert done.exit_code == 0, done.output
    compiled, platform = yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text())
    assert set(compiled["root"]["dag"]["tasks"]) == {"simulation", *STAGES, "rollout"}
    assert "kubernetes" in platform["platforms"]
    defaults = compiled["root"]["inputDefinitions"]["parameters"]
    assert json.loads(defaults["training_job"]["defaultValue"])["training"]["workers"] == {"min": 1, "max": 2}
    assert "pip install" not in (tmp_path / "pipeline.yaml").read_text()


def test_a_stage_is_given_only_what_it_reads(run):
    given = parameters(load_job(EXAMPLE).spec, "log.parquet", "v")
    for stage in STAGES:
        sections = set(json.loads(given[f"{stage}_job"])) - {"actionSpace", "actions", "slate", "seed"}
        assert sections == {to_camel(section.partition(".")[0]) for section in SECTIONS[stage]}
    assert json.loads(given["understanding_job"])["evaluation"] == {"gate": {"metric": "balanced"}}


@pytest.mark.parametrize(
    ("space", "more"),
    [
        ("parametric", {"algorithm": {"cql": {}}}),
        ("continuous", {"algorithm": {"iql": {}}}),
        ("slate", {"algorithm": {"slateQ": {}}, "slate": {"size": 2}}),
        (
            "slate",
            {
                "algorithm": {"slateQ": {}},
                "slate": {"size": 2, "choice": "reward"},
                "reward": {"metricWeights": {"watched": 1.0}},
            },
        ),
    ],
)
def test_what_a_stage_is_given_is_a_job_of_its_own(space, more):
    job = {"actionSpace": space, "data": {"decisionLog": "log.parquet"}, **more}
    given = parameters(JobSpec.model_validate(job), "log.parquet", "v")
    for stage in STAGES:
        assert JobSpec.model_validate_json(given[f"{stage}_job"]).action_space == space


def test_kfp_reads_each_component_s_documentation():
    from components.training.component import training

    assert isinstance(training, dsl.base_component.BaseComponent)
    inputs = training.component_spec.inputs
    assert {"job", "version", "training_data", "normalization", "warm_start"} == set(inputs)
