"""bigtrain as a contender of tools/bench/step.py: its engine, on the job's model and data."""

from __future__ import annotations

from typing import Any

from common import GRAD_CLIP, OPTIM, Clock, Job, check_parameters


def ours(job: Job, clock: Clock) -> None:
    """ZeRO-1 on one rank, ZeRO-3 on more, fp32."""
    import torch

    from bigtrain.config.schema import ClusterConfig, Config, ParallelConfig, TrainConfig
    from bigtrain.data.loader import Microbatch
    from bigtrain.distributed.start import start, stop
    from bigtrain.engine.engine import Engine

    clock.mark("imports")
    config = Config(
        model=job.model,
        optim=OPTIM,
        parallel=ParallelConfig(zero_stage=1 if job.ranks == 1 else 3),
        train=TrainConfig(
            num_steps=job.num_warmup + job.num_steps,
            global_batch_size=job.batch_size,
            micro_batch_size=job.rank_batch_size,
            sequence_length=job.sequence_length,
            grad_clip=GRAD_CLIP,
        ),
        cluster=ClusterConfig(device="cpu"),
    )
    runtime = start(config)
    clock.mark("process group")
    engine = Engine(config, runtime)
    check_parameters(job, sum(getattr(p, "ds_numel", p.numel()) for chunk in engine.chunks for p in chunk.parameters()))
    clock.mark("engine")
    positions = torch.arange(job.sequence_length).expand(job.rank_batch_size, -1)

    def step(batch: Any) -> float:
        tokens = batch[:, :-1]
        microbatch = Microbatch(
            tokens_BS=tokens,
            targets_BS=batch[:, 1:],
            loss_mask_BS=torch.ones_like(tokens, dtype=torch.bool),
            positions_BS=positions,
            documents_BS=torch.zeros_like(tokens),
            single_document=True,
        )
        loss = engine.forward_backward([microbatch])
        engine.optimizer_step(OPTIM.lr)
        return loss.mean.item()

    clock.run(job, step)
    stop()
