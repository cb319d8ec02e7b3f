"""One pipeline stage of Megatron under DeepSpeed's ZeRO: two verbs, whatever the layout.

`forward_backward` runs a step's microbatches through Megatron's schedule; `optimizer_step` reduces, clips and updates.
Loss and gradient are means over the predicted tokens of the whole global batch, so neither depends on how the batch was
cut.

How the two vendors meet (DeepSpeed 0.19.8, Megatron-core 0.16.1):

- The schedule calls autograd itself, so DeepSpeed sees its "PyTorch-style" backward. Before each one its
  `clear_backward_seen_flag` must run, or the second backward in a row never reduces; and before DeepSpeed's own hook on
  the output, or layers that are recomputed are reduced in part (stage.py: `announce_backward`).
- DeepSpeed averages over its data-parallel group; we want a sum over ranks divided by the tokens, so the loss is
  multiplied by the group's size first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from bigtrain.config.schema import Config
from bigtrain.data.microbatch import Microbatch
from bigtrain.distributed.rng import seed_step
from bigtrain.distributed.sharding import Shard
from bigtrain.distributed.start import Runtime
from bigtrain.engine import deepspeed_patches
from bigtrain.engine.gather import Releases, held, keep_gathered
from bigtrain.engine.mpu import Mpu
from bigtrain.engine.settings import deepspeed_config
from bigtrain.engine.stage import TIED, Handle, Stage, announce_backward
from bigtrain.engine.tied import TiedWeight
from bigtrain.engine.vendor import import_deepspeed
from bigtrain.model.build import EMBEDDING, Decoder, build, shards_of
from bigtrain.model.initial import initialize
from bigtrain.optim.loss_scale import SMALLEST, LossScale
from bigtrain.optim.optimizer import build_optimizer


@dataclass(frozen=True)
class LossSum:
    """Over the whole global batch, the same on every rank. Tensors, so that asking for them is the only wait."""

    nats: torch.Tensor
    """Sum of the cross-entropy of the predicted tokens, fp32 scalar."""
    tokens: torch.Tensor
    """Predicted tokens, int64 scalar."""

    @property
    def mean(self) -> torch.Tensor:
        return self.nats / self.tokens.clamp(min=1)


class Engine:
    """Model, gradients and optimizer of this rank. Building it is collective."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        deepspeed = import_deepspeed(runtime.device)
        self.mpu = Mpu(runtime, zero_stage=config.parallel.zero_stage)
        deepspeed_patches.apply(self.mpu.sharding_group)
        on_gpu = runtime.device.type == "cuda"
        if not on_gpu:
            deepspeed_patches.apply_on_cpu()
        self.keeps_gathered = config.parallel.zero_stage == 3 and keep_gathered(config, runtime)
        """`parallel.gather`, decided: ZeRO-3 gathers each weight once a step."""
        settings = deepspeed_config(config, keep_gathered=self.keeps_gathered, on_gpu=on_gpu)
        self.chunks = self._build_chunks(deepspeed, settings)
        self._shards = [each for chunk in self.chunks for each in shards_of(chunk, runtime.topology)]
        self._tied = self._tied_weight()
        stage = Stage(self.chunks, self._tied)
        self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=stage,
            optimizer=build_optimizer(stage.named_parameters(), config.optim),
            config=settings,
            mpu=self.mpu,
            dist_init_required=False,
        )
        releases_late = config.parallel.zero_stage == 3 and config.parallel.pipeline > 1 and not self.keeps_gathered
        self._releases = [Releases(chunk) for chunk in self.chunks] if releases_late else []
        self._handles = [Handle(chunk, partial(self._forward, index)) for index, chunk in enumerate(self.chunks)]
        self._schedule = get_forward_backward_func()
        seed_step(config.run.seed, 0, runtime.topology)  # sequence parallelism forks a stream in evaluations too
        self.loss_scale = LossScale(config.precision.initial_loss_scale, config.precision.loss_scale_window)
        """Of fp16; without effect in other precisions."""
        self.steps_taken = 0
        self.grad_norm = 0.0
        """Of the last step, before clipping."""
        self.overflowed = False
        """Whether the last step was dropped since its gradient overflowed at fp16's loss scale, which is lower now."""

    def shards(self) -> list[tuple[Shard, torch.nn.Parameter]]:
        """Every parameter of this stage with its place in the whole model."""
        return self._shards

    def _build_chunks(self, deepspeed: Any, settings: dict[str, Any]) -> list[Decoder]:
        """Under ZeRO-3 each parameter is cut up as soon as its module is made, and only this rank's piece is filled."""
        config, topology = self.config, self.runtime.topology
        with deepspeed.zero.Init(
            enabled=config.parallel.zero_stage == 3,
            data_parallel_group=self.mpu.sharding_group,
            config_dict_or_path=settings,
            remote_device=self.runtime.device.type,
            mpu=self.mpu,
        ):
            chunks = build(config, self.runtime)
        for chunk in chunks:
            initialize(chunk, config.model, seed=config.run.seed, topology=topology)
            for shard, parameter in shards_of(chunk, topology):
                counted_here = shard.dim is not None or topology.tensor_rank == 0
                is_copy = chunk.copies_embedding and shard.name == EMBEDDING
                # what DeepSpeed's gradient norm counts on this rank: see mpu.py
                parameter.tensor_model_parallel = counted_here and not is_copy  # type: ignore[attr-defined]
                if getattr(parameter, "sequence_parallel", False):
                    parameter.register_hook(self._sum_over_tensor_group)
        return chunks

    def _tied_weight(self) -> TiedWeight | None:
        """The weight of this stage that another stage has too."""
        topology = self.runtime.topology
        if not self.config.model.tie_embeddings or topology.pipeline == 1:
            return None
        for shard, parameter in self.shards():
            if shard.name == EMBEDDING:
                return TiedWeight(parameter, self.runtime.groups.embd)
        return None

    def _forward(self, chunk: int, **inputs: Any) -> torch.Tensor:
        output = self._deepspeed(chunk=chunk, **inputs)
        if not output.requires_grad:
            return output
        if self._releases and chunk != TIED:
            self._releases[chunk].after_forward()
        return announce_backward(output, partial(self._before_backward, chunk))

    def _before_backward(self, chunk: int) -> None:
        """DeepSpeed's flags, which its own `backward` would set."""
        if self._releases and chunk != TIED:
            self._releases[chunk].before_backward()
        self.optimizer.clear_backward_seen_flag()
        self._deepspeed._manual_backward_expected = True  # the loss is scaled already

    def _sum_over_tensor_group(self, gradient: torch.Tensor) -> torch.Tensor:
        """Each tensor rank saw a part of the sequence. A hook on the leaf runs before DeepSpeed reduces."""
        return self.runtime.all_reduce(gradient.float().contiguous(), group=self.runtime.groups.tp).to(gradient.dtype)

    def forward_backward(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """Add the gradient of this step's loss. `microbatches`: this data rank's share of the global batch."""
        seed_step(self.config.run.seed, self.steps_taken, self.runtime.topology)
        self._deepspeed.train()
        tokens = self._count_tokens(microbatches)
        # DeepSpeed will divide by the size of its group, which for ZeRO 0 is one, and by the loss scale
        scale = self.mpu.get_data_parallel_world_size() / tokens.clamp(min=1).float()
        if self.config.precision.dtype == "fp16":
            self.optimizer.override_loss_scale(self.loss_scale.value)
            scale = scale * self.loss_scale.value
        nats = self._run(microbatches, scale, forward_only=False)
        for part in self._tied.summed() if self._tied is not None else ():
            self._forward(TIED, gradient=part).backward()
        return LossSum(nats, tokens)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """The loss alone, without dropout."""
        self._deepspeed.eval()
        return LossSum(self._run(microbatches, torch.ones(()), forward_only=True), self._count_tokens(microbatches))

    def optimizer_step(self, lr: float, *, skip: bool = False) -> float:
        """Reduce the gradients over the data ranks, clip, update with learning rate `lr`. Returns the global gradient
        norm before clipping, inf where it is not finite: DeepSpeed then drops the gradients on all ranks alike, and
        weights, moments and Adam's step count stay as they are, to the bit. With `skip` that is done to any gradient,
        and the norm is nan: it is not known."""
        if self.config.parallel.zero_stage == 0 and self.runtime.topology.data > 1:
            self._all_reduce_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with deepspeed_patches.update_refused(self.optimizer, self.runtime.device) if skip else nullcontext():
            self._deepspeed.step()
        if self.config.parallel.zero_stage == 3:
            # DeepSpeed overwrites in the first backward of a step and adds in the others; a chunk may come later
            self.optimizer.grad_partitions_flat_buffer.zero_()
        self.steps_taken += 1
        self.grad_norm = math.nan if skip else float(self._deepspeed.get_global_grad_norm())
        self.overflowed = False
        if self.config.precision.dtype == "fp16" and not skip:
            overflowed = not math.isfinite(self.grad_norm)
            self.overflowed = overflowed and self.loss_scale.value > SMALLEST
            self.loss_scale.update(overflowed=overflowed)
        return self.grad_norm

    def _run(self, microbatches: Sequence[Microbatch], scale: torch.Tensor, *, forward_only: bool) -> torch.Tensor:
        """Sum of the loss in nats over the global batch, on every rank."""
        train, runtime = self.config.train, self.runtime
        interleaved = len(self.chunks) > 1
        if interleaved:
            microbatches = _filled(microbatches, runtime.topology.pipeline)
            # neighbours of one chunk that run before the next chunk's: Megatron wants whole groups
            self.chunks[0].config.microbatch_group_size_per_vp_stage = _group_size(
                len(microbatches), runtime.topology.pipeline
            )
        iterators = [iter(microbatches) for _ in self.chunks]
        with held(parameter for _, parameter in self.shards()) if self.keeps_gathered else nullcontext():
            sums = self._schedule(
                forward_step_func=self._forward_step(scale.to(runtime.device)),
                data_iterator=iterators if interleaved else iterators[0],
                model=self._handles if interleaved else self._handles[0],  # type: ignore[arg-type]
                num_microbatches=len(microbatches),
                seq_length=train.sequence_length,
                micro_batch_size=train.micro_batch_size,
                forward_only=forward_only,
            )
        # only the last stage has sums; the others contribute nothing
        total = torch.stack(sums).sum() if sums else torch.zeros((), device=runtime.device)
        runtime.all_reduce(total, group=runtime.groups.dp)
        if runtime.topology.pipeline > 1:
            runtime.all_reduce(total, group=runtime.groups.pp)
        if runtime.topology.tensor > 1:  # the same but for a fault of one of them, and all must decide alike on it
            dist.broadcast(total, group_src=0, group=runtime.groups.tp)
        return total

    def _forward_step(self, scale: torch.Tensor) -> Callable[..., Any]:
        device = self.runtime.device

        def loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """Megatron wants (what to differentiate, tokens, what to keep)."""
            nats = (losses * mask).sum()
            return nats * scale, mask.sum().int(), nats.detach()

        def step(batches: Iterator[Microbatch], model: Handle) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            boundaries = None if batch.single_document else batch.boundaries
            mask = batch.loss_mask_BS.to(device, torch.float32)
            output = model(
                input_ids=batch.tokens_BS.to(device),
                position_ids=batch.positions_BS.to(device),
                attention_mask=None if boundaries is None else boundaries.to(device),
                labels=batch.targets_BS.to(device),
            )
            return output, lambda losses: loss(mask, losses)

        return step

    def _count_tokens(self, microbatches: Sequence[Microbatch]) -> torch.Tensor:
        """Predicted tokens in the global batch, int64 scalar on the device."""
        count = sum(int(batch.loss_mask_BS.sum()) for batch in microbatches)
        tokens = torch.tensor(count, dtype=torch.int64, device=self.runtime.device)
        return self.runtime.all_reduce(tokens, group=self.runtime.groups.dp)

    def _all_reduce_gradients(self) -> None:
        """ZeRO 0: sum over the data ranks what DeepSpeed would have reduced, in fp32."""
        gradients = getattr(self.optimizer, "fp32_groups_gradients_flat", None)  # bf16: already flat and fp32
        if gradients is None:
            found = [self.optimizer.get_param_gradient_attribute(p) for _, p in self.shards()]
            gradients = [gradient for gradient in found if gradient is not None]
        for bucket in _buckets(gradients):
            if len(bucket) == 1:
                self.runtime.all_reduce(bucket[0], group=self.runtime.groups.dp)
                continue
            flat = self.runtime.all_reduce(torch.cat([g.flatten() for g in bucket]), group=self.runtime.groups.dp)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


def _filled(microbatches: Sequence[Microbatch], least: int) -> Sequence[Microbatch]:
    """At least `least` microbatches, by repeating the last without a token to predict: it changes neither the loss nor
    the gradient. The interleaved schedule wants one a stage."""
    last = microbatches[-1]
    empty = replace(last, num_tokens_B=[0] * len(last.num_tokens_B))
    return [*microbatches, *[empty] * (least - len(microbatches))]


def _group_size(num_microbatches: int, pipeline: int) -> int:
    """The smallest group, of at least a microbatch a stage, whose last is not smaller than that either."""
    return next(
        size
        for size in range(pipeline, num_microbatches + 1)
        if num_microbatches % size == 0 or num_microbatches % size >= pipeline
    )


def _buckets(tensors: Sequence[torch.Tensor], elements: int = 1 << 26) -> Iterator[list[torch.Tensor]]:
    """Neighbours together, up to `elements`: few collectives, and little memory beside the gradients. A tensor that
    is larger comes alone."""
    bucket: list[torch.Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel() > elements:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket
