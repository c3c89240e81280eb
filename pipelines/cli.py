"""The `bluewhale` command."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from contracts import progress
from contracts.job import JobError, load_job
from contracts.stage import StageError, TransientError, read_record
from pipelines import reaper
from pipelines.display import Display
from pipelines.local import Run

EXIT_CODES = """\b
Exit codes:
  0    done; for run and rollout: the policy was promoted
  1    a stage failed; the message says which, why and what to do
  2    the command line or the job file is wrong
  3    the evaluation's gate stopped the policy
  4    the canary rolled the policy back
  130  interrupted
"""

console = Console(stderr=True)


class _Group(click.Group):
    """Runs a subcommand with clear errors, stable exit codes, and no process left behind."""

    def invoke(self, context: click.Context) -> Any:
        from serving.client import ServiceError
        from serving.processes import ServerError

        signal.signal(signal.SIGTERM, _interrupt)
        if not os.environ.get(reaper.MARK):
            reaper.watch()
        try:
            return super().invoke(context)
        except JobError as error:
            console.print(f"[red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
            context.exit(2)
        except (StageError, ServerError, ServiceError, FileNotFoundError, TransientError) as error:
            console.print(f"[red]error:[/] {_plain(error)}", highlight=False, soft_wrap=True)
            context.exit(1)
        except KeyboardInterrupt:
            console.print("\ninterrupted; the same command carries on from the finished stages", highlight=False)
            # Threads of libraries may still run: leave at once, the watcher ends what is left.
            os._exit(130)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _plain(error: Exception) -> str:
    return str(error).replace("[", r"\[")


@click.group(
    cls=_Group,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="bluewhale")
def main() -> None:
    """Applied reinforcement learning: from logged decisions to a policy that serves live traffic.

    \b
    A whole job:      bluewhale run manifests/examples/cartpole.yaml
    Stage by stage:   bluewhale log JOB, then timeline, features, normalize, understand, train, evaluate, export
    In service:       bluewhale serve JOB, and beside it simulate JOB and rollout JOB
    """


def _job_command(name: str, example: str = "") -> Callable[[Callable[..., Any]], click.Command]:
    """A command on a job file, with the options that all of them share."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        def call(job_file: Path, runs: Path, **options: Any) -> Any:
            job = load_job(job_file)
            return function(Run(job, runs / job.metadata.name), **options)

        call.__doc__ = f"{function.__doc__}\n\n    \b\n    Example:\n      {example or f'bluewhale {name} job.yaml'}\n"
        decorated: Any = click.option(
            "--runs", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True,
            help="Directory of all runs; this job's is below it.",
        )(call)  # fmt: skip
        decorated = click.argument("job_file", metavar="JOB", type=click.Path(path_type=Path))(decorated)
        for option in reversed(getattr(function, "__click_params__", [])):
            decorated.__click_params__.insert(0, option)
        return main.command(name)(decorated)

    return wrap


_as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")


_warm_start = click.option(
    "--warm-start", metavar="POLICY", default="",
    help="Begin with the weights of this policy bundle, as runs/yesterday/training/policy.",
)  # fmt: skip


@_job_command("run", "bluewhale run manifests/examples/cartpole.yaml")
@_as_json
@_warm_start
def run(run: Run, as_json: bool, warm_start: str) -> None:
    """Run the whole job, or what of it is not finished, and write result.json and report.html."""
    from contracts.stage import alone
    from pipelines.local import kept_policy, run_job

    started = time.time()
    try:
        with alone(run.directory), Display(console) as display:
            reaper.succeed(run.directory)
            code = run_job(run, display, kept_policy(run, warm_start))
    finally:
        if as_json and run.result:
            click.echo(json.dumps(run.result, indent=2))
    if not as_json:
        _summary(run, time.time() - started)
    sys.exit(code)


@_job_command("compile", "bluewhale compile manifests/examples/cartpole.yaml -o pipeline.yaml")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=Path("pipeline.yaml"), show_default=True,
    help="The file to write; its suffix is .yaml or .json.",
)  # fmt: skip
def compile_(run: Run, output: Path) -> None:
    """Write the job's KFP pipeline for a cluster as IR YAML, its parameters filled in from the job.

    Upload it in the UI of Kubeflow Pipelines, or apply the job itself and let the operator run it.
    """
    from pipelines.cluster import compile_pipeline

    if output.suffix not in (".yaml", ".yml", ".json"):
        raise click.BadParameter(f"{output}: KFP wants the suffix .yaml or .json", param_hint="--output")
    compile_pipeline(run.job, output)
    click.echo(output)


@_job_command("log")
def log(run: Run) -> None:
    """Make the decision log: play the simulation's environment with its behaviour policy."""
    from simulation.log import write_log

    if not run.job.spec.simulation:
        raise JobError("spec.simulation: missing; only a simulation can make a log")
    with _shown(run, "log"):
        write_log(run.job.spec, run.path("log"))


@_job_command("timeline")
def timeline(run: Run) -> None:
    """Order the log's decisions and find what followed each: transitions, and quarantine for rows unfit for use."""
    from components.timeline.build import build_timeline

    with _shown(run, "timeline"):
        build_timeline(run.job.spec, run.decision_log, run.job.spec.data.outcomes, run.path("timeline"))


@_job_command("features")
def features(run: Run) -> None:
    """Join each decision's state features point in time from Feast, and fill the online store."""
    from components.features.point_in_time import join_features

    with _shown(run, "features"):
        join_features(run.job.spec, run.path("timeline"), run.path("features"))


@_job_command("normalize", "bluewhale normalize job.yaml\n      bluewhale normalize job.yaml --explain cart_position")
@click.option("--explain", "feature", metavar="FEATURE", help="Tell why a feature has its type; identify nothing.")
@_as_json
def normalize(run: Run, feature: str | None, as_json: bool) -> None:
    """Identify each feature and write the normalization spec."""
    if feature:
        from components.normalization.explain import explain

        found = explain(run.path("features"), run.path("normalization"), feature)
        click.echo(json.dumps(found, indent=2)) if as_json else _explained(found)
        return
    from components.normalization.identify import identify_features

    with _shown(run, "normalization"):
        identify_features(run.job.spec, run.path("features"), run.path("normalization"))


def _explained(found: dict[str, Any]) -> None:
    """A feature's type and evidence, and its values before and after as columns of blocks."""
    out = Console()
    if "dropped" in found:
        out.print(f"{found['name']} is dropped: {found['dropped']}", highlight=False)
        return
    out.print(f"[bold]{found['name']}[/] is {found['type']}: {found['how']}", highlight=False)
    evidence = "  ".join(f"{name} {value:.6g}" for name, value in found["evidence"].items())
    out.print(f"[dim]{evidence}[/]", highlight=False)
    for when in ("before", "after"):
        drawn = found[when]
        most = max(drawn["counts"]) or 1
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * int(count) // int(most))] for count in drawn["counts"])
        ends = [f"{end:.4g}" for end in drawn.get("edges") or drawn["values"]]
        if "values" in drawn:
            ends.append("other")
        out.print(f"{when:>7} {ends[0]:>10} [cyan]│{bars}│[/] {ends[-1]}", highlight=False)


@_job_command("understand")
def understand(run: Run) -> None:
    """Ask of the data whether it is that of a Markov decision process at all."""
    from components.understanding.understand import understand as examine

    with _shown(run, "understanding"):
        examine(run.job.spec, run.path("features"), run.path("normalization"), run.path("understanding"))


@_job_command("train")
@_warm_start
def train(run: Run, warm_start: str) -> None:
    """Train the job's algorithm with TorchX on as many workers as it says, after its sweep, if it has one."""
    if run.job.spec.sweep:
        from components.sweep.sweep import sweep_and_train as launch
    else:
        from components.training.launch import train as launch

    from pipelines.local import kept_policy

    with _shown(run, "training"):
        begin = kept_policy(run, warm_start)
        launch(run.job.spec, run.path("features"), run.path("normalization"), run.path("training"), begin)


@_job_command("evaluate")
def evaluate(run: Run) -> None:
    """Estimate from the held-out log what each epoch's policy would have earned, and judge the last by the gate."""
    from components.evaluation.evaluate import evaluate as estimate

    with _shown(run, "evaluation"):
        estimate(run.job.spec, run.path("features"), run.path("training"), run.path("evaluation"))


@_job_command("export")
def export(run: Run) -> None:
    """Export the policy to ONNX, check it against torch, and lay out a Triton model repository."""
    from components.export.policy import export_policy

    with _shown(run, "export"):
        export_policy(run.job.spec, run.path("features"), run.path("training"), run.path("export"))


@_job_command("serve")
def serve(run: Run) -> None:
    """Serve the exported policy with Triton and Prometheus, until interrupted.

    With a simulation, the behaviour policy is the stable one and keeps all traffic until `bluewhale rollout` moves it.
    Without one there is nothing to compare with, and the exported policy itself answers.
    """
    from contracts.stage import alone
    from pipelines.local import export_stable
    from serving.service import serve as start

    read_record(run.path("export"))
    exported = run.path("export") / "model_repository"
    if run.job.spec.action_space != "discrete":
        raise StageError(
            f"serve: canary and decision log are for named actions, these are {run.job.spec.action_space}; "
            f"start Triton itself on {exported}"
        )
    stable, candidate = (export_stable(run), exported) if run.job.spec.simulation else (exported, None)
    salt = f"{run.job.metadata.name}-{run.job.spec.seed}"
    with (
        alone(run.path("serving")),
        start(run.path("serving"), stable, candidate, run.job.spec.deploy.canary, salt) as endpoints,
    ):
        for name, value in vars(endpoints).items():
            click.echo(f"{name:>14}  {value}")
        console.print("serving; Ctrl-C ends it", highlight=False)
        signal.pause()


@_job_command("simulate", "bluewhale simulate job.yaml --episodes 200")
@click.option("--episodes", type=click.IntRange(min=1), help="Stop after as many; without it, until interrupted.")
@click.option("--clients", type=click.IntRange(min=1), default=4, show_default=True, help="Episodes played at once.")
def simulate(run: Run, episodes: int | None, clients: int) -> None:
    """Play live traffic: episodes of the environment whose every action is asked of the running service."""
    from serving.client import ServiceError
    from serving.service import read_endpoints
    from simulation.traffic import Traffic

    endpoints = read_endpoints(run.path("serving"))
    traffic = Traffic(endpoints.grpc, run.job.spec.seed, clients, episodes)
    try:
        with traffic:
            traffic.wait()
    finally:
        click.echo(json.dumps(traffic.counts))
    if traffic.last_error:
        raise ServiceError(traffic.last_error)


@main.command(
    "reproduce",
    epilog="\b\nExample:\n  bluewhale reproduce > results.md\n  bluewhale reproduce --study offline --only mixed",
)
@click.option(
    "--study",
    "names",
    multiple=True,
    help="offline, online, gridworld, pendulum, slates or bandits; may be given again.",
)
@click.option("--only", multiple=True, help="Only this column or row of the tables; may be given again.")
@click.option("--seeds", type=click.IntRange(min=2), default=10, show_default=True, help="Seeds of each cell.")
@_as_json
def reproduce(names: tuple[str, ...], only: tuple[str, ...], seeds: int, as_json: bool) -> None:
    """Train every algorithm where the truth is known, over many seeds, and print what it earns, as Markdown."""
    from simulation import studies

    if unknown := [name for name in names if name not in studies.STUDIES]:
        raise click.BadParameter(f"{unknown[0]}: there are {', '.join(studies.STUDIES)}", param_hint="--study")
    chosen = names or tuple(studies.STUDIES)
    known = [name for study in chosen for name in (*studies.STUDIES[study].columns, *studies.STUDIES[study].rows)]
    if unknown := [name for name in only if name not in known]:
        raise click.BadParameter(f"{unknown[0]}: there are {', '.join(dict.fromkeys(known))}", param_hint="--only")
    found = {}
    for name in chosen:
        with Display(console) as display:
            display.start(name)
            progress.listener = functools.partial(display.progress, name)
            results = studies.reproduce(name, list(only), range(seeds))
        found[name] = [vars(result) for result in results]
        if not as_json:  # each as it is ready: they take hours
            study = studies.STUDIES[name]
            table = studies.table(results, study.decimals)
            click.echo(f"{study.title}: mean over {seeds} seeds [95 %].\n\n{table}\n")
    if as_json:
        click.echo(json.dumps(found, indent=2))


def _setting(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, the value as YAML has it."""
    import yaml

    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text}: write NAME=VALUE, such as learningRate=0.001")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.BadParameter(f"{text}: {' '.join(str(error).split())}") from None
    return found


@main.command(
    "gym",
    epilog="\b\nExample:\n  bluewhale gym CartPole-v1\n  bluewhale gym Pendulum-v1 --algorithm sac --seed 3 --json\n"
    "  bluewhale gym Acrobot-v1 --algorithm qrDqn --set quantiles=21 --output policies/acrobot",
)
@click.argument("environment")
@click.option(
    "--algorithm",
    type=click.Choice(["dqn", "c51", "qrDqn", "ddpg", "td3", "sac"]),
    help="As in a job's algorithm.  [default: dqn, or sac where actions are numbers]",
)
@click.option(
    "--set", "given", multiple=True, callback=_setting, metavar="NAME=VALUE", help="A field of the algorithm."
)
@click.option(
    "--decisions", type=click.IntRange(min=1), help="To play and learn from; known environments have their own."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same policy."
)
@click.option("--output", type=click.Path(path_type=Path), help="New directory for the policy bundle.")
@_as_json
def gym(
    environment: str,
    algorithm: str | None,
    given: dict[str, Any],
    decisions: int | None,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Learn online: play a Gymnasium ENVIRONMENT, learn from a replay buffer, and try the policy on fresh episodes."""
    from simulation import online

    if output and output.exists():
        raise click.BadParameter(f"{output} is there already", param_hint="--output")
    settings, made = online.settings_for(environment, algorithm, given, decisions)
    with Display(console) as display:
        display.start("gym", f"{made.name} in {environment}")
        show = functools.partial(display.progress, "gym")
        learned = online.learn_online(environment, made, settings, seed, show)
    result = online.result(environment, learned, seed)
    if output:
        online.save(learned, output, result)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    low, high = result["interval"]
    text = f"{made.name} in {environment}: mean return {result['mean_return']:.1f} [{low:.1f}, {high:.1f}]"
    click.echo(f"{text} over {result['episodes']} fresh episodes, after {result['decisions']:,} decisions")


@_job_command("rollout")
def rollout(run: Run) -> None:
    """Move the running service's traffic to the exported policy in steps, each on evidence, or roll it back."""
    from serving.rollout import roll_out
    from serving.service import read_endpoints

    endpoints = read_endpoints(run.path("serving"))
    with Display(console) as display:
        display.start("rollout")
        outcome = roll_out(
            run.job.spec.deploy.canary,
            Path(endpoints.state_file),
            Path(endpoints.decision_log),
            endpoints.prometheus,
            run.job.spec.reward.metric_weights,
            progress=lambda share, text: display.progress("rollout", share, 1.0, text),
        )
    click.echo(json.dumps(outcome, indent=2))
    sys.exit(0 if outcome["verdict"] == "promoted" else 4)


@contextlib.contextmanager
def _shown(run: Run, stage: str) -> Iterator[None]:
    """Show a stage's progress while it works, and its record when it is done."""
    with Display(console) as display:
        display.start(stage)
        progress.listener = lambda done, total, text: display.progress(stage, done, total, text)
        yield
    click.echo(json.dumps(read_record(run.path(stage)), indent=2))


def _figure(value: float) -> str:
    """A tenth for large numbers, three digits for small ones."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _summary(run: Run, seconds: float) -> None:
    result = run.result
    colour = "green" if result["verdict"] in ("promoted", "exported") else "red"
    verdict = f"[bold {colour}]{result['verdict'].replace('_', ' ')}[/]"
    table = Table(title=f"{result['job']}: {verdict} in {seconds:.0f} s", title_justify="left", show_header=False)
    counts = result["timeline"]
    table.add_row("log", f"{counts['rows_in']:,} decisions, {counts['rows_quarantined']:,} quarantined")
    gate = run.job.spec.evaluation.gate
    estimate = result["evaluation"][gate.estimator].get(gate.metric)
    if estimate:
        relative = ""
        if estimate["relative"] is not None:
            relative = f", {estimate['relative']:.2f} x the logged policy"
        value, low, high = (_figure(estimate[name]) for name in ("value", "low", "high"))
        interval = f"{value} [{low}, {high}]{relative}"
        table.add_row("estimate", f"{gate.metric} {interval}")
    table.add_row("gate", f"{result['gate']['verdict']}: {result['gate']['reason']}")
    if truth := result["evaluation"].get("truth"):
        policy, behaviour = truth["policy"], truth["behaviour"]
        table.add_row(
            "true return",
            f"{policy['value']:.1f} ± {policy['standard_error']:.1f} over {policy['episodes']} episodes; "
            f"behaviour policy {behaviour['value']:.1f} ± {behaviour['standard_error']:.1f}",
        )
    if outcome := result.get("rollout"):
        table.add_row("rollout", f"{outcome['verdict'].replace('_', ' ')}: {outcome['reason']}")
        table.add_row(
            "requests",
            f"{outcome['requests']:,}, {outcome['failed_requests']} failed, {outcome['fallbacks']} fallbacks",
        )
    table.add_row("report", str(run.directory / "report.html"))
    console.print(table, highlight=False)


if __name__ == "__main__":
    main()
