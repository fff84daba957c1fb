"""The report of a sweep, without a browser: who is best, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eat_dist.metrics.pareto import not_dominated
from eat_dist.report.page import render
from eat_dist.report.sweeps import drawings, tables
from eat_dist.report.sweeps.looks import strokes
from eat_dist.report.sweeps.page import make_sweep_page, verdict, warnings
from eat_dist.report.sweeps.ranking import best, finished, front, gain, ordered, score
from eat_dist.report.sweeps.reading import read_sweep
from eat_dist.report.sweeps.wording import objective_name, reason
from eat_dist.storage import Folder
from sweep_folders import PLANTED, SPACE, TWO, edited, sweep_of, write_sweep


def last_values(folder: Folder, name: str, status: str = "FINISHED") -> dict[int, float]:
    """By trial number the last value of an objective, read without the code under test."""
    rows = json.loads(folder.read("trials.json"))
    return {r["number"]: r["results"][-1]["objectives"][name] for r in rows if r["status"] == status and r["results"]}


# Who is best


@pytest.mark.parametrize(("direction", "choose"), [("max", max), ("min", min)])
def test_the_best_trial_is_the_best_in_the_objectives_direction(tmp_path: Path, direction: str, choose: Any) -> None:
    """The second objective of the helper, 1 − attacked NMI, is to be made small."""
    name = {"max": "attacked_nmi", "min": "attacked_error"}[direction]
    folder = write_sweep(tmp_path / "s", pruned=10, failed=3, objectives=[{"name": name, "direction": direction}])
    values = last_values(folder, name)
    sweep = read_sweep(folder)

    winner = best(sweep)

    assert winner is not None
    assert winner.number == choose(values, key=values.__getitem__)
    middle = float(np.median(list(values.values())))
    assert gain(sweep) == pytest.approx(abs(values[winner.number] - middle))
    table = tables.trials(sweep)
    assert table.rows[0].heading == f"★ {winner.number}"
    assert [row.heading for row in table.rows if "★" in row.heading] == [f"★ {winner.number}"]
    assert [row.heading for row in table.rows if row.cells[1].mark == "best"] == [f"★ {winner.number}"]
    assert strokes(sweep)[winner.id].rank == max(stroke.rank for stroke in strokes(sweep).values())


def test_a_pruned_trial_is_never_the_best_however_high_its_last_value(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=6, pruned=2)
    pruned = next(iter(last_values(folder, "attacked_nmi", "PRUNED")))
    result = {"epoch": 2, "objectives": {"attacked_nmi": 0.99}, "figures": {}}

    sweep = read_sweep(edited(folder, pruned, results=[result]))

    winner = best(sweep)
    assert winner is not None
    assert winner.number != pruned
    # Were it finished, it would be.
    finishing = best(read_sweep(edited(folder, pruned, status="FINISHED")))
    assert finishing is not None
    assert finishing.number == pruned


def test_a_score_is_that_of_the_last_epoch_not_of_the_luckiest(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=1)
    values = [{"epoch": epoch, "objectives": {"attacked_nmi": value}} for epoch, value in ((2, 0.9), (3, 0.4))]
    # As they may lie in the file: not in order.
    sweep = read_sweep(edited(folder, 0, results=values[::-1]))

    assert score(sweep.trials[0], sweep.objectives[0]) == 0.4


def test_trials_come_finished_then_pruned_each_best_first(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=12, pruned=4, failed=2)

    statuses = [trial.status for trial in ordered(sweep)]
    values = [score(trial, sweep.objectives[0]) or 0 for trial in ordered(sweep) if trial.status == "FINISHED"]

    assert statuses == ["FINISHED"] * 6 + ["PRUNED"] * 4 + ["FAILED"] * 2
    assert values == sorted(values, reverse=True)


def test_the_front_is_what_nothing_beats() -> None:
    """Worked by hand: (3, 1), (2, 2) and (1, 3) beat nothing of each other; (1, 1) and (2, 1) are beaten."""
    points = [(3, 1), (1, 1), (2, 2), (2, 1), (1, 3), (2, 2)]

    assert not_dominated(points, ["max", "max"]) == [0, 2, 4, 5]
    assert not_dominated(points, ["min", "min"]) == [1]
    assert not_dominated(points, ["max", "min"]) == [0]


def test_two_objectives_have_a_front_and_no_best(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, objectives=TWO, trials=20, failed=1)
    chosen = front(sweep)

    said = verdict(sweep)

    assert best(sweep) is None
    assert 1 < len(chosen) < len(finished(sweep))
    for trial in chosen:
        mine = [score(trial, objective) or 0 for objective in sweep.objectives]
        for other in finished(sweep):
            theirs = [score(other, objective) or 0 for objective in sweep.objectives]
            assert theirs == mine or any(a < b for a, b in zip(theirs, mine, strict=True))
    assert said.label == f"◆ {len(chosen)} trials on the front of clean R@1 and attacked NMI"
    headings = [row.heading for row in tables.trials(sweep).rows]
    assert headings[: len(chosen)] == [f"◆ {trial.number}" for trial in chosen]
    assert not any("◆" in heading or "★" in heading for heading in headings[len(chosen) :])
    assert f"{len(chosen)} trials of {len(finished(sweep))} on the front" in drawings.pareto(sweep).caption


# What is said


def test_the_verdict_counts_names_and_warns(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", pruned=10, failed=3)
    values = last_values(folder, "attacked_nmi")
    number = max(values, key=values.__getitem__)

    said = verdict(read_sweep(folder))

    assert said.about == "30 trials: 17 finished, 10 pruned, 3 failed"
    assert said.label == f"★ Trial {number}: attacked NMI {100 * values[number]:.1f} %"
    ahead = f"{100 * (values[number] - float(np.median(list(values.values())))):.1f} points ahead of the median one"
    assert said.sentence == f"Trial {number} is the best of 17 finished trials, {ahead}."
    assert f"{PLANTED} = " in said.notes[0]
    assert "One seed a trial" in said.notes[1]
    assert "on all training classes, then test it" in said.notes[1]


def test_a_ready_config_is_named_where_there_is_one(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=2)
    without = verdict(read_sweep(folder))
    folder.write("best.yaml", b"seed: 0\n")

    assert verdict(read_sweep(folder)).notes == [
        *without.notes,
        "Its config for that: best.yaml in the sweep's folder.",
    ]


def test_one_trial_alone_is_ahead_of_nobody(tmp_path: Path) -> None:
    said = verdict(sweep_of(tmp_path, trials=1))

    assert said.sentence == "Trial 0 is the only one that finished: there is nothing to compare it with."


def test_a_sweep_of_failures_has_a_page_that_says_so(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=3, failed=3, space={PLANTED: SPACE[PLANTED]})

    page = make_sweep_page(sweep)

    assert page.verdicts[0].outcome == "fail"
    assert "there is no best" in page.verdicts[0].sentence
    assert "nan in iteration 112" in render(page, figures_folder=None)


def test_an_unfinished_sweep_is_reported_with_a_warning(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=6, trials_requested=10)
    edited(folder, 0, status="RUNNING")
    edited(folder, 1, status="INTERRUPTED", results=[])

    sweep = read_sweep(folder)

    assert warnings(sweep)[0].startswith(
        "The sweep is not finished: 2 trials running or interrupted and 4 of 10 not started."
    )
    assert len(finished(sweep)) == 4
    assert not warnings(sweep_of(tmp_path, trials=6))


def test_a_best_that_the_results_contradict_is_said(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=5)
    right = best(read_sweep(folder))
    assert right is not None
    wrong = next(trial for trial in read_sweep(folder).trials if trial.id != right.id)
    folder.write_json("sweep.json", folder.read_json("sweep.json") | {"best": wrong.id})

    said = warnings(read_sweep(folder))

    assert said == [
        f"sweep.json names trial {wrong.number} as the best; by the last results in trials.json it is trial "
        f"{right.number}, and this page goes by those."
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("attacked_nmi", "attacked NMI"), ("clean_r_at_1", "clean R@1"), ("harmonic", "harmonic mean")],
)
def test_objectives_are_named_in_words(tmp_path: Path, name: str, words: str) -> None:
    sweep = sweep_of(tmp_path, trials=1, objectives=[{"name": name, "direction": "max"}])

    assert objective_name(sweep.objectives[0]) == words
    assert ("that of clean R@1 and attacked NMI" in tables.trials(sweep).note) == (name == "harmonic")


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    folder = edited(write_sweep(tmp_path / "s", trials=1, failed=1), 0, error="x" * 5000)

    assert len(reason(read_sweep(folder).trials[0])) == 300
