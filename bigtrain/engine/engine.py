"""One pipeline stage of Megatron under DeepSpeed's ZeRO: two verbs, whatever the layout.

`forward_backward` runs a step's microbatches through Megatron's schedule; `optimizer_step` reduces, clips and updates.
Loss and gradient are means over the predicted tokens of the whole global batch, so neither depends on how the batch was
cut.

How the two vendors meet (DeepSpeed 0.19.8, Megatron-core 0.16.1):

- The schedule calls autograd itself, so DeepSpeed sees its "PyTorch-style" backward. Before each one its
  `clear_backward_seen_flag` must run, or the second backward in a row never reduces; a hook on the stage's output,
  registered inside its forward, comes before DeepSpeed's own hook on the same tensor.
- DeepSpeed averages over its data-parallel group; we want a sum over ranks divided by the tokens, so the loss is
  multiplied by the group's size first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from bigtrain.config.schema import Config
from bigtrain.data.loader import Microbatch
from bigtrain.distributed.rng import seed_step
from bigtrain.distributed.start import Runtime
from bigtrain.engine import deepspeed_patches
from bigtrain.engine.gather import keep_gathered
from bigtrain.engine.mpu import Mpu
from bigtrain.engine.settings import deepspeed_config
from bigtrain.engine.vendor import import_deepspeed
from bigtrain.model.attention import boundaries_of
from bigtrain.model.build import Decoder, build, shards_of
from bigtrain.model.initial import initialize
from bigtrain.optim.adamw import build_optimizer


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


class Stage(torch.nn.Module):
    """The module that DeepSpeed sees: the decoder, and the flag that lets every backward reduce."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.before_backward: Callable[[], None] = lambda: None

    def forward(self, **inputs: Any) -> torch.Tensor:
        output = self.decoder(**inputs)
        if output.requires_grad:
            output.register_hook(self._before_backward)
        return output

    def _before_backward(self, gradient: torch.Tensor) -> torch.Tensor:
        self.before_backward()
        return gradient


class _Handle:
    """The model as Megatron's schedule sees it: Megatron's attributes, DeepSpeed's forward."""

    def __init__(self, decoder: Decoder, forward: Callable[..., torch.Tensor]) -> None:
        self.config = decoder.config
        self.model_type = decoder.model_type
        self.set_input_tensor = decoder.set_input_tensor
        self.decoder = decoder.decoder
        self._forward = forward

    def __call__(self, **inputs: Any) -> torch.Tensor:
        return self._forward(**inputs)


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
        settings = deepspeed_config(config, keep_gathered=keep_gathered(config, runtime), on_gpu=on_gpu)
        self.decoder = self._build_decoder(deepspeed, settings)
        stage = Stage(self.decoder)
        self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=stage,
            optimizer=build_optimizer(stage.named_parameters(), config.optim),
            config=settings,
            mpu=self.mpu,
            dist_init_required=False,
        )
        stage.before_backward = self.optimizer.clear_backward_seen_flag
        self._handle = _Handle(self.decoder, self._deepspeed)
        self._schedule = get_forward_backward_func()
        seed_step(config.run.seed, 0, runtime.topology)  # sequence parallelism forks a stream in evaluations too
        self.steps_taken = 0
        self.grad_norm = 0.0
        """Of the last step, before clipping."""

    def _build_decoder(self, deepspeed: Any, settings: dict[str, Any]) -> Decoder:
        """Under ZeRO-3 each parameter is cut up as soon as its module is made, and only this rank's piece is filled."""
        config, topology = self.config, self.runtime.topology
        with deepspeed.zero.Init(
            enabled=config.parallel.zero_stage == 3,
            data_parallel_group=self.mpu.sharding_group,
            config_dict_or_path=settings,
            remote_device=self.runtime.device.type,
            mpu=self.mpu,
        ):
            decoder = build(config, self.runtime)
        initialize(decoder, config.model, seed=config.run.seed, topology=topology)
        for shard, parameter in shards_of(decoder, topology):
            # DeepSpeed's gradient norm counts weights without this mark on one tensor rank only
            parameter.tensor_model_parallel = shard.dim is not None and topology.tensor > 1  # type: ignore[attr-defined]
            if getattr(parameter, "sequence_parallel", False):
                parameter.register_hook(self._sum_over_tensor_group)
        return decoder

    def _sum_over_tensor_group(self, gradient: torch.Tensor) -> torch.Tensor:
        """Each tensor rank saw a part of the sequence. A hook on the leaf runs before DeepSpeed reduces."""
        return self.runtime.all_reduce(gradient.float().contiguous(), group=self.runtime.groups.tp).to(gradient.dtype)

    def forward_backward(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """Add the gradient of this step's loss. `microbatches`: this data rank's share of the global batch."""
        seed_step(self.config.run.seed, self.steps_taken, self.runtime.topology)
        self._deepspeed.train()
        tokens = self._count_tokens(microbatches)
        # DeepSpeed will divide by the size of its group, which for ZeRO 0 is one
        scale = self.mpu.get_data_parallel_world_size() / tokens.clamp(min=1).float()
        return LossSum(self._run(microbatches, scale, forward_only=False), tokens)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Microbatch]) -> LossSum:
        """The loss alone, without dropout."""
        self._deepspeed.eval()
        return LossSum(self._run(microbatches, torch.ones(()), forward_only=True), self._count_tokens(microbatches))

    def optimizer_step(self, lr: float) -> float:
        """Reduce the gradients over the data ranks, clip, update with learning rate `lr`. Returns the global gradient
        norm before clipping, inf where DeepSpeed skipped the update for a gradient that is not finite."""
        if self.config.parallel.zero_stage == 0 and self.runtime.topology.data > 1:
            self._all_reduce_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        self.steps_taken += 1
        self.grad_norm = float(self._deepspeed.get_global_grad_norm())
        return self.grad_norm

    def _run(self, microbatches: Sequence[Microbatch], scale: torch.Tensor, *, forward_only: bool) -> torch.Tensor:
        """Sum of the loss in nats over the global batch, on every rank."""
        train, runtime = self.config.train, self.runtime
        sums = self._schedule(
            forward_step_func=self._forward_step(scale.to(runtime.device)),
            data_iterator=iter(microbatches),
            model=self._handle,  # type: ignore[arg-type]  # all that it asks of a module
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
        return total

    def _forward_step(self, scale: torch.Tensor) -> Callable[..., Any]:
        device = self.runtime.device

        def loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """Megatron wants (what to differentiate, tokens, what to keep)."""
            nats = (losses * mask).sum()
            return nats * scale, mask.sum().int(), nats.detach()

        def step(batches: Iterator[Microbatch], model: _Handle) -> tuple[torch.Tensor, Any]:
            batch = next(batches)
            boundaries = None if batch.single_document else boundaries_of(batch.documents_BS)
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
            gradients = [p.grad for p in self.decoder.parameters() if p.grad is not None]
        for bucket in _buckets(gradients):
            if len(bucket) == 1:
                self.runtime.all_reduce(bucket[0], group=self.runtime.groups.dp)
                continue
            flat = self.runtime.all_reduce(torch.cat([g.flatten() for g in bucket]), group=self.runtime.groups.dp)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))


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
