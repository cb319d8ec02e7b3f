"""How far a layout's run is from the oracle's, and whether that is within the bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Bounds:
    """Largest relative deviations that are allowed; None: reported only."""

    loss: float
    """Of the loss of every step."""
    first_grad_norm: float
    """Of the global gradient norm of the first step."""
    grad_norm: float
    """Of the global gradient norm of every later step."""
    gradient: float
    """Of a gradient's difference, as a share of its tensor's norm."""
    weight: float | None
    """Of a weight's difference after the last step, as a share of its tensor's norm."""
    why: str


BOUNDS = {
    "strict": Bounds(
        1e-5, 1e-5, 1e-5, 1e-5, 1e-5,
        "SGD carries fp32 rounding on as it is: gradients are those of every step, weights those after the last.",
    ),
    "fp32": Bounds(
        1e-5, 1e-5, 1e-3, 1e-5, None,
        "Adam turns the rounding of gradients near zero into whole steps, so later gradients and the weights agree "
        "less than the loss; gradients are those of the first step. Measured of the norm: 1e-7 in the first "
        "step, 1e-5 in ten and 4e-4 in twenty.",
    ),
    "bf16": Bounds(
        2e-3, 5e-3, 1.0, 5e-2, None,
        "A bf16 number has 8 bits, so a rounding is up to 0.4 %, and a gradient has gone through dozens of them; the "
        "oracle stays in fp32. Measured on two layouts: loss 5e-4, first step's norm 1.2e-3, its gradients 1.5e-2. "
        "Adam turns rounding into whole steps, so the runs part: the norm by less than 1 % in ten steps and by up to "
        "36 % in twenty, where it swings from step to step while the loss agrees. Its later bound shows gross faults "
        "only.",
    ),
    "fp16": Bounds(
        1e-3, 2e-4, 0.5, 1e-2, None,
        "An fp16 number has 11 bits, so a rounding is up to 0.05 %, and a gradient has gone through dozens of them; "
        "the oracle stays in fp32. Measured on two layouts: loss 1.7e-4, first norm 2.8e-5, first gradients 1.7e-3. "
        "Adam turns rounding into whole steps, so the runs part: the norm by less than 1 % in ten steps and by up to "
        "15 % in twenty, where it swings from step to step while the loss agrees. Its later bound shows gross faults "
        "only.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Trajectory:
    """A run: per step the loss, the gradient norm and (for the first steps) whole gradients; the weights at the end."""

    losses: Sequence[float]
    grad_norms: Sequence[float]
    gradients: Sequence[Tensors]
    """Empty for a step that was skipped for an overflow; the gradient norm is not finite then."""
    weights: Tensors


@dataclass(frozen=True)
class Deviation:
    """Largest relative deviations of a layout, and what deviated first."""

    loss: float
    grad_norm: float
    gradient: float
    weight: float
    first: str | None
    """The first step, and the parameter in it, that is out of bounds; None where nothing is."""
    losses: tuple[float, ...]
    """Step by step."""
    grad_norms: tuple[float, ...]
    """Step by step."""

    def as_json(self) -> dict[str, Any]:
        """With "inf" for infinity, which JSON lacks."""
        return {key: _for_json(value) for key, value in asdict(self).items()}


def compare(found: Trajectory, expected: Trajectory, bounds: Bounds) -> Deviation:
    """Raises ValueError where the two are not of the same parameters."""
    loss = [_relative(a, b) for a, b in zip(found.losses, expected.losses, strict=True)]
    norm = [_relative(a, b) for a, b in zip(found.grad_norms, expected.grad_norms, strict=True)]
    skipped = [not math.isfinite(each) for each in found.grad_norms[: len(found.gradients)]]
    gradients = [
        {} if skip and not a else _by_name(a, b)
        for skip, a, b in zip(skipped, found.gradients, expected.gradients, strict=True)
    ]
    weights = _by_name(found.weights, expected.weights)
    return Deviation(
        max(loss),
        max(norm),
        max(max(step.values(), default=math.inf) for step in gradients),
        max(weights.values()),
        _first(found, loss, norm, gradients, weights, bounds),
        tuple(loss),
        tuple(norm),
    )


def difference(**quantities: Sequence[Sequence[float]]) -> str | None:
    """The first step in which the ranks do not report the same number, None where there is none. Each quantity: a list
    of steps for each rank. What is no number equals itself here: `compare` names the step that it came in."""
    for name, ranks in quantities.items():
        for step, values in enumerate(zip(*ranks, strict=True), 1):
            if len({repr(value) for value in values}) > 1:
                return (
                    f"step {step}: the ranks report different {name.replace('_', ' ')}: {', '.join(map(repr, values))}"
                )
    return None


def _first(
    found: Trajectory,
    loss: Sequence[float],
    norm: Sequence[float],
    gradients: Sequence[Mapping[str, float]],
    weights: Mapping[str, float],
    bounds: Bounds,
) -> str | None:
    for step in range(len(loss)):
        if not loss[step] <= bounds.loss:  # not a number is out of bounds too
            return f"step {step + 1}: loss by {loss[step]:.1e}"
        if not math.isfinite(found.grad_norms[step]):
            return f"step {step + 1} was skipped (overflow: its gradient is not finite)"
        for name, deviation in gradients[step].items() if step < len(gradients) else ():
            if not deviation <= bounds.gradient:
                return f"step {step + 1}: gradient of {name} by {deviation:.1e}"
        if not norm[step] <= (bounds.grad_norm if step else bounds.first_grad_norm):
            return f"step {step + 1}: gradient norm by {norm[step]:.1e}"
    for name, deviation in weights.items():
        if bounds.weight is not None and not deviation <= bounds.weight:
            return f"after step {len(loss)}: weight {name} by {deviation:.1e}"
    return None


def _relative(found: float, expected: float) -> float:
    deviation = abs(found - expected) / max(abs(expected), 1e-30)
    return deviation if math.isfinite(deviation) else math.inf


def _for_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_for_json(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _by_name(found: Tensors, expected: Tensors) -> dict[str, float]:
    if found.keys() != expected.keys():
        raise ValueError(f"different parameters: {sorted(found.keys() ^ expected.keys())}")
    return {name: _share_of_norm(found[name], expected[name]) for name in sorted(expected)}


def _share_of_norm(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    deviation = ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    return deviation if math.isfinite(deviation) else math.inf
