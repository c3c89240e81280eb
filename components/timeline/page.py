"""The data report on one self-contained page."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from components.page import svg, template

MOST_BARS = 12
COLUMNS = 3
COVERAGE = "rows that have the feature"

_TEMPLATE = template("""\
<table>
{% for name, value in counts.items() %}
<tr><td>{{ name }}</td><td>{{ "{:,}".format(value) }}</td></tr>
{% endfor %}
</table>
{% for warning in warnings %}
<p class="verdict" style="border-color: {{ colours.inconclusive }}">{{ warning }}</p>
{% endfor %}
{% if reasons %}
<h2>Quarantine by reason</h2>
<table>{% for name, n in reasons.items() %}
<tr><td>{{ name.replace("_", " ") }}</td><td>{{ "{:,}".format(n) }}</td></tr>
{% endfor %}</table>
{% endif %}
<h2>Distributions</h2>
{{ figure | safe }}
""")


def write_page(report: dict[str, Any], path: str | Path) -> None:
    """Write the page of a data report to `path`."""
    counts = {
        "Rows read": report["rows_in"],
        "Transitions": report["rows_out"],
        "Described below": report["described"],
        "Quarantined": report["rows_quarantined"],
        "Left out by the job": report["rows_left_out"],
        "MDPs": report["lengths"]["count"],
        "Ends of MDPs": report["terminal"],
        "Cut off": report["truncated"],
        "Decisions before their time": report["out_of_order"],
        "MDPs over several days": report["mdps_over_days"],
        f"Longest MDP ({report['largest_mdp']['mdp_id']})": report["largest_mdp"]["rows"],
    }
    told = {
        "reports": "Outcomes",
        "unmatched": "of no decision in the log",
        "late": "too late",
        "unparsable": "unreadable",
    }
    counts |= {name: report["outcomes"][key] for key, name in told.items() if "outcomes" in report}
    found = {name: report[name] for name in ("reasons", "warnings")}
    html = _TEMPLATE.render(title="Timeline", counts=counts, figure=_figure(report), **found)
    Path(path).write_text(html)


def _figure(report: dict[str, Any]) -> str:
    panels = [("decisions per MDP", report["lengths"])]
    panels += [(f"{name} per decision", found) for name, found in report["metrics"].items()]
    panels.append(("propensity of the action", report["propensities"]))
    bars = {COVERAGE: report["coverage"]}
    if total := sum(report["actions"].values()):
        bars = {"actions": {name: count / total for name, count in report["actions"].items()}} | bars
    rows = -(-(len(panels) + len(bars)) // COLUMNS)
    figure = Figure(figsize=(11, 2.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis, (title, found) in zip(axes, panels, strict=False):
        _histogram(axis, title, found)
    for axis, (title, shares) in zip(axes[len(panels) :], bars.items(), strict=False):
        _bars(axis, title, shares)
    for axis in axes[len(panels) + len(bars) :]:
        axis.set_axis_off()
    return svg(figure)


def _histogram(axis: Axes, title: str, found: dict[str, Any]) -> None:
    _plain(axis, title)
    if not found["count"]:
        _said(axis, "not logged")
        return
    if found["minimum"] == found["maximum"]:
        _said(axis, f"always {found['mean']:.4g}")
        return
    edges = found["edges"]
    widths = [right - left for left, right in pairwise(edges)]
    axis.bar(edges[:-1], found["counts"], widths, align="edge", color="#0b6e99")
    axis.axvline(found["mean"], color="#d9730d", linewidth=1)
    axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))


def _said(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", transform=axis.transAxes, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])


def _bars(axis: Axes, title: str, shares: dict[str, float]) -> None:
    # Of features those that are missing most are worth a look.
    least_first = title == COVERAGE
    shown = sorted(shares.items(), key=lambda item: item[1], reverse=not least_first)[:MOST_BARS]
    which = "least" if least_first else "most"
    more = f" ({MOST_BARS} of {len(shares)}, {which} first)" if len(shares) > MOST_BARS else ""
    _plain(axis, title + more)
    axis.barh([name for name, _ in shown], [share for _, share in shown], color="#4f9768", height=0.65)
    axis.set_xlim(0, min(1.0, 1.25 * max((share for _, share in shown), default=1.0)))
    # A bar is no thicker for having few beside it.
    axis.set_ylim(-0.5, max(len(shown), MOST_BARS / 2) - 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.invert_yaxis()


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
