"""report.html: what happened in one run or several, as curves and a table. The page needs nothing from the network.

`write_report` reads each run's config.yaml and metrics.jsonl and writes one file. A run is one colour in every plot.
"""

from __future__ import annotations

import html
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bigtrain.config.errors import UserError
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

REPORT_FILE = "report.html"

_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_MAX_POINTS = 4000
"""Of one curve; a longer one is thinned, keeping its extremes."""
_LAST_STEPS = 10
"""Steps that the final training loss is the mean of."""

_STYLE = """
  body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; margin: 2rem auto; max-width: 1300px; padding: 0 1rem; }
  h1 { font-size: 1.4rem; margin: 0 0 1rem; }
  table { border-collapse: collapse; margin-bottom: 1rem; font-variant-numeric: tabular-nums; }
  th, td { text-align: left; padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #e5e7eb; font-weight: normal; }
  thead th { font-weight: 600; border-bottom: 2px solid #d1d5db; }
  tbody th { color: #6b7280; }
  .dot { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 50%; margin-right: 0.5em; }
  .empty { background: #fef3c7; border-radius: 6px; padding: 1rem; }
"""
# Plotly's button that uploads the chart to its cloud is no part of a page that needs no network.
_PLOTLY = {
    "displaylogo": False,
    "responsive": True,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],
}
_FINAL_LOSS = f"Training loss, mean of the last {_LAST_STEPS} steps"
_UNKNOWN = "-"


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


@dataclass(frozen=True)
class Run:
    """What a report shows of one run."""

    name: str
    config: dict[str, Any]
    """config.yaml; empty where the run has none."""
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_run(run_dir: Path) -> Run:
    """Read a run's folder. Raises UserError where it is none, or its config.yaml is not readable."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder. Give the folder of a run, such as runs/default.")
    metrics, config_path = run_dir / METRICS_FILE, run_dir / "config.yaml"
    if not metrics.exists() and not config_path.exists():
        raise UserError(f"{run_dir}: not a run's folder: it has neither {METRICS_FILE} nor config.yaml.")
    records = read_metrics(metrics) if metrics.exists() else []
    config = _read_config(config_path) if config_path.exists() else {}
    return Run(
        name=str(config.get("run", {}).get("name", run_dir.resolve().name)),
        config=config,
        train=[record for record in records if record.get("kind") == "train"],
        evals=[record for record in records if record.get("kind") == "eval"],
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
        f"<body>\n<h1>{title}</h1>\n{_table(runs, names)}\n{body}\n</body>\n</html>\n"
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
    """The lines of one run in one panel: what it trained, and where the panel is of losses, the held-out loss."""
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
    if panel.field != "loss" or not run.evals:
        return [trained]
    tokens_at = {record["step"]: record["tokens"] for record in run.train}
    known = [record for record in run.evals if panel.axis == "step" or record["step"] in tokens_at]
    held_out = Scatter(
        x=[record["step"] if panel.axis == "step" else tokens_at[record["step"]] for record in known],
        y=[_plottable(record["loss"]) for record in known],
        mode="lines+markers",
        line={"color": colour, "width": 1, "dash": "dot"},
        marker={"color": colour, "size": 8, "symbol": "circle-open", "line": {"width": 2}},
        name=f"{label}, held out",
        legendgroup=label,
        showlegend=in_legend,
    )
    return [trained, held_out]


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
    columns = [_config_facts(run) | _results(run) for run in runs]
    head = "".join(
        f'<th><span class="dot" style="background:{colour}"></span>{html.escape(name)}</th>'
        for name, colour in zip(names, _colours(runs), strict=True)
    )
    rows = ""
    for fact in columns[0]:
        cells = "".join(f"<td>{html.escape(column[fact])}</td>" for column in columns)
        rows += f"<tr><th>{html.escape(fact)}</th>{cells}</tr>\n"
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}</tbody></table>"


def _config_facts(run: Run) -> dict[str, str]:
    def get(group: str, key: str) -> Any:
        values = run.config.get(group)
        return values.get(key, "?") if isinstance(values, dict) else "?"

    return {
        "Model": f"{get('model', 'name')}: {get('model', 'num_layers')} layers of {get('model', 'hidden_size')}, "
        f"vocabulary {get('model', 'vocab_size')}",
        "Layout": f"tensor {get('parallel', 'tensor')}, pipeline {get('parallel', 'pipeline')}, "
        f"ZeRO-{get('parallel', 'zero_stage')}, {get('precision', 'dtype')}",
        "Batch": f"{get('train', 'global_batch_size')} sequences of {get('train', 'sequence_length')} tokens",
        "Optimizer": f"{get('optim', 'name')}, peak lr {get('optim', 'lr')}, {get('schedule', 'name')} schedule",
        "Seed": f"{get('run', 'seed')}",
    }


def _results(run: Run) -> dict[str, str]:
    facts = {"Steps": "none yet", "Tokens": _UNKNOWN, _FINAL_LOSS: _UNKNOWN}
    if run.train:
        losses = [record["loss"] for record in run.train[-_LAST_STEPS:]]
        facts["Steps"] = f"{run.train[-1]['step']:,}"
        facts["Tokens"] = f"{run.train[-1]['tokens']:,}"
        facts[_FINAL_LOSS] = f"{statistics.fmean(losses):.4f}"
    facts |= {"Held-out loss, last": "not evaluated", "Held-out loss, best": _UNKNOWN}
    facts |= {"Perplexity, last": _UNKNOWN, "Bits a byte, last": _UNKNOWN}
    if run.evals:
        last = run.evals[-1]
        facts["Held-out loss, last"] = f"{last['loss']:.4f} at step {last['step']:,}"
        facts["Held-out loss, best"] = f"{min(record['loss'] for record in run.evals):.4f}"
        facts["Perplexity, last"] = f"{last['perplexity']:.2f}"
        if last["bits_per_byte"] is not None:
            facts["Bits a byte, last"] = f"{last['bits_per_byte']:.3f}"
    facts["Tokens a second, median"] = _median(run, "tokens_per_second", ",.0f")
    facts["Step time in s, median"] = _median(run, "step_time_s", ".3f")
    facts["MFU, median"] = _median(run, "mfu", ".1%")
    return facts


def _median(run: Run, field: str, form: str) -> str:
    values = [record[field] for record in run.train if record[field] is not None]
    return f"{statistics.median(values):{form}}" if values else _UNKNOWN


def _read_config(path: Path) -> dict[str, Any]:
    """config.yaml as plain values. Not as a Config: a report of an old run must not depend on today's settings."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as a config: {str(error).splitlines()[0]}") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _distinct(names: list[str], fallbacks: list[str]) -> list[str]:
    """The names, or the folders of the runs where two runs have the same name."""
    return names if len(set(names)) == len(names) else fallbacks


def _colours(runs: list[Run]) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(len(runs))]


def _plottable(value: Any) -> Any:
    return value if isinstance(value, int | float) and math.isfinite(value) else None
