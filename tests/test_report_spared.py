"""Of few classes a set is clustered twice under each attack; the report shows and marks the lower figure."""

from __future__ import annotations

from typing import Any

import pytest

from eat_dist.metrics.spared import Counted, counted_figure
from eat_dist.report.bench_tables import fractions
from eat_dist.report.content import Table
from eat_dist.report.curve_sections import curves as curve_section
from eat_dist.report.curve_sections import fraction_plots
from eat_dist.report.groups import Value, group_by_seed, worst
from eat_dist.report.reading import Run
from eat_dist.report.schema import Evaluation
from eat_dist.report.tables import attacks, curves, headline, inference
from evaluation_folders import evaluation, figures, history

SIGN = "†"


def few_classes(**changes: Any) -> Run:
    """Three attacks; with all images attacked 22.5, 24.8 and 21.6 of NMI are left, with one in five spared 24.0, 10.5
    and 23.0. So the second is the strongest."""
    attacked = {}
    for objective, whole, spared in (
        ("displacement", 0.225, 0.24),
        ("proxy", 0.248, 0.105),
        ("nearest_negative", 0.216, 0.23),
    ):
        of_spared = figures(0.1, spared) | {"nmi_std": 0.011}
        attacked[f"pgd20/{objective}"] = figures(0.1, whole, attacked=True) | {
            f"{name}_spared": of_spared[name] for name in ("nmi", "nmi_std", "ami", "ami_std", "f1", "f1_std")
        }
    least = figures(0.1, 0.105)
    content = evaluation(classes=5, ladder=[], curves=[], fractions_table=[])
    content["ensemble"] |= {
        "attacked": attacked,
        "worst": {name: least[name] for name in ("r_at_1", "nmi", "ami", "f1")},
    }
    return Run("few", Evaluation.model_validate(content | changes), "", history(iterations=0), None)


def column(table: Table, label: str) -> list[tuple[str, str | None]]:
    place = [entry.label for entry in table.columns].index(label) - 1
    return [(row.cells[place].text, row.cells[place].mark) for row in table.rows]


@pytest.mark.parametrize(
    ("whole", "spared", "counted"),
    [
        (0.3, 0.2, Counted(0.2, 0.02, spared=True)),
        (0.2, 0.3, Counted(0.2, 0.01, spared=False)),
        (0.2, 0.2, Counted(0.2, 0.01, spared=False)),
    ],
)
def test_the_lower_of_both_clusterings_counts_with_its_own_deviation(
    whole: float, spared: float, counted: Counted
) -> None:
    both = {"nmi": whole, "nmi_std": 0.01, "nmi_spared": spared, "nmi_std_spared": 0.02}

    assert counted_figure(both, "nmi") == counted


def test_a_figure_that_was_measured_once_or_not_at_all_is_itself() -> None:
    assert counted_figure({"nmi": 0.3, "nmi_std": 0.01}, "nmi") == Counted(0.3, 0.01, spared=False)
    assert counted_figure({"r_at_1": 0.3, "nmi_spared": 0.1}, "r_at_1") == Counted(0.3, None, spared=False)
    assert counted_figure({}, "nmi") == Counted(None, None, spared=False)


@pytest.mark.parametrize("figure", ["NMI", "AMI", "F1"])
def test_the_strongest_attack_is_the_one_that_left_the_worst_figure(figure: str) -> None:
    cells = column(attacks(few_classes()), figure)
    strongest = [text for text, mark in cells if mark == "strongest"]

    assert strongest == [SIGN + cells[-1][0]]  # the last row is the worst of all


def test_an_attack_shows_the_lower_of_both_figures_and_a_sign_where_that_is_the_spared_one() -> None:
    table = attacks(few_classes())

    assert [text for text, _ in column(table, "NMI")] == ["76.0", "22.5", "†10.5", "21.6", "10.5"]
    place = [entry.label for entry in table.columns].index("NMI") - 1
    assert [row.cells[place].spread for row in table.rows] == ["0.4", "0.4", "1.1", "0.4", ""]
    assert "†: with one image in 5 left as it is" in table.note


def test_a_test_set_of_many_classes_has_no_sign_and_no_legend_of_it() -> None:
    many = Run("many", Evaluation.model_validate(evaluation()), "", history(iterations=0), None)
    table = attacks(many)

    assert SIGN not in table.note
    assert SIGN not in "".join(cell.text for row in table.rows for cell in row.cells)


def test_the_worst_figure_of_an_entry_carries_the_spread_of_the_spared_clustering_it_is_of() -> None:
    run = few_classes()

    assert worst("nmi")(run.evaluation) == Value(0.105, 0.011)
    cell = headline(group_by_seed([run]), comparable=True).rows[0].cells[3]
    assert (cell.text, cell.spread) == ("10.5", "1.1")


def test_attacks_behind_a_defense_at_inference_show_the_lower_figure_too() -> None:
    attacked = few_classes().evaluation.ensemble.attacked
    row = {"attack": "pgd20", "objective": "proxy"}
    row |= {"adaptive": attacked["pgd20/proxy"], "non_adaptive": attacked["pgd20/displacement"]}
    table = inference(few_classes(inference={"name": "bart", "attacks": [row]}))

    assert [cell.text for cell in table.rows[0].cells][3:5] == ["†10.5", "22.5"]
    assert "†: with one image in 5" in table.note


def test_a_curve_runs_through_the_lower_figure_and_says_so() -> None:
    point = {"objective": "proxy", "attack": "pgd20", "epsilon": 0.1, "r_at_1": 0.1}
    clean = {"objective": "proxy", "attack": "clean", "epsilon": 0.0, "r_at_1": 0.7, "nmi": 0.76, "nmi_std": 0.0}
    point |= {"nmi": 0.248, "nmi_std": 0.004, "nmi_spared": 0.105, "nmi_std_spared": 0.011}
    run = few_classes(curves=[clean, point])
    section = curve_section(group_by_seed([run]))

    assert column(curves(run), "NMI") == [("76.0", None), ("†10.5", None)]
    assert "†: with one image in 5" in curves(run).note
    assert "lower one" in section.lead
    [alt] = [
        plot.alt for block in section.blocks if block.kind == "plots" for plot in block.plots if "nmi" in plot.name
    ]
    assert "10.5" in alt
    assert "24.8" not in alt


def test_one_image_in_c_spared_is_a_part_of_its_own_among_the_attacked_fractions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"objective": "proxy", "attack": "pgd20", "fraction": part, "r_at_1": 0.2} for part in (0.5, 1.0)]
    rows = [row | {"nmi": nmi, "nmi_std": 0.0} for row, nmi in zip(rows, (0.4, 0.248), strict=True)]
    run = few_classes(fractions_table=rows)
    table = fractions([run])

    assert [text for text, _ in column(table, "images attacked")] == ["50", "80", "100"]
    assert [text for text, _ in column(table, "NMI")] == ["40.0", "10.5", "24.8"]
    assert [text for text, _ in column(table, "R@1")] == ["20.0", "–", "20.0"]
    assert "one image in C left as it is" in table.note
    drawn: list[Any] = []
    monkeypatch.setattr("eat_dist.report.curve_sections.line_plot", lambda _, lines, **__: drawn.extend(lines))
    fraction_plots(group_by_seed([run]))
    assert list(drawn[0].x) == [0, 50, 80, 100]
    assert list(drawn[0].y) == pytest.approx([76, 40, 10.5, 24.8])
