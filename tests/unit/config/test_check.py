"""Each thing that can be wrong with a config is found, named and given a fix; all of them at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bigtrain.config.check import check
from bigtrain.config.cluster_rules import time_limit_minutes
from bigtrain.config.schema import (
    CacheConfig,
    Config,
    DataConfig,
    PrepareConfig,
    RemoteConfig,
    SourceConfig,
    TokenizerConfig,
    WeightConfig,
)

WORLD = 4


def config_with(**changes: Any) -> Config:
    """A sound config with keys changed: train__num_steps=3."""
    config = Config(
        data=DataConfig(train=[SourceConfig("train")], valid=[SourceConfig("valid")]),
        tokenizer=TokenizerConfig(path="tokenizer.model"),
    )
    config = dataclasses.replace(
        config, cluster=dataclasses.replace(config.cluster, procs_per_node=WORLD, device="cpu")
    )
    for name, value in changes.items():
        group, key = name.split("__")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{key: value})})
    return config


def found(world: int = WORLD, **changes: Any) -> dict[str, str]:
    return {problem.key: str(problem) for problem in check(config_with(**changes), world)}


def test_a_sound_config_has_no_problem() -> None:
    assert found() == {}


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"parallel__tensor": 3}, "parallel.tensor", "4 ranks"),
        ({"checkpoint__keep_every": 250}, "checkpoint.keep_every", "every checkpoint.interval=100 steps"),
        ({"checkpoint__keep_every": 5, "checkpoint__interval": 0}, "checkpoint.keep_every", "interval=0"),
        ({"checkpoint__interval": "often"}, "checkpoint.interval", "is not a whole number or auto"),
        ({"checkpoint__interval": -1}, "checkpoint.interval", "must be at least 0"),
        (
            {"checkpoint__keep_best": 1, "checkpoint__interval": "auto"},
            "checkpoint.keep_best",
            "with checkpoint.interval=auto",
        ),
        ({"cluster__mtbf_h": 0.0}, "cluster.mtbf_h", "must be more than 0"),
        ({"anomaly__spike": "ignore"}, "anomaly.spike", "no such choice"),
        ({"anomaly__window": 2}, "anomaly.window", "must be at least 4"),
        ({"checkpoint__keep_best": 1, "eval__interval": 0}, "checkpoint.keep_best", "every eval.interval=0 steps"),
        ({"checkpoint__keep_best": 1, "eval__interval": 150}, "checkpoint.keep_best", "not at each checkpoint"),
        ({"parallel__pipeline": 3}, "parallel.pipeline", "do not divide into tensor 1 x pipeline 3"),
        ({"parallel__pipeline": 2, "model__num_layers": 1}, "parallel.pipeline", "the model has 1"),
        (
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "model__num_layers": 3},
            "parallel.virtual_pipeline",
            "Set parallel.virtual_pipeline to at most 1",
        ),
        ({"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline", "there is one stage"),
        ({"precision__loss_scale_window": 0}, "precision.loss_scale_window", "at least 1"),
        ({"parallel__sequence": True}, "parallel.sequence", "one rank"),
        (
            {"parallel__sequence": True, "parallel__tensor": 2, "train__sequence_length": 255},
            "train.sequence_length",
            "254 or 256",
        ),
        ({"parallel__zero_stage": 4}, "parallel.zero_stage", "at most 3"),
        ({"parallel__gather": "stp"}, "parallel.gather", "nearest: step"),
        ({"model__num_attention_heads": 7}, "model.hidden_size", "multiple of model.num_attention_heads=7"),
        ({"model__num_query_groups": 3}, "model.num_attention_heads", "model.num_query_groups=3"),
        ({"model__num_query_groups": 1, "parallel__tensor": 2}, "model.num_query_groups", "parallel.tensor=2"),
        ({"model__ffn_hidden_size": 705, "parallel__tensor": 2}, "model.ffn_hidden_size", "704 or 706"),
        ({"model__vocab_size": 5001, "parallel__tensor": 2}, "model.vocab_size", "5000 or 5002"),
        ({"model__hidden_size": 264}, "model.hidden_size", "heads of 33"),
        ({"model__position": "learned", "train__sequence_length": 4096}, "train.sequence_length", "2048 tokens"),
        ({"model__position": "alibi"}, "model.position", "Choose rope, learned"),
        ({"train__global_batch_size": 17}, "train.global_batch_size", "16 or 32"),
        ({"train__micro_batch_size": 3}, "train.global_batch_size", "12 or 24"),
        ({"data__num_lanes": 6}, "data.num_lanes", "4 or 8"),
        ({"schedule__warmup_steps": 301}, "schedule.warmup_steps", "300 steps"),
        ({"train__num_tokens": 4096}, "schedule.warmup_steps", "1 steps"),
        ({"schedule__name": "wsd", "schedule__decay_fraction": 0.95}, "schedule.decay_fraction", "300"),
        ({"optim__lr": 0.0}, "optim.lr", "more than 0"),
        ({"optim__lr": float("nan")}, "optim.lr", "finite"),
        ({"train__num_steps": 0}, "train.num_steps", "at least 1"),
        ({"train__micro_batch_size": 0}, "train.micro_batch_size", "at least 1"),
        ({"model__num_attention_heads": 0}, "model.num_attention_heads", "at least 1"),
        ({"parallel__tensor": 0}, "parallel.tensor", "at least 1"),
        ({"eval__num_tokens": 0}, "eval.num_tokens", "at least 1"),
        ({"run__name": "../x"}, "run.name", "name of a folder"),
        ({"data__train": []}, "data.train", "nothing to train on"),
        ({"data__train": [SourceConfig("")]}, "data.train.0.path", "empty"),
        ({"data__valid": [SourceConfig("v", -1.0)]}, "data.valid.0.weight", "more than 0"),
        ({"data__valid": [SourceConfig("v", set="a.b")]}, "data.valid.0.set", "letters, digits, _ and -"),
        ({"data__valid": [SourceConfig("v", set="a\n")]}, "data.valid.0.set", "letters, digits, _ and -"),
        ({"data__valid": [SourceConfig("v", set="a"), SourceConfig("w")]}, "data.valid.1.set", "Name the set of this"),
        ({"data__train": [SourceConfig("t", set="a")]}, "data.train.0.set", "not in evaluation sets"),
        ({"data__train": [SourceConfig("t", -1.0)]}, "data.train.0.weight", "0 or more"),
        ({"data__train": [SourceConfig("t", float("nan"))]}, "data.train.0.weight", "finite"),
        ({"data__train": [SourceConfig("t", 0.0)]}, "data.train", "no source has a weight above 0"),
        ({"data__train": [SourceConfig("https://u:secret@h/x", 0.0)]}, "data.train", "https://***@h/x"),
        ({"data__valid": [SourceConfig("https://u:secret@h/x.tar")]}, "data.valid.0.path", "https://***@h/x.tar"),
        (
            {"data__train": [SourceConfig("t", 1.0, [WeightConfig(9, -2.0)])]},
            "data.train.0.then.0.weight",
            "0 or more",
        ),
        (
            {"data__train": [SourceConfig("t", 1.0, [WeightConfig(0, 2.0)])]},
            "data.train.0.then.0.from_tokens",
            "Set data.train.0.weight",
        ),
        (
            {"data__train": [SourceConfig("t", 1.0, [WeightConfig(9, 2.0), WeightConfig(9, 3.0)])]},
            "data.train.0.then.1.from_tokens",
            "two weights begin there",
        ),
        (
            {"data__train": [SourceConfig("t", 0.0, [WeightConfig(9, 2.0)])]},
            "data.train",
            "no source has a weight above 0 from token 0 on",
        ),
        (
            {
                "data__train": [
                    SourceConfig("t", 1.0, [WeightConfig(900, 0.0)]),
                    SourceConfig("u", 1.0, [WeightConfig(7, 0)]),
                ]
            },
            "data.train",
            "no source has a weight above 0 from token 900 on",
        ),
        ({"data__prepare": PrepareConfig(inputs=["*.py"])}, "data.prepare.out", "empty"),
        ({"data__prepare": PrepareConfig(prompt_field="text")}, "data.prepare.prompt_field", "field of the text too"),
        ({"data__prepare": PrepareConfig(inputs=["*.py"], out="s3://b/x")}, "data.prepare.out", "built on a disk"),
        (
            {"data__prepare": PrepareConfig(inputs=["*.py"], out="out"), "model__vocab_size": 2048},
            "model.vocab_size",
            "model.vocab_size=4096 or more",
        ),
        ({"data__train": [SourceConfig("gs://b/x")]}, "data.train.0.path", "gs:// is not known"),
        ({"data__valid": [SourceConfig("web/{0..9}.tar")]}, "data.valid.0.path", "needs tokenised shards"),
        ({"data__max_bad_fraction": 1.0}, "data.max_bad_fraction", "less than 1"),
        ({"data__max_bad_fraction": -0.1}, "data.max_bad_fraction", "at least 0"),
        ({"data__cache": CacheConfig(max_gb=0)}, "data.cache.max_gb", "more than 0"),
        ({"data__remote": RemoteConfig(timeout_s=float("inf"))}, "data.remote.timeout_s", "finite"),
        ({"data__remote": RemoteConfig(retries=-1)}, "data.remote.retries", "at least 0"),
        ({"tokenizer__path": ""}, "tokenizer.path", "empty"),
        ({"tokenizer__vocab_size": -1}, "tokenizer.vocab_size", "at least 0"),
        (
            {"data__prepare": PrepareConfig(inputs=["*.py"], out="out"), "tokenizer__vocab_size": 0},
            "tokenizer.vocab_size",
            "at least 1",
        ),
        (
            {
                "data__prepare": PrepareConfig(inputs=["*.py"], out="out"),
                "tokenizer__kind": "file",
                "tokenizer__specials": ["<|user|>"],
            },
            "tokenizer.specials",
            "Set tokenizer.specials=[]",
        ),
        ({"cluster__num_nodes": 2}, "cluster.num_nodes", "+cluster=slurm"),
        ({"cluster__kind": "slurm", "cluster__device": "auto"}, "cluster.device", "cuda or cpu"),
        ({"cluster__time": "tomorrow"}, "cluster.time", "D-HH:MM:SS"),
    ],
)
def test_problem(changes: dict[str, Any], key: str, says: str) -> None:
    problems = found(**changes)
    assert key in problems, problems
    assert says in problems[key]
    assert str(problems[key]).startswith(f"{key}=")


def test_a_source_may_have_no_weight_for_a_while() -> None:
    later = SourceConfig("u", 0.0, [WeightConfig(1_000_000, 0.5)])
    assert found(data__train=[SourceConfig("t", 1.0, [WeightConfig(2_000_000, 0.0)]), later]) == {}


def test_named_evaluation_sets_are_sound() -> None:
    sets = [SourceConfig("a", set="web_2-b"), SourceConfig("b", set="0"), SourceConfig("c", set="0")]
    assert found(data__valid=sets) == {}


def test_all_problems_at_once_and_no_division_by_a_bad_value() -> None:
    problems = found(parallel__tensor=0, train__micro_batch_size=0, model__num_attention_heads=0, optim__lr=-1.0)
    assert set(problems) == {"parallel.tensor", "train.micro_batch_size", "model.num_attention_heads", "optim.lr"}


def test_a_tokenizer_that_is_there_needs_no_size() -> None:
    prepared = PrepareConfig(inputs=["*.py"], out="out")
    assert found(data__prepare=prepared, tokenizer__kind="file", tokenizer__vocab_size=0) == {}


def test_unresolved_ranks_of_a_cluster_are_named() -> None:
    assert "cluster.procs_per_node" in found(world=0, cluster__kind="slurm", cluster__procs_per_node=0)


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("1-00:00:00", 1440),
        ("90", 90),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-2", 1560),
        ("1-2:30", 1590),
        ("0", None),
        ("x", None),
    ],
)
def test_time_limit(text: str, minutes: int | None) -> None:
    assert time_limit_minutes(text) == minutes


def test_raw_text_cannot_be_packed_by_size() -> None:
    text = DataConfig(train=[SourceConfig("web/*.tar")], pack="best_fit")
    config = dataclasses.replace(config_with(), data=text)
    assert any(problem.key == "data.pack" and "raw text" in str(problem) for problem in check(config, WORLD))
