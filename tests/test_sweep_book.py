"""What a sweep without a cluster plans, writes down, reads back, and refuses in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_plans import FIGURES, SPACE, ledger_of, plan_of

from eat_dist.console import Console
from eat_dist.errors import ConfigError, EatError, StorageError
from eat_dist.spaces import check_space
from eat_dist.storage import Folder
from eat_dist.sweeps import SweepPlan, resume_sweep, start_sweep
from eat_dist.sweeps.book import Ledger
from eat_dist.sweeps.plan import check_plan
from eat_dist.sweeps.record import read_trials

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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trials_requested", "3"),
        ("trials_requested", True),
        ("validation_share", None),
        ("grace_period", 1.5),
        ("reduction_factor", [3]),
        ("search", "genetic"),
        ("space", ["attack.epsilon"]),
        ("base_config", "base"),
        ("seconds", "long"),
        ("git", "67c3c17"),
        ("mlflow_run_id", 7),
    ],
)
def test_a_value_of_the_wrong_kind_in_the_state_is_one_line_that_names_it(key: str, value: Any, tmp_path: Path) -> None:
    Folder.at(tmp_path).write_json("sweep.json", plan_of().to_json() | {key: value})

    with pytest.raises(StorageError, match=f"sweep.json' is damaged: {key}") as error:
        resume_sweep(str(tmp_path), console=Console())
    assert "\n" not in str(error.value)


# The book


def reported(epoch: int, value: float = 0.3) -> dict[str, Any]:
    return {"epoch": epoch, "figures": {**FIGURES, "worst/nmi": value}, "attacked_nmi": value}


def test_the_record_on_disk_is_whole_after_every_event(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, plan_of())

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
    before = ledger_of(tmp_path, plan_of())
    given = [before.begin() for _ in range(3)]
    before.learn("0001", reported(2))
    before.learn("0002", reported(2))
    before.end("0002", error=None)

    after = ledger_of(tmp_path, plan_of(), read_trials(Folder.at(tmp_path)))
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
        parent_run_id=lambda: None,
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
