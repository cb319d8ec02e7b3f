"""Which layouts a certificate is about."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any

from bigtrain.config.errors import UserError


@dataclass(frozen=True)
class Layout:
    """ZeRO stage and sizes of the groups; the name is how the command line and the table call it."""

    zero: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    virtual: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        sequence, virtual = "s" if self.sequence else "", f"v{self.virtual}" if self.virtual > 1 else ""
        return f"z{self.zero}-t{self.tensor}{sequence}-p{self.pipeline}{virtual}-d{self.data}"

    def settings(self) -> dict[str, Any]:
        """Fields of `ParallelConfig`."""
        return {
            "zero_stage": self.zero,
            "tensor": self.tensor,
            "sequence": self.sequence,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual,
        }


_NAME = re.compile(r"z([0-3])(?:-?t(\d+)(s?))?(?:-?p(\d+)(?:v(\d+))?)?(?:-?d(\d+))?")


def parse(name: str) -> Layout:
    """``z3-t2s-p2v2-d1``: ZeRO stage, tensor size (s: sequence parallel), pipeline size (v: chunks a stage), data size;
    what is left out is 1. Raises UserError."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"--layouts {name}: is no layout. Write ZeRO stage, tensor, pipeline, data as in z3-t2s-p2v2-d1."
        )
    zero, tensor, sequence, pipeline, virtual, data = match.groups()
    sizes = [int(size or 1) for size in (tensor, pipeline, virtual, data)]
    if min(sizes) < 1:
        raise UserError(f"--layouts {name}: sizes are at least 1.")
    return Layout(int(zero), sizes[0], bool(sequence), sizes[1], sizes[2], sizes[3])


def full_matrix(world: int) -> list[Layout]:
    """ZeRO 0-3 x tensor 1, 2, 4 x sequence off, on x pipeline 1, 2, 4 x chunks 1, 2 x data 1, 2, where the product fits
    `world` ranks and means something."""
    every = (
        Layout(zero, tensor, sequence, pipeline, virtual, data)
        for data, pipeline, virtual, tensor, sequence, zero in product(
            (1, 2), (1, 2, 4), (1, 2), (1, 2, 4), (False, True), (0, 1, 2, 3)
        )
    )
    sound = [
        each for each in every if (each.tensor > 1 or not each.sequence) and (each.pipeline > 1 or each.virtual == 1)
    ]
    return sorted((each for each in sound if each.world <= world), key=lambda each: each.world)


COVERING = (
    "z3 z0-d2 z1-t2s z2-p2 z3-t2-d2 z0-t2-p2 z1-p2v2-d2 z2-t4s z2-p2-d2 z3-p4 z3-p2v2-d2 z1-t2s-p2 z3-t2s-p2v2 "
    "z1-t4s-p2-d1 z3-t2s-p2v2-d2"
)
"""What runs without --all: on up to 4 ranks each value of each setting; on 8, two of the largest besides."""


def covering(world: int) -> list[Layout]:
    """Those of `COVERING` that fit `world` ranks; at least one."""
    return [layout for layout in map(parse, COVERING.split()) if layout.world <= world]
