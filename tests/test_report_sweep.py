"""The report of a sweep, without a browser: who is best, what mattered, what is said and refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.metrics.pareto import not_dominated
from eat_dist.report import sweep_figures, write_report
from eat_dist.report.content import Listing, Table, Text
from eat_dist.report.page import render
from eat_dist.report.sweeps import drawings, sections, tables
from eat_dist.report.sweeps.importance import FEWEST_TRIALS, analyse, analyses, common_epoch
from eat_dist.report.sweeps.looks import STOPPED, strokes
from eat_dist.report.sweeps.page import make_sweep_page, verdict, warnings
from eat_dist.report.sweeps.parallel import parallel
from eat_dist.report.sweeps.ranking import best, finished, front, gain, ordered, score
from eat_dist.report.sweeps.reading import Sweep, read_sweep
from eat_dist.report.sweeps.space import read_space, written
from eat_dist.report.sweeps.wording import objective_name, reason
from eat_dist.storage import Folder
from evaluation_folders import quick_evaluation, write_run
from sweep_folders import CONDITIONAL, IDLE, ONE, PLANTED, SPACE, TWO, write_sweep


def sweep_of(path: Path, **options: Any) -> Sweep:
    return read_sweep(write_sweep(path / "sweep", **options))


def edited(folder: Folder, number: int, **changes: Any) -> Folder:
    """The sweep with keys of one trial replaced."""
    rows = folder.read_json("trials.json")
    rows[number] |= changes
    folder.write_json("trials.json", rows)
    return folder


def last_values(folder: Folder, name: str, status: str = "FINISHED") -> dict[int, float]:
    """By trial number the last value of an objective, read without the code under test."""
    rows = json.loads(folder.read("trials.json"))
    return {r["number"]: r["results"][-1]["objectives"][name] for r in rows if r["status"] == status and r["results"]}


def column(table: Table, label: str) -> list[str]:
    place = [entry.label for entry in table.columns].index(label) - 1
    return [row.cells[place].text for row in table.rows]


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


def test_a_sweep_of_failures_has_a_page_that_says_so(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=3, failed=3, space={PLANTED: SPACE[PLANTED]})

    page = make_sweep_page(sweep)

    assert page.verdicts[0].outcome == "fail"
    assert "there is no best" in page.verdicts[0].sentence
    assert "nan in iteration 112" in render(page, figures_folder=None)


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


# What mattered


def test_a_planted_setting_is_found_and_an_idle_one_is_not(tmp_path: Path) -> None:
    found = analyse(sweep := sweep_of(tmp_path, trials=20, seed=1), finished(sweep), sweep.objectives[0]).found
    by_key = {entry.parameter.key: entry for entry in found}

    assert found[0].parameter.key == PLANTED
    assert found[0].share > 0.5
    assert found[0].matters
    assert not by_key[IDLE].matters
    assert set(by_key) == set(SPACE)


def test_scores_that_are_noise_make_nothing_important(tmp_path: Path) -> None:
    """The negative control: the forest still gives most to some setting, but no more than to shuffled scores."""
    sweep = sweep_of(tmp_path, trials=20, seed=3, effect=0.0)

    found = analyse(sweep, finished(sweep), sweep.objectives[0]).found

    assert max(entry.share for entry in found) > 0.2
    assert not any(entry.matters for entry in found)


def test_pruned_trials_count_only_where_all_were_measured(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=26, pruned=12, failed=2)

    at_the_end, early = analyses(sweep)

    assert (at_the_end.epoch, at_the_end.trials) == (None, 12)
    assert (early.epoch, early.trials) == (2, 24)
    assert early.found[0].parameter.key == PLANTED
    assert common_epoch(sweep_of(tmp_path, trials=4)) is None


def test_too_few_trials_are_not_analysed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, trials=FEWEST_TRIALS - 1)

    (found,) = analyses(sweep)
    section = sections.importance([found], [])

    assert found.found == ()
    said = " ".join(block.text for block in section.blocks if isinstance(block, Text))
    assert f"{FEWEST_TRIALS - 1} of at least {FEWEST_TRIALS} trials" in said
    assert section.empty


def test_equal_scores_are_not_analysed(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=FEWEST_TRIALS)
    for number in range(FEWEST_TRIALS):
        edited(folder, number, results=[{"epoch": 1, "objectives": {"attacked_nmi": 0.5}}])

    (found,) = analyses(read_sweep(folder))

    assert found.left_out == ("too little to analyse: all scores are equal",)


def test_a_conditional_setting_is_judged_among_the_trials_it_applies_to(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, space=CONDITIONAL, trials=24)
    applying = [trial for trial in sweep.trials if "defense.relay_steps" in trial.settings]

    (found,) = analyses(sweep)

    by_key = {entry.parameter.key: entry for entry in found.found}
    assert FEWEST_TRIALS <= len(applying) < 24
    assert by_key["defense.relay_steps"].trials == len(applying)
    assert by_key[PLANTED].trials == 24
    assert found.found[0].parameter.key == PLANTED


def test_a_conditional_setting_that_applied_to_few_is_left_out_with_a_word(tmp_path: Path) -> None:
    space = {key: CONDITIONAL[key] for key in ("defense.transfer_rule", "defense.relay_steps")}
    (found,) = analyses(sweep_of(tmp_path, space={PLANTED: {"choice": [0.5]}} | space, trials=12))

    assert [sentence.split(" to ")[0] for sentence in found.left_out] == [
        f"{PLANTED} had one value in all of these trials",
        "defense.relay_steps applied",
    ]


def test_importances_leave_optunas_settings_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()

    analyses(sweep_of(tmp_path, trials=FEWEST_TRIALS))

    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


# Drawings


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


# The page as a file


def test_a_sweep_folder_becomes_a_page_and_its_figures(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=3, space={PLANTED: SPACE[PLANTED]})

    written_files = [write_report([folder], str(tmp_path / where / "r.html")) for where in ("first", "second")]

    html = Path(written_files[0].page).read_text(encoding="utf-8")
    assert html == Path(written_files[1].page).read_text(encoding="utf-8")
    assert "<h1>Sweep s</h1>" in html
    names = {path.name for path in (tmp_path / "first" / "r_figures").iterdir()}
    for name in ("parallel", "front", "course-attacked-nmi", "slice-attacked-nmi-defense-transfer-strength"):
        assert {f"{name}.svg", f"{name}.png"} <= names
    assert len(written_files[0].figures) == len(names)
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert "var(--scale-6)" in html
    # Without a script, a request or a date of its own.
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    evil = "<script>$x$<"
    folder = write_sweep(
        tmp_path / "s",
        trials=2,
        failed=1,
        space={PLANTED: SPACE[PLANTED], f"a.{evil}": {"choice": [evil]}},
        objectives=[{"name": evil, "direction": "max"}],
        name=evil,
        command=evil,
        git=evil,
        base_config={"data": {"dataset": evil}},
    )
    edited(folder, 0, error=evil, run_folder=evil)

    html = Path(write_report([folder], str(tmp_path / "r.html")).page).read_text(encoding="utf-8")

    assert "<script" not in html
    assert html.count("&lt;script&gt;$x$&lt;") > 15


def test_progress_is_told_by_part(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    sweep = sweep_of(tmp_path, trials=1, failed=1)

    make_sweep_page(sweep, on_progress=lambda *progress: told.append(progress))

    assert told == [("importances", 0, 3), ("figures", 1, 3), ("page", 2, 3)]


# What is refused


def test_a_sweep_is_reported_alone(tmp_path: Path) -> None:
    sweep, run = write_sweep(tmp_path / "s", trials=1), write_run(tmp_path / "a", summary=quick_evaluation())
    other = write_sweep(tmp_path / "t", trials=1)

    for folders in ([sweep, run], [run, sweep], [sweep, other], [sweep, sweep]):
        with pytest.raises(ConfigError, match="one sweep alone"):
            write_report(folders, str(tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


def broken(path: Path, fault: str) -> Folder:
    folder = write_sweep(path, trials=2)
    sweep, rows = folder.read_json("sweep.json"), folder.read_json("trials.json")
    if fault in ("sweep.json", "trials.json"):
        folder.delete(fault)
    elif fault == "cut":
        folder.write("trials.json", b'[{"id": ')
    elif fault == "no trials":
        folder.write_json("trials.json", [])
    elif fault == "twice":
        folder.write_json("trials.json", [rows[0], rows[0]])
    elif fault == "schema":
        folder.write_json("sweep.json", sweep | {"schema": 2})
    elif fault == "objectives":
        folder.write_json("sweep.json", sweep | {"objectives": []})
    elif fault == "space":
        folder.write_json("sweep.json", sweep | {"space": sweep["space"] | {IDLE: {"normal": [0, 1]}}})
    elif fault == "log":
        folder.write_json("sweep.json", sweep | {"space": sweep["space"] | {IDLE: {"log_uniform": [0, 1]}}})
    elif fault == "status":
        edited(folder, 0, status="DONE")
    elif fault == "stranger":
        edited(folder, 1, settings={"data.batch_size": 3})
    elif fault == "word":
        edited(folder, 1, settings={PLANTED: "much"})
    return folder


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("sweep.json", "it lacks sweep.json; start the sweep again"),
        ("trials.json", "it lacks trials.json; start the sweep again"),
        ("cut", "not valid JSON"),
        ("no trials", "no trials yet"),
        ("twice", "two trials have the id t0000"),
        ("schema", "expected schema 1; got 2"),
        ("objectives", "objectives"),
        ("space", f"with a list for {IDLE}"),
        ("log", f"above 0 for {IDLE}"),
        ("status", "0.status"),
        ("stranger", "trial 1 sets data.batch_size, which sweep.json lacks"),
        ("word", f"two numbers for {PLANTED}"),
    ],
)
def test_a_damaged_sweep_is_one_line(tmp_path: Path, fault: str, says: str) -> None:
    folder = broken(tmp_path / "s", fault)

    with pytest.raises(StorageError) as raised:
        write_report([folder], str(tmp_path / "r.html"))

    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, EatError)
    assert not (tmp_path / "r.html").exists()


def test_a_figure_that_is_not_finite_counts_as_not_measured(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "s", trials=3)
    rows = folder.read_json("trials.json")
    rows[1]["results"][-1]["objectives"]["attacked_nmi"] = math.nan
    folder.write("trials.json", json.dumps(rows).encode())

    sweep = read_sweep(folder)

    assert [trial.number for trial in finished(sweep)] == [0, 2]
    assert "–" in column(tables.trials(sweep), "attacked NMI, %")
    assert sweep.objectives[0].name == ONE[0]["name"]
