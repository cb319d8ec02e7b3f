"""RUN/summary.json: how a run ended, in a few numbers, from its own metrics."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.telemetry.goodput import account, attempts_in
from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics

SUMMARY_FILE = "summary.json"


def write_summary(run_dir: Path, *, unigram_nats: Mapping[str, float], wall_s: float) -> None:
    """The last train and eval records, beside the unigram cross-entropy of the same held-out tokens in nats.

    `unigram_nats`: of each evaluation set by its name. The one without a name stands in "eval" and "unigram_nats",
    those with one in "eval_sets". `wall_s`: seconds of this attempt, from when the ranks join to its end; start-up and
    preparation are not in it. "goodput" has the whole run's time by what it went to (bigtrain.telemetry.goodput)."""
    records = read_metrics(run_dir / METRICS_FILE)
    train = _last(records, "train")
    summary = {
        "steps": train.get("step", 0),
        "tokens": train.get("tokens", 0),
        "train_loss": train.get("loss"),
        "eval": _evaluation(records, ""),
        "unigram_nats": unigram_nats.get(""),
        "wall_s": round(wall_s, 3),
    }
    if attempts := attempts_in(records):
        summary["goodput"] = account(attempts).to_dict()
    names = [name for name in unigram_nats if name]
    if names:
        summary["eval_sets"] = {
            name: {**_evaluation(records, name), "unigram_nats": unigram_nats[name]} for name in names
        }
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")


def _evaluation(records: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The last evaluation of a set."""
    last = _last([record for record in records if record.get("set", "") == name], "eval")
    return {key: last.get(key) for key in ("loss", "perplexity", "bits_per_byte")}


def tells_of(run_dir: Path, step: int) -> bool:
    """Whether there is a summary already, and it is that of a run that ended at `step`."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((run_dir / SUMMARY_FILE).read_text())["steps"] == step
    return False


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if record["kind"] == kind), {})
