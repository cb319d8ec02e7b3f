"""What a dry run says of the data."""

from __future__ import annotations

import json
from pathlib import Path

from bigtrain.config.compose import compose
from bigtrain.launching.machine import resolve
from bigtrain.launching.plan import plan

LENGTH = ["train.num_steps=100", "train.global_batch_size=16", "train.sequence_length=250", "cluster.device=cpu"]


def planned(tmp_path: Path, train: str, *more: str) -> list[str]:
    settings = ["data=shards", f"data.train={train}", "data.valid=[]", "tokenizer.path=t.model", *LENGTH, *more]
    return plan(resolve(compose(settings), cwd=tmp_path)).splitlines()


def shards(folder: Path, num_tokens: int) -> None:
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"num_tokens": num_tokens, "num_documents": 99}))


def test_epochs_of_every_source_and_a_warning_above_four(tmp_path: Path) -> None:
    shards(tmp_path / "web" / "train", 1_000_000)
    shards(tmp_path / "code" / "train", 20_000)
    lines = planned(tmp_path, "[{path: web/train, weight: 3}, {path: code/train}]")
    (epochs,) = [line for line in lines if line.startswith("epochs ")]
    assert epochs.split(maxsplit=1)[1] == "web 0.30, code 5.00"
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert f"{tmp_path / 'code' / 'train'} is gone through 5.0 times" in warning
    assert lines.index(warning) == lines.index(epochs) + 1


def test_where_the_weights_come_from(tmp_path: Path) -> None:
    lines = planned(tmp_path, "[{path: a}]", "checkpoint.init_from=x")
    assert f"weights from         {tmp_path / 'x'}" in lines


def test_a_weight_that_begins_later(tmp_path: Path) -> None:
    shards(tmp_path / "a", 100_000)
    shards(tmp_path / "b", 100_000)
    later = "[{path: a, then: [{from_tokens: 300000, weight: 0}]}, {path: b, weight: 0, then: [{from_tokens: 300000}]}]"
    (epochs,) = [line for line in planned(tmp_path, later) if line.startswith("epochs ")]
    assert epochs.endswith("a 3.00, b 1.00")


def test_data_that_are_not_there_yet_or_elsewhere_are_left_out(tmp_path: Path) -> None:
    assert not [line for line in planned(tmp_path, "[{path: web}]") if line.startswith("epochs")]
    assert not [line for line in planned(tmp_path, "[{path: 's3://b/web'}]") if line.startswith("epochs")]
