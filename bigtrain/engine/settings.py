"""DeepSpeed's configuration from ours."""

from __future__ import annotations

from typing import Any

from bigtrain.config.derive import parameter_parts, parameters_of_stages
from bigtrain.config.schema import Config

KEEP = 10**15
"""Elements: more than any model has, so that nothing is released for its distance or its size."""


def deepspeed_config(config: Config, *, keep_gathered: bool, on_gpu: bool) -> dict[str, Any]:
    """The schedule owns the microbatches, so for DeepSpeed every step() ends one accumulation (its "unmanaged"
    mode). Gradients are accumulated and reduced in fp32 whatever the weights are.

    `keep_gathered`: ZeRO-3 keeps the gathered weights until the optimizer changes them."""
    parallel = config.parallel
    weights = max(stage.per_rank(parallel.tensor) for stage in parameters_of_stages(config.model, parallel))
    zero: dict[str, Any] = {
        "stage": max(parallel.zero_stage, 1),  # stage 0 is stage 1 over a group of one: see mpu.py
        "overlap_comm": on_gpu and parallel.zero_stage == 3,  # DeepSpeed's default; a CPU has no second stream
        "contiguous_gradients": on_gpu,  # against fragments there; on a CPU one more copy of every gradient
        # DeepSpeed allocates a whole bucket in every step, so it is no larger than what there is to reduce
        "reduce_bucket_size": min(weights, 500_000_000),
        "allgather_bucket_size": 2 * -(-min(weights, 500_000_000) // 2),  # even, as it wants it
        "memory_efficient_linear": False,
    }
    if parallel.zero_stage == 3:
        zero["round_robin_gradients"] = False
        # the gradient norm has a collective a sub-group, over stages that may differ in size
        zero["sub_group_size"] = KEEP
        if keep_gathered:
            # gathered once, behind the update. The thresholds of reuse only span a microbatch, and nothing under 1F1B
            zero |= {"stage3_param_persistence_threshold": KEEP, "stage3_model_persistence_threshold": KEEP}
        else:
            # released behind each module in forward and backward, and at most the next layer is gathered ahead
            layer = parameter_parts(config.model).layer.per_rank(parallel.tensor)
            zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": layer}
            zero["stage3_max_live_parameters"] = 2 * layer
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.train.grad_clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": KEEP,
    }
    if config.precision.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.precision.dtype == "fp16":
        settings["fp16"] = {"enabled": True, "loss_scale": 1}  # static for DeepSpeed: the engine sets it in every step
    return settings
