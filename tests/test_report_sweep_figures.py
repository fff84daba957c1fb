"""What the report of a sweep shows, without a browser: its tables, its axes and its drawings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eat_dist.report import sweep_figures
from eat_dist.report.content import Listing, Table, Text
from eat_dist.report.sweeps import drawings, sections, tables
from eat_dist.report.sweeps.looks import STOPPED
from eat_dist.report.sweeps.parallel import parallel
from eat_dist.report.sweeps.ranking import best, finished
from eat_dist.report.sweeps.reading import read_sweep
from eat_dist.report.sweeps.space import read_space, written
from sweep_folders import CONDITIONAL, IDLE, ONE, PLANTED, SPACE, edited, sweep_of, write_sweep


def column(table: Table, label: str) -> list[str]:
    place = [entry.label for entry in table.columns].index(label) - 1
    return [row.cells[place].text for row in table.rows]


def texts(drawing: Any) -> set[str]:
    """What is written into the axes."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    drawing.paint(axes)
    return {text.get_text() for text in axes.texts}


def lines(drawing: Any) -> list[Any]:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    drawing.paint(axes)
    return list(axes.lines)


# Tables


def test_failed_trials_are_listed_with_their_reasons(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=8, failed=3)

    table = tables.failed(sweep)

    assert table is not None
    assert [row.heading for row in table.rows] == ["0", "1", "2"]
    assert {row.cells[0].mark for row in table.rows} == {"fail"}
    assert {row.cells[2].text for row in table.rows} == {
        "NonFiniteLossError: the loss of member 1 is nan in iteration 112 lower the learning rate"
    }
    # The one that failed after its first epoch is among the measured, too; the others are not.
    assert [row.heading for row in tables.trials(sweep).rows if row.cells[0].text == "failed"] == ["1"]
    assert tables.failed(sweep_of(tmp_path, trials=3)) is None


def test_a_setting_that_did_not_apply_is_not_written(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", space=CONDITIONAL, trials=12)
    sweep = read_sweep(folder)
    table = tables.trials(sweep)

    rules, steps = column(table, "defense.transfer_rule"), column(table, "defense.relay_steps")

    assert {"uniform", "relay"} == set(rules)
    assert [step == "–" for step in steps] == [rule == "uniform" for rule in rules]
    assert column(tables.space(sweep), "applies where")[2] == "defense.transfer_rule is relay"
    # In the drawing its lines pass beside the axis, and it says so.
    assert "not used" in texts(parallel(sweep))


def test_the_table_writes_each_figure_once(tmp_path: Path) -> None:
    """Attacked NMI is the objective here, so its column of figures is left out."""
    labels = [entry.label for entry in tables.trials(sweep_of(tmp_path, trials=2)).columns]

    assert labels.count("attacked NMI, %") == 1
    assert {"clean R@1, %", "attacked R@1, %", "clean NMI, %", *SPACE} < set(labels)


def test_what_made_the_sweep_is_on_the_page(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=2)
    winner = best(sweep)
    assert winner is not None

    blocks = sections.origin(sweep).blocks

    listed = {block.caption: block.text for block in blocks if isinstance(block, Listing)}
    assert listed["Command"] == sweep.about.command
    settings = listed[f"Settings of trial {winner.number}, over the base config"]
    assert f"  transfer_strength: {winner.settings[PLANTED]}\n" in settings
    assert "search optuna; scheduler asha" in next(block.text for block in blocks if isinstance(block, Text))
    space = next(block for block in blocks if isinstance(block, Table))
    assert [row.heading for row in space.rows] == list(SPACE)
    assert column(space, "space")[1] == "log_uniform 1e-4, 0.01"
    assert column(space, f"best (trial {winner.number})")[4] in ("4/255", "8/255", "16/255")


def test_a_figure_that_is_not_finite_counts_as_not_measured(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=3)
    rows = folder.read_json("trials.json")
    rows[1]["results"][-1]["objectives"]["attacked_nmi"] = math.nan
    folder.write("trials.json", json.dumps(rows).encode())

    sweep = read_sweep(folder)

    assert [trial.number for trial in finished(sweep)] == [0, 2]
    assert "–" in column(tables.trials(sweep), "attacked NMI, %")
    assert sweep.objectives[0].name == ONE[0]["name"]


# The axes


def test_places_on_an_axis_follow_its_scale() -> None:
    """On [1e-4, 1e-2] 1e-3 lies in the middle; of three categories the second does; 3 lies halfway from 1 to 5."""
    space = {
        "a": {"log_uniform": ["1e-4", 1e-2]},
        "b": {"choice": ["x", [8, 16], True]},
        "c": {"integer": [1, 5]},
        "d": {"grid": ["4/255", "8/255"]},
    }
    axes = read_space(space, [{"d": 4 / 255}])

    assert axes[0].position(1e-3) == pytest.approx(0.5)
    assert [axes[1].position(value) for value in ("x", [8, 16], True)] == [0, 0.5, 1]
    assert axes[2].position(3) == 0.5
    # As given and as the config reads it: the same value.
    assert [axes[3].position(value) for value in ("4/255", 8 / 255)] == [0, 1]
    assert axes[3].label(8 / 255) == "8/255"
    assert axes[3].categories == ("4/255", "8/255")
    assert [axis.ordered for axis in axes] == [True, False, True, True]
    assert axes[0].ticks() == [(0.0, "0.0001"), (pytest.approx(0.5), "0.001"), (1.0, "0.01")]
    assert [label for _, label in axes[1].ticks()] == ["x", "[8, 16]", "true"]


def test_an_axis_reaches_what_was_tried_outside_of_the_space() -> None:
    axes = read_space({"a": {"uniform": [0, 1]}, "b": {"choice": ["x"]}}, [{"a": 2.0, "b": "y"}])

    assert axes[0].high == 2.0
    assert axes[1].categories == ("x", "y")


def test_settings_are_written_short() -> None:
    assert [written(value) for value in (0.00316227766, True, None, [16, 32], "8/255", 3)] == [
        "0.003162",
        "true",
        "null",
        "[16, 32]",
        "8/255",
        "3",
    ]


# Drawings


def test_a_line_runs_through_a_trials_settings_to_its_score(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=5, pruned=1)
    winner = best(sweep)
    assert winner is not None

    drawn = [line for line in lines(parallel(sweep)) if len(line.get_xdata()) == len(SPACE) + 1]

    assert len(drawn) == 5
    thickest = max(drawn, key=lambda line: line.get_linewidth())
    learning_rate = winner.settings["optimiser.learning_rate"]
    place = (math.log10(learning_rate) + 4) / 2
    np.testing.assert_allclose(thickest.get_xdata()[:2], [winner.settings[PLANTED], place], atol=1e-9)
    # The best score is at the right end, the pruned trial is thin and dotted.
    assert thickest.get_xdata()[-1] == 1
    (thin,) = [line for line in drawn if line.get_color() == STOPPED.colour]
    assert thin.get_linewidth() < min(line.get_linewidth() for line in drawn if line is not thin)
    assert {*SPACE, "attacked NMI, %", "4/255"} - texts(parallel(sweep)) == {"optimiser.learning_rate", IDLE}
    assert "optimiser.learning_rate (log)" in texts(parallel(sweep))


def test_courses_end_where_trials_were_pruned(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=5, pruned=2)

    drawing = drawings.course(sweep, sweep.objectives[0])

    ends = sorted(line.get_xdata()[-1] for line in lines(drawing) if len(line.get_xdata()) > 1)
    assert ends == [2, 2, 8, 8, 8]
    assert drawing.alt.count("pruned after epoch 2") == 2


def test_the_front_leaves_out_what_was_pruned(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=8, pruned=3)

    drawn = drawings.pareto(sweep)

    assert drawn.caption.endswith("of 5 on the front")
    assert sum(len(line.get_xdata()) for line in lines(drawn) if line.get_marker() == STOPPED.marker) == 0


def test_figures_for_a_tracking_server_are_whole(tmp_path: Path) -> None:
    """One of each kind, title and legend within the figure as it is saved without further ado."""
    space = {PLANTED: SPACE[PLANTED]}
    made = sweep_figures(write_sweep(tmp_path / "s", trials=10, space=space))

    slices = "slice-attacked-nmi-defense-transfer-strength"
    assert set(made) == {"parallel", "front", "course-attacked-nmi", "importance-attacked-nmi-at-the-end", slices}
    for figure in made.values():
        assert figure.get_suptitle()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 > -0.15
        assert box.y0 > -0.05
        assert box.x1 < width + 0.15
        assert box.y1 < height + 0.05
    assert made["front"].legends


def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    folder = edited(write_sweep(tmp_path / "s", trials=1), 0, status="RUNNING", results=[])

    assert sweep_figures(folder) == {}
