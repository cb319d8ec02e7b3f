"""The contenders of tools/bench/step.py: what a user would pick instead of bigtrain, as a user would write it.

Each is a function `(job, clock)` that builds the job's model, trains it, and reports to the clock. They run in
processes of their own. `CONTENDERS` at the end names them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import GRAD_CLIP, OPTIM, Clock, Job, check_parameters
from ours import ours

if TYPE_CHECKING:
    from torch import nn


def gemm(job: Job, clock: Clock) -> None:
    """The machine's peak: the best fp32 matrix product, in floating-point operations a second."""
    import torch

    clock.mark("imports")
    best = 0.0
    for size in (1024, 1536, 2048):
        a, b, c = (torch.randn(size, size) for _ in range(3))
        for _ in range(job.num_steps):
            begin = time.perf_counter()
            torch.mm(a, b, out=c)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    clock.notes["peak_flops"] = best


def plain(job: Job, clock: Clock) -> None:
    """One process: PlainLlama, torch's AdamW, torch's clipping."""
    _plain(job, clock, wrap=lambda model: model)


def ddp(job: Job, clock: Clock) -> None:
    """The same under DistributedDataParallel."""

    def wrap(model: nn.Module) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    _plain(job, clock, wrap)


def fsdp2(job: Job, clock: Clock) -> None:
    """The same under fully_shard (FSDP2), each block and the rest: what ZeRO-3 does, by PyTorch."""

    def wrap(model: Any) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (job.ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    _plain(job, clock, wrap)


def trainer(job: Job, clock: Clock) -> None:
    """Hugging Face's Trainer with its defaults."""
    _trainer(job, clock)


def trainer_zero3(job: Job, clock: Clock) -> None:
    """Hugging Face's Trainer with the ZeRO-3 configuration of its documentation, without offloading."""
    config = {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 10**9,
    }
    _trainer(job, clock, deepspeed=config)


def deepspeed_zero3(job: Job, clock: Clock) -> None:
    """Transformers' Llama under `deepspeed.initialize`, ZeRO-3 with DeepSpeed's defaults, torch's fused AdamW."""
    import deepspeed
    import torch
    from transformers import LlamaForCausalLM

    clock.mark("imports")
    deepspeed.init_distributed("gloo")
    clock.mark("process group")
    config = {
        "train_micro_batch_size_per_gpu": job.rank_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": GRAD_CLIP,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(_llama_config(job))
    check_parameters(job, sum(p.ds_numel for p in model.parameters()))  # type: ignore[attr-defined]
    clock.mark("model")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), weight_decay=OPTIM.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    clock.mark("engine")

    def step(batch: Any) -> float:
        tokens = batch[:, :-1].contiguous()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    clock.run(job, step)


def _plain(job: Job, clock: Clock, wrap: Callable[[nn.Module], nn.Module]) -> None:
    import torch
    import torch.distributed as dist
    from plain_llama import PlainLlama
    from torch.nn import functional as F

    clock.mark("imports")
    if job.ranks > 1:
        dist.init_process_group("gloo")
        clock.mark("process group")
    torch.manual_seed(0)
    bare = PlainLlama(job.model)
    check_parameters(job, sum(p.numel() for p in bare.parameters()))
    clock.mark("model")
    kind = "fused"
    if job.num_warmup:  # not where the start is what is measured
        kind = _faster_adamw(bare)
        clock.mark("choice of AdamW")
    clock.notes["adamw"] = kind
    model = wrap(bare)
    optimizer = _adamw(model, kind)
    clock.mark("engine")

    def step(batch: Any) -> float:
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    clock.run(job, step)


def _adamw(model: nn.Module, kind: str) -> Any:
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": OPTIM.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, **{kind: True})


def _faster_adamw(model: nn.Module) -> str:
    """fused or foreach: what takes less time on a copy of this model. All ranks take rank 0's answer."""
    import copy

    import torch
    import torch.distributed as dist

    seconds: dict[str, float] = {}
    for kind in ("fused", "foreach"):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = _adamw(twin, kind)
        optimizer.step()
        times: list[float] = []
        for _ in range(5):
            begin = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - begin)
        seconds[kind] = min(times)
    choice = [min(seconds, key=lambda kind: seconds[kind])]
    if dist.is_initialized():
        dist.broadcast_object_list(choice)
    return choice[0]


def _llama_config(job: Job) -> Any:
    from transformers import LlamaConfig

    m = job.model
    return LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_query_groups,
        max_position_embeddings=m.max_positions,
        rms_norm_eps=m.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        use_cache=False,
    )


def _trainer(job: Job, clock: Clock, deepspeed: dict[str, Any] | None = None) -> None:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    clock.mark("imports")
    examples = [row for batch in _whole_batches(job) for row in batch]

    class Report(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark("engine")

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=job.rank_batch_size,
            max_steps=job.num_warmup + job.num_steps,
            learning_rate=OPTIM.lr,
            adam_beta1=OPTIM.beta1,
            adam_beta2=OPTIM.beta2,
            weight_decay=OPTIM.weight_decay,
            max_grad_norm=GRAD_CLIP,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            dataloader_pin_memory=False,
            deepspeed=deepspeed,
        )
        _ = arguments.device  # starts the process group where there is one
        clock.mark("process group")
        model = LlamaForCausalLM(_llama_config(job))
        check_parameters(job, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))
        clock.mark("model")
        result = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[Report()]).train()  # type: ignore[arg-type]
        clock.losses.append(result.training_loss)


def _whole_batches(job: Job) -> list[list[dict[str, Any]]]:
    """What a dataset of the Trainer holds: it deals the examples to the ranks itself, and shifts the labels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (job.batch_size, job.sequence_length)
    batches = [
        torch.randint(job.model.vocab_size, shape, generator=generator) for _ in range(job.num_warmup + job.num_steps)
    ]
    return [[{"input_ids": row, "labels": row} for row in batch] for batch in batches]


CONTENDERS: dict[str, Callable[[Job, Clock], None]] = {
    "gemm": gemm,
    "plain": plain,
    "trainer": trainer,
    "ours": ours,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "deepspeed-zero3": deepspeed_zero3,
    "trainer-zero3": trainer_zero3,
}
