"""The next token, against probabilities by hand."""

from __future__ import annotations

import pytest
import torch

from bigtrain.model.sampling import choose

LOGITS = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))


def shares(count: int = 20_000, **settings: float) -> list[float]:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(5)
    many = LOGITS.expand(count, -1)
    drawn = choose(many, temperature=settings["temperature"], top_k=int(settings.get("top_k", 0)), generator=generator)
    return (torch.bincount(drawn, minlength=4) / count).tolist()


def test_temperature_0_takes_the_likeliest() -> None:
    rows = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])
    assert choose(rows, temperature=0.0, top_k=0).tolist() == [1, 0]


def test_temperature_1_draws_by_the_models_probabilities() -> None:
    assert shares(temperature=1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)


def test_temperature_sharpens_and_flattens() -> None:
    weights = [p**2 for p in (0.1, 0.2, 0.3, 0.4)]
    assert shares(temperature=0.5) == pytest.approx([w / sum(weights) for w in weights], abs=0.015)
    assert shares(temperature=1e4) == pytest.approx([0.25] * 4, abs=0.015)


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, [0, 0, 0, 1]), (2, [0, 0, 3 / 7, 4 / 7]), (9, [0.1, 0.2, 0.3, 0.4])]
)
def test_top_k(top_k: int, expected: list[float]) -> None:
    assert shares(temperature=1.0, top_k=top_k) == pytest.approx(expected, abs=0.015)


def test_the_same_generator_draws_the_same() -> None:
    rows = LOGITS.expand(50, -1)
    first, second = (
        choose(rows, temperature=1.0, top_k=0, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
