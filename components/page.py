"""What a stage's self-contained page for the pipeline's UI is made from: one frame, and figures as inline SVG."""

from __future__ import annotations

import io

import jinja2
from matplotlib.figure import Figure

COLOURS = {"pass": "#2e7d4f", "disabled": "#666", "fail": "#b3261e", "inconclusive": "#a86400"}

_FRAME = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
.verdict { border-left: 5px solid; background: #f6f6f4; padding: .7rem 1rem }
.verdict b { text-transform: capitalize }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td small { color: #666; display: block }
.judged { background: #eef4fb } svg { max-width: 100%; height: auto } .scroll { overflow-x: auto }
</style></head><body>
<h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""
_MACROS = """\
{% macro verdict(kind, reason, name="") %}
<p class="verdict" style="border-color: {{ colours[kind] }}">{% if name %}<b>{{ name }}</b>: {% endif %}
<b style="color: {{ colours[kind] }}">{{ kind }}</b>: {{ reason }}</p>
{% endmacro %}
"""
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.DictLoader({"frame": _FRAME, "macros": _MACROS}),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["colours"] = COLOURS


def number(value: float) -> str:
    """To four digits, and without an exponent where it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


_ENVIRONMENT.filters["number"] = number


def template(body: str) -> jinja2.Template:
    """A page with this body; it is rendered with a `title`, and has a macro `verdict(kind, reason, name)`."""
    start = '{% extends "frame" %}{% from "macros" import verdict %}{% block body %}'
    return _ENVIRONMENT.from_string(f"{start}{body}{{% endblock %}}")


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
