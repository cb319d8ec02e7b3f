"""The sum of a tied weight's gradients, as parts that a backward in half precision can carry."""

from __future__ import annotations

import pytest
import torch

from bigtrain.engine.tied import split


def test_fp32_goes_as_it_is() -> None:
    total = torch.randn(5)
    (part,) = split(total, torch.float32)
    assert part is total


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 22)])
def test_two_parts_add_up(dtype: torch.dtype, bits: int) -> None:
    total = 1 + 99 * torch.rand(1000, generator=torch.Generator().manual_seed(0))  # below 1 fp16 has fewer bits
    parts = split(total, dtype)
    assert all(part.dtype == dtype for part in parts)
    error = (sum(part.double() for part in parts) - total.double()).abs() / total.abs()
    assert error.max() < 2.0**-bits < (parts[0].double() - total.double()).abs().div(total.abs()).max()


def test_a_sum_that_one_number_cannot_hold() -> None:
    first, rest = split(torch.tensor([100_000.0, -100_000.0]), torch.float16)
    assert (first.double() + rest.double()).tolist() == [100_000.0, -100_000.0]
    assert split(torch.tensor([200_000.0]), torch.float16)[1].isinf().all(), "an overflow, which skips the step"


def test_what_is_not_finite_stays_so() -> None:
    first, rest = split(torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]), torch.float16)
    assert first[:2].isinf().all() and first[2].isnan() and rest.tolist() == [0, 0, 0, 0]
