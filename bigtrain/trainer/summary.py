"""RUN/summary.json: how a run ended, in a few numbers, from its own metrics."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics

SUMMARY_FILE = "summary.json"


def write_summary(run_dir: Path, *, unigram_nats: float | None, wall_s: float) -> None:
    """The last train and eval records, beside the unigram cross-entropy of the same held-out tokens in nats.

    `wall_s`: seconds of this attempt, from when the ranks join to its end; start-up and preparation are not in it."""
    records = read_metrics(run_dir / METRICS_FILE)
    train = _last(records, "train")
    summary = {
        "steps": train.get("step", 0),
        "tokens": train.get("tokens", 0),
        "train_loss": train.get("loss"),
        "eval": {key: _last(records, "eval").get(key) for key in ("loss", "perplexity", "bits_per_byte")},
        "unigram_nats": unigram_nats,
        "wall_s": round(wall_s, 3),
    }
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n")


def tells_of(run_dir: Path, step: int) -> bool:
    """Whether there is a summary already, and it is that of a run that ended at `step`."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((run_dir / SUMMARY_FILE).read_text())["steps"] == step
    return False


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if record["kind"] == kind), {})
