"""summary.json says what metrics.jsonl says last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from bigtrain.telemetry.metrics import MetricsFile
from bigtrain.trainer.summary import tells_of, write_summary


def summary_of(
    tmp_path: Path, *records: dict[str, object], unigram_nats: Mapping[str, float] = MappingProxyType({"": 6.5})
) -> dict[str, object]:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    for record in records:
        metrics.append(record)
    metrics.close()
    write_summary(tmp_path, unigram_nats=unigram_nats, wall_s=1.23456)
    return json.loads((tmp_path / "summary.json").read_text())


def test_the_last_of_each_kind(tmp_path: Path) -> None:
    found = summary_of(
        tmp_path,
        {"kind": "train", "step": 1, "tokens": 10, "loss": 9.0},
        {"kind": "eval", "step": 1, "loss": 8.0, "perplexity": 7.0, "bits_per_byte": 6.0},
        {"kind": "train", "step": 2, "tokens": 20, "loss": 5.0},
        {"kind": "eval", "step": 2, "loss": 4.0, "perplexity": 3.0, "bits_per_byte": 2.0},
        {"kind": "event", "name": "checkpoint", "step": 2, "seconds": 1.0},
    )
    assert found == {
        "steps": 2,
        "tokens": 20,
        "train_loss": 5.0,
        "eval": {"loss": 4.0, "perplexity": 3.0, "bits_per_byte": 2.0},
        "unigram_nats": 6.5,
        "wall_s": 1.235,
    }


def test_evaluation_sets_by_name(tmp_path: Path) -> None:
    found = summary_of(
        tmp_path,
        {"kind": "eval", "step": 1, "set": "books", "loss": 9.0, "perplexity": 8.0, "bits_per_byte": 7.0},
        {"kind": "eval", "step": 2, "set": "books", "loss": 4.0, "perplexity": 3.0, "bits_per_byte": 2.0},
        {"kind": "eval", "step": 2, "set": "code", "loss": 5.0, "perplexity": 6.0, "bits_per_byte": None},
        unigram_nats={"books": 6.5, "code": 7.5},
    )
    assert found["eval_sets"] == {
        "books": {"loss": 4.0, "perplexity": 3.0, "bits_per_byte": 2.0, "unigram_nats": 6.5},
        "code": {"loss": 5.0, "perplexity": 6.0, "bits_per_byte": None, "unigram_nats": 7.5},
    }
    assert found["eval"] == {"loss": None, "perplexity": None, "bits_per_byte": None}
    assert found["unigram_nats"] is None


def test_a_run_without_held_out_data(tmp_path: Path) -> None:
    found = summary_of(tmp_path, {"kind": "train", "step": 1, "tokens": 10, "loss": 9.0})
    assert found["eval"] == {"loss": None, "perplexity": None, "bits_per_byte": None}


def test_it_tells_of_the_step_that_it_ends_at(tmp_path: Path) -> None:
    assert not tells_of(tmp_path, 1)
    summary_of(tmp_path, {"kind": "train", "step": 1, "tokens": 10, "loss": 9.0})
    assert tells_of(tmp_path, 1) and not tells_of(tmp_path, 2)


def test_a_run_that_did_nothing(tmp_path: Path) -> None:
    found = summary_of(tmp_path)
    assert (found["steps"], found["tokens"], found["train_loss"]) == (0, 0, None)
