"""The dynamic loss scale of fp16 (Micikevicius et al., https://arxiv.org/abs/1710.03740, section 3.2).

Ours rather than DeepSpeed's: that one changes its scale before it divides the step's gradients by it."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST, SMALLEST = 2.0**24, 1.0


@dataclass
class LossScale:
    """What the loss is multiplied with. Halved after a step that overflowed, doubled after `window` that did not."""

    value: float
    window: int
    good_steps: int = 0
    """Steps without overflow since the value last changed."""

    def update(self, *, overflowed: bool) -> None:
        """After an optimizer step, taken or skipped."""
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, SMALLEST)
        elif self.good_steps >= self.window:
            self.value, self.good_steps = min(self.value * 2, LARGEST), 0
