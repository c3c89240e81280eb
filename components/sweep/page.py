"""The page of a sweep: what was tried, how it was judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from components.page import svg, template
from contracts.job import JobSpec

_TEMPLATE = template("""
<p>{{ judged | length }} of {{ tried | length }} trials could be judged, by the {{ estimator }} estimate of
{{ gate.metric }} on training MDPs that the trial had not seen; best is the highest lower bound.</p>
{{ figure | safe }}
<div class="scroll"><table><tr><th>Trial</th>{% for p in parameters %}<th>{{ p }}</th>{% endfor %}
<th>{{ gate.metric }}</th><th>Seconds</th></tr>
{% for t in order %}
<tr><td>{{ t.number + 1 }}{% if t.number == 0 %} <small>the job's own</small>{% endif %}</td>
{% for p in parameters %}
<td>{{ "%.4g" % t.settings[p] if t.settings[p] is float else t.settings.get(p, "") }}</td>
{% endfor %}
<td{% if loop.first and not t.failed %} class="judged"{% endif %}>{% if t.failed %}failed: {{ t.failed }}{% else %}
{{ "%.4g" % t.value }} [{{ "%.4g" % t.low }}, {{ "%.4g" % t.high }}]
{% if t.relative is not none %}<small>× {{ "%.3g" % t.relative }}</small>{% endif %}{% endif %}</td>
<td>{{ "%.0f" % t.seconds }}</td></tr>
{% endfor %}
</table></div>
""")


def best_of(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """The trial whose estimate has the highest lower bound."""
    return max(judged, key=lambda each: each["low"])


def write_page(spec: JobSpec, tried: list[dict[str, Any]], path: Path) -> None:
    """Write the page of a finished sweep."""
    assert spec.sweep
    judged = [each for each in tried if not each["failed"]]
    failed = [each for each in tried if each["failed"]]
    html = _TEMPLATE.render(
        title="Sweep",
        tried=tried,
        judged=judged,
        order=sorted(judged, key=lambda each: -each["low"]) + failed,
        parameters=list(spec.sweep.parameters),
        gate=spec.evaluation.gate,
        estimator=spec.evaluation.gate.estimator.replace("_", " "),
        figure=_figure(spec, judged),
    )
    path.write_text(html)


def _figure(spec: JobSpec, judged: list[dict[str, Any]]) -> str:
    """A panel for each parameter: the estimates, with their intervals, by its value; the best is coloured."""
    assert spec.sweep
    parameters = spec.sweep.parameters
    best = best_of(judged)
    figure = Figure(figsize=(min(3.4 * len(parameters), 14), 2.9), layout="constrained")
    panels = figure.subplots(1, len(parameters), sharey=True, squeeze=False)[0]
    for axis, (name, parameter) in zip(panels, parameters.items(), strict=True):
        values = parameter.values()
        for each in judged:
            setting = each["settings"].get(name)
            if setting is None or (parameter.choices and setting not in values):
                continue  # the job's own, which is no choice
            x = values.index(setting) if parameter.choices else setting
            colour = "#d9730d" if each is best else "#0b6e99"
            axis.plot([x, x], [each["low"], each["high"]], color=colour, linewidth=1, alpha=0.6)
            axis.plot(x, each["value"], "o", color=colour, markersize=4)
        if parameter.choices:
            axis.set_xticks(range(len(values)), parameter.choices)
            axis.set_xlim(-0.5, len(values) - 0.5)
        elif parameter.log:
            axis.set_xscale("log")
            # All that was searched, so that some power of ten is among it; what lies between has no room for its name.
            axis.plot([parameter.low, parameter.high], [judged[0]["value"]] * 2, alpha=0)
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(spec.evaluation.gate.metric, fontsize=8)
    return svg(figure)
