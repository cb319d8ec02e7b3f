"""The hand-written backwards, against torch's autograd of the formula in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bigtrain.model.pointwise import RootMeanSquareNorm, Rotate, SwiGLU, rotary_table

S, B, H = 5, 3, 16
EPS = 1e-5


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x[..., : H // 2], x[..., H // 2 :]
    return F.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def compare(
    ours: Callable[..., torch.Tensor], formula: Callable[..., torch.Tensor], *inputs: torch.Tensor, atol: float
) -> None:
    """Values and all gradients."""
    mine = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    found, expected = ours(*mine), formula(*exact)
    assert found.dtype == inputs[0].dtype
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=atol)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(upstream.to(found.dtype))
    expected.backward(upstream.to(found.dtype).double())
    for one, other in zip(mine, exact, strict=True):
        if one.requires_grad:
            assert one.grad is not None and other.grad is not None
            torch.testing.assert_close(one.grad.double(), other.grad, atol=atol, rtol=atol)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).requires_grad_()


DTYPES = pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])


@DTYPES
def test_rms_norm(dtype: torch.dtype, atol: float) -> None:
    x, weight = normal(S, B, H, dtype=dtype), normal(H, dtype=dtype)
    compare(lambda x, w: RootMeanSquareNorm.apply(x, w, EPS), rms_norm, x, weight, atol=atol)


@DTYPES
def test_swiglu(dtype: torch.dtype, atol: float) -> None:
    compare(SwiGLU.apply, swiglu, normal(S, B, H, dtype=dtype), atol=atol)


@DTYPES
def test_rotate(dtype: torch.dtype, atol: float) -> None:
    cos, sin = rotary_table(S, H, 100.0, torch.device("cpu"))
    compare(Rotate.apply, rotate, normal(S, B, H, dtype=dtype), cos, sin, atol=atol)


def test_inputs_are_not_changed() -> None:
    """The backward writes in place, into what is its own."""
    cos, sin = rotary_table(S, H, 100.0, torch.device("cpu"))
    weight = normal(H)
    for function in (
        lambda x: RootMeanSquareNorm.apply(x, weight, EPS),
        SwiGLU.apply,
        lambda x: Rotate.apply(x, cos, sin),
    ):
        x = normal(S, B, H)
        before = x.detach().clone()
        out = function(x)
        upstream = torch.ones_like(out)
        out.backward(upstream)
        assert torch.equal(x, before) and bool((upstream == 1).all())


def test_a_gradient_that_is_spread_in_memory() -> None:
    weight = normal(H)
    for function in (lambda x: RootMeanSquareNorm.apply(x, weight, EPS), SwiGLU.apply):
        straight, turned = normal(S, B, H), normal(S, B, H)
        function(straight).sum().backward()
        function(turned.transpose(0, 1)).transpose(0, 1).sum().backward()
        assert straight.grad is not None and turned.grad is not None
        torch.testing.assert_close(straight.grad, turned.grad)


def test_the_table_is_cosine_and_sine_of_position_times_frequency() -> None:
    cos, sin = rotary_table(7, 4, 10000.0, torch.device("cpu"))
    assert cos.shape == sin.shape == (7, 2)
    assert cos[3].tolist() == pytest.approx([torch.tensor(3.0).cos().item(), torch.tensor(0.03).cos().item()])
    assert sin[6].tolist() == pytest.approx([torch.tensor(6.0).sin().item(), torch.tensor(0.06).sin().item()])
