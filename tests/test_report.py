"""The report, without a browser: what is marked, merged and said."""

from __future__ import annotations

from typing import Any

import pytest

from eat_dist.report.cells import marked
from eat_dist.report.content import Page, Table
from eat_dist.report.groups import Value, disagreements, group_by_seed, worst
from eat_dist.report.page import make_page, render, verdict
from eat_dist.report.reading import Run
from eat_dist.report.schema import Evaluation
from eat_dist.report.tables import attacks, headline
from eat_dist.report.wording import attack_name, number, percent, radius, split_attack
from evaluation_folders import BARE, SHORT, evaluation, history, quick_evaluation, run_of


def marks(table: Table, column: int) -> list[str | None]:
    """The marks of a column of numbers, the row headings not counted."""
    return [row.cells[column].mark for row in table.rows]


# What is marked


def test_the_best_of_a_column_is_marked_as_printed() -> None:
    """0.3012 and 0.2996 print as 30.1 and 30.0; 30.04 and 29.96 both print as 30.0 and are marked alike."""
    values = [[Value(30.12), Value(30.04)], [Value(29.96), Value(29.96)], [Value(10.0), Value(None)]]

    cells = marked(values, eligible=[True] * 3, mark="best", extremes=[max, max])

    assert [row[0].mark for row in cells] == ["best", None, None]
    # Both print 30.0: no difference to mark.
    assert [row[1].mark for row in cells] == [None, None, None]
    assert [row[1].text for row in cells] == ["30.0", "30.0", "–"]


def test_a_run_with_a_failed_check_is_never_the_best() -> None:
    broken = run_of("broken", strength=0.9, failing=("gradients",))
    runs = [broken, run_of("a", strength=0.3), run_of("b", strength=0.2)]

    table = headline(group_by_seed(runs), comparable=True)

    attacked_recall = 1
    assert marks(table, attacked_recall) == [None, "best", None]
    assert table.rows[0].heading == "✗ broken"
    assert "do not quote" in table.note
    # Were its checks to pass, it would be the best.
    runs[0] = run_of("broken", strength=0.9)
    assert marks(headline(group_by_seed(runs), comparable=True), attacked_recall) == ["best", None, None]


def test_runs_measured_differently_are_not_compared() -> None:
    runs = [run_of("a", strength=0.3, **BARE), run_of("b", strength=0.2, epsilon=0.2, **BARE)]

    table = headline(group_by_seed(runs), comparable=not disagreements(runs))
    page = make_page(runs)

    assert disagreements(runs) == ["ε"]
    assert {cell.mark for row in table.rows for cell in row.cells} == {None}
    assert "they differ in ε" in page.warnings[0]
    assert not make_page([runs[0], run_of("c", **BARE)]).warnings


def test_one_run_alone_is_not_the_best_of_anything() -> None:
    table = headline(group_by_seed([run_of("a")]), comparable=True)

    assert {cell.mark for row in table.rows for cell in row.cells} == {None}


def test_the_strongest_attack_is_the_lowest_figure_and_the_highest_success() -> None:
    """Of the helper's attacks on all images nearest_negative leaves least R@1, random_wrong_centroid least NMI."""
    table = attacks(run_of("a"))
    columns = [column.label for column in table.columns][1:]
    objectives = {
        name: [row.cells[0].text for row in table.rows if row.cells[columns.index(name)].mark == "strongest"]
        for name in ("R@1", "NMI", "success")
    }

    assert objectives == {
        "R@1": ["nearest negative"],
        "NMI": ["random wrong centroid"],
        "success": ["nearest negative"],
    }


def test_an_attack_on_a_sample_is_named_so_and_does_not_compete() -> None:
    weak = evaluation()
    weak["ensemble"]["attacked"]["square1000/nearest_negative"]["r_at_1"] = 0.0
    run = Run("a", Evaluation.model_validate(weak), "", history(iterations=0), None)

    row = next(row for row in attacks(run).rows if row.heading.startswith("Square"))

    assert row.heading == "Square-1000 (sample)"
    assert {cell.mark for cell in row.cells} == {None}


# Seeds


def test_runs_that_differ_in_their_seed_only_become_mean_and_deviation() -> None:
    """Clean R@1 0.70, 0.71, 0.72 for seeds 0, 1, 2: mean 71.0, deviation (n − 1) 1.0."""
    config = "name: {name}\nseed: {seed}\ndefense:\n  name: eat\n"
    runs = [run_of(f"eat-{seed}", config.format(name=f"n{seed}", seed=seed), seed=seed) for seed in range(3)]
    other = run_of("pgd_at-0", "seed: 0\ndefense:\n  name: pgd_at\n")

    groups = group_by_seed([*runs, other])
    cell = headline(groups, comparable=True).rows[0].cells[0]

    assert [group.label for group in groups] == ["eat (3 seeds)", "pgd_at-0"]
    assert (cell.text, cell.spread) == ("71.0", "1.0")


def test_two_runs_of_one_seed_are_no_sample_of_two() -> None:
    assert len(group_by_seed([run_of("a", "seed: 0"), run_of("b", "seed: 0")])) == 2
    assert len(group_by_seed([run_of("a", "seed: 0"), run_of("b", "seed: 1", seed=1)])) == 1


def test_foreign_models_are_never_put_together() -> None:
    """Their config does not say which weights they have."""
    target = {"kind": "module", "name": "x"}
    runs = [run_of(str(seed), "seed: 0", seed=seed, target=target) for seed in range(2)]

    assert len(group_by_seed(runs)) == 2


def test_the_worst_figure_carries_the_spread_of_its_own_attack() -> None:
    summary = evaluation()
    weakest = min(summary["ensemble"]["attacked"].values(), key=lambda figures: figures.get("nmi", 1.0))
    weakest["nmi_std"] = 0.031

    assert worst("nmi")(Evaluation.model_validate(summary)) == Value(weakest["nmi"], 0.031)
    # Of R@1 the worst is over queries, not over attacks: it has no spread.
    assert worst("r_at_1")(Evaluation.model_validate(summary)).std is None


# What is said


@pytest.mark.parametrize(
    ("changes", "outcome", "sentence"),
    [
        ({}, "pass", "✓ All 8 sanity checks passed: the figures may be quoted."),
        ({"failing": ("zero_epsilon", "ladder")}, "fail", "✗ 2 of 8 sanity checks failed: do not quote these figures."),
        ({"sanity": []}, "none", "○ No sanity checks were run (protocol full): read the attacked figures as upper "),
    ],
)
def test_the_verdict_says_whether_the_figures_may_be_quoted(
    changes: dict[str, Any], outcome: str, sentence: str
) -> None:
    said = verdict(run_of("a", strength=0.5, **changes))

    assert said.outcome == outcome
    assert said.sentence.startswith(sentence)
    # Clean R@1 0.70; half of it is left.
    assert said.figures[0] == ("R@1", "70.0", "35.0")


def test_what_was_not_measured_is_said() -> None:
    quick = Run("q", Evaluation.model_validate(quick_evaluation()), "", history(iterations=0), None)

    html = render(make_page([quick]), figures_folder=None)

    for sentence in (
        "q (protocol quick): no strength ladder was measured.",
        "q (protocol quick): no curve against ε was measured.",
        "q (protocol quick): no transfer matrix was measured.",
        "q (protocol quick): no embeddings were kept.",
        "q (protocol quick): there are no training statistics.",
        "q (protocol quick): no sanity checks were run.",
    ):
        assert sentence in html
    assert "<svg" not in html
    # Nothing explains how to read what is not there.
    assert "t-SNE" not in html


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("apgd100x5/displacement@members", ("APGD-100\N{NO-BREAK SPACE}×5", "displacement", "summed members")),
        ("pgd20/nearest_negative@member_0", ("PGD-20", "nearest negative", "member 0")),
        ("cw/own_objective", ("CW", "own objective", "fused embedding")),
        ("strange/x@without_2", ("strange", "x", "all but member 2")),
    ],
)
def test_attacks_are_named_in_words(key: str, words: tuple[str, str, str]) -> None:
    assert split_attack(key) == words


def test_numbers_are_written_as_a_reader_expects() -> None:
    assert [number(-0.04), number(-1.26), number(float("nan")), number(None)] == ["0.0", "−1.3", "–", "–"]
    assert percent(0.6957) == "69.6"
    assert [radius(8 / 255, "linf"), radius(0.1, "linf"), radius(1.0, "l2")] == ["8/255", "0.1", "1"]
    assert attack_name("pgd20x1") == "PGD-20"


def test_a_cell_without_a_spread_says_nothing_of_one() -> None:
    html = render(make_page([run_of("a", **BARE)]), figures_folder=None)

    assert '<td class="number">70.0</td>' in html
    assert '76.0<span class="spread"> ±0.4</span>' in html


def test_a_page_lists_its_drawings_in_folds_too() -> None:
    page = make_page([run_of("a", **BARE | {"curves": SHORT["curves"]})])

    assert isinstance(page, Page)
    names = [plot.name for plot in page.plots()]
    assert len(names) == len(set(names))
    assert "curve-r-at-1-displacement" in names
