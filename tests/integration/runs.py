"""Starts runs of real ranks for the tests, and reads what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import frozen
from bigtrain.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrackerConfig,
    TrainConfig,
)

STEPS, HALF, VOCABULARY = 24, 12, 512
DEADLINE_S = 300.0
LAUNCHER = (
    "import sys; from bigtrain.config.frozen import load; from bigtrain.launching import attempts; "
    "sys.exit(attempts.train(load(sys.argv[1])))"
)
LAYOUTS: dict[str, tuple[dict[str, Any], str, float]] = {
    "zero3-tensor2": ({"zero_stage": 3, "tensor": 2}, "fp32", 0.0),
    "zero1-pipeline2-fp16-dropout": ({"zero_stage": 1, "pipeline": 2}, "fp16", 0.1),
}
"""parallel, precision, dropout."""


def build_shards(out: Path) -> Path:
    """Shards of 60 modules of the standard library, and their tokenizer."""
    from bigtrain.data import tokenizer_training as training
    from bigtrain.data.build import BuildOptions, build
    from bigtrain.data.sentencepiece_tokenizer import SentencePieceTokenizer

    library = Path(os.__file__).parent
    inputs = sorted(str(path) for path in library.glob("*.py") if path.stat().st_size < 60_000)[:60]
    model = training.train([Path(path).read_text(encoding="utf-8") for path in inputs], vocab_size=VOCABULARY)
    tokenizer = SentencePieceTokenizer(model)
    build(BuildOptions(inputs, held_out=0.15), tokenizer=tokenizer, out=out, num_workers=0, progress=False)
    return out


def config_of(run_dir: Path, data: Path, layout: str = "zero3-tensor2") -> Config:
    parallel, dtype, dropout = LAYOUTS[layout]
    return Config(
        run=RunConfig(name=run_dir.name, dir=str(run_dir)),
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=128,
            vocab_size=VOCABULARY,
            max_positions=128,
            hidden_dropout=dropout,
            attention_dropout=dropout,
        ),
        data=DataConfig(
            train=[SourceConfig(str(data / "train"))], valid=[SourceConfig(str(data / "valid"))], num_lanes=8
        ),
        tokenizer=TokenizerConfig(path=str(data / "train" / "tokenizer.model"), vocab_size=VOCABULARY),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=5),
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(dtype=dtype, initial_loss_scale=1024.0, loss_scale_window=5),
        train=TrainConfig(num_steps=STEPS, global_batch_size=8, micro_batch_size=2, sequence_length=64),
        checkpoint=CheckpointConfig(interval=0, keep=2),
        eval=EvalConfig(interval=HALF, num_batches=2),
        tracker=TrackerConfig(kind="none", log_interval=10),
        cluster=ClusterConfig(device="cpu", procs_per_node=2),
    )


@dataclass
class Attempt:
    """One start of a run, ended."""

    status: int
    output: str
    """Of rank 0 and of the launcher."""
    ranks: list[str]
    """Logs of the other ranks."""


def launch(config: Config) -> subprocess.Popen[str]:
    frozen.save(config, config.run.dir)
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, config.run.dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def ended(config: Config, launcher: subprocess.Popen[str]) -> Attempt:
    try:
        output, _ = launcher.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        launcher.kill()
        raise
    logs = sorted((Path(config.run.dir) / "logs").glob("rank-*.log"))
    return Attempt(launcher.returncode, output, [log.read_text() for log in logs])


def run(config: Config) -> Attempt:
    return ended(config, launch(config))


def run_well(config: Config) -> Path:
    attempt = run(config)
    assert attempt.status == 0, attempt.output + "".join(attempt.ranks)
    return Path(config.run.dir)


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    whole_lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [record for record in map(json.loads, whole_lines) if record["kind"] == kind]


def at_step(run_dir: Path, step: int) -> Callable[[], bool]:
    def reached() -> bool:
        return (run_dir / "metrics.jsonl").exists() and any(r["step"] >= step for r in records(run_dir, "train"))

    return reached


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert launcher.poll() is None, f"it ended before: {launcher.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def trajectory(run_dir: Path) -> list[tuple[Any, ...]]:
    """All that a step is, but its time."""
    keys = ("step", "tokens", "loss", "lr", "grad_norm")
    return [tuple(record[key] for key in keys) for record in records(run_dir, "train")]


def last_step(run_dir: Path) -> int:
    return records(run_dir, "train")[-1]["step"]


def committed(run_dir: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-*/COMMITTED"))
