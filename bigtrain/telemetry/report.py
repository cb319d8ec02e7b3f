"""report.html: what happened in one run or several, as curves and a table. The page needs nothing from the network.

`write_report` reads each run's config.yaml and metrics.jsonl and writes one file. A run is one colour in every plot.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bigtrain.telemetry.console import duration
from bigtrain.telemetry.goodput import PARTS, Account
from bigtrain.telemetry.run_facts import UNKNOWN, Run, facts_of, in_order, read_run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

REPORT_FILE = "report.html"

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_SYMBOLS = ("circle-open", "square-open", "diamond-open", "triangle-up-open", "star-open", "hexagon-open")
"""Of the evaluation sets of a run."""
_PARTS = dict(zip(PARTS, ("#059669", "#0891b2", "#2563eb", "#d97706", "#9ca3af", "#dc2626", "#7f1d1d"), strict=True))
"""Of the wall time, with their colours."""
_MAX_POINTS = 4000
"""Of one curve; a longer one is thinned, keeping its extremes."""

_STYLE = """
  body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; margin: 2rem auto; max-width: 1300px; padding: 0 1rem; }
  h1 { font-size: 1.4rem; margin: 0 0 1rem; }
  table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #e5e7eb; font-weight: normal; }
  thead th { font-weight: 600; border-bottom: 2px solid #d1d5db; }
  tbody th { color: #6b7280; }
  .dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; margin-right: 0.5em; }
  .bar { display: flex; height: 1.2rem; border-radius: 4px; overflow: hidden; margin-bottom: 0.8rem; }
  .goodput { margin: 0 0 0.2rem; }
  .empty { background: #fef3c7; border-radius: 6px; padding: 1rem; }
"""
# Plotly's button that uploads the chart to its cloud is no part of a page that needs no network.
_PLOTLY = {
    "displaylogo": False,
    "responsive": True,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],
}


class _Panel(NamedTuple):
    title: str
    axis: str
    """Field of the train records on the horizontal axis."""
    field: str
    scale: Literal["tight", "from zero", "logarithmic"] = "tight"


_PANELS = (
    _Panel("Loss over steps", "step", "loss"),
    _Panel("Loss over tokens", "tokens", "loss"),
    _Panel("Learning rate", "step", "lr"),
    _Panel("Gradient norm", "step", "grad_norm", "logarithmic"),
    _Panel("Tokens a second", "step", "tokens_per_second", "from zero"),
    _Panel("Step time (s)", "step", "step_time_s", "from zero"),
)


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of `run_dirs` to `out`, by default the first one's report.html, aside and renamed, and return
    its path. Raises UserError as `read_run` does."""
    runs = [read_run(run_dir) for run_dir in run_dirs]
    names = _distinct([run.name for run in runs], [str(run_dir) for run_dir in run_dirs])
    path = out if out is not None else run_dirs[0] / REPORT_FILE
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(_page(runs, names), encoding="utf-8")
    os.replace(aside, path)
    return path


def _page(runs: list[Run], names: list[str]) -> str:
    title = html.escape("bigtrain: " + ", ".join(names))
    if any(run.train or run.evals for run in runs):
        body = _figure(runs, names).to_html(full_html=False, include_plotlyjs=True, config=_PLOTLY)
    else:
        body = '<p class="empty">No step is done yet: there is nothing to plot. Make the report again later.</p>'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{_table(runs, names)}\n{_goodput(runs, names)}{body}\n</body>\n</html>\n"
    )


def _figure(runs: list[Run], names: list[str]) -> Figure:
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=3, cols=2, subplot_titles=[panel.title for panel in _PANELS], vertical_spacing=0.09)
    for index, panel in enumerate(_PANELS):
        row, col = index // 2 + 1, index % 2 + 1
        for run, name, colour in zip(runs, names, _colours(runs), strict=True):
            figure.add_traces(_curves(run, name, colour, panel, in_legend=index == 0), rows=row, cols=col)
        figure.update_xaxes(title_text=panel.axis, title_standoff=4, row=row, col=col)
        figure.update_yaxes(
            type="log" if panel.scale == "logarithmic" else "linear",
            rangemode="tozero" if panel.scale == "from zero" else "normal",
            row=row,
            col=col,
        )
    figure.update_layout(
        template="plotly_white",
        height=1050,
        margin={"l": 60, "r": 30, "t": 80, "b": 50},
        legend={"orientation": "h", "y": 1.04, "yanchor": "bottom"},
        hovermode="x unified",
        font={"family": "system-ui, sans-serif"},
    )
    return figure


def _curves(run: Run, name: str, colour: str, panel: _Panel, *, in_legend: bool) -> list[Scatter]:
    """The lines of one run in one panel: what it trained, and where the panel is of losses, the held-out losses."""
    from plotly.graph_objects import Scatter

    # Plotly reads tags in names, and entities but quotes.
    label = html.escape(name, quote=False)
    x, y = thinned([record[panel.axis] for record in run.train], [record[panel.field] for record in run.train])
    trained = Scatter(
        x=x,
        y=y,
        # A single point has no line that would show it.
        mode="lines" if len(x) > 1 else "markers",
        line={"color": colour, "width": 1.5},
        name=label,
        legendgroup=label,
        showlegend=in_legend and bool(x),
    )
    if panel.field != "loss":
        return [trained]
    held_out = [_held_out_curve(run, label, colour, panel, name, in_legend=in_legend) for name in run.evals]
    return [trained, *held_out]


def _held_out_curve(run: Run, label: str, colour: str, panel: _Panel, name: str, *, in_legend: bool) -> Scatter:
    """The loss of one evaluation set."""
    from plotly.graph_objects import Scatter

    tokens_at = {record["step"]: record["tokens"] for record in run.train}
    known = [record for record in run.evals[name] if panel.axis == "step" or record["step"] in tokens_at]
    symbol = _SYMBOLS[list(run.evals).index(name) % len(_SYMBOLS)]
    return Scatter(
        x=[record["step"] if panel.axis == "step" else tokens_at[record["step"]] for record in known],
        y=[_plottable(record["loss"]) for record in known],
        mode="lines+markers",
        line={"color": colour, "width": 1, "dash": "dot"},
        marker={"color": colour, "size": 8, "symbol": symbol, "line": {"width": 2}},
        name=f"{label}, {html.escape(name, quote=False) or 'held out'}",
        legendgroup=label,
        showlegend=in_legend,
    )


def thinned(x: Sequence[Any], y: Sequence[Any], limit: int = _MAX_POINTS) -> tuple[list[Any], list[Any]]:
    """The curve with at most `limit` points: the smallest and the largest of each of limit / 2 equal parts, so that no
    spike is lost. Non-finite values become gaps (None)."""
    values = [_plottable(value) for value in y]
    if len(values) <= limit:
        return list(x), values
    kept: list[int] = []
    num_parts = limit // 2
    for part in range(num_parts):
        indices = range(part * len(values) // num_parts, (part + 1) * len(values) // num_parts)
        finite = [index for index in indices if values[index] is not None]
        lowest, highest = (
            (min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)) if finite else (indices[0],) * 2
        )
        kept += sorted({lowest, highest})
    return [x[index] for index in kept], [values[index] for index in kept]


def _table(runs: list[Run], names: list[str]) -> str:
    """One column a run, one row a fact."""
    columns = [facts_of(run) for run in runs]
    head = "".join(
        f'<th><span class="dot" style="background:{colour}"></span>{html.escape(name)}</th>'
        for name, colour in zip(names, _colours(runs), strict=True)
    )
    rows = ""
    for fact in in_order(columns):
        cells = "".join(f"<td>{html.escape(column.get(fact, UNKNOWN))}</td>" for column in columns)
        rows += f"<tr><th>{html.escape(fact)}</th>{cells}</tr>\n"
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}</tbody></table>"


def _goodput(runs: list[Run], names: list[str]) -> str:
    """A bar a run of where its time went, across its restarts."""
    bars = ""
    for run, name in zip(runs, names, strict=True):
        if run.goodput is not None:
            bars += f'<p class="goodput">{html.escape(name)}: {html.escape(run.goodput.told())}</p>\n'
            bars += f'<div class="bar">{"".join(_pieces(run.goodput))}</div>\n'
    legend = "".join(
        f'<span class="dot" style="background:{colour}"></span>{part.replace("_", " ")} &emsp;'
        for part, colour in _PARTS.items()
    )
    return f"{bars}<p>{legend}</p>\n" if bars else ""


def _pieces(spent: Account) -> Iterator[str]:
    for part, seconds in spent.parts.items():
        if seconds > 0:
            share = seconds / spent.wall_s
            told = f"{part.replace('_', ' ')}: {duration(seconds)}, {share:.1%}"
            style = f"width:{100 * share:.4f}%;background:{_PARTS[part]}"
            yield f'<span title="{told}" style="{style}"></span>'


def _distinct(names: list[str], fallbacks: list[str]) -> list[str]:
    """The names, or the folders of the runs where two runs have the same name."""
    return names if len(set(names)) == len(names) else fallbacks


def _colours(runs: list[Run]) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(runs))]


def _plottable(value: Any) -> Any:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
