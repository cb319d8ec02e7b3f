"""RUN/summary.json: how a run ended, in a few numbers, from its own metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bigtrain.telemetry.metrics import METRICS_FILE, read_metrics


def write_summary(run_dir: Path, *, unigram_nats: float | None, wall_s: float) -> None:
    """The last train and eval records, beside the unigram cross-entropy of the same held-out tokens in nats."""
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
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _last(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next((record for record in reversed(records) if record["kind"] == kind), {})
