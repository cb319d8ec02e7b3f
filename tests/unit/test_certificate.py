"""tools/layouts.py: which layouts there are, and that a deviation is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bigtrain.config.errors import UserError
from tools.certificate import page
from tools.certificate.compare import BOUNDS, Trajectory, compare
from tools.certificate.matrix import Layout, covering, full_matrix, parse
from tools.layouts import Certificate, Row


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
    assert len(layouts) == 12
    assert {layout.zero for layout in layouts} == {0, 1, 2, 3}
    assert {layout.tensor for layout in layouts} == {1, 2, 4} == {layout.pipeline for layout in layouts}
    assert {layout.virtual for layout in layouts} == {1, 2} == {layout.data for layout in layouts}


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


def test_other_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="'c'"):
        compare(trajectory(c=torch.ones(1)), trajectory(), BOUNDS["fp32"])


def test_holds_only_where_something_was_certified(tmp_path: Path) -> None:
    good, bad = compare(trajectory(), trajectory(), BOUNDS["strict"]), Row("z1-t1-p1-d1", 1, failed="<died>")
    certificate = Certificate({"steps": 2, "overrides": []}, BOUNDS["strict"], documents_are_apart=True)
    assert not certificate.holds
    certificate.rows.append(Row("z9", 1, refused="cannot be"))
    assert not certificate.holds
    certificate.rows.append(Row("z0-t1-p1-d1", 1, deviation=good))
    assert certificate.holds
    certificate.rows.append(bad)
    assert not certificate.holds

    page.write(certificate, tmp_path / "c.json", tmp_path / "c.html")
    record = json.loads((tmp_path / "c.json").read_text())
    assert [row["verdict"] for row in record["layouts"]] == ["refused: cannot be", "ok", "FAILED: <died>"]
    assert record["holds"] is False
    assert "&lt;died&gt;" in (tmp_path / "c.html").read_text()
    assert "1 of 3 layouts" in page.summary(certificate)
    with pytest.raises(UserError, match="cannot be written"):
        page.write(certificate, tmp_path / "no" / "c.json", tmp_path / "c.html")
