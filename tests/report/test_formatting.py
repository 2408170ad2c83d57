"""Tables are rounded in the page and unrounded in the CSV."""

from __future__ import annotations

from typing import Any

import pytest

from jax_selftrain.report.formatting import Column, Level, Table, average_curves, format_number, make_cell_table
from jax_selftrain.stats.estimators import Estimate


@pytest.mark.parametrize(
    ("value", "digits", "options", "expected"),
    [
        (0.12345, 3, {}, "0.123"),
        (-0.5, 1, {}, "−0.5"),
        (-0.0001, 2, {}, "0.00"),
        (0.0001, 2, {"signed": True}, "0.00"),
        (0.25, 1, {"scale": 100, "signed": True}, "+25.0"),
        (1234567.0, 0, {}, "1,234,567"),
    ],
)
def test_numbers_have_fixed_decimals_and_a_true_minus(
    value: float, digits: int, options: dict[str, Any], expected: str
) -> None:
    assert format_number(value, digits, **options) == expected


def test_an_estimate_without_interval_is_marked() -> None:
    record = {"a": Estimate(1.0, None, None, 1), "p": 1e-9}
    table = Table("t", "T", (Column("a", "A"), Column("p", p_value=True)), [record])
    assert "no interval from one" in table.to_html()
    assert "&lt; 0.001" in table.to_html()
    assert table.to_csv() == "a,a_low,a_high,p\n1.0,,,1e-09\n"


def test_a_level_in_a_column_of_changes_has_no_plus_sign() -> None:
    column = Column("change", digits=1, signed=True)
    cells = (Level(12.34), 1.0, Estimate(-2.0, -3.0, -1.0, 5))
    table = Table("t", "t", (column,), [{"change": cell} for cell in cells])
    html = table.to_html()
    assert "<td>12.3</td>" in html
    assert "<td>+1.0</td>" in html
    assert table.to_csv().splitlines() == ["change,change_low,change_high", "12.34,,", "1.0,,", "-2.0,-3.0,-1.0"]


def test_a_table_over_several_cells_names_them() -> None:
    one, other = ({"student": "a", "treatment": treatment, "seed": 3} for treatment in ("source a", "noise"))
    heads = [Column("n")]
    assert make_cell_table("t", "t", heads, [(one, {"n": 1}), (one, {"n": 2})]).rows == [[1], [2]]
    table = make_cell_table("t", "t", heads, [(one, {"n": 1}), (other, {"n": 2})])
    assert table.to_csv().splitlines() == ["student,treatment,seed,n", "a,source a,3,1", "a,noise,3,2"]


def test_a_column_finds_its_value_in_a_record() -> None:
    entry = {"value": 0.5, "low": 0.25, "high": None, "n": 8}
    column = Column("change", path=("task", "change"), measure="exact_match")
    assert column.find({"task": {"change": entry}}) == Estimate(50.0, 25.0, None, 8)
    assert column.find({"task": None}) is None
    assert Column("controls").find({"controls": ["noise", "text"]}) == "noise, text"


def test_curves_of_unequal_lengths_are_averaged_at_both_ends() -> None:
    """With epochs, seeds have other numbers of steps."""
    assert average_curves([[0.0, 1.0, 4.0], [2.0, 3.0, 5.0, 8.0]]) == [1.0, 2.0, 6.0]
    assert average_curves([[3.0]]) == [3.0]
