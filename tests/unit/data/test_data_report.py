"""What a launch says of its data, against what the sequences really hold."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import epochs
from bigtrain.config.schema import Config, DataConfig, SourceConfig, TrainConfig, WeightConfig
from bigtrain.data import data_report
from bigtrain.data.data_report import expected_cut_documents, packing_of, packing_of_held_out
from bigtrain.data.held_out import HeldOut, held_out
from bigtrain.data.order import Order, Source, training_order
from bigtrain.data.rows import Window
from bigtrain.data.shards import Dataset


def cut(windows: list[Window]) -> set[int]:
    """Documents with predicted tokens in more than one of the windows."""
    sequences: dict[int, set[int]] = defaultdict(set)
    for number, window in enumerate(windows):
        for piece in window.pieces:
            if piece.count > 1:
                sequences[piece.document].add(number)
    return {document for document, numbers in sequences.items() if len(numbers) > 1}


@pytest.mark.parametrize("sequence_length", [2, 7, *range(20, 60), 100, 20_000])
def test_held_out_is_counted(built: Path, sequence_length: int) -> None:
    dataset = Dataset.open(built / "valid")
    sequences = HeldOut([dataset], sequence_length=sequence_length)
    windows = [sequences.sequence(number) for number in range(sequences.num_sequences)]
    found = packing_of_held_out(sequences)
    assert found.cut_documents == len(cut(windows)) / len(dataset)
    filled = sum(window.num_tokens - 1 for window in windows)
    assert found.padding == pytest.approx(1 - filled / (len(windows) * sequence_length), abs=1e-12)


def test_several_held_out_sources_count_together(built: Path) -> None:
    parts = [Dataset.open(built / side) for side in ("train", "valid")]
    alone = [packing_of_held_out(HeldOut([part], sequence_length=24)) for part in parts]
    found = packing_of_held_out(HeldOut(parts, sequence_length=24))
    shares = [each.cut_documents * len(part) for each, part in zip(alone, parts, strict=True)]
    assert found.cut_documents == pytest.approx(sum(shares) / sum(map(len, parts)))


@pytest.mark.parametrize("sequence_length", [16, 64, 200])
def test_concat_is_what_is_to_be_expected(built: Path, sequence_length: int) -> None:
    """The mean over many orders and epochs of what was cut in truth."""
    dataset = Dataset.open(built / "train")
    shares: list[float] = []
    for seed in range(40):
        order = Order([Source(dataset)], seed=seed, num_lanes=1, sequence_length=sequence_length)
        per_epoch = dataset.index.num_tokens / sequence_length
        windows = [order.sequence(number) for number in range(int(4 * per_epoch) + 2)]
        for epoch in (1, 2):  # whole, and not begun at the beginning of a sequence
            sequences: dict[int, set[int]] = defaultdict(set)
            for number, window in enumerate(windows):
                for piece in window.pieces:
                    if piece.count > 1 and piece.epoch == epoch:
                        sequences[piece.document].add(number)
            shares.append(sum(len(numbers) > 1 for numbers in sequences.values()) / len(dataset))
    expected = expected_cut_documents(dataset, sequence_length)
    assert float(np.mean(shares)) == pytest.approx(expected, abs=4 * float(np.std(shares)) / len(shares) ** 0.5)
    assert 0.05 < expected < 1


@pytest.mark.parametrize("sequence_length", [16, 64, 200])
def test_best_fit_is_what_its_sequences_hold(built: Path, sequence_length: int) -> None:
    dataset = Dataset.open(built / "train")
    order = Order([Source(dataset)], seed=3, num_lanes=1, sequence_length=sequence_length, pack="best_fit")
    windows: list[Window] = []
    while (window := order.sequence(len(windows))).pieces[0].epoch == 0:
        windows.append(window)
    found = packing_of(order, 0)
    filled = sum(window.num_tokens for window in windows)
    assert found.padding == pytest.approx(1 - filled / (len(windows) * (sequence_length + 1)))
    assert found.cut_documents == len(cut(windows)) / len(dataset)
    assert found.cut_documents == np.mean(dataset.num_tokens_of_documents() > sequence_length + 1)


def config_of(built: Path, pack: str, num_steps: int) -> Config:
    train = [
        SourceConfig(str(built / "train"), 0.0, [WeightConfig(20_000, 3.0)]),
        SourceConfig(str(built / "valid"), 1.0),
    ]
    valid = [SourceConfig(str(built / "valid"), set="books"), SourceConfig(str(built / "valid"), set="code")]
    return Config(
        data=DataConfig(train=train, valid=valid, num_lanes=4, pack=pack),
        train=TrainConfig(num_steps=num_steps, global_batch_size=8, sequence_length=32),
    )


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_what_is_said(built: Path, pack: str) -> None:
    config = config_of(built, pack, 200)
    order = training_order(config.data, seed=1, sequence_length=32)
    lines = list(data_report.lines(config, order, held_out(config.data, sequence_length=32)))
    train = Dataset.open(built / "train")
    assert lines[0].startswith("train: ") and lines[3].startswith("valid books: ") and lines[4].startswith("valid code")
    made = order.epochs(200 * 8)
    assert f"  train: {epochs.number(made[train.name])} epochs in 200 steps; {pack}: " in lines[1]
    assert ("no padding, about " in lines[1]) == (pack == "concat") and "of the documents cut" in lines[1]
    many = [name for name, count in made.items() if count > 4]
    assert many and [line.split()[1] for line in lines[5:]] == many
    assert not any(line.startswith("warning") for line in data_report.lines(config_of(built, pack, 1), order, {}))


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_a_dry_runs_epochs_are_those_of_the_order(built: Path, pack: str) -> None:
    config = config_of(built, pack, 400)
    order = training_order(config.data, seed=1, sequence_length=32)
    sizes = [Dataset.open(source.path).index.num_tokens for source in config.data.train]
    found = epochs.planned(config.data.train, sizes, 400 * 8 * 32)
    assert found == pytest.approx(list(order.epochs(400 * 8).values()), rel=1e-3 if pack == "concat" else 0.05)
