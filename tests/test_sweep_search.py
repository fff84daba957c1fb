"""What a sweep decides without a cluster: who is next, who is best, and what is asked for in vain."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from eat_dist.cluster.tune import Halving
from eat_dist.config import load_config
from eat_dist.console import Console
from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.spaces import check_space, parse_space
from eat_dist.storage import Folder
from eat_dist.sweeps import SweepPlan, resume_sweep, start_sweep
from eat_dist.sweeps.book import Ledger
from eat_dist.sweeps.objectives import front, values_of
from eat_dist.sweeps.plan import check_plan, default_grace
from eat_dist.sweeps.record import Trial, ranked, read_trials, result_of, winners, write_trials
from eat_dist.sweeps.search import propose

SPACE = """
defense.transfer_rule: {choice: [none, hardest]}
defense.temperature: {log_uniform: [0.1, 10], when: {defense.transfer_rule: hardest}}
attack.num_steps: {integer: [1, 9]}
attack.epsilon: {uniform: [0.05, 0.3]}
model.widths: {choice: [[8, 16], [16, 32]]}
"""
FIGURES = {"clean/r_at_1": 0.9, "clean/nmi": 0.8, "worst/r_at_1": 0.4, "worst/nmi": 0.3}


def plan_of(space: str = SPACE, *assignments: str, **changes: Any) -> SweepPlan:
    base = load_config(None, ["tracking.enabled=false", *assignments])
    parsed = parse_space(yaml.safe_load(space), name="test", source="space")
    plan = SweepPlan(
        name="digits-test",
        base=base,
        space=check_space(parsed, base)[0],
        trials=6,
        search="optuna",
        scheduler="asha",
        objective="attacked_nmi",
        validation_share=0.4,
        seed=0,
        concurrent=None,
        grace_period=default_grace(base.train.epochs),
        reduction_factor=3,
    )
    return replace(plan, **changes)


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


# What a trial is, and what comes out


def test_every_trial_is_measured_alike_whatever_it_trains_against() -> None:
    plan = plan_of(SPACE, "attack.epsilon=0.1", "evaluation.protocol=full", "evaluation.epsilons=[0,0.1]")
    config = plan.trial_config({"attack.epsilon": 0.3}, base=plan.base)

    assert config.attack.epsilon == 0.3
    assert (config.evaluation.epsilon, config.evaluation.protocol) == (0.1, "quick")
    assert (config.evaluation.epsilons, config.evaluation.members) == (None, False)
    assert config.data.validation_share == 0.4


def test_the_best_config_trains_on_all_classes_and_is_measured_as_the_base_is() -> None:
    plan = plan_of(SPACE, "attack.epsilon=0.1", "evaluation.protocol=standard")

    best = plan.best_config({"attack.epsilon": 0.3, "attack.num_steps": 4})
    assert (best.data.validation_share, best.attack.num_steps) == (0, 4)
    assert (best.evaluation.epsilon, best.evaluation.protocol) == (0.1, "standard")
    assert plan.best_config({"attack.num_steps": 5}) == plan.base


def test_a_plan_is_read_back_from_its_json(tmp_path: Path) -> None:
    folder, plan = Folder.at(tmp_path), plan_of(concurrent=2)
    folder.write_json("sweep.json", plan.to_json())
    read = SweepPlan.from_json(folder.read_json("sweep.json"), source="sweep.json")

    assert replace(read, space=check_space(read.space, read.base)[0]) == plan


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trials": 0}, "--trials must be at least 1; got 0"),
        ({"validation_share": 0.0}, "never on test classes"),
        ({"validation_share": 1.5}, "--validation-share must be in"),
        ({"search": "grid"}, "but defense.temperature, attack.epsilon is a range"),
        ({"objective": "pareto"}, "ASHA stops trials by one number"),
        ({"reduction_factor": 1}, "--reduction-factor must be at least 2"),
        ({"grace_period": 16}, "between 1 and train.epochs = 15; got 16"),
        ({"grace_period": 0}, "between 1 and train.epochs = 15; got 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused_before_anything_is_written(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    plan = plan_of(SPACE, **changes)

    with pytest.raises(ConfigError) as error:
        start_sweep(plan, sweep_dir=str(tmp_path / "sweep"), command="", console=Console())

    assert expected in str(error.value)
    assert not (tmp_path / "sweep").exists()


def test_all_faults_of_a_plan_come_in_one_line() -> None:
    with pytest.raises(ConfigError) as error:
        check_plan(plan_of(SPACE, "cluster.backend=local", trials=0, reduction_factor=1))

    for expected in ("--trials", "set cluster.backend to ray", "--reduction-factor"):
        assert expected in str(error.value)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")

    with pytest.raises(StorageError, match="choose another --sweep-dir, or continue"):
        start_sweep(plan_of(), sweep_dir=str(tmp_path), command="", console=Console())
    with pytest.raises(StorageError, match=r"it has no sweep.json"):
        resume_sweep(str(tmp_path), console=Console())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [("sweep.json", "{", "not valid JSON"), ("sweep.json", "{}", "damaged"), ("trials.json", '[{"id": 1}]', "damaged")],
)
def test_a_damaged_record_is_one_line(name: str, content: str, expected: str, tmp_path: Path) -> None:
    Folder.at(tmp_path).write_json("sweep.json", plan_of().to_json())
    (tmp_path / name).write_text(content)

    with pytest.raises(StorageError, match=expected) as error:
        resume_sweep(str(tmp_path), console=Console())
    assert "\n" not in str(error.value)


# The book


def ledger_of(folder: Path, trials: list[Trial] | None = None, **changes: Any) -> Ledger:
    plan = plan_of(**changes)
    return Ledger(
        plan,
        Folder.at(folder),
        trials or [],
        config_of=lambda settings: plan.trial_config(settings, base=plan.base),
        parent_run_id=None,
        console=Console(),
    )


def reported(epoch: int, value: float = 0.3) -> dict[str, Any]:
    return {"epoch": epoch, "figures": {**FIGURES, "worst/nmi": value}, "attacked_nmi": value}


def test_the_record_on_disk_is_whole_after_every_event(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path)

    def statuses() -> list[tuple[str, str, int]]:
        return [(trial.id, trial.status, trial.epoch) for trial in read_trials(Folder.at(tmp_path))]

    first, second = ledger.begin(), ledger.begin()
    assert first is not None
    assert second is not None
    assert (first["id"], first["reported"]) == ("0000", 0)
    assert statuses() == [("0000", "RUNNING", 0), ("0001", "RUNNING", 0)]
    ledger.learn("0000", reported(2))
    ledger.learn("0000", reported(2, value=0.9))  # a process that was started again repeats itself
    assert statuses()[0] == ("0000", "RUNNING", 2)
    assert read_trials(Folder.at(tmp_path))[0].objectives == {"attacked_nmi": 0.3}
    ledger.end("0000", error=None)
    ledger.end("0001", error="member 0: the clean loss is nan")
    assert statuses() == [("0000", "PRUNED", 2), ("0001", "FAILED", 0)]
    assert read_trials(Folder.at(tmp_path))[1].error == "member 0: the clean loss is nan"
    assert ledger.begin() is not None
    for epoch in (2, 6, 15):
        ledger.learn("0002", reported(epoch))
    ledger.end("0002", error=None)
    assert statuses()[2] == ("0002", "FINISHED", 15)


def test_unfinished_trials_go_first_with_their_ids_settings_and_what_they_reported(tmp_path: Path) -> None:
    before = ledger_of(tmp_path)
    given = [before.begin() for _ in range(3)]
    before.learn("0001", reported(2))
    before.learn("0002", reported(2))
    before.end("0002", error=None)

    after = ledger_of(tmp_path, read_trials(Folder.at(tmp_path)))
    assert after.left == 5
    tasks = [after.begin() for _ in range(5)]

    assert [task["id"] for task in tasks if task] == ["0000", "0001", "0003", "0004", "0005"]
    assert [task["reported"] for task in tasks if task] == [0, 2, 0, 0, 0]
    assert [task["config"] for task in tasks[:2] if task] == [task["config"] for task in given[:2] if task]
    assert after.begin() is None
    assert [trial.id for trial in after.interrupt()] == ["0000", "0001", "0003", "0004", "0005"]


def test_settings_that_cannot_hold_together_are_a_failed_trial_and_the_sweep_goes_on(tmp_path: Path) -> None:
    """They are valid at the bounds, and in between they are not."""
    plan = plan_of("data.batch_size: {integer: [60, 72]}", trials=3, search="random")
    ledger = Ledger(
        plan,
        Folder.at(tmp_path),
        [],
        config_of=lambda settings: plan.trial_config(settings, base=plan.base),
        parent_run_id=None,
        console=Console(),
    )

    assert ledger.begin() is None
    trials = read_trials(Folder.at(tmp_path))
    assert [trial.status for trial in trials] == ["FAILED"] * 3
    assert all("must be a multiple of images_per_class" in str(trial.error) for trial in trials)


# The command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "a sweep needs --space and --trials, e.g. eat-dist sweep"),
        (["--space", "SPACE"], "a sweep needs --trials"),
        (["--space", "SPACE", "--trials", "0"], "--trials must be at least 1; got 0"),
        (["--space", "SPACE", "--trials", "2", "--concurrent", "many"], "--concurrent takes a whole number, or auto"),
        (["--space", "nowhere.yaml", "--trials", "2"], "cannot read the space 'nowhere.yaml'"),
        (["--space", "SPACE", "--trials", "2", "--set", "attack.epsilom=1"], "unknown key 'attack.epsilom'"),
        (["--space", "SPACE", "--trials", "2", "--objective", "pareto", "--scheduler", "asha"], "has two"),
        (["--resume", "nowhere"], "is not a sweep's folder"),
        (["--resume", "nowhere", "--trials", "2"], "give it alone"),
        (["--resume", "nowhere", "--seed", "0"], "give it alone"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_to_do(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from eat_dist.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(SPACE)
    arguments = ["space.yaml" if argument == "SPACE" else argument for argument in arguments]

    result = CliRunner().invoke(app, ["sweep", *arguments])

    assert isinstance(result.exception, EatError)
    assert expected in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "sweeps").exists()
