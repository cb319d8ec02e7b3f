"""diff: which tensors differ, and by how much, against numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bigtrain.checkpoint import compare as comparing
from bigtrain.checkpoint import reshard as resharding
from bigtrain.checkpoint import stored
from bigtrain.checkpoint.compare import compare
from bigtrain.checkpoint.layout import Layout
from tests.unit.checkpoints import flip, main, place_of, save, tensors

FC1 = "weight.decoder.layers.1.mlp.linear_fc1.weight"
NORM = "exp_avg.decoder.final_layernorm.weight"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a matrix takes several."""
    monkeypatch.setattr(stored, "BLOCK_BYTES", 700)
    monkeypatch.setattr(comparing, "_SMALL_ELEMENTS", 50)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("a"), tensors())


def test_the_same_in_another_layout(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = resharding.reshard(resharding.plan(first, layout_=Layout(tensor=2, data=3)), tmp_path / "b")
    for more in ([], ["--values"]):
        assert main(["diff", str(first), str(second), *more]) == 0
        assert capsys.readouterr().out == "the same: 45 tensors, by their hashes, and state.json\n"


@pytest.mark.usefixtures("small_blocks")
def test_figures_are_numpys(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tensors()
    generator = torch.Generator().manual_seed(5)
    changed[FC1] = changed[FC1] * (1 + 1e-3 * torch.randn(changed[FC1].shape, generator=generator))
    changed[FC1][::2] = tensors()[FC1][::2]
    changed[NORM] = changed[NORM].clone()
    changed[NORM][17] = 9.0
    other = save(tmp_path / "b", changed, step=301)
    second = resharding.reshard(resharding.plan(other, layout_=Layout(tensor=4, data=2)), tmp_path / "c")
    found = compare(first, second, values=True)
    assert [each.name for each in found.tensors] == [FC1, NORM] and found.num_equal == 43
    for each in found.tensors:
        a, b = tensors()[each.name].numpy().astype(np.float64), changed[each.name].numpy().astype(np.float64)
        difference = np.abs(a - b)
        assert each.values is not None
        assert each.values.num_different == int((a != b).sum()) and each.values.numel == a.size
        assert each.values.largest == difference.max()
        assert each.values.index == tuple(map(int, np.unravel_index(difference.argmax(), a.shape)))
        assert each.values.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    names = [name for name, _, _ in found.state]
    assert names == ["adam_step", "cursor.num_sequences", "step"]
    assert main(["diff", str(first), str(second), "--values"]) == 1
    said = capsys.readouterr().out
    assert f"differs: {NORM}: 1 of 64 elements (1.56 %), largest" in said and "at [17], relative" in said
    assert "state.json: step: 300 in A, 301 in B" in said
    assert "43 tensors are the same, 2 differ, 0 are in one alone; 3 entries of state.json differ" in said


def test_without_values_the_hashes_are_shown(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tensors()
    changed[FC1] = changed[FC1] + 1
    second = save(tmp_path / "b", changed)
    assert main(["diff", str(first), str(second)]) == 1
    said = capsys.readouterr().out
    hashes = [json.loads((p / "manifest.json").read_bytes())["tensors"][FC1]["hash"] for p in (first, second)]
    assert f"differs: {FC1}: {hashes[0]} in A, {hashes[1]} in B" in said
    assert main(["diff", str(first), str(second), "--json", "--values"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["equal"] and found["tensors"][0]["values"]["largest"] == pytest.approx(1, rel=1e-6)


def test_what_only_one_has_and_other_shapes(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {name: tensor for name, tensor in tensors().items() if not name.startswith("exp_avg_sq.")}
    del changed[NORM]
    changed["weight.more"] = torch.ones(3)
    changed[FC1] = changed[FC1].reshape(64, 192)
    second = save(tmp_path / "b", changed)
    for more in ([], ["--values"]):
        assert main(["diff", str(first), str(second), *more]) == 1
        said = capsys.readouterr().out
        assert "only in A: all 15 tensors of exp_avg_sq" in said and said.count("only in A: exp_avg_sq") == 0
        assert f"only in A: {NORM}: float32 [64]" in said and "only in B: weight.more: float32 [3]" in said
        assert f"differs: {FC1}: float32 [192, 64] in A, float32 [64, 192] in B" in said
        assert "28 tensors are the same, 1 differ, 17 are in one alone" in said


def test_weights_in_bf16_are_those_rounded(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = resharding.reshard(resharding.plan(first, weights_only=True, dtype="bf16"), tmp_path / "b")
    found = compare(first, second, values=True)
    weights = [each for each in found.tensors if each.b]
    assert len(weights) == 15
    for each in weights:
        original = tensors()[each.name].double()
        rounded = tensors()[each.name].bfloat16().double()
        assert each.values is not None
        assert each.values.num_different == 0, "rounded, they are the same"
        assert each.values.largest == float((original - rounded).abs().max())
    assert main(["diff", str(second), str(first), "--values"]) == 1
    said = capsys.readouterr().out
    assert "(bfloat16 [64] in A, float32 [64] in B; counted as the narrower)" in said
    assert (
        "only in B: all 15 tensors of exp_avg" in said and "state.json: weights_only: true in A, nothing in B" in said
    )


def test_numbers_that_are_none_and_zeros_with_signs(tmp_path: Path) -> None:
    def values(a: list[float], b: list[float]) -> comparing.Values:
        folders = [save(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", {"weight.w": torch.tensor(x)})
                   for name, x in (("a", a), ("b", b))]  # fmt: skip
        found = compare(folders[0], folders[1], values=True).tensors[0].values
        assert found is not None
        return found

    nan, inf = float("nan"), float("inf")
    signs = values([0.0, 0.0, 1.0, nan], [-0.0, -0.0, 1.0, nan])
    assert (signs.num_different, signs.largest, signs.relative) == (2, 0.0, 0.0)
    assert values([1.0, 2.0], [1.0, nan]).largest == inf
    both = values([inf, 2.0, 5.0], [inf, 2.0, 4.0])
    assert (both.num_different, both.largest, both.index) == (1, 1.0, (2,))


@pytest.mark.parametrize(
    ("part", "whole", "shown"),
    [
        (0, 5, "0 %"),
        (1, 20_000, "<0.01 %"),
        (1, 64, "1.56 %"),
        (5, 50, "10 %"),
        (997, 1000, "99.7 %"),
        (99_989, 100_000, "99.99 %"),
        (10**8 - 1, 10**8, ">99.99 %"),
        (5, 5, "100 %"),
        (0, 0, "0 %"),
    ],
)
def test_a_share_is_all_or_none_only_where_it_is(part: int, whole: int, shown: str) -> None:
    values = comparing.Values(part, whole, 0.5, (0,), 0.1)
    found = comparing.Comparison(0, [comparing.Difference("weight.w", "a", "b", values)], [], {})
    assert f"{part:,} of {whole:,} elements ({shown}), largest" in comparing.lines(found, "A", "B")[2]


def test_entries_of_the_settings(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second = save(
        tmp_path / "b", tensors(), versions={"bigtrain": "0.2.0"}, config={"optim": {"lr": 0.002}, "x": "y" * 99}
    )
    assert main(["diff", str(first), str(second)]) == 1
    said = capsys.readouterr().out
    assert "config.optim.lr: 0.001 in A, 0.002 in B" in said
    assert 'versions.bigtrain: "0.1.0" in A, "0.2.0" in B' in said
    assert 'versions.torch: "2.13.0" in A, nothing in B' in said
    assert "45 tensors are the same, 0 differ" in said and max(map(len, said.splitlines())) < 200


def test_damage_is_an_error(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = tensors()
    changed[FC1] = changed[FC1] + 1
    second = save(tmp_path / "b", changed)
    file, at = place_of(second, FC1)
    file.write_bytes(file.read_bytes()[:at])
    assert main(["diff", str(first), str(second)]) == 1
    capsys.readouterr()
    assert main(["diff", str(first), str(second), "--values"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {FC1} cannot be read in ") and said.err.count("\n") == 1
    flip(second / "manifest.json", 300)
    assert main(["diff", str(first), str(second)]) == 2
    assert "manifest.json is not the one that was committed" in capsys.readouterr().err
    assert main(["diff", str(first), str(tmp_path / "nowhere")]) == 2
