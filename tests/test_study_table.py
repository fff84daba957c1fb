"""The tables of a study against values worked by hand, and what its page says, without a browser."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path
from typing import Any

import pytest

from eat_dist.errors import ConfigError, StorageError
from eat_dist.report import write_report
from eat_dist.report.content import Table
from eat_dist.report.groups import Value
from eat_dist.report.page import render
from eat_dist.report.studies import tables
from eat_dist.report.studies.comparison import Comparison, compare
from eat_dist.report.studies.page import make_study_page, verdict, warnings
from eat_dist.report.studies.reading import Study, read_study
from eat_dist.report.studies.text import as_csv, markdown
from eat_dist.storage import Folder
from study_folders import FIGURES, drawn, study_json, write_study

R1, NMI = "worst/r_at_1", "worst/nmi"
# Three seeds. eat − pgd_at is +0.02, +0.03, +0.04: mean 0.03, deviation 0.01. trades is ahead of nobody.
ROWS = {"pgd_at": [0.30, 0.40, 0.50], "eat": [0.32, 0.43, 0.54], "trades": [0.20, 0.35, 0.38]}


def study_of(path: Path, rows: Any, **changes: Any) -> Study:
    return read_study(write_study(path / "study", study_json(rows, **changes)))


def compared(path: Path, rows: Any, **changes: Any) -> Comparison:
    [found] = compare(study_of(path, rows, **changes))
    return found


def row(comparison: Comparison, label: str) -> Any:
    return next(row for row in comparison.rows if row.label == label)


def column(table: Table, label: str) -> list[str]:
    place = [entry.label for entry in table.columns].index(label) - 1
    return [row.cells[place].text for row in table.rows]


# The statistics


def test_a_row_is_the_mean_and_the_sample_deviation_over_its_seeds(tmp_path: Path) -> None:
    """0.3, 0.4, 0.5: mean 0.4; deviations −0.1, 0, 0.1, so √(0.02/2) = 0.1."""
    comparison = compared(tmp_path, ROWS)

    value = row(comparison, "pgd_at").value(R1)
    assert value.mean == pytest.approx(0.4)
    assert value.std == pytest.approx(0.1)
    assert row(comparison, "pgd_at").passes == Value(9135.0, 0.0)
    assert row(comparison, "pgd_at").seconds.mean == pytest.approx(91.0)


def test_a_part_of_a_pass_is_counted_too(tmp_path: Path) -> None:
    content = study_json(ROWS)
    for run in content["runs"]:
        run["passes"] += 0.667  # of a forward pass alone
    [comparison] = compare(read_study(write_study(tmp_path, content)))

    assert row(comparison, "eat").passes.mean == pytest.approx(9135.667)


def test_differences_are_of_the_same_seed_and_to_the_best_other_row(tmp_path: Path) -> None:
    comparison = compared(tmp_path, ROWS)

    lead, behind, last = (comparison.difference(row(comparison, label), R1) for label in ("eat", "pgd_at", "trades"))

    assert lead is not None
    assert (lead.other, lead.seeds) == ("pgd_at", 3)
    assert lead.value.mean == pytest.approx(0.03)
    assert lead.value.std == pytest.approx(0.01)
    # The seeds themselves differ by 0.11: unpaired, nobody could tell.
    assert (row(comparison, "eat").value(R1).std or 0) > 0.1
    assert behind is not None
    assert (behind.other, behind.value.mean) == ("eat", pytest.approx(-0.03))
    assert last is not None
    # −0.12, −0.08, −0.16
    assert (last.other, last.value.mean, last.value.std) == ("eat", pytest.approx(-0.12), pytest.approx(0.04))


@pytest.mark.parametrize(
    ("second", "is_ahead"),
    [
        ([0.32, 0.43, 0.54], True),  # mean 0.03 > 0.01
        ([0.29, 0.40, 0.54], False),  # −0.01, 0, 0.04: mean 0.01 < 0.026
        ([0.30, 0.40, 0.50], False),  # equal
    ],
)
def test_the_first_is_best_only_if_it_is_ahead_by_more_than_the_differences_deviate(
    tmp_path: Path, second: list[float], is_ahead: bool
) -> None:
    comparison = compared(tmp_path, {"pgd_at": ROWS["pgd_at"], "eat": second})

    best = comparison.best(R1)
    assert (best is not None) == is_ahead
    assert best is None or best.label == "eat"


def test_one_seed_has_no_deviation_and_no_best(tmp_path: Path) -> None:
    study = study_of(tmp_path, {"pgd_at": [0.3], "eat": [0.9]})
    [comparison] = compare(study)

    assert row(comparison, "eat").value(R1) == Value(0.9, None)
    assert comparison.best(R1) is None
    lead = comparison.difference(row(comparison, "eat"), R1)
    assert lead is not None
    assert lead.value == Value(pytest.approx(0.6), None)
    text = markdown(study)
    assert "±" not in text.split("One seed")[0]
    assert "**" not in text
    assert "One seed: there is no spread" in text


def test_who_lacks_a_seed_is_compared_but_nobody_is_compared_with_it(tmp_path: Path) -> None:
    """The lucky row's one good seed would make it first."""
    study = study_of(tmp_path, {**ROWS, "lucky": [None, None, 0.9]})
    [comparison] = compare(study)

    lead = comparison.difference(row(comparison, "eat"), R1)
    assert lead is not None
    assert lead.other == "pgd_at"
    first, lucky = comparison.first(R1), comparison.difference(row(comparison, "lucky"), R1)
    assert first is not None
    assert first.label == "eat"
    assert lucky is not None
    assert (lucky.seeds, lucky.value) == (1, Value(pytest.approx(0.36), None))
    text = markdown(study)
    assert "| lucky | 3 | 25 | 9,135 | 92 | 1 of 3 | 0.900 |" in text
    assert "Without all seeds, so others are not compared with them: lucky (1 of 3)." in text
    assert text.count("- lucky-digits-s") == 2  # the failed runs, named with their reasons
    assert "the clean loss is nan" in text


def test_where_all_rows_lack_the_same_seed_they_are_compared_over_the_others(tmp_path: Path) -> None:
    rows = {label: [*values[:2], None] for label, values in ROWS.items()}
    lead = compared(tmp_path, rows).difference(row(compared(tmp_path, rows), "eat"), R1)

    assert lead is not None
    assert (lead.seeds, lead.value.mean) == (2, pytest.approx(0.025))


def test_runs_that_were_not_measured_alike_have_no_best_and_no_differences(tmp_path: Path) -> None:
    content = study_json(ROWS)
    content["runs"][0]["measured"] = content["runs"][0]["measured"] | {"epsilon": "0.2"}
    study = read_study(write_study(tmp_path, content))
    [comparison] = compare(study)

    assert comparison.best(R1) is None
    assert comparison.difference(row(comparison, "eat"), R1) is None
    assert "the runs differ in ε" in markdown(study)


def test_each_dataset_is_compared_by_itself(tmp_path: Path) -> None:
    study = study_of(tmp_path, {"digits": ROWS, "cub": {"pgd_at": [0.6, 0.7], "eat": [0.5, 0.6], "trades": [0.1, 0.2]}})

    firsts = [comparison.first(R1) for comparison in compare(study)]
    assert [first and first.label for first in firsts] == ["eat", "pgd_at"]
    assert [line for line in markdown(study).splitlines() if line.startswith("## ")] == [
        "## digits: protocol standard, L∞ ε = 0.1, 2120 images of 106 unseen classes",
        "## cub: protocol standard, L∞ ε = 0.1, 2120 images of 106 unseen classes",
    ]


# As text


def test_the_markdown_has_figures_costs_and_differences(tmp_path: Path) -> None:
    lines = markdown(study_of(tmp_path, ROWS)).splitlines()

    assert lines[0] == "# Study omniglot"
    assert (
        "| row | M | epochs | passes | seconds | seeds | clean R@1 | attacked R@1 | clean NMI | attacked NMI |" in lines
    )
    figures = next(line for line in lines if line.startswith("| eat | 3"))
    assert figures == "| eat | 3 | 25 | 9,135 | 91 | 3 |" + 4 * " **0.430 ± 0.110** |"
    assert "| row | clean R@1, to eat | attacked R@1, to eat | clean NMI, to eat | attacked NMI, to eat |" in lines
    assert "| eat |" + 4 * " +0.030 ± 0.010 (to pgd_at) |" in lines
    assert "| trades |" + 4 * " −0.120 ± 0.040 |" in lines


def test_the_csv_has_the_numbers_unrounded(tmp_path: Path) -> None:
    rows = drawn(["natural", "pgd_at", "eat"])
    read = list(csv.DictReader(io.StringIO(as_csv(study_of(tmp_path, rows)))))

    assert [line["row"] for line in read] == ["natural", "pgd_at", "eat"]
    for line in read:
        assert (line["dataset"], line["members"], line["seeds"], line["passes"]) == ("digits", "3", "3", "9135.0")
        for figure in FIGURES:
            name, values = figure.replace("/", "_"), rows[line["row"]][figure]
            assert float(line[f"{name}_mean"]) == pytest.approx(statistics.fmean(values), abs=1e-12)
            assert float(line[f"{name}_std"]) == pytest.approx(statistics.stdev(values), abs=1e-12)
            other = rows["pgd_at" if line["row"] == "eat" else "eat"][figure]
            differences = [mine - theirs for mine, theirs in zip(values, other, strict=True)]
            assert float(line[f"{name}_difference"]) == pytest.approx(statistics.fmean(differences), abs=1e-12)
            assert float(line[f"{name}_difference_std"]) == pytest.approx(statistics.stdev(differences), abs=1e-12)
            assert line[f"{name}_best"] == ("1" if line["row"] == "eat" else "0")


def test_equal_compute_is_said(tmp_path: Path) -> None:
    assert "Equal compute: the passes of 'pgd_at'" in markdown(study_of(tmp_path, ROWS, budget_row="pgd_at"))
    assert "Equal compute" not in markdown(study_of(tmp_path, ROWS))


def test_rows_that_miss_the_budget_are_named_beside_the_table(tmp_path: Path) -> None:
    content = study_json(ROWS, budget_row="pgd_at")
    for run in content["runs"]:
        run["passes"] *= {"eat": 1.04, "trades": 0.25, "pgd_at": 1.0}[run["row"]]
    told = markdown(read_study(write_study(tmp_path, content)))
    assert "the passes of 'pgd_at', as nearly as whole epochs allow; not so: trades (0.25 ×)." in told


def test_a_row_whose_training_withstood_nothing_is_named_beside_the_table(tmp_path: Path) -> None:
    content = study_json(ROWS)
    assert "withstood nothing" not in markdown(read_study(write_study(tmp_path / "one", content)))
    next(run for run in content["runs"] if run["row"] == "trades")["withstands_nothing"] = True
    told = markdown(read_study(write_study(tmp_path / "other", content)))
    assert "Training that withstood nothing" in told
    assert "as chance would: trades." in told


# The page


def test_the_page_has_percentages_with_the_best_marked(tmp_path: Path) -> None:
    study = study_of(tmp_path, ROWS)
    [comparison] = compare(study)
    table = tables.figures(study, comparison)

    assert column(table, "attacked R@1") == ["40.0", "43.0", "31.0"]
    assert [line.cells[1].spread for line in table.rows] == ["10.0", "11.0", "9.6"]
    assert [line.heading for line in table.rows if line.cells[1].mark == "best"] == ["eat"]
    against = tables.differences(comparison)
    assert column(against, "attacked R@1, to eat") == ["−3.0", "+3.0", "−12.0"]
    assert [line.cells[1].spread for line in against.rows] == ["1.0", "1.0 to pgd_at", "4.0"]


def test_the_verdict_says_who_is_ahead_or_that_nobody_is(tmp_path: Path) -> None:
    ahead = verdict(compared(tmp_path, ROWS))
    assert ahead.sentence == "★ eat is ahead in attacked R@1 and attacked NMI, by more than seeds differ."
    assert ahead.figures == [("R@1", "43.0", "43.0"), ("NMI", "43.0", "43.0")]

    split = {
        "pgd_at": {**{figure: [0.3, 0.4] for figure in FIGURES}, NMI: [0.5, 0.6]},
        "eat": {figure: [0.3, 0.5] for figure in FIGURES},
    }
    nobody = verdict(compared(tmp_path, split))
    assert nobody.sentence == "○ eat has the highest attacked R@1; no row is ahead in it by more than seeds differ."
    assert nobody.notes[1] == "First elsewhere: pgd_at in attacked NMI."


def test_the_page_warns_of_what_failed_is_missing_or_may_not_be_quoted(tmp_path: Path) -> None:
    content = study_json({**ROWS, "lucky": [None, 0.5, 0.6]})
    content["runs"][0]["failed_checks"] = ["epsilon_zero"]
    content["runs"][1] |= {"status": "INTERRUPTED", "figures": None}
    told = warnings(read_study(write_study(tmp_path, content)))

    assert "1 run of 12 to come" in told[0]
    assert told[1] == "1 run failed: lucky-digits-s0."
    assert "not to be quoted: pgd_at-digits-s0 (epsilon_zero)" in told[2]


def test_a_study_in_which_nothing_is_finished_has_a_page_that_says_so(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", study_json({"pgd_at": [None], "eat": [None]}))
    study = read_study(folder)

    assert verdict(compare(study)[0]).outcome == "fail"
    assert "No finished run: pgd_at and eat." in markdown(study)
    written = write_report([folder], str(tmp_path / "report.html"))
    assert written.figures == ()
    assert "No run is finished yet." in Path(written.page).read_text()


def test_names_from_a_study_are_escaped_on_the_page(tmp_path: Path) -> None:
    page = make_study_page(study_of(tmp_path, ROWS, name="<script>alert(1)</script>", command="a && <b>"))

    html = render(page, figures_folder=None)
    assert "<script>" not in html
    assert "a &amp;&amp; &lt;b&gt;" in html


def test_the_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study", study_json(ROWS))
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pages.append(Path(write_report([folder], str(tmp_path / name / "report.html")).page).read_bytes())

    assert pages[0] == pages[1]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 7}, "expected schema 1; got 7"),
        ({"runs": []}, "is not a study: runs: "),
        ({"rows": {"pgd_at": {}}}, "'eat-digits-s0' is of no row or dataset"),
        ({"runs": "many"}, "is not a study: runs: "),
    ],
)
def test_a_damaged_study_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_study(tmp_path, study_json(ROWS) | changes)

    with pytest.raises(StorageError, match=message) as refused:
        read_study(folder)
    assert "\n" not in str(refused.value)


def test_a_study_is_reported_alone(tmp_path: Path) -> None:
    study, other = (write_study(tmp_path / name, study_json(ROWS)) for name in ("a", "b"))

    with pytest.raises(ConfigError, match=r"one study alone; got the study '.*a' with 1 other folders"):
        write_report([study, other], str(tmp_path / "report.html"))
    assert Folder.at(tmp_path).names() == ["a", "b"]
