"""The report of an evaluation says what the results hold, and nothing that users write becomes markup."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rdm_rl.evaluation.comparison import compare
from rdm_rl.evaluation.intervals import Estimate
from rdm_rl.evaluation.report import cautions, format_results, html_report, markdown_report, tables
from rdm_rl.evaluation.results import Result, Results


def a_row(name: str, kind: Any = "student", frechet: float = 1.0, ink: float = 0.5, **facts: Any) -> Result:
    values = {"net/frechet/teacher": Estimate(frechet, frechet - 0.1, frechet + 0.1)}
    values["reward/ink"] = Estimate(ink, ink - 0.02, ink + 0.02)
    by_image = {"reward/ink": [[ink], [ink]]}
    facts = {"num_images": 2, "num_inference_steps": 4, "network_evaluations": 4.0, **facts}
    return Result(name=name, kind=kind, values=values, by_image=by_image, **facts)


def some_results(*rows: Result, **facts: Any) -> Results:
    teacher = a_row("teacher", "reference", frechet=0.3, network_evaluations=100.0)
    defaults = {
        "prompts": ["a", "b"],
        "seeds": [0],
        "reference": "teacher",
        "settings": {},
        "versions": {},
        "seconds": 1,
    }
    return Results(rows=[teacher, *rows], **{**defaults, **facts})


def test_the_floor_and_what_was_trained_on_do_not_compete() -> None:
    results = some_results(a_row("near"), a_row("far", frechet=2.0, ink=0.9, trained_on=("ink",)))
    markdown = markdown_report(results)
    assert "| near | **1.00** ± 0.10 |" in markdown
    assert "| teacher | 0.30 ± 0.10 |" in markdown
    assert "0.900† ± 0.020" in markdown
    assert "† marks" in markdown
    assert "2.00  ±0.10" in format_results(results)


@pytest.mark.parametrize(("value", "decimals"), [(1234.5, 0), (12.345, 1), (0.012345, 3), (0.0, 3)])
def test_columns_have_three_digits_of_their_largest_number(value: float, decimals: int) -> None:
    (table,) = (table for table in tables(some_results(a_row("a", ink=value))) if table.title == "Cost and rewards")
    (column,) = (column for column in table.columns if column.title == "ink")
    assert column.decimals == decimals, "the teacher has 0.5"


def test_readers_are_warned_of_unequal_and_of_few_images() -> None:
    few, many = a_row("few"), a_row("many", num_images=5000)
    assert [caution[:20] for caution in cautions(some_results(few))] == ["With 2 images, dista"]
    assert any("do not compare" in caution for caution in cautions(some_results(few, many)))
    assert cautions(replace(some_results(), rows=[many])) == []


def test_the_page_escapes_what_users_write_and_shows_all_of_it() -> None:
    evil = '<script>alert("x")</script>'
    results = some_results(a_row(evil), prompts=[evil, "b"], settings={evil: {evil: evil}}, versions={evil: evil})
    page = html_report(results, {evil: [torch.zeros(3, 8, 8)]}, {}, command=evil)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 10
    assert "25× fewer" in page
    assert "ink against fidelity" in page


def test_a_report_needs_no_reference_and_no_pictures() -> None:
    row = Result(name="a", kind="student", num_images=1, values={})
    results = replace(some_results(), rows=[row], reference=None)
    assert "<h1>Evaluation</h1>" in html_report(results, {}, {})
    assert "| a |" in markdown_report(results)


def test_comparison_takes_what_is_shared() -> None:
    first = some_results(a_row("s"))
    more = {"reward/ink": [[0.1, 0.7], [0.2, 0.9], [0.3, 1.0]]}
    student = replace(a_row("s"), by_image=more)
    second = replace(first, rows=[student], prompts=["c", "b", "a"], seeds=[1, 0], reference=None)
    merged = compare({"x": first, "y": second})
    assert ([row.name for row in merged.rows], merged.reference) == (["x: teacher", "x: s", "y: s"], "x: teacher")
    assert merged.prompts == ["a", "b"]
    (last,) = (row for row in merged.rows if row.name == "y: s")
    assert last.by_image["reward/ink"] == [pytest.approx([1.0]), pytest.approx([0.9])]
    assert last.differences["reward/ink"].value == pytest.approx(0.45)
    with pytest.raises(ValueError, match="share no prompt"):
        compare({"x": first, "y": replace(second, prompts=["d", "e", "f"])})


def test_a_row_that_two_evaluations_have_is_one_with_all_that_they_measured() -> None:
    first = some_results(a_row("s"))
    more = {"reward/ink": [[0.5], [0.5]], "reward/size": [[1.0], [3.0]]}
    second = replace(first, rows=[replace(row, by_image=more) for row in first.rows])
    (teacher, student) = compare({"x": first, "y": second}).rows
    assert (teacher.name, student.name) == ("x: teacher", "x: s")
    assert student.values["reward/size"].value == 2
    assert student.values["net/frechet/teacher"].value == 1, "the same prompts and seeds"
