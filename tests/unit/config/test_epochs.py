"""How often a planned run goes through its sources."""

from __future__ import annotations

import itertools

import pytest

from bigtrain.config import epochs
from bigtrain.config.locations import short_names
from bigtrain.config.schema import SourceConfig, WeightConfig


def test_shares_by_weight() -> None:
    assert epochs.planned([SourceConfig("a", 3.0), SourceConfig("b", 1.0)], [1000, 500], 4000) == [3.0, 2.0]


def test_weights_that_change() -> None:
    """Token by token, as a person would count it."""
    sources = [
        SourceConfig("a", 1.0, [WeightConfig(70, 0.0), WeightConfig(30, 3.0)]),
        SourceConfig("b", 1.0),
        SourceConfig("c", 0.0, [WeightConfig(50, 4.0), WeightConfig(1000, 9.0)]),
    ]
    sizes = [10, 20, 40]
    counted = [0.0, 0.0, 0.0]
    for token in range(100):
        a = 1 if token < 30 else 3 if token < 70 else 0
        weights = [a, 1, 0 if token < 50 else 4]
        for place in range(3):
            counted[place] += weights[place] / sum(weights) / sizes[place]
    assert epochs.planned(sources, sizes, 100) == pytest.approx(counted, rel=1e-12)
    assert epochs.changes(sources) == [0, 30, 50, 70, 1000]


def test_a_warning_above_four_epochs() -> None:
    (line,) = epochs.warnings({"/data/web/train": 4.0, "/data/code/train": 4.06})
    assert line.startswith("warning: /data/code/train is gone through 4.1 times")
    assert epochs.told({"/data/web/train": 4.0, "/data/code/train": 4.06}) == "web 4.00, code 4.06"


def test_few_epochs_are_not_none() -> None:
    assert [epochs.number(count) for count in (12.3, 1.0, 0.349, 0.0349, 0.00034, 0)] == [
        "12.30",
        "1.00",
        "0.35",
        "0.035",
        "0.00034",
        "0.00",
    ]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/home/me/data/stdlib/bpe-4096/train"], ["bpe-4096/train"]),
        (["train"], ["train"]),
        (["/d/web/train", "/d/code/train"], ["web", "code"]),
        (["/d/web/train", "/d/web/extra"], ["train", "extra"]),
        (["/d/web/train", "s3://bucket/web/train"], ["/d", "s3://bucket"]),
        (["/d/a", "/d/a/b"], ["a", "a/b"]),
        (["/d/a", "/d/x/a"], ["a", "x/a"]),
        (["/d/x/a/a", "/d/a/a"], ["x/a", "a"]),
        (["same", "same"], ["same"]),
        ([], []),
    ],
)
def test_short_names(folders: list[str], names: list[str]) -> None:
    assert list(short_names(folders).values()) == names


def test_short_names_are_distinct() -> None:
    folders = ["/".join(each) for length in (1, 2, 3) for each in itertools.product(["a", "b", ""], repeat=length)]
    for one, other in itertools.permutations(dict.fromkeys(folders), 2):
        names = short_names([one, other])
        assert len(set(names.values())) == 2, (one, other)
