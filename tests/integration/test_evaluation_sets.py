"""Named evaluation sets in real runs: the same numbers in two layouts, each step once, and shown by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.config.schema import DataConfig, EvalConfig, ParallelConfig, SourceConfig
from bigtrain.launching.outcome import summary

from .test_train import config_of, data, records, run, run_well  # noqa: F401

pytestmark = pytest.mark.slow
FIELDS = ("loss", "perplexity", "bits_per_byte")


def test_sets_are_the_same_in_every_layout_and_shown_by_name(data: Path, tmp_path: Path) -> None:  # noqa: F811
    valid, train = SourceConfig(str(data / "valid")), SourceConfig(str(data / "train"))
    sets = [replace(valid, set="held-out"), replace(train, set="seen"), replace(valid, set="both")]
    sets += [replace(train, set="both")]

    config = config_of(tmp_path / "tensor", data)
    steps = replace(config.train, num_steps=6)
    config = replace(
        config,
        data=DataConfig(train=config.data.train, valid=sets, num_lanes=8),
        train=steps,
        eval=EvalConfig(interval=3, num_batches=3),
    )
    run_well(replace(config, train=replace(steps, stop_after=3)))
    attempt = run(config)
    assert attempt.status == 0, attempt.output
    other = replace(
        config,
        run=replace(config.run, name="data", dir=str(tmp_path / "data")),
        parallel=ParallelConfig(zero_stage=1),
        train=replace(steps, micro_batch_size=1),
    )
    run_well(other)

    found = {name: records(tmp_path / name, "eval") for name in ("tensor", "data")}
    for evaluations in found.values():
        assert [(each["set"], each["step"]) for each in evaluations] == [
            (name, step) for step in (3, 6) for name in ("held-out", "seen", "both")
        ]
    for here, there in zip(found["tensor"], found["data"], strict=True):
        assert [here[key] for key in FIELDS] == pytest.approx([there[key] for key in FIELDS], rel=1e-5)
    last = {each["set"]: each for each in found["tensor"][-3:]}
    assert len({each["loss"] for each in last.values()}) == 3
    assert "evaluation of seen at step 6: loss " in attempt.output and "epochs at step 6: " in attempt.output
    told = json.loads((tmp_path / "tensor" / "summary.json").read_text())
    assert told["eval_sets"]["both"]["loss"] == last["both"]["loss"]
    lines = summary(tmp_path / "tensor", took_s=1.0)
    assert all(any(line.startswith(f"loss of {name} ") for line in lines) for name in last)
    assert ", held-out" in (tmp_path / "tensor" / "report.html").read_text()
