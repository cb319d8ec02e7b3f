"""What is wrong with a config. Pure: every problem at once, before anything starts.

First each value alone (choices, ranges), then the rules that tie values together; a rule is asked only when the values
that it divides by are sound.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from bigtrain.config import keys
from bigtrain.config.cluster_rules import cluster_problems
from bigtrain.config.data_rules import data_problems
from bigtrain.config.derive import num_steps
from bigtrain.config.problem import Problem
from bigtrain.config.schema import Config


def check(config: Config, world: int) -> list[Problem]:
    """Every problem of `config` on `world` ranks, none where it is sound. Touches no disk and no device."""
    problems = [*_choices(config), *_ranges(config)]
    bad = {problem.key for problem in problems}
    if world < 1:
        bad.add("cluster.procs_per_node")
    for needs, rule in _RULES:
        if not bad.intersection(needs):
            problems += rule(config, world)
    return problems


def get(config: Config, path: str) -> Any:
    """The value of a key."""
    return operator.attrgetter(keys.attribute(path))(config)


def _choices(config: Config) -> Iterator[Problem]:
    for key in keys.all_keys():
        value = get(config, key.path)
        if key.choices and value not in key.choices:
            near = keys.nearest(value, key.choices, 1)
            fix = f"Choose {', '.join(key.choices)}" + (f"; nearest: {near[0]}" if near else "")
            yield Problem(key.path, value, "no such choice", fix)
        if key.words and isinstance(value, str) and value not in key.words:
            yield Problem(key.path, value, f"is not {key.kind}", f"Set it to {key.kind}")


_COMPARE: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    ">=": (operator.ge, "at least"),
    ">": (operator.gt, "more than"),
    "<=": (operator.le, "at most"),
    "<": (operator.lt, "less than"),
}

_AT_LEAST_ONE = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.vocab_size",
    "model.max_positions",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "train.num_steps",
    "train.num_tokens",
    "train.global_batch_size",
    "train.micro_batch_size",
    "data.num_lanes",
    "checkpoint.keep",
    "anomaly.max_skips",
    "eval.num_batches",
    "eval.num_tokens",
    "tracker.log_interval",
    "cluster.num_nodes",
    "cluster.procs_per_node",
    "cluster.cpus_per_proc",
    "cluster.array_parallelism",
    "cluster.signal_s",
    "precision.initial_loss_scale",
    "precision.loss_scale_window",
]
_NOT_NEGATIVE = [
    "run.seed",
    "train.grad_clip",
    "optim.beta1",
    "optim.beta2",
    "optim.weight_decay",
    "schedule.warmup_steps",
    "schedule.min_ratio",
    "schedule.decay_fraction",
    "data.num_workers",
    "data.max_bad_fraction",
    "tokenizer.vocab_size",
    "data.remote.retries",
    "checkpoint.interval",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "anomaly.max_rewinds",
    "eval.interval",
    "model.attention_dropout",
    "model.hidden_dropout",
    "parallel.zero_stage",
    "cluster.max_restarts",
    "watchdog.startup_s",
    "watchdog.data_s",
    "watchdog.step_s",
    "watchdog.eval_s",
    "watchdog.save_s",
    "watchdog.factor",
]

_RANGES: tuple[tuple[str, str, float], ...] = (
    *((key, ">=", 1) for key in _AT_LEAST_ONE),
    *((key, ">=", 0) for key in _NOT_NEGATIVE),
    ("train.sequence_length", ">=", 2),
    ("train.stop_after", ">=", 1),
    ("data.max_bad_fraction", "<", 1),
    ("cluster.mtbf_h", ">", 0),
    ("cluster.device_memory_gib", ">", 0),
    ("anomaly.window", ">=", 4),
    ("anomaly.threshold", ">", 0),
    ("parallel.zero_stage", "<=", 3),
    ("model.rope_theta", ">", 0),
    ("model.norm_eps", ">", 0),
    ("model.init_std", ">", 0),
    ("model.attention_dropout", "<", 1),
    ("model.hidden_dropout", "<", 1),
    ("optim.lr", ">", 0),
    ("optim.eps", ">", 0),
    ("optim.beta1", "<", 1),
    ("optim.beta2", "<", 1),
    ("schedule.min_ratio", "<=", 1),
    ("schedule.decay_fraction", "<=", 1),
    ("data.cache.max_gb", ">", 0),
    ("data.remote.timeout_s", ">", 0),
    ("data.prepare.held_out", ">", 0),
    ("data.prepare.held_out", "<", 1),
)


def _ranges(config: Config) -> Iterator[Problem]:
    for key, sign, bound in _RANGES:
        value = get(config, key)
        compare, words = _COMPARE[sign]
        if isinstance(value, str):  # a word in place of a number
            continue
        if value is not None and not math.isfinite(value):
            yield Problem(key, value, "is no finite number", f"Set {key} to a number, {words} {bound:g}")
        elif value is not None and not compare(value, bound):
            yield Problem(key, value, f"must be {words} {bound:g}", f"Set it to {words} {bound:g}")


def _run(config: Config, world: int) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", config.run.name):
        yield Problem(
            "run.name", config.run.name, "is the name of a folder: letters, digits, . _ + -", "Choose another run.name"
        )
    if not config.run.dir:
        yield Problem("run.dir", config.run.dir, "is empty", "Set run.dir=FOLDER, or leave it out for runs/NAME")


def _layout(config: Config, world: int) -> Iterator[Problem]:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    if world % (tensor * pipeline):
        cluster = config.cluster
        ranks = (
            f"{world} ranks (cluster.num_nodes={cluster.num_nodes} x cluster.procs_per_node={cluster.procs_per_node})"
        )
        layout = f"tensor {tensor} x pipeline {pipeline}"
        wrong, other = ("tensor", 1) if world % tensor else ("pipeline", tensor)
        fitting = [str(size) for size in range(1, min(world, 64) + 1) if world % (size * other) == 0]
        fix = f"Set parallel.{wrong} to one of {', '.join(fitting)}, or change cluster.procs_per_node"
        value = getattr(config.parallel, wrong)
        yield Problem(f"parallel.{wrong}", value, f"{ranks} do not divide into {layout}", fix)
    if config.parallel.sequence and tensor == 1:
        message = "sequence parallelism shards over the tensor group, which has one rank here"
        yield Problem("parallel.sequence", True, message, "Set parallel.sequence=false, or parallel.tensor=2 or more")
    if config.parallel.sequence and config.train.sequence_length % tensor:
        length = config.train.sequence_length
        message = f"with parallel.sequence it must be a multiple of parallel.tensor={tensor}"
        yield Problem(
            "train.sequence_length", length, message, f"Set {_multiples('train.sequence_length', length, tensor)}"
        )


def _pipeline(config: Config, world: int) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and pipeline == 1:
        message = "chunks are interleaved over the stages of a pipeline, and there is one stage"
        fix = "Set parallel.virtual_pipeline=1, or parallel.pipeline=2 or more"
        yield Problem("parallel.virtual_pipeline", virtual, message, fix)
    elif pipeline * virtual > layers:
        key = "parallel.virtual_pipeline" if pipeline <= layers else "parallel.pipeline"
        message = f"{pipeline} stages x {virtual} chunks want a layer each, and the model has {layers}"
        fix = f"Set {key} to at most {layers // pipeline if pipeline <= layers else layers}"
        yield Problem(key, get(config, key), message, fix)


def _model(config: Config, world: int) -> Iterator[Problem]:
    model, tensor = config.model, config.parallel.tensor
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.hidden_size % heads:
        message = f"must be a multiple of model.num_attention_heads={heads}"
        yield Problem(
            "model.hidden_size",
            model.hidden_size,
            message,
            _multiples("Set model.hidden_size", model.hidden_size, heads),
        )
    elif model.position == "rope" and model.hidden_size // heads % 2:
        message = f"{heads} heads make heads of {model.hidden_size // heads}, and rope turns pairs"
        yield Problem("model.hidden_size", model.hidden_size, message, "Choose heads of an even size")
    if heads % groups:
        message = f"must be a multiple of model.num_query_groups={groups}"
        yield Problem("model.num_attention_heads", heads, message, "Choose a model.num_query_groups that divides it")
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        value = getattr(model, name)
        if value % tensor:
            fix = f"{_multiples(f'Set model.{name}', value, tensor)}, or another parallel.tensor"
            yield Problem(f"model.{name}", value, f"is not divisible by parallel.tensor={tensor}", fix)


def _positions(config: Config, world: int) -> Iterator[Problem]:
    length, positions = config.train.sequence_length, config.model.max_positions
    if config.model.position == "learned" and length > positions:
        message = f"the model has learned positions for {positions} tokens only (model.max_positions)"
        yield Problem("train.sequence_length", length, message, "Lower it, or raise model.max_positions")


def _batch(config: Config, world: int) -> Iterator[Problem]:
    layout = config.parallel.tensor * config.parallel.pipeline
    if world % layout:
        return
    data, train = world // layout, config.train
    together = train.micro_batch_size * data
    if train.global_batch_size % together:
        message = (
            f"does not divide into microbatches of train.micro_batch_size={train.micro_batch_size} sequences on "
            f"{data} data-parallel ranks"
        )
        fix = _multiples("Set train.global_batch_size", train.global_batch_size, together)
        yield Problem("train.global_batch_size", train.global_batch_size, message, fix)
    if config.data.num_lanes % data:
        fix = _multiples("Set data.num_lanes", config.data.num_lanes, data)
        message = f"must be a multiple of the data-parallel size, {data} here"
        yield Problem("data.num_lanes", config.data.num_lanes, message, fix)


def _schedule(config: Config, world: int) -> Iterator[Problem]:
    warmup, steps = config.schedule.warmup_steps, num_steps(config.train)
    if warmup > steps:
        message = f"the warm-up is longer than the training of {steps} steps"
        yield Problem("schedule.warmup_steps", warmup, message, f"Set schedule.warmup_steps to at most {steps}")
    elif config.schedule.name == "wsd" and warmup + config.schedule.decay_fraction * steps > steps:
        message = f"{warmup} steps of warm-up and this share of decay are more than the {steps} steps"
        yield Problem("schedule.decay_fraction", config.schedule.decay_fraction, message, "Lower one of the two")


def _checkpoint(config: Config, world: int) -> Iterator[Problem]:
    interval, every, best = config.checkpoint.interval, config.checkpoint.keep_every, config.checkpoint.keep_best
    if isinstance(interval, str):
        if best:
            message = (
                "with checkpoint.interval=auto no step is known beforehand at which the loss is measured and saved"
            )
            yield Problem("checkpoint.keep_best", best, message, "Set checkpoint.interval to a number of steps")
        return
    if every and (not interval or every % interval):
        message = f"checkpoints are made every checkpoint.interval={interval} steps"
        fix = _multiples("Set checkpoint.keep_every", every, interval) if interval else "Set checkpoint.interval"
        yield Problem("checkpoint.keep_every", every, message, fix)
    if best and (not config.eval.interval or interval % config.eval.interval):
        message = f"the loss is measured every eval.interval={config.eval.interval} steps, not at each checkpoint"
        fix = f"Set eval.interval={interval}, or a divisor of it"
        yield Problem("checkpoint.keep_best", best, message, fix)


def _start(config: Config, world: int) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    if checkpoint.init_from and checkpoint.resume not in ("auto", "never"):
        message = f"a run starts from weights, or goes on from checkpoint.resume={checkpoint.resume}, not both"
        yield Problem("checkpoint.init_from", checkpoint.init_from, message, "Leave one of them out")


_Rule = Callable[[Config, int], Iterator[Problem]]
_RULES: tuple[tuple[tuple[str, ...], _Rule], ...] = (
    ((), _run),
    (("parallel.tensor", "parallel.pipeline", "cluster.procs_per_node", "cluster.num_nodes"), _layout),
    (("parallel.pipeline", "parallel.virtual_pipeline", "model.num_layers"), _pipeline),
    (
        (
            "model.hidden_size",
            "model.num_attention_heads",
            "model.num_query_groups",
            "model.ffn_hidden_size",
            "model.vocab_size",
            "parallel.tensor",
        ),
        _model,
    ),
    (("train.sequence_length", "model.max_positions"), _positions),
    (
        (
            "parallel.tensor",
            "parallel.pipeline",
            "cluster.procs_per_node",
            "cluster.num_nodes",
            "train.global_batch_size",
            "train.micro_batch_size",
            "data.num_lanes",
        ),
        _batch,
    ),
    (
        (
            "schedule.warmup_steps",
            "schedule.decay_fraction",
            "train.num_steps",
            "train.num_tokens",
            "train.global_batch_size",
            "train.sequence_length",
        ),
        _schedule,
    ),
    (("checkpoint.interval", "checkpoint.keep_every", "checkpoint.keep_best", "eval.interval"), _checkpoint),
    ((), data_problems),
    ((), _start),
    ((), cluster_problems),
)


def _multiples(prefix: str, value: int, step: int) -> str:
    """`prefix` with the nearest multiples of `step` around `value`."""
    below, above = value // step * step, (value // step + 1) * step
    return f"{prefix}={below} or {above}" if below else f"{prefix}={above}"
