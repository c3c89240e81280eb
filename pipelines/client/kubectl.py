"""`kubectl bluewhale`: jobs in a cluster, for people and scripts."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.live import Live

from contracts.job import JobError
from pipelines.client.cluster import ClusterClient
from pipelines.client.lint import Problem
from pipelines.client.lint import lint as lint_file
from pipelines.client.protocol import ENDS, Asked, ClientError, Job
from pipelines.client.screen import Lines, table, tree

EXIT_CODES = """\b
Exit codes:
  0    done; for get NAME -w: the job succeeded
  1    not done: refused, or not possible as the job stands; for get NAME -w: the job failed
  2    the command line or a job file is wrong
  3    get NAME -w: the evaluation's gate stopped the policy
  4    get NAME -w: the canary rolled the policy back
  5    there is no such job, stage or log
  6    the cluster cannot be reached, does not know BlueWhale, or does not allow it
  130  interrupted
"""
PIPED_WIDTH = 160
LIST_SECONDS = 2.0


class _Group(click.Group):
    """Runs a subcommand with clear errors and stable exit codes."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (ClientError, JobError) as error:
            click.echo(f"{click.style('error:', fg='red')} {error}", err=True)
            context.exit(error.exit_code if isinstance(error, ClientError) else 2)
        except KeyboardInterrupt:
            context.exit(130)


@click.group(
    cls=_Group,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="bluewhale")
def bluewhale() -> None:
    """See and steer BlueWhale's jobs in a cluster.

    \b
    Start one:   kubectl apply -f job.yaml
    Look at it:  kubectl bluewhale get shop -w
    Read a log:  kubectl bluewhale logs shop --stage training -f
    Steer it:    kubectl bluewhale pause shop, then resume, promote, abort, retry
    """


def main() -> None:
    """The entry point, under the name that kubectl gives it."""
    bluewhale(prog_name="kubectl bluewhale")


_output = click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Print for programs.")


def _command(name: str, *examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command on a cluster, with the options that all of them share."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        def call(namespace: str | None, context: str | None, kubeconfig: str | None, **options: Any) -> Any:
            return function(ClusterClient(namespace, context, kubeconfig), **options)

        lines = "\n      ".join(examples)
        call.__doc__ = f"{function.__doc__}\n\n    \b\n    Examples:\n      {lines}\n"
        decorated: Any = call
        for flags, text in (
            (("--kubeconfig",), "File that describes the cluster; $KUBECONFIG or ~/.kube/config if left out."),
            (("--context",), "Which of its contexts to use."),
            (("-n", "--namespace"), "The job's namespace; the context's if left out."),
        ):
            decorated = click.option(*flags, help=text)(decorated)
        decorated.__click_params__[:0] = getattr(function, "__click_params__", [])
        return bluewhale.command(name)(decorated)

    return wrap


@_command(
    "get",
    "kubectl bluewhale get",
    "kubectl bluewhale get shop -w",
    "kubectl bluewhale get shop -o json | jq .status.rollout.weight",
)
@click.argument("name", required=False)
@click.option("-w", "--watch", is_flag=True, help="Stay until the job has ended, and say by the exit code how.")
@_output
def get(client: ClusterClient, name: str | None, watch: bool, output: str | None) -> None:
    """Show a job's stages and its canary, or all jobs of a namespace."""
    if name and watch:
        sys.exit(ENDS[_watch(client, name, output).status.phase])
    if name:
        job = client.get(name)
        _print(job, output) if output else _console().print(tree(job))
    elif watch:
        _watch_all(client, output)
    elif output:
        _print(_Items(items=client.jobs()), output)
    elif jobs := client.jobs():
        _console().print(table(jobs))
    else:
        click.echo(f"no jobs in namespace {client.namespace}", err=True)


@_command(
    "logs",
    "kubectl bluewhale logs shop --stage timeline",
    "kubectl bluewhale logs shop --stage training -f",
    "kubectl bluewhale logs shop --stage training --worker 1",
)
@click.argument("name")
@click.option(
    "--stage", required=True, help="timeline, features, normalization, understanding, training, evaluation, export, ..."
)
@click.option("-f", "--follow", is_flag=True, help="Wait for more, until the stage ends.")
@click.option("--worker", type=click.IntRange(min=0), help="Of training's workers, this one.")
def logs(client: ClusterClient, name: str, stage: str, follow: bool, worker: int | None) -> None:
    """Print what a stage's newest attempt has logged."""
    if worker is not None and stage != "training":
        raise click.BadParameter(f"stage {stage} has no workers; only training has", param_hint="--worker")
    for line in client.logs(name, stage, follow, worker):
        click.echo(line)


@_command("promote", "kubectl bluewhale promote shop")
@click.argument("name")
@_output
def promote(client: ClusterClient, name: str, output: str | None) -> None:
    """Promote the candidate now.

    Without waiting for the canary's evidence, all traffic goes to it.
    """
    _tell(client.promote(name), output)


@_command("abort", "kubectl bluewhale abort shop")
@click.argument("name")
@_output
def abort(client: ClusterClient, name: str, output: str | None) -> None:
    """End the canary.

    All traffic goes back to the stable policy, and the job fails; retry begins the canary anew.
    """
    _tell(client.abort(name), output)


@_command("pause", "kubectl bluewhale pause shop")
@click.argument("name")
@_output
def pause(client: ClusterClient, name: str, output: str | None) -> None:
    """Hold a job where it is.

    While a canary is under way, its weight stays as it is (`paused` of the PolicyService). Before that, the job is
    suspended (`suspend` of the RLTrainingJob): its run is ended, and what is finished is kept. A job with a schedule
    starts no more runs.
    """
    _tell(client.pause(name), output)


@_command("resume", "kubectl bluewhale resume shop")
@click.argument("name")
@_output
def resume(client: ClusterClient, name: str, output: str | None) -> None:
    """Let a paused job go on.

    Its canary goes on where it is held; a suspended job, from the stages that are finished.
    """
    _tell(client.resume(name), output)


@_command("retry", "kubectl bluewhale retry shop")
@click.argument("name")
@_output
def retry(client: ClusterClient, name: str, output: str | None) -> None:
    """Start a failed job again.

    It goes on from its failed stage; a policy that was rolled back or aborted begins its canary anew.
    """
    _tell(client.retry(name), output)


@bluewhale.command("lint")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@_output
def lint(files: tuple[str, ...], output: str | None) -> None:
    """Check job files as the API would, without a cluster.

    \b
    Examples:
      kubectl bluewhale lint job.yaml
      kubectl bluewhale lint jobs/*.yaml -o json
    """
    problems = [problem for file in files for problem in lint_file(file)]
    if output:
        _print(_Problems(problems=problems), output)
    else:
        for problem in problems:
            click.echo(problem, err=True)
        if not problems:
            click.echo(f"{len(files)} {'file' if len(files) == 1 else 'files'}: nothing wrong")
    sys.exit(2 if problems else 0)


class _Items(BaseModel):
    items: list[Job]


class _Problems(BaseModel):
    problems: list[Problem]


def _watch(client: ClusterClient, name: str, output: str | None) -> Job:
    """Show every change until the job has ended."""
    jobs = client.watch(name)
    job = next(jobs)
    console = _console()
    if not output and console.is_terminal:
        # The tree is drawn anew every half second: times pass while nothing else does.
        with Live(get_renderable=lambda: tree(job), console=console, refresh_per_second=2) as live:
            while following := next(jobs, None):
                job = following
                live.refresh()
        return job
    lines = Lines(console)
    for changed in itertools.chain([job], jobs):
        job = changed
        _print(job, output, indent=None) if output else lines.show(job)
    return job


def _watch_all(client: ClusterClient, output: str | None) -> None:
    """Show all jobs until interrupted."""
    jobs = client.jobs()
    if not output and (console := _console()).is_terminal:
        with Live(get_renderable=lambda: table(jobs), console=console, refresh_per_second=2):
            while True:
                time.sleep(LIST_SECONDS)
                jobs = client.jobs()
    last: dict[str, Job] = {}
    while True:
        for job in jobs:
            if last.get(job.name) != job:
                _print(job, output, indent=None) if output else click.echo(f"{job.name}: {job.status.phase}")
        last = {job.name: job for job in jobs}
        time.sleep(LIST_SECONDS)
        jobs = client.jobs()


def _console() -> Console:
    """A pipe has no width: it gets one at which little is cut."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def _tell(asked: Asked, output: str | None) -> None:
    if output:
        _print(asked, output)
    else:
        click.echo(f"{asked.kind} {asked.name}: {asked.message}")


def _print(model: BaseModel, output: str | None, indent: int | None = 2) -> None:
    """For programs; without an indent, one JSON object a line or one YAML document after another."""
    document = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    if output == "yaml":
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        click.echo(text if indent else f"---\n{text}", nl=False)
    else:
        click.echo(json.dumps(document, indent=indent, ensure_ascii=False))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
