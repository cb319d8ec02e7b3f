"""What a finished run tells its user."""

from __future__ import annotations

import json
from pathlib import Path

from bigtrain.config.schema import Config
from bigtrain.launching.outcome import generate_command, newest_checkpoint, next_steps, summary

FOUND = {
    "steps": 300,
    "tokens": 1228800,
    "train_loss": 3.1,
    "eval": {"loss": 3.25, "perplexity": 25.79, "bits_per_byte": 1.4},
    "unigram_nats": 6.0,
    "wall_s": 120.4,
}


def test_held_out_loss_stands_beside_the_unigram(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(FOUND), encoding="utf-8")
    (tmp_path / "report.html").write_text("", encoding="utf-8")
    text = "\n".join(summary(tmp_path))
    for part in (
        "300 steps",
        "1,228,800 tokens",
        "3.2500 nats",
        "1.400 bits a byte",
        "6.0000 nats",
        "2.7500 nats below",
    ):
        assert part in text
    assert str(tmp_path / "report.html") in text


def test_a_model_worse_than_the_unigram_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**FOUND, "unigram_nats": 3.0}), encoding="utf-8")
    assert "0.2500 nats ABOVE" in "\n".join(summary(tmp_path))


def test_summary_with_parts_missing(tmp_path: Path) -> None:
    assert summary(tmp_path) == []
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 1, "eval": None}), encoding="utf-8")
    assert len(summary(tmp_path)) == 1


def test_newest_committed_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if step != 11:  # half written
            (folder / "COMMITTED").touch()
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert newest_checkpoint(tmp_path) == newest
    assert f"checkpoint={newest}" in generate_command(Config(), newest).arguments
    assert len(next_steps(Config(), newest)) <= 5
