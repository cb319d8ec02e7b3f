"""The next token, against probabilities by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bigtrain.model.sampling import choose, probabilities

LOGITS = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))


def shares(count: int = 20_000, **settings: float) -> list[float]:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(5)
    drawn = choose(
        LOGITS.expand(count, -1),
        temperature=settings["temperature"],
        top_k=int(settings.get("top_k", 0)),
        top_p=settings.get("top_p", 1.0),
        generators=[generator] * count,
    )
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


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.3, [0, 0, 0, 1]), (0.5, [0, 0, 3 / 7, 4 / 7]), (0.95, [0.1, 0.2, 0.3, 0.4])]
)
def test_top_p(top_p: float, expected: list[float]) -> None:
    assert shares(temperature=1.0, top_p=top_p) == pytest.approx(expected, abs=0.015)


def by_numpy(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """One token after the other, from the likeliest on, until enough probability is there."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    total, found, kept = weights[order].sum(), 0.0, np.zeros(len(logits))
    for token in order:
        if top_p < 1 and found / total >= top_p:
            break
        kept[token] = weights[token]
        found += weights[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [0.001, 0.4, 0.9, 0.9999, 1.0])
def test_probabilities_are_those_of_a_loop_in_numpy(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(2)) * 3
    found = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for row, mine in zip(logits.numpy(), found.numpy(), strict=True):
        expected = by_numpy(row, temperature, top_k, top_p)
        np.testing.assert_array_equal(mine > 0, expected > 0)
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-7)


def test_a_row_is_drawn_by_its_own_generator() -> None:
    """What is drawn for a row depends neither on the other rows nor on where it stands."""

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    rows = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    settings = {"temperature": 1.0, "top_k": 0}
    together = choose(rows, generators=generators(3, 4, 5), **settings)
    turned = choose(rows.flip(0), generators=generators(5, 4, 3), **settings).flip(0)
    alone = [choose(rows[n : n + 1], generators=generators(3 + n), **settings).item() for n in range(3)]
    assert together.tolist() == turned.tolist() == alone
