"""A sweep's command line as those of its runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bigtrain.config.compose import compose
from bigtrain.config.errors import UserError
from bigtrain.config.sweep import points


def test_every_combination_in_the_order_of_the_command_line() -> None:
    found = points(["run.name=s", "optim.lr=1e-3,3e-4", "model.num_layers=4", "run.seed=range(1,3)"])
    assert [point.label for point in found] == [
        "lr-0.001-seed-1",
        "lr-0.001-seed-2",
        "lr-0.0003-seed-1",
        "lr-0.0003-seed-2",
    ]
    assert found[1].overrides == ("run.name=s", "optim.lr=0.001", "model.num_layers=4", "run.seed=2")
    assert found[1].swept == ("optim.lr=0.001", "run.seed=2")
    configs = [compose(point.overrides) for point in found]
    assert [(config.optim.lr, config.run.seed, config.model.num_layers) for config in configs] == [
        (1e-3, 1, 4),
        (1e-3, 2, 4),
        (3e-4, 1, 4),
        (3e-4, 2, 4),
    ]


@pytest.mark.parametrize(
    ("override", "labels"),
    [
        ("model=tiny,gpt_1b", ["model-tiny", "model-gpt_1b"]),
        ("model=glob(gpt_1*,exclude=[gpt_125m,gpt_13b])", ["model-gpt_1b", "model-gpt_175b"]),
        ("+experiment=smoke,one_gpu", ["experiment-smoke", "experiment-one_gpu"]),
        ("train.num_steps=choice(1e3,20)", ["num_steps-1000", "num_steps-20"]),
        ("optim.weight_decay=range(0,0.3,0.1)", ["weight_decay-0.0", "weight_decay-0.1", "weight_decay-0.2"]),
    ],
)
def test_what_can_be_swept(override: str, labels: list[str]) -> None:
    assert [point.label for point in points([override])] == labels


def test_what_is_one_value_is_not_swept() -> None:
    """Lists, mappings and quoted commas; `run.seed` alone is."""
    same = ["data.train=[{path: a}, {path: b}]", "data.valid={web: a, code: b}", "cluster.setup=['a,b']"]
    assert [point.overrides[:3] for point in points([*same, "run.seed=1,2"])] == [tuple(same)] * 2


def test_labels_are_names_of_folders_and_differ() -> None:
    (a, b) = points(["optim.name=adamw", "data.prepare.out=/data/x,/data-x"])
    assert a.label != b.label and all(re.fullmatch(r"[\w.+-]+", point.label) for point in (a, b))
    names = points(["optim.name=adamw,sgd", "schedule.name=wsd,cosine"])
    assert names[0].label == "optim.name-adamw-schedule.name-wsd"
    long = points([f"tracker.project={'x' * 90},{'x' * 91}", "run.seed=1,2"])
    assert len({point.label for point in long}) == 4 and max(len(point.label) for point in long) < 160


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lr=1e-3"], "no setting has several values"),
        (["optim.lr=1,1"], "two runs would be called lr-1"),
        (["optim.lr=interval(1,2)"], "no list of values"),
        (["run.name=a,b"], "it is the sweep's"),
        (["run.dir=a,b"], "it is the sweep's"),
        (["run.seed=range(0,1000000000)"], "1,000 runs at most"),
        (["run.seed=range(0,40)", "data.num_lanes=range(0,40)"], "1,000 runs at most"),
        (["model=glob(nothing*)"], "no value in it"),
    ],
)
def test_what_cannot_be_swept(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        points(overrides)


def test_a_mistake_in_a_value_is_left_to_the_composing(tmp_path: Path) -> None:
    found = points(["optim.lr=fast,slow"])
    with pytest.raises(UserError, match=r"optim\.lr"):
        compose(found[0].overrides)


def test_without_multirun_commas_are_told() -> None:
    with pytest.raises(UserError, match="--multirun"):
        compose(["optim.lr=1e-3,3e-4"])
