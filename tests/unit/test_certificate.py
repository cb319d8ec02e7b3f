"""tools/layouts.py: which layouts there are, and that a deviation is found and named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.config.errors import UserError
from bigtrain.config.schema import ModelConfig
from tests.distributed.harness import RankError, RankPool
from tools.certificate import page
from tools.certificate.compare import BOUNDS, Trajectory, compare, difference
from tools.certificate.matrix import Layout, covering, full_matrix, parse
from tools.layouts import Certificate, Row, config_of, main
from tools.layouts import parse as command_line


class Broken(RankPool):
    """Ranks that cannot run anything."""

    def run(self, *_: Any, **__: Any) -> list[Any]:
        raise RankError("1 of 1 ranks failed\nTraceback\nRuntimeError: no shared memory\n---- rank 0 wrote\n(nothing)")


def trajectory(**changed: torch.Tensor) -> Trajectory:
    """Two steps of two parameters; `changed`: another gradient of the second step."""
    gradients = [{"a": torch.ones(4), "b": torch.arange(1.0, 5)} for _ in range(2)]
    gradients[1] |= changed
    return Trajectory([2.0, 1.0], [3.0, 2.5], gradients, {"a": torch.ones(4), "b": torch.ones(3)})


@pytest.mark.parametrize("name", ["z3-t2s-p2v2-d1", "z0-t1-p1-d2", "z2-t4-p1-d1"])
def test_a_name_is_read_back(name: str) -> None:
    assert str(parse(name)) == name


def test_what_a_name_leaves_out_is_one() -> None:
    assert parse("z1") == Layout(1)
    assert parse("z3-p4d2") == Layout(3, pipeline=4, data=2)


@pytest.mark.parametrize("name", ["", "z4", "t2", "z1-t0", "z1-d2-t2"])
def test_no_name(name: str) -> None:
    with pytest.raises(UserError, match="--layouts"):
        parse(name)


def test_the_full_matrix() -> None:
    layouts = full_matrix(8)
    assert len(layouts) == len(set(layouts)) >= 60
    assert all(layout.world <= 8 for layout in layouts)
    for zero in range(4):
        assert Layout(zero, tensor=2, sequence=True, pipeline=2, virtual=2, data=2) in layouts
        assert Layout(zero, tensor=2, pipeline=4) in layouts
        assert Layout(zero, tensor=4, sequence=True, data=2) in layouts


def test_the_covering_dozen_has_every_value() -> None:
    layouts = covering(4)
    assert len(layouts) == 13
    assert {layout.zero for layout in layouts} == {0, 1, 2, 3}
    assert {layout.tensor for layout in layouts} == {1, 2, 4} == {layout.pipeline for layout in layouts}
    assert {layout.virtual for layout in layouts} == {1, 2} == {layout.data for layout in layouts}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_covering_uses_all_ranks(world: int) -> None:
    sizes = [layout.world for layout in covering(world)]
    assert max(sizes) == world
    assert sizes.count(8) in (0, 2)


def test_equal_runs_do_not_deviate() -> None:
    found = compare(trajectory(), trajectory(), BOUNDS["strict"])
    assert (found.loss, found.grad_norm, found.gradient, found.weight, found.first) == (0, 0, 0, 0, None)


def test_the_first_parameter_and_step_are_named() -> None:
    found = compare(trajectory(b=torch.arange(1.0, 5) * 1.001), trajectory(), BOUNDS["strict"])
    assert found.first == "step 2: gradient of b by 1.0e-03"
    assert found.gradient == pytest.approx(1e-3, rel=1e-3)


def test_what_is_no_number_is_out_of_bounds() -> None:
    found = compare(trajectory(a=torch.full((4,), torch.nan)), trajectory(), BOUNDS["bf16"])
    assert found.first is not None and "gradient of a by inf" in found.first


def test_a_step_that_was_skipped_is_named() -> None:
    found = replace(trajectory(), grad_norms=[3.0, math.inf], gradients=[trajectory().gradients[0], {}])
    deviation = compare(found, trajectory(), BOUNDS["strict"])
    assert deviation.first is not None and deviation.first.startswith("step 2 was skipped (overflow")
    assert json.loads(json.dumps(deviation.as_json(), allow_nan=False))["grad_norms"] == [0.0, "inf"]


def test_the_first_gradient_norm_has_its_own_bound() -> None:
    found = [compare(replace(trajectory(), grad_norms=norms), trajectory(), BOUNDS["fp32"]) for norms in
             ([3.0, 2.501], [3.001, 2.5])]  # fmt: skip
    assert [each.first for each in found] == [None, "step 1: gradient norm by 3.3e-04"]


def test_ranks_that_differ() -> None:
    nan = float("nan")
    assert difference(losses=[[1.0, nan], [1.0, float("nan")]], gradient_norms=[[2.0], [2.0]]) is None
    found = difference(losses=[[1.0], [1.0]], gradient_norms=[[2.0, 3.0], [2.0, nan]])
    assert found == "step 2: the ranks report different gradient norms: 3.0, nan"


def test_other_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="'c'"):
        compare(trajectory(c=torch.ones(1)), trajectory(), BOUNDS["fp32"])


def test_holds_only_where_something_was_certified(tmp_path: Path) -> None:
    good, bad = (
        compare(trajectory(), trajectory(), BOUNDS["strict"]),
        Row("z1-t1-p1-d1", 1, failed="<died>", report="all that the rank said"),
    )
    certificate = Certificate(
        {"steps": 2, "overrides": []}, ModelConfig(), BOUNDS["strict"], 0, documents_are_apart=True
    )
    assert not certificate.holds
    certificate.rows.append(Row("z9", 1, refused="cannot be"))
    certificate.num_planned = 1
    assert not certificate.holds
    certificate.rows.append(Row("z0-t1-p1-d1", 1, deviation=good))
    certificate.num_planned = 3
    assert not certificate.holds, "not all have run"
    certificate.num_planned = 2
    assert certificate.holds
    certificate.rows.append(bad)
    certificate.num_planned = 3
    assert not certificate.holds

    page.write(certificate, tmp_path / "new" / "c.json", tmp_path / "c.html")
    record = json.loads((tmp_path / "new" / "c.json").read_text())
    assert record["model"]["num_layers"] == ModelConfig().num_layers
    assert record["layouts"][2]["report"] == "all that the rank said"
    assert [row["verdict"] for row in record["layouts"]] == ["refused: cannot be", "ok", "FAILED: <died>"]
    assert record["holds"] is False
    assert "&lt;died&gt;" in (tmp_path / "c.html").read_text()
    assert "1 of 3 layouts" in page.summary(certificate)
    with pytest.raises(UserError, match="cannot be written"):
        page.write(certificate, tmp_path / "c.html" / "c.json", tmp_path / "c.html")


def test_the_model_is_small_or_the_users() -> None:
    assert config_of(command_line([])).model.num_layers == 9
    assert config_of(command_line(["model.num_layers=4"])).model.num_layers == 4
    tiny = config_of(command_line(["model=tiny"])).model
    assert (tiny.num_layers, tiny.hidden_size, tiny.vocab_size) == (6, 256, 4096)
    assert config_of(command_line(["parallel.gather=microbatch"])).parallel.gather == "microbatch"


def no_ranks(world: int) -> RankPool:
    raise AssertionError("no rank may start")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layouts", "z3-d2,z4"], "--layouts z4"),
        (["--layouts", ""], "--layouts"),
        (["model.num_query_groups=3"], "model.num_attention_heads"),
        (["model=nano"], "no such preset"),
        (["model.activation=gelu"], "no such model"),
        (["model.hidden_dropout=0.1"], "dropout"),
        (["parallel.tensor=2"], "--layouts"),
        (["parallel=zero1"], "--layouts"),
        (["train.num_steps=5"], "--steps"),
        (["schedule=cosine"], "constant"),
        (["cluster.device=cuda"], "CPU"),
        (["+experiment=smoke"], "one by one"),
        (["--strict", "optim=adamw"], "SGD"),
        (["--strict", "precision=bf16"], "fp32"),
        (["--json", "file/layouts.json"], "file/layouts.json: cannot be written"),
    ],
)
def test_what_is_wrong_is_said_before_any_rank_starts(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(arguments, no_ranks) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", [["--world", "0"], ["--steps", "0"], ["--world", "2", "--layouts", "z1"]])
def test_options_that_cannot_be(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments, no_ranks)
    assert end.value.code == 2


def test_a_single_rank_that_fails_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([], Broken) == 2
    assert capsys.readouterr().err.startswith(
        "error: one rank, which gives the initial weights, failed: RuntimeError: no"
    )
