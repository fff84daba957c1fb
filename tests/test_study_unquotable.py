"""A row of a study whose runs failed sanity checks: shown and marked, but never first and never compared with."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from eat_dist.console import Console
from eat_dist.report.studies import tables
from eat_dist.report.studies.comparison import compare
from eat_dist.report.studies.drawings import drawings
from eat_dist.report.studies.page import verdict
from eat_dist.report.studies.reading import Study, read_study
from eat_dist.report.studies.text import as_csv, markdown
from eat_dist.storage import Folder
from eat_dist.studies.results import write_results
from eat_dist.tracking import Tracker
from study_folders import FIGURES, study_json, write_study

R1 = "worst/r_at_1"
# broken would be first by far. Of the others eat is ahead of pgd_at by +0.02, +0.03, +0.04.
ROWS = {"broken": [0.80, 0.82, 0.84], "pgd_at": [0.30, 0.40, 0.50], "eat": [0.32, 0.43, 0.54]}
FAILED = {"broken-digits-s1": ["gradients", "black_box"], "broken-digits-s2": ["gradients"]}


def study_of(
    path: Path, *, failed: Mapping[str, list[str]] = FAILED, rows: Mapping[str, Sequence[float | None]] = ROWS
) -> Study:
    content = study_json(rows)
    for run in content["runs"]:
        run["failed_checks"] = failed.get(run["name"], [])
    return read_study(write_study(path / "study", content))


def test_a_row_with_a_failed_check_is_never_first_nor_best(tmp_path: Path) -> None:
    [comparison] = compare(study_of(tmp_path))

    for figure in FIGURES:
        first, best = comparison.first(figure), comparison.best(figure)
        assert first is not None
        assert best is not None
        assert (first.label, best.label) == ("eat", "eat")
    [as_if_passed] = compare(study_of(tmp_path / "passed", failed={}))
    best = as_if_passed.best(R1)
    assert best is not None
    assert best.label == "broken"


def test_the_best_quotable_row_is_compared_with_the_second_quotable_and_the_doubtful_row_with_the_best(
    tmp_path: Path,
) -> None:
    [comparison] = compare(study_of(tmp_path))
    found = {row.label: comparison.difference(row, R1) for row in comparison.rows}

    assert {label: one and one.other for label, one in found.items()} == {
        "broken": "eat",
        "pgd_at": "eat",
        "eat": "pgd_at",
    }
    assert found["broken"] is not None
    assert found["broken"].value.mean == pytest.approx(0.39)  # 0.48, 0.39, 0.30
    assert found["eat"] is not None
    assert found["eat"].value.mean == pytest.approx(0.03)


def test_the_seeds_of_a_doubtful_row_do_not_keep_the_others_from_being_compared(tmp_path: Path) -> None:
    rows = {"broken": ROWS["broken"], "pgd_at": [0.30, 0.40, None], "eat": [0.32, 0.43, None]}
    study = study_of(tmp_path, rows=rows)
    [comparison] = compare(study)

    first = comparison.first(R1)
    assert first is not None
    assert first.label == "eat"
    assert "Without all seeds" not in markdown(study)


def test_a_doubtful_row_is_marked_in_every_table_and_a_line_beneath_names_it_with_its_checks(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    [comparison] = compare(study)
    line = "do not quote broken (gradients and black_box)."

    for table in (tables.figures(study, comparison), tables.differences(comparison)):
        assert [row.heading for row in table.rows] == ["✗ broken", "pgd_at", "eat"]
        assert {cell.mark for cell in table.rows[0].cells} == {None}
    assert line in tables.figures(study, comparison).note
    text = markdown(study)
    assert text.count("| ✗ broken |") == 2
    assert text.count("**") == 2 * len(FIGURES)
    assert "| eat | 3 | 25 | 9,135 | 91 | 3 | **0.430" in text
    assert line in text
    [clean] = [one for one in drawings(comparison) if "attacked R@1" in one.caption]
    assert "eat 43.0 ± 11.0; pgd_at 40.0 ± 10.0; ✗ broken 82.0 ± 2.0" in clean.alt


def test_the_terminal_marks_a_doubtful_row_and_stars_the_best_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study_of(tmp_path)

    write_results(Folder.at(tmp_path / "study"), Console(), Tracker(None))

    shown = capsys.readouterr().out
    lines = {name: next(line for line in shown.splitlines() if name in line) for name in ("broken", "pgd_at", "eat ")}
    assert "✗ broken" in lines["broken"]
    assert [line.count("*") for line in lines.values()] == [0, 0, len(FIGURES)]
    assert "do not quote that row" in shown


def test_where_all_checks_passed_no_row_is_marked(tmp_path: Path) -> None:
    text = markdown(study_of(tmp_path, failed={}))

    assert "✗" not in text
    assert "sanity checks" not in text


def test_the_csv_names_the_failed_checks_and_calls_no_such_row_best(tmp_path: Path) -> None:
    read = {line["row"]: line for line in csv.DictReader(io.StringIO(as_csv(study_of(tmp_path))))}

    assert {row: line["failed_checks"] for row, line in read.items()} == {
        "broken": "gradients black_box",
        "pgd_at": "",
        "eat": "",
    }
    assert {row: line["worst_r_at_1_best"] for row, line in read.items()} == {"broken": "0", "pgd_at": "0", "eat": "1"}
    assert read["broken"]["worst_r_at_1_difference_to"] == "eat"


def test_the_verdict_fails_where_checks_failed_and_speaks_of_the_other_rows(tmp_path: Path) -> None:
    [comparison] = compare(study_of(tmp_path))
    said = verdict(comparison)

    assert said.outcome == "fail"
    assert said.sentence == (
        "✗ Sanity checks failed in broken: do not quote that row. "
        "Of the others eat is ahead in attacked R@1 and attacked NMI, by more than seeds differ."
    )
    assert said.figures[0] == ("R@1", "43.0", "43.0")
    assert verdict(compare(study_of(tmp_path / "passed", failed={}))[0]).outcome == "none"


def test_where_every_row_is_doubtful_nothing_is_compared(tmp_path: Path) -> None:
    study = study_of(tmp_path, failed={f"{row}-digits-s0": ["transfer"] for row in ROWS})
    [comparison] = compare(study)
    said = verdict(comparison)

    assert said.outcome == "fail"
    assert said.sentence == ("✗ Sanity checks failed in broken, pgd_at and eat: do not quote those rows. Not compared.")
    assert "**" not in markdown(study)
    assert tables.differences(comparison).rows[0].cells[0].text == "–"
