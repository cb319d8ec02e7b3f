"""The certificate as text, JSON and a page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.config.errors import UserError

if TYPE_CHECKING:
    from bigtrain.config.schema import ModelConfig
    from tools.layouts import Certificate, Row

LEGEND = (
    "loss: of any step. gradient norm: of any step, over all parameters, before clipping. gradients: the largest of "
    "any parameter, as a share of its norm. weights: likewise, after the last step."
)
COLUMNS = ("layout", "ranks", "loss", "gradient norm", "gradients", "weights", "verdict")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,td:last-child,th:first-child,th:last-child{text-align:left}.bad{background:#fdd}"
)


def cells(row: Row) -> list[str]:
    """A row of the table, under `COLUMNS`."""
    found = row.deviation
    numbers = [found.loss, found.grad_norm, found.gradient, found.weight] if found is not None else []
    shown = [f"{number:.1e}" for number in numbers] or ["-"] * 4
    return [row.layout, str(row.ranks), *shown, row.verdict]


def bounds_line(certificate: Certificate) -> str:
    """What deviations are allowed, and why these."""
    bounds = certificate.bounds
    weight = "reported only" if bounds.weight is None else f"{bounds.weight:g}"
    return (
        f"bounds: loss {bounds.loss:g}, gradient norm {bounds.first_grad_norm:g} in the first step and "
        f"{bounds.grad_norm:g} later, gradients {bounds.gradient:g} of their "
        f"norm, weights {weight}. {bounds.why}"
    )


def model_line(model: ModelConfig) -> str:
    """The shape of the model, in words."""
    tied = "tied" if model.tie_embeddings else "untied"
    return (
        f"model: {model.name}, {model.num_layers} layers of {model.hidden_size}, {model.num_attention_heads} heads in "
        f"{model.num_query_groups} groups, feed-forward {model.ffn_hidden_size}, vocabulary {model.vocab_size}; "
        f"{model.position} positions, {model.norm}, {model.activation}, {tied} embeddings"
    )


def outcome(certificate: Certificate) -> str:
    """The certificate in a line or two."""
    rows = certificate.rows
    bad, refused = sum(row.is_bad for row in rows), sum(row.refused is not None for row in rows)
    said = "" if certificate.is_complete else f"INCOMPLETE, {certificate.num_planned - len(rows)} not run: "
    said += f"{certificate.num_certified} of {len(rows)} layouts compute the oracle's run"
    said += f"; {refused} refused before any rank started" if refused else ""
    said += f"; {bad} DEVIATE" if bad else ""
    apart = "in no bit" if certificate.documents_are_apart else "SHOWS THROUGH"
    return f"{said}. A row's first document changes the logits of its second: {apart}."


def summary(certificate: Certificate) -> str:
    """A table of the largest relative deviations from the oracle."""
    lines = aligned([list(COLUMNS), *map(cells, certificate.rows)])
    return "\n".join(["", *lines, "", LEGEND, bounds_line(certificate), outcome(certificate)])


def aligned(table: list[list[str]]) -> list[str]:
    """Rows of one length as lines, with the columns below each other; the last one is as wide as it is."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    return [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=False)), line[-1]])
        for line in table
    ]


def require_writable(*paths: Path) -> None:
    """Makes the folders of these files. Raises UserError where one cannot be written."""
    for path in paths:
        try:
            is_new = not path.exists()
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a"):
                pass
            if is_new:
                path.unlink()
        except OSError as error:
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written: {error.strerror}. Give --json and --page other places.")


def write(certificate: Certificate, to_json: Path, to_page: Path) -> None:
    """Also makes their folders. Raises UserError where a file cannot be written."""
    versions = {name: version(name) for name in ("bigtrain", "torch", "deepspeed", "megatron-core", "transformers")}
    record = {
        "holds": certificate.holds,
        "complete": certificate.is_complete,
        "outcome": outcome(certificate),
        "versions": versions,
        **certificate.settings,
        "model": asdict(certificate.model),
        "bounds": vars(certificate.bounds),
        "documents_are_apart": certificate.documents_are_apart,
        "layouts": [
            {"layout": row.layout, "ranks": row.ranks, "seconds": round(row.seconds, 1), "verdict": row.verdict}
            | (row.deviation.as_json() if row.deviation is not None else {})
            | ({"report": row.report} if row.report is not None else {})
            for row in certificate.rows
        ],
    }
    write_texts({to_json: json.dumps(record, indent=1) + "\n", to_page: _page(certificate, versions)})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Also makes the folders of these files. Raises UserError where one cannot be written."""
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from error


def _page(certificate: Certificate, versions: dict[str, str]) -> str:
    rows = [line("th", list(COLUMNS)), *(line("td", cells(row), row.is_bad) for row in certificate.rows)]
    shown = [
        outcome(certificate),
        "Largest relative deviation of each layout from Hugging Face Transformers in a bare PyTorch loop, "
        f"{certificate.settings['steps']} steps; settings: "
        f"{' '.join(certificate.settings['overrides']) or 'the defaults'}.",
        model_line(certificate.model),
        LEGEND,
        bounds_line(certificate),
        ", ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    return whole_page("Layouts", "Every layout, one run", shown, rows)


def line(tag: str, texts: Sequence[str], bad: bool = False) -> str:
    """A row of a page's table."""
    mark = " class=bad" if bad else ""
    return f"<tr{mark}>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def whole_page(title: str, heading: str, shown: Sequence[str], rows: Sequence[str]) -> str:
    """A page of some paragraphs and a table of such rows."""
    paragraphs = "".join(f"<p>{html.escape(text)}</p>" for text in shown)
    return (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{heading}</h1>"
        f"{paragraphs}<table>{''.join(rows)}</table>\n"
    )
