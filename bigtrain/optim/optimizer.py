"""torch's optimizers over two parameter groups: matrices decay, norms and biases do not."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bigtrain.config.schema import OptimConfig


def decays(name: str) -> bool:
    """Weight decay is for matrices: linear layers and embeddings. Told by name, since ZeRO-3 leaves no shape to see."""
    return not (name.endswith(".bias") or name.endswith("norm.weight"))


def build_optimizer(parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, one fused kernel a flat partition, or SGD. `parameters`: (name, parameter) of this rank's stage."""
    named = list(parameters)
    groups = [
        {"params": [p for n, p in named if decays(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
