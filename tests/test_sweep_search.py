"""What a sweep decides without a cluster: who is next, who is stopped, and who is best."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_plans import FIGURES, SPACE, plan_of

from eat_dist.cluster.tune import Halving
from eat_dist.storage import Folder
from eat_dist.sweeps import SweepPlan
from eat_dist.sweeps.objectives import front, values_of
from eat_dist.sweeps.record import Trial, ranked, read_trials, result_of, winners, write_trials
from eat_dist.sweeps.search import propose


def value_of(settings: dict[str, Any]) -> float:
    """A made-up objective whose best is ε = 0.2 with many steps."""
    return 1 - abs(settings["attack.epsilon"] - 0.2) + settings["attack.num_steps"] / 100


def played(plan: SweepPlan, count: int, trials: list[Trial] | None = None) -> list[Trial]:
    """Trials one after the other, every fourth pruned and every seventh failed."""
    trials = list(trials or [])
    for number in range(len(trials), count):
        settings = propose(plan, number, trials)
        assert settings is not None
        status: Any = "FAILED" if number % 7 == 6 else "PRUNED" if number % 4 == 3 else "FINISHED"
        epoch = plan.epochs if status == "FINISHED" else plan.rungs[0]
        values = {name: value_of(settings) for name in plan.objectives}
        results = [] if status == "FAILED" else [result_of(epoch, values, FIGURES)]
        trials.append(Trial(f"{number:04d}", number, status, f"trials/{number:04d}", settings, results))
    return trials


# Search


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_one_seed_gives_one_sweep_and_another_another(search: Any) -> None:
    first, again, other = (
        [trial.settings for trial in played(plan_of(search=search, seed=seed), 15)] for seed in (0, 0, 1)
    )

    assert first == again
    assert first != other
    assert len({str(settings) for settings in first}) == 15, "settings are repeated"


@pytest.mark.parametrize("search", ["optuna", "random"])
@pytest.mark.parametrize("objective", ["attacked_nmi", "pareto"])
def test_a_search_that_was_killed_and_read_back_goes_on_as_if_it_had_not_been(
    search: Any, objective: Any, tmp_path: Path
) -> None:
    plan = plan_of(search=search, objective=objective, scheduler="none")
    whole = played(plan, 14)
    write_trials(Folder.at(tmp_path), whole[:11])

    resumed = played(plan, 14, read_trials(Folder.at(tmp_path)))

    assert [trial.settings for trial in resumed] == [trial.settings for trial in whole]


def test_optuna_learns_from_the_record() -> None:
    """After thirty trials it looks near the best ε; random search does not."""

    def distance(search: Any) -> float:
        late = played(plan_of(search=search), 40)[30:]
        return sum(abs(trial.settings["attack.epsilon"] - 0.2) for trial in late) / len(late)

    assert distance("optuna") < 0.6 * distance("random")


def test_trials_that_run_at_once_are_not_alike() -> None:
    plan, trials = plan_of(), played(plan_of(), 12)
    for number in (12, 13, 14):
        settings = propose(plan, number, trials)
        assert settings is not None
        trials.append(Trial(f"{number:04d}", number, "RUNNING", "x", settings))

    running = [trial.settings for trial in trials[12:]]
    assert all(first != second for first, second in itertools.combinations(running, 2))


def test_a_grid_is_gone_through_in_order_and_ends() -> None:
    plan = plan_of("attack.epsilon: {grid: [0.1, 0.2]}\nattack.num_steps: {integer: [1, 2]}", search="grid")
    trials = played(plan, 4)

    assert [tuple(trial.settings.values()) for trial in trials] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]
    assert propose(plan, 4, trials) is None


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_a_small_space_is_exhausted_rather_than_repeated(search: Any) -> None:
    plan = plan_of("attack.epsilon: {grid: [0.1, 0.2]}\nattack.name: {choice: [pgd, fgsm]}", search=search)
    trials: list[Trial] = []
    while (settings := propose(plan, len(trials), trials)) is not None:
        results = [result_of(15, {"attacked_nmi": 0.5}, FIGURES)]
        trials.append(Trial(f"{len(trials):04d}", len(trials), "FINISHED", "x", settings, results))

    assert len(trials) == 4


# Rungs


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "rungs"),
    [(15, 2, 3, (2, 6, 15)), (4, 1, 3, (1, 3, 4)), (9, 1, 3, (1, 3, 9)), (1, 1, 2, (1,)), (8, 8, 2, (8,))],
)
def test_rungs_are_those_of_ashas_scheduler(epochs: int, grace: int, factor: int, rungs: tuple[int, ...]) -> None:
    plan = plan_of(SPACE, f"train.epochs={epochs}", grace_period=grace, reduction_factor=factor)
    brackets = Halving("o", grace, factor, epochs).scheduler()._brackets

    assert plan.rungs == rungs
    assert {milestone for milestone, _ in brackets[0]._rungs} <= set(rungs)
    assert replace(plan, scheduler="none").rungs == (epochs,)


def test_a_resumed_scheduler_judges_as_the_one_before_would() -> None:
    from types import SimpleNamespace

    earlier = [("0000", 1, 0.5), ("0001", 1, 0.6), ("0002", 1, 0.7)]
    for value, verdict in ((0.4, "STOP"), (0.8, "CONTINUE")):
        scheduler = Halving("o", 1, 3, 9, earlier).scheduler()
        newcomer = SimpleNamespace(trial_id="fresh")
        scheduler.on_trial_add(None, newcomer)
        assert scheduler.on_trial_result(None, newcomer, {"epoch": 1, "o": value}) == verdict
    blank = Halving("o", 1, 3, 9).scheduler()
    blank.on_trial_add(None, newcomer)
    assert blank.on_trial_result(None, newcomer, {"epoch": 1, "o": 0.4}) == "CONTINUE"


# Objectives


def test_objectives_are_what_they_say() -> None:
    assert values_of("attacked_nmi", FIGURES) == {"attacked_nmi": 0.3}
    assert values_of("harmonic", FIGURES)["harmonic"] == pytest.approx(2 * 0.9 * 0.3 / 1.2)
    assert values_of("harmonic", dict.fromkeys(FIGURES, 0.0)) == {"harmonic": 0.0}
    assert values_of("pareto", FIGURES) == {"clean_r_at_1": 0.9, "attacked_nmi": 0.3}


def test_the_front_is_what_nothing_dominates() -> None:
    values = {"a": (0.9, 0.1), "b": (0.5, 0.5), "c": (0.5, 0.4), "d": (0.1, 0.9), "e": (0.1, 0.1), "f": (0.9, 0.1)}

    assert front(values) == ["a", "f", "b", "d"]


def test_only_finished_trials_win() -> None:
    def trial(number: int, status: Any, epoch: int, value: float) -> Trial:
        return Trial(f"{number}", number, status, "x", {}, [result_of(epoch, {"attacked_nmi": value}, FIGURES)])

    trials = [trial(0, "PRUNED", 2, 0.9), trial(1, "FINISHED", 15, 0.5), trial(2, "FINISHED", 15, 0.6)]
    trials.append(Trial("3", 3, "FAILED", "x", {}, error="no"))

    assert winners(trials, ("attacked_nmi",)) == ("2", [])
    assert [entry.id for entry in ranked(trials, ("attacked_nmi",))] == ["2", "1", "0", "3"]
    assert winners(trials[:1], ("attacked_nmi",)) == (None, [])
