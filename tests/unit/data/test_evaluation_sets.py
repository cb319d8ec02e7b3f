"""Named evaluation sets: their numbers against sums over whole documents, for every layout and batch size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.config.errors import UserError
from bigtrain.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from bigtrain.data.held_out import held_out
from bigtrain.data.microbatch import Microbatch
from bigtrain.data.shards import Dataset
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.engine.engine import LossSum
from bigtrain.topology import Topology
from bigtrain.trainer.evaluator import Evaluation
from bigtrain.trainer.run_data import RunData

from .conftest import make_texts
from .test_build import small_build

S = 24
VOCAB = 420
COSTS = np.random.default_rng(0).integers(1, 1 << 20, (VOCAB, VOCAB))
"""Of a model that predicts each token from the one before: whole numbers, so that sums are exact in any order."""


@pytest.fixture(scope="module")
def other(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of other texts."""
    texts = make_texts(40, seed=7)
    return small_build(tmp_path_factory.mktemp("other") / "out", texts, tokenizer, held_out=0.5)


def config_of(built: Path, other: Path, *, global_batch: int = 8, micro_batch: int = 2, batches: int = 1000) -> Config:
    valid = [
        SourceConfig(str(built / "valid"), set="first"),
        SourceConfig(str(built / "valid"), set="both"),
        SourceConfig(str(other / "valid"), set="both"),
        SourceConfig(str(other / "valid"), set="second"),
    ]
    return Config(
        model=ModelConfig(vocab_size=VOCAB),
        data=DataConfig(train=[SourceConfig(str(built / "train"))], valid=valid, num_lanes=8),
        tokenizer=TokenizerConfig(path=str(built / "train")),
        train=TrainConfig(global_batch_size=global_batch, micro_batch_size=micro_batch, sequence_length=S),
        eval=EvalConfig(num_batches=batches),
    )


class Rank:
    """An engine of one data rank, which adds nothing of other ranks."""

    runtime: Any = SimpleNamespace(
        device=torch.device("cpu"),
        groups=SimpleNamespace(dp="dp"),
        all_reduce=lambda tensor, group: tensor,  # pyright: ignore
    )

    def evaluate(self, microbatches: tuple[Microbatch, ...]) -> LossSum:
        nats, tokens = 0, 0
        for each in microbatches:
            mask = each.loss_mask_BS.numpy()
            nats += int(COSTS[each.tokens_BS.numpy()[mask], each.targets_BS.numpy()[mask]].sum())
            tokens += int(mask.sum())
        return LossSum(torch.tensor(nats, dtype=torch.float64), torch.tensor(tokens))


def evaluated(config: Config, data: int) -> dict[str, Evaluation]:
    """What all data ranks find together."""
    found: dict[str, Evaluation] = {}
    engine: Any = Rank()
    for rank in range(data):
        opened = RunData.open(config, Topology.of(world=data, tensor=1, pipeline=1, rank=rank))
        for name, evaluator in opened.evaluators().items():
            share, so_far = evaluator.evaluate(engine), found.get(name, Evaluation(0.0, 0, 0))
            found[name] = Evaluation(
                so_far.nats + share.nats, so_far.tokens + share.tokens, so_far.text_bytes + share.text_bytes
            )
    return found


def by_hand(*folders: Path) -> Evaluation:
    """Document by document; the bytes are those of the text that the shards were built from."""
    nats, tokens, text_bytes = 0, 0, 0
    for folder in folders:
        dataset = Dataset.open(folder)
        for document in range(len(dataset)):
            ids = dataset.tokens(document).astype(np.int64)
            nats += int(COSTS[ids[:-1], ids[1:]].sum())
            tokens += len(ids) - 1
            text_bytes += dataset.describe(document)[1]["text_bytes"]
    return Evaluation(float(nats), tokens, text_bytes)


@pytest.mark.parametrize(
    ("data", "global_batch", "micro_batch"),
    [(1, 8, 2), (1, 8, 8), (2, 8, 1), (4, 8, 2), (8, 8, 1), (2, 20, 5), (1, 1, 1)],
)
def test_the_same_numbers_for_every_data_size_and_batch_size(
    built: Path, other: Path, data: int, global_batch: int, micro_batch: int
) -> None:
    found = evaluated(config_of(built, other, global_batch=global_batch, micro_batch=micro_batch), data)
    first, second = by_hand(built / "valid"), by_hand(other / "valid")
    assert found == {"first": first, "both": by_hand(built / "valid", other / "valid"), "second": second}
    assert first != second
    record = found["second"].as_record()
    assert record["loss"] == pytest.approx(second.nats / second.tokens)
    assert record["bits_per_byte"] == pytest.approx(second.nats / math.log(2) / second.text_bytes)


def test_each_set_has_its_own_bound(built: Path, other: Path) -> None:
    few = evaluated(config_of(built, other, global_batch=2, batches=2), 1)
    assert all(0 < found.tokens <= 4 * S for found in few.values())
    assert few["first"] != few["second"]


def test_so_many_tokens_are_the_same_text_for_every_batch_size(built: Path, other: Path) -> None:
    found: list[dict[str, Evaluation]] = []
    for global_batch, micro_batch, data in ((1, 1, 1), (8, 2, 2), (20, 5, 1)):
        config = config_of(built, other, global_batch=global_batch, micro_batch=micro_batch)
        found.append(evaluated(replace(config, eval=EvalConfig(num_batches=1, num_tokens=5 * S - 1)), data))
    assert found[0] == found[1] == found[2]
    assert all(4 * S < each.tokens <= 5 * S for each in (found[0]["first"], found[0]["second"]))


def test_the_unigram_of_each_set(built: Path, other: Path) -> None:
    opened = RunData.open(config_of(built, other), Topology.of(world=1, tensor=1, pipeline=1, rank=0))
    found = opened.unigram_nats()
    assert list(found) == ["first", "both", "second"] and len(set(found.values())) == 3
    sizes = {name: len(sequences.predicted_tokens()) for name, sequences in opened.held_out.items()}
    together = found["first"] * sizes["first"] + found["second"] * sizes["second"]
    assert found["both"] == pytest.approx(together / sizes["both"])


def test_a_list_is_one_set_without_a_name(built: Path, other: Path) -> None:
    sources = [SourceConfig(str(folder / "valid")) for folder in (built, other)]
    (name,) = sets = held_out(DataConfig(valid=sources), sequence_length=S)
    assert name == "" and len(sets[name].datasets) == 2


def test_a_set_that_is_not_there_is_named(built: Path) -> None:
    sources = [SourceConfig(str(built / "valid"), set="a"), SourceConfig(str(built / "gone"), set="b")]
    with pytest.raises(UserError, match=r"gone: no such folder"):
        held_out(DataConfig(valid=sources), sequence_length=S)


def test_nothing_to_evaluate_on(built: Path, other: Path) -> None:
    config = config_of(built, other)
    config = Config(data=DataConfig(train=config.data.train, num_lanes=8), tokenizer=config.tokenizer)
    opened = RunData.open(config, Topology.of(world=1, tensor=1, pipeline=1, rank=0))
    assert opened.evaluators() == {} == opened.unigram_nats()
