"""Runs side by side, by hand: order, best, what differs, and when nothing may be compared."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import pytest
from rich.console import Console

from eat_dist.errors import ConfigError, StorageError
from eat_dist.robustness.statistics import EnsembleStatistics, MemberStatistics, Policy
from eat_dist.runs import comparison as comparing
from eat_dist.runs.comparison import Comparison, Row, compare
from eat_dist.runs.comparison_table import print_comparison
from eat_dist.runs.summary import flat_figures
from eat_dist.runs.tracked import EpochMeans
from eat_dist.schedule import Schedule

ALIKE = {"protocol": "quick", "epsilon": "0.2"}


def row(
    name: str,
    value: float | None = None,
    *,
    parent: str | None = None,
    started: int = 0,
    params: Mapping[str, str] | None = None,
    measured: Mapping[str, str] = ALIKE,
) -> Row:
    common = {"data.dataset": "digits", "defense.name": "eat", "ensemble.members": "3", "seed": "0"}
    metrics = {} if value is None else {"worst/r_at_1": value, "epoch/clean_loss": 10 * value}
    return Row(
        key=name,
        name=name,
        status="FINISHED",
        parent=parent,
        started=started,
        folder=None,
        params=common | dict(params or {}),
        metrics=metrics,
        measured=measured,
    )


def arranged(rows: list[Row], sort: str | None = None) -> Comparison:
    metric = comparing._sorted_by(rows, sort)
    return Comparison(comparing._in_order(rows, metric), metric)


def names(comparison: Comparison) -> list[str]:
    return ["  " * depth + entry.name for depth, entry in comparison.rows]


def printed(comparison: Comparison, *, width: int | None = None) -> str:
    out = io.StringIO()
    print_comparison(comparison, Console(file=out, width=width, force_terminal=width is not None, color_system=None))
    return out.getvalue()


def test_trials_stand_beneath_their_sweep_which_stands_where_its_best_trial_would() -> None:
    rows = [
        row("alone", 0.5),
        row("new", started=9),
        row("old", started=1),
        row("sweep"),
        row("bad", 0.1, parent="sweep"),
        row("good", 0.7, parent="sweep"),
        row("pruned", parent="sweep"),
        row("orphan", 0.6, parent="elsewhere"),
    ]

    assert names(arranged(rows)) == ["sweep", "  good", "  bad", "  pruned", "orphan", "alone", "new", "old"]
    # Of a loss the lowest is the best.
    by_loss = ["sweep", "  bad", "  good", "  pruned", "alone", "orphan", "new", "old"]
    assert names(arranged(rows, "epoch/clean_loss")) == by_loss


def test_the_best_is_marked_only_among_runs_measured_alike() -> None:
    alike = [row("a", 0.5), row("b", 0.7), row("unmeasured", measured={})]
    out = printed(arranged(alike))
    assert [line for line in out.splitlines() if "*" in line and "│" in line] == [
        line for line in out.splitlines() if line.startswith(" b ")
    ]
    assert "* marks the best" in out

    unlike = [row("a", 0.5), row("b", 0.7, measured=ALIKE | {"epsilon": "0.1"})]
    out = printed(arranged(unlike))
    assert "*" not in out
    assert "the runs differ in ε. No best is marked." in out
    elsewhere = [row("a", 0.5), row("b", 0.7, params={"data.dataset": "omniglot"})]
    assert arranged(elsewhere).measured_unlike == ["dataset"]


def test_only_params_that_differ_and_can_change_a_number_have_columns() -> None:
    first = {"attack.epsilon": "0.1", "train.epochs": "3", "cluster.address": "a", "data.root": "/a", "name": "a"}
    second = {"attack.epsilon": "0.2", "train.epochs": "3", "cluster.address": "b", "data.root": "/b", "name": "b"}
    sweep = Row("s", "s", "RUNNING", None, 0, None, {"trials": "6"}, {}, {})

    assert arranged([row("a", params=first), row("b", params=second), sweep]).differing == ["attack.epsilon"]


def test_what_does_not_fit_the_terminal_goes_into_a_second_table() -> None:
    many = [f"attack.setting_{index}" for index in range(4)]
    rows = [row(name, 0.5, params=dict.fromkeys(many, name)) for name in ("a", "b")]
    wide, narrow, piped = (printed(arranged(rows), width=width) for width in (200, 100, None))
    assert wide.count("━╇") > 0
    assert [text.count(" run ") for text in (wide, narrow, piped)] == [1, 2, 1]
    assert all(max(map(len, text.splitlines())) <= width for text, width in ((wide, 200), (narrow, 100)))
    for text in (wide, narrow, piped):
        assert all(setting in text for setting in many)


def test_an_unknown_metric_lists_the_nearest() -> None:
    rows = [row("a", 0.5)]
    with pytest.raises(ConfigError, match=r"no run has the metric 'worst/r_at1'; the nearest: worst/r_at_1, "):
        comparing._sorted_by(rows, "worst/r_at1")
    with pytest.raises(ConfigError, match="nor any other yet"):
        comparing._sorted_by([row("a")], "worst/r_at_1")


def test_a_folder_that_is_no_run_is_looked_for_in_mlflow(tmp_path: object) -> None:
    with pytest.raises(StorageError, match="there is no MLflow store at"):
        compare([str(tmp_path)], sort=None, last=None, tracking_uri=f"sqlite:///{tmp_path}/none.db")


def test_of_each_attack_the_lowest_over_its_objectives_is_sent() -> None:
    """A success rate is left to the objectives, since its highest is the worst. On a sample there is no NMI."""
    attacked = {
        "pgd20/displacement": {"r_at_1": 0.4, "nmi": 0.2, "success_rate": 0.5},
        "pgd20/proxy@members": {"r_at_1": 0.3, "nmi": 0.6, "success_rate": None},
        "square1000/displacement": {"r_at_1": 0.9, "success_rate": 0.1},
    }
    flat = flat_figures({"clean": {"r_at_1": 1.0}, "attacked": attacked, "members": [{"attacked": attacked}]})
    assert {name: value for name, value in flat.items() if name.count("/") == 2 and not name.startswith("member")} == {
        "attacked/pgd20/r_at_1": 0.3,
        "attacked/pgd20/nmi": 0.2,
        "attacked/square1000/r_at_1": 0.9,
    }
    assert flat["member_0/attacked/pgd20/r_at_1"] == 0.3
    assert flat["attacked/pgd20/proxy/from_members/nmi"] == 0.6


def test_a_run_that_failed_sanity_checks_is_marked_and_never_the_best() -> None:
    broken = replace(row("broken", 0.9), failed_checks="gradients, black_box")
    comparison = arranged([broken, row("sound", 0.5), row("weak", 0.4)])
    assert comparison.best("worst/r_at_1") == 0.5
    told = printed(comparison)
    assert "broken ✗" in told
    assert "✗ broken failed sanity checks (gradients, black_box): do not quote it. It is never best." in told
    assert "50.0 *" in told
    assert "90.0 *" not in told


def test_epoch_means_are_over_members_and_iterations_of_their_epoch_alone() -> None:
    """Two iterations an epoch. Losses of two members: (1, 3), (3, 5) → members 2 and 4, ensemble 3."""
    epochs = EpochMeans(Schedule(iterations_per_epoch=2, epochs=3))

    def merged(iteration: int, *losses: float) -> EnsembleStatistics:
        members = tuple(MemberStatistics(rank, iteration - 1, 8, clean_loss=loss) for rank, loss in enumerate(losses))
        empty = EnsembleStatistics.initial(Policy(2, 5, "none", 1, 1.0, 0.9), iteration)
        return replace(empty, members=members)

    assert epochs.add(merged(1, 1.0, 3.0)) is None
    assert epochs.add(merged(2, 3.0, 5.0)) == (
        1,
        {"epoch/clean_loss": 3.0, "epoch/member_0/clean_loss": 2.0, "epoch/member_1/clean_loss": 4.0},
    )
    assert epochs.add(merged(3, 100.0, 100.0)) is None  # the second iteration of this epoch never came
    assert epochs.add(merged(5, 1.0, 1.0)) is None
    ended = epochs.add(merged(6, 3.0, 3.0))
    assert ended is not None
    assert (ended[0], ended[1]["epoch/clean_loss"]) == (3, 2.0)
