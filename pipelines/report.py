"""report.html: the run on one self-contained page, for people."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from components.normalization.spec import NormalizationSpec
from components.page import number, svg
from components.understanding.page import figure, read_understanding
from contracts.job import (
    ESTIMATORS,
    REWARD,
    Algorithm,
    BehaviourCloning,
    LinearBandit,
    LogisticBandit,
    RLTrainingJob,
)

TITLES = {
    "stepwise_importance_sampling": "Step-wise importance sampling",
    "stepwise_direct_method": "Step-wise direct method",
    "stepwise_doubly_robust": "Step-wise doubly robust",
    "sequential_direct_method": "Sequential direct method",
    "weighted_sequential_doubly_robust": "Weighted sequential doubly robust",
}
COLOURS = ("#0b6e99", "#d9730d", "#4f9768", "#b0525f", "#8a5fb0")


def write_report(job: RLTrainingJob, result: dict[str, Any], directory: Path) -> None:
    """Write `report.html` from the result and what the finished stages left in the run's directory."""
    evaluation = json.loads((directory / "evaluation" / "report.json").read_text())
    losses = [json.loads(line) for line in (directory / "training" / "losses.jsonl").read_text().splitlines()]
    spec = NormalizationSpec.read(directory / "normalization" / "spec.json")
    features = json.loads((directory / "features" / "stage.json").read_text())
    understanding = read_understanding(directory / "understanding")
    gate = job.spec.evaluation.gate
    metrics = [m for m in sorted(evaluation["logged"]["per_step"]) if m != REWARD or m == gate.metric]
    html = _template().render(
        job=job,
        result=result,
        verdict=result["verdict"].replace("_", " "),
        good=result["verdict"] in ("promoted", "exported"),
        stages=result["stages"],
        gate=gate,
        estimate=result["evaluation"][gate.estimator].get(gate.metric),
        truth=result["evaluation"].get("truth"),
        estimators=ESTIMATORS,
        titles=TITLES,
        metrics=metrics,
        final=evaluation["final"],
        logged=evaluation["logged"],
        diagnostics=evaluation["diagnostics"],
        estimates_figure=_estimates(evaluation, gate.metric),
        metrics_figure=_all_metrics(evaluation, metrics),
        understanding=understanding,
        understanding_figure=figure(understanding),
        losses_figure=_losses(losses, job.spec.algorithm),
        features=spec.features,
        dropped=spec.dropped,
        missing=features["missing_fraction"],
        rollout=result.get("rollout"),
        rollout_figure=_rollout(result["rollout"]) if result.get("rollout") else None,
        settings=job.model_dump_json(indent=2, by_alias=True),
    )
    (directory / "report.html").write_text(html)


def _estimates(evaluation: dict[str, Any], metric: str) -> str:
    """The gate's metric over epochs, one panel per estimator, relative to the logged policy where that is defined."""
    figure = Figure(figsize=(14.5, 2.9), layout="constrained")
    axes = figure.subplots(1, len(ESTIMATORS), sharex=True)
    for axis, estimator, colour in zip(axes, ESTIMATORS, COLOURS, strict=True):
        _over_epochs(axis, evaluation, estimator, metric, colour)
        axis.set_title(TITLES[estimator], fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
    axes[0].set_ylabel(f"{metric}, logged policy = 1", fontsize=8)
    return _svg(figure)


def _all_metrics(evaluation: dict[str, Any], metrics: list[str]) -> str:
    """Every metric over epochs by the sequential and by the step-wise doubly robust estimator."""
    figure = Figure(figsize=(3.25 * len(metrics), 5), layout="constrained")
    axes = figure.subplots(2, len(metrics), sharex=True, squeeze=False)
    for row, estimator in enumerate(("stepwise_doubly_robust", "weighted_sequential_doubly_robust")):
        for axis, metric in zip(axes[row], metrics, strict=True):
            _over_epochs(axis, evaluation, estimator, metric, COLOURS[2 + 2 * row])
            axis.set_title(metric if row == 0 else "", fontsize=9)
        axes[row][0].set_ylabel(TITLES[estimator], fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("epoch", fontsize=8)
    return _svg(figure)


def _over_epochs(axis: Axes, evaluation: dict[str, Any], estimator: str, metric: str, colour: str) -> None:
    points = [(e["epoch"], e["estimates"][estimator].get(metric)) for e in evaluation["epochs"]]
    known = [(epoch, p) for epoch, p in points if p]
    if not known:
        axis.text(0.5, 0.5, "refused", ha="center", transform=axis.transAxes, fontsize=9)
        return
    prefix = "relative_" if known[0][1]["relative"] is not None else ""
    value = "relative" if prefix else "value"
    epochs = [epoch for epoch, _ in known]
    axis.fill_between(
        epochs, [p[f"{prefix}low"] for _, p in known], [p[f"{prefix}high"] for _, p in known], color=colour, alpha=0.2,
        linewidth=0,
    )  # fmt: skip
    axis.plot(epochs, [p[value] for _, p in known], color=colour, marker="o", markersize=3)
    if prefix:
        axis.axhline(1.0, color="#888", linewidth=0.8, linestyle="--")
        # A policy that changes nothing should look flat, not like noise magnified.
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.9), max(high, 1.1))
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _losses(losses: list[dict[str, float]], algorithm: Algorithm) -> str:
    figure = Figure(figsize=(13, 2.7), layout="constrained")
    match algorithm.config:
        case BehaviourCloning():
            titles = {"td_loss": "Negative log-likelihood", "q_mean": "Mean score of logged actions"}
        case LinearBandit():
            titles = {"td_loss": "Squared error of the expected reward", "q_mean": "Mean expected reward"}
        case LogisticBandit():
            titles = {"td_loss": "Cross-entropy of the reward", "q_mean": "Mean expected reward"}
        case _:
            titles = {"td_loss": "Temporal-difference loss", "mc_loss": "Monte-Carlo loss", "q_mean": "Mean Q-value"}
            if not any("mc_loss" in p for p in losses):
                del titles["mc_loss"]  # no return is known of what it is held against
    axes = figure.subplots(1, len(titles))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.plot([p["step"] for p in losses], [p.get(name, math.nan) for p in losses], color=COLOURS[0], linewidth=1.2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
    return _svg(figure)


def _rollout(rollout: dict[str, Any]) -> str:
    """The candidate's weight over time, and each check's verdict at every look below it."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    times, weights = [0.0], [0.0]
    looks = []
    for step in rollout["steps"]:
        end = step["started"] + step.get("seconds", 0.0)
        times += [step["started"], end]
        weights += [step["weight"] * 100] * 2
        looks += step["looks"]
    final = 100.0 if rollout["verdict"] == "promoted" else 0.0
    times += [times[-1], times[-1] + 1]
    weights += [final, final]
    top.plot(times, weights, color=COLOURS[0], drawstyle="steps-post")
    top.fill_between(times, weights, step="post", alpha=0.15, color=COLOURS[0], linewidth=0)
    top.set_ylabel("candidate's MDPs, %", fontsize=8)
    top.set_ylim(-4, 108)
    colours = {"pass": "#4f9768", "fail": "#c4341a", "inconclusive": "#c9c9c9", "error": "#d9730d"}
    names = [check["name"] for check in looks[0]["checks"]] if looks else []
    for look in looks:
        for row, check in enumerate(look["checks"]):
            bottom.scatter(look["time"], -row, color=colours[check["verdict"]], marker="s", s=16)
    for name, colour in colours.items():
        bottom.scatter([], [], color=colour, marker="s", s=16, label=name)
    bottom.set_yticks([-i for i in range(len(names))], names, fontsize=8)
    bottom.set_ylim(-len(names) + 0.5, 0.5)
    bottom.set_xlabel("seconds", fontsize=8)
    figure.legend(fontsize=7, ncols=4, loc="outside lower right", frameon=False)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return svg(figure)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.jinja")
