"""What the data was understood to be, on one self-contained page; and the figure of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from components.page import svg, template
from contracts.job import UNDERSTANDING_CHECKS

MOST_BARS = 20
LABELS = {"state_effect": "the state", "action_effect": "and the action", "markov": "and the step before"}
SHADES = {"state_effect": "#0b6e99", "action_effect": "#d9730d", "markov": "#b3261e"}

_TEMPLATE = template("""\
{% for name, check in document.checks.items() %}
{{ verdict(check.verdict, check.reason, name.replace("_", " ")) }}
{% endfor %}
<p>A model of the dynamics, fitted to half of {{ "{:,}".format(document.mdps) }} MDPs
({{ "{:,}".format(document.transitions) }} transitions) and tried on the other half. An outcome that no bar explains is
noise to whatever is logged.{% if document.steady %} Never varying, and so left out: {{ document.steady | join(", ") }}.
{% endif %}</p>
{% if figure %}
<h2>What explains what follows a decision, and what of it matters</h2>
{{ figure | safe }}
{% endif %}
""")


def write_page(document: dict[str, Any], path: str | Path) -> None:
    """Write the page of what the understanding stage found to `path`."""
    html = _TEMPLATE.render(title="Data understanding", document=document, figure=figure(document))
    Path(path).write_text(html)


def read_understanding(understanding: str | Path) -> dict[str, Any]:
    """What the understanding stage found."""
    document: dict[str, Any] = json.loads((Path(understanding) / "understanding.json").read_text())
    return document


def figure(document: dict[str, Any]) -> str:
    """Explained shares by outcome, and importance by feature, as inline SVG; empty where nothing could be fitted."""
    if not document["outcomes"]:
        return ""
    outcomes = sorted(document["outcomes"], key=lambda o: -sum(o[check]["share"] for check in UNDERSTANDING_CHECKS))
    importance = list(document["importance"].items())[:MOST_BARS]
    shown = outcomes[:MOST_BARS]
    drawn = Figure(figsize=(11, 1.2 + 0.28 * max(len(shown), len(importance))), layout="constrained")
    left, right = drawn.subplots(1, 2)
    start = [0.0] * len(shown)
    names = [o["name"] for o in shown]
    for check in UNDERSTANDING_CHECKS:
        widths = [max(o[check]["share"], 0.0) for o in shown]
        left.barh(names, widths, left=start, color=SHADES[check], label=LABELS[check], height=0.65)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    left.set_xlim(0, 1)
    left.set_xlabel("share of the outcome's variance explained by", fontsize=8)
    drawn.legend(fontsize=8, ncols=3, loc="outside upper left", frameon=False)
    right.barh([name for name, _ in importance], [max(v, 0.0) for _, v in importance], color="#4f9768", height=0.65)
    right.set_xlabel("importance: error added when its values are shuffled", fontsize=8)
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    for axis in (left, right):
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    if len(outcomes) > MOST_BARS or len(document["importance"]) > MOST_BARS:
        left.set_title(f"the {MOST_BARS} most of each", fontsize=8)
    return svg(drawn)
