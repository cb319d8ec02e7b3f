"""bigtrain as a contender of tools/bench/step.py: its engine, on the job's model and data."""

from __future__ import annotations

from typing import Any

from common import GRAD_CLIP, OPTIM, Clock, Job, check_parameters

LAYOUT_MICRO_BATCH_SIZE = 2
"""Sequences: the same for every layout, so that only the layout differs."""


def ours(job: Job, clock: Clock) -> None:
    """The job's layout; without one data parallel, ZeRO-1 on one rank and ZeRO-3 on more. fp32."""
    from bigtrain.config.schema import ClusterConfig, Config, ParallelConfig, TrainConfig
    from bigtrain.distributed.start import start, stop
    from bigtrain.engine.engine import Engine

    clock.mark("imports")
    config = Config(
        model=job.model,
        optim=OPTIM,
        parallel=_layout(job.layout) if job.layout else ParallelConfig(zero_stage=1 if job.ranks == 1 else 3),
        train=TrainConfig(
            num_steps=job.num_warmup + job.num_steps,
            global_batch_size=job.batch_size,
            micro_batch_size=LAYOUT_MICRO_BATCH_SIZE if job.layout else job.rank_batch_size,
            sequence_length=job.sequence_length,
            grad_clip=GRAD_CLIP,
        ),
        cluster=ClusterConfig(device="cpu"),
    )
    runtime = start(config)
    clock.mark("process group")
    engine = Engine(config, runtime)
    if runtime.topology.world == runtime.topology.data:
        parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
        check_parameters(job, sum(getattr(p, "ds_numel", p.numel()) for p in parameters))
    clock.mark("engine")

    def step(batch: Any) -> float:
        if job.layout:  # else the job has dealt out the sequences
            batch = batch.chunk(runtime.topology.data)[runtime.topology.data_rank]
        loss = engine.forward_backward([_microbatch(rows) for rows in batch.split(config.train.micro_batch_size)])
        engine.optimizer_step(OPTIM.lr)
        return loss.mean.item()

    clock.run(job, step)
    stop()


def _layout(name: str) -> Any:
    from bigtrain.config.schema import ParallelConfig
    from tools.certificate.matrix import parse

    return ParallelConfig(**parse(name).settings())


def _microbatch(rows: Any) -> Any:
    """Of rows of tokens [B, S + 1], one document each."""
    from bigtrain.data.microbatch import Microbatch

    return Microbatch(
        tokens_BS=rows[:, :-1],
        targets_BS=rows[:, 1:],
        starts_B=[[0]] * len(rows),
        num_tokens_B=[rows.shape[1]] * len(rows),
    )
