"""The evaluation on one self-contained page, for the pipeline's UI; and in figures, for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from components.page import svg, template
from contracts.job import ESTIMATORS, Gate, JobSpec

_TEMPLATE = template("""\
{{ verdict(report.gate.verdict, report.gate.reason) }}
<h2>What the policy would have earned</h2>
<p>Estimates of the last epoch's policy on {{ "{:,}".format(report.diagnostics.held_out_mdps) }} held-out MDPs, with
{{ "%g" % (100 * confidence) }} % intervals; below, times the logged policy. The gate judges the marked one.</p>
<div class="scroll"><table><tr><th>Estimator</th>{% for m in metrics %}<th>{{ m }}</th>{% endfor %}</tr>
{% for estimator in estimators %}
<tr><td>{{ estimator | replace("_", " ") | capitalize }}</td>
{% for m in metrics %}
{% set e = report.final[estimator].get(m) %}
<td{% if estimator == gate.estimator and m == gate.metric %} class="judged"{% endif %}>
{% if e %}
{{ e.value | number }} [{{ e.low | number }}, {{ e.high | number }}]
{% if e.relative is not none %}
<small>× {{ "%.3g" % e.relative }} [{{ "%.3g" % e.relative_low }}, {{ "%.3g" % e.relative_high }}]</small>
{% endif %}
{% else %}
refused
{% endif %}
</td>
{% endfor %}</tr>
{% endfor %}
{% for label, values in [("per step", report.logged.per_step), ("per MDP", report.logged.per_mdp)] %}
<tr><td>Logged policy, {{ label }}</td>{% for m in metrics %}<td>{{ values[m] | number }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<h2>{{ gate.metric }} over epochs</h2>
{{ figure | safe }}
<h2>How much data speaks</h2>
<table>{% for name, value in report.diagnostics.items() %}
<tr><td>{{ name | replace("_", " ") | capitalize }}</td><td>{{ "{:,}".format(value) }}</td></tr>
{% endfor %}</table>
""")


def write_page(spec: JobSpec, report: dict[str, Any], path: str | Path) -> None:
    """Write the page of an evaluation report to `path`."""
    gate = spec.evaluation.gate
    html = _TEMPLATE.render(
        title="Counterfactual policy evaluation",
        report=report,
        gate=gate,
        confidence=spec.evaluation.confidence,
        estimators=ESTIMATORS,
        metrics=sorted(report["logged"]["per_step"]),
        figure=_over_epochs(report, gate.metric),
    )
    Path(path).write_text(html)


def read_report(evaluation: str | Path) -> dict[str, Any]:
    """The evaluation stage's report."""
    report: dict[str, Any] = json.loads((Path(evaluation) / "report.json").read_text())
    return report


def judged(gate: Gate, report: dict[str, Any]) -> dict[str, Any]:
    """The estimate that the gate reads, relative to the logged policy, and the verdict; None for what is not known."""
    estimate = report["final"][gate.estimator].get(gate.metric) or {}
    figures = {"value": "relative", "lower": "relative_low", "upper": "relative_high"}
    return {
        "estimator": gate.estimator,
        "metric": gate.metric,
        **{name: estimate.get(key) for name, key in figures.items()},
        "verdict": report["gate"]["verdict"],
    }


def scalars(report: dict[str, Any]) -> dict[str, float]:
    """Every estimate by `estimator/metric`, and `.../relative` where there is a logged value to set it against."""
    found = {}
    for estimator in ESTIMATORS:
        for metric, estimate in report["final"][estimator].items():
            if isinstance(estimate, dict):
                found[f"{estimator}/{metric}"] = estimate["value"]
                if estimate["relative"] is not None:
                    found[f"{estimator}/{metric}/relative"] = estimate["relative"]
    return found


def _over_epochs(report: dict[str, Any], metric: str) -> str:
    """One panel per estimator as inline SVG, relative to the logged policy where that is defined."""
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axis, estimator in zip(figure.subplots(1, len(ESTIMATORS), sharex=True), ESTIMATORS, strict=True):
        points = [(e["epoch"], e["estimates"][estimator].get(metric)) for e in report["epochs"]]
        known = [(epoch, point) for epoch, point in points if point]
        axis.set_title(estimator.replace("_", " ").capitalize(), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not known:
            axis.text(0.5, 0.5, "refused", ha="center", transform=axis.transAxes, fontsize=9)
            continue
        relative = known[0][1]["relative"] is not None
        value, low, high = ("relative", "relative_low", "relative_high") if relative else ("value", "low", "high")
        epochs = [epoch for epoch, _ in known]
        axis.fill_between(epochs, [p[low] for _, p in known], [p[high] for _, p in known], alpha=0.2, linewidth=0)
        axis.plot(epochs, [p[value] for _, p in known], marker="o", markersize=3)
        if relative:
            axis.axhline(1.0, color="#888", linewidth=0.8, linestyle="--")
    figure.supxlabel("epoch; the dashed line is the logged policy", fontsize=8)
    return svg(figure)
