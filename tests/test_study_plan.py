"""What a study file says, which runs it makes, and how many epochs equal compute gives them. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import REPOSITORY
from eat_dist.cluster.capacity import capacity_of_runs
from eat_dist.cluster.resources import Node
from eat_dist.config import RunConfig, override
from eat_dist.errors import ClusterError, ConfigError
from eat_dist.studies.budget import Allotment, equal_passes, passes_an_iteration
from eat_dist.studies.plan import StudyRun, plan_runs
from eat_dist.studies.reading import Study, load_study
from small_runs import small_config

GOOD = """
base: digits.yaml
set: {train.epochs: 6, evaluation: {num_steps: 3}}
rows:
  natural: {defense.name: natural}
  eat: {}
seeds: [3, 5]
"""


def written(folder: Path, text: str) -> Path:
    (folder / "digits.yaml").write_text("name: digits\ncluster: {backend: local}\n")
    (folder / "other.yaml").write_text("name: other\ncluster: {backend: local}\ntrain: {epochs: 9}\n")
    (folder / "study.yaml").write_text(text)
    return folder / "study.yaml"


def study_of(folder: Path, text: str, *assignments: str) -> Study:
    return load_study(written(folder, text), assignments)


# The file


def test_a_study_is_rows_by_datasets_by_seeds_each_row_once_before_any_twice(tmp_path: Path) -> None:
    study = study_of(tmp_path, GOOD)
    runs = plan_runs(study, local=False)

    assert [run.name for run in runs] == ["natural-digits-s3", "eat-digits-s3", "natural-digits-s5", "eat-digits-s5"]
    assert [(run.config.name, run.config.seed, run.folder) for run in runs[:1]] == [
        ("natural-digits-s3", 3, "runs/natural-digits-s3")
    ]
    assert study.name == "study"
    assert {run.config.defense.name for run in runs} == {"natural", "eat"}
    assert {(run.config.train.epochs, run.config.evaluation.num_steps) for run in runs} == {(6, 3)}


def test_a_rows_settings_are_above_the_command_lines_those_above_the_datasets_and_those_above_all_runs(
    tmp_path: Path,
) -> None:
    text = """
        datasets:
          one: {base: digits.yaml, train.epochs: 4, attack.num_steps: 4, optimiser.learning_rate: 4e-3}
          two: other.yaml
        set: {train.epochs: 3, attack.num_steps: 3, optimiser.learning_rate: 3e-3, data.batch_size: 120}
        rows: {a: {optimiser.learning_rate: 6e-3}}
    """
    one, two = plan_runs(study_of(tmp_path, text, "attack.num_steps=5", "optimiser.learning_rate=5e-3"), local=True)

    def numbers(run: StudyRun) -> tuple[float, ...]:
        config = run.config
        return (
            config.data.batch_size,
            config.train.epochs,
            config.attack.num_steps,
            config.optimiser.learning_rate,
        )

    assert (one.dataset, two.dataset) == ("one", "two")
    assert numbers(one) == (120, 4, 5, 6e-3)
    assert numbers(two) == (120, 3, 5, 6e-3)


def test_without_ray_every_run_is_in_this_process(tmp_path: Path) -> None:
    text = "base: digits.yaml\nrows: {a: {cluster.backend: ray}}"
    assert [run.config.cluster.backend for run in plan_runs(study_of(tmp_path, text), local=False)] == ["ray"]
    assert [run.config.cluster.backend for run in plan_runs(study_of(tmp_path, text), local=True)] == ["local"]


def test_no_run_of_a_study_is_registered(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    (tmp_path / "digits.yaml").write_text("name: digits\ntracking: {register_as: mine}\n")
    assert {run.config.tracking.register_as for run in plan_runs(load_study(path), local=True)} == {None}


FAULTY = {
    "an unknown key": ("rows: {a: {}}\nbase: digits.yaml\nseed: [0]", "unknown key 'seed' (did you mean 'seeds'?)"),
    "no rows": ("base: digits.yaml", "rows: expected one or more names"),
    "no dataset": ("rows: {a: {}}", "expected either 'base'"),
    "a dataset twice": ("base: digits.yaml\ndatasets: {a: digits.yaml}\nrows: {a: {}}", "expected either 'base'"),
    "a missing config": ("base: nope.yaml\nrows: {a: {}}", "cannot read the config"),
    "a seed twice": ("base: digits.yaml\nrows: {a: {}}\nseeds: [1, 1]", "different whole numbers from 0"),
    "a negative seed": ("base: digits.yaml\nrows: {a: {}}\nseeds: [-1]", "different whole numbers from 0"),
    "a row's seed": ("base: digits.yaml\nrows: {a: {seed: 1}}", "rows.a: 'seed' cannot be set there"),
    "a row's MLflow": ("base: digits.yaml\nrows: {a: {tracking.uri: x}}", "'tracking.uri' cannot be set there"),
    "a name for a folder": ("base: digits.yaml\nrows: {a/b: {}}", "letters, digits, '.', '_' and '-'; got 'a/b'"),
    "a row that is a word": ("base: digits.yaml\nrows: {a: natural}", "rows.a: expected config keys with values"),
    "a budget of nobody": (
        "base: digits.yaml\nrows: {natural: {}}\nbudget: {passes: natual}",
        "there is no row 'natual' (did you mean 'natural'?)",
    ),
    "a budget of another kind": ("base: digits.yaml\nrows: {a: {}}\nbudget: passes", "budget: expected {passes: ROW}"),
    "a list": ("[1, 2]", "expected a mapping with 'base' and 'rows'; got list"),
    "no YAML": ("rows: [", "is not YAML"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_file_is_one_line_that_says_what_to_do(case: str, tmp_path: Path) -> None:
    text, expected = FAULTY[case]

    with pytest.raises(ConfigError) as refused:
        study_of(tmp_path, text)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


UNFIT = {
    "an unknown config key": (
        "{defense.nam: eat}",
        "row 'b' on digits: unknown key 'defense.nam' (did you mean 'name'?)",
    ),
    "an unknown section": ("{defens.name: eat}", "unknown key 'defens'"),
    "a value in place of a section": ("{train.epochs.many: 3}", "'epochs' is a value, not a section"),
    "an unknown defense": ("{defense.name: pgd}", "row 'b' on digits: no defense is called 'pgd'"),
    "settings that do not go together": ("{defense.transfer_rule: relay, attack.num_steps: 1}", "at least 2"),
    "another evaluation": ("{evaluation.num_steps: 9}", "would not be measured like 'a': evaluation.num_steps is 9"),
    "another radius": ("{attack.epsilon: 0.1}", "evaluation.epsilon is 0.1 and there 0.2"),
    "other images": ("{data.validation_share: 0.4}", "data.validation_share is 0.4"),
    "nothing measured": ("{evaluation.protocol: none}", "there would be nothing to compare"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_rows_that_cannot_be_run_or_compared_are_refused_before_anything_starts(case: str, tmp_path: Path) -> None:
    settings, expected = UNFIT[case]
    study = study_of(tmp_path, f"base: digits.yaml\nrows: {{a: {{}}, b: {settings}}}")

    with pytest.raises(ConfigError) as refused:
        plan_runs(study, local=True)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_changes_training_or_the_strength_of_the_attack_on_randomised_models_may_differ(tmp_path: Path) -> None:
    row = "{evaluation.eot_draws: 20, evaluation.batch_size: 64, data.batch_size: 120, attack.num_steps: 9}"
    assert plan_runs(study_of(tmp_path, f"base: digits.yaml\nrows: {{a: {{}}, b: {row}}}"), local=True)


def test_the_full_protocol_attacks_through_the_members_of_all_rows_or_of_none(tmp_path: Path) -> None:
    text = "base: digits.yaml\nset: {evaluation.protocol: full}\nrows: {a: {}, one: {ensemble.members: 1}"
    assert len(plan_runs(study_of(tmp_path, text + "}"), local=True)) == 2
    with pytest.raises(ConfigError, match=r"evaluation\.members is False and there True"):
        plan_runs(study_of(tmp_path, text + ", b: {evaluation.members: false}}"), local=True)


def test_what_the_protocol_does_not_read_may_differ(tmp_path: Path) -> None:
    """Standard and full have objectives and steps of their own."""
    text = "base: digits.yaml\nset: {evaluation.protocol: PROTOCOL}\nrows: {a: {}, b: {evaluation.objectives: [proxy]}}"
    assert len(plan_runs(study_of(tmp_path, text.replace("PROTOCOL", "standard")), local=True)) == 2
    with pytest.raises(ConfigError, match=r"evaluation\.objectives"):
        plan_runs(study_of(tmp_path, text.replace("PROTOCOL", "quick")), local=True)


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    text = "datasets: {c: digits.yaml, b-c: digits.yaml}\nrows: {a-b: {}, a: {}}"
    with pytest.raises(ConfigError, match="two runs would be called 'a-b-c-s0'"):
        plan_runs(study_of(tmp_path, text), local=True)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
@pytest.mark.parametrize("local", [True, False])
def test_the_studies_that_come_with_it_can_be_run(path: Path, local: bool) -> None:
    runs = plan_runs(load_study(path), local=local)

    assert len({run.name for run in runs}) == len(runs)
    assert {run.config.evaluation.members for run in runs} == {False}


# Equal compute


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ("defense.name=natural", 1),
        ("defense.name=pgd_at", 5 + 2),
        ("defense.name=pgd_at,defense.adversarial_share=1", 5 + 1),
        ("defense.name=pgd_at,attack.num_steps=3", 3 + 2),
        ("defense.name=pgd_at,ensemble.members=1", 5 + 2),
        ("defense.transfer_rule=uniform", 5 + 2 + 1),
        ("defense.transfer_rule=uniform,defense.peers=2", 5 + 2 + 2),
        ("defense.transfer_rule=uniform,ensemble.members=1", 5 + 2),  # there is nobody to receive from
        ("defense.transfer_rule=none", 5 + 2),
        ("defense.transfer_rule=relay", 5 + 2),
        ("defense.transfer_rule=joint", 5 * 3 + 2),
    ],
)
def test_passes_are_counted_on_the_defense_itself(settings: str, passes: int) -> None:
    """K attack steps, one pass a batch in the loss; of ``joint`` each step passes through all three members.

    Whatever network, split and images the row has: they are not what is counted on.
    """
    config = override(
        RunConfig(),
        "cluster.backend=local",
        "model.backbone=resnet18",
        "ensemble.split.rule=leave_one_out",
        *settings.split(","),
    )
    assert passes_an_iteration(config) == passes


def runs_of(**settings: str) -> list[StudyRun]:
    return [
        StudyRun(row, row, "digits", 0, small_config("cluster.backend=local", "attack.num_steps=5", *text.split(",")))
        for row, text in settings.items()
    ]


def test_every_row_gets_the_reference_rows_passes_as_nearly_as_whole_epochs_allow() -> None:
    """pgd_at: 3 members × 7 passes × 10 iterations × 16 epochs = 3360.

    natural: 30 an epoch, 112 epochs. uniform: 240 an epoch, 14. One member: 70 an epoch, 48. Members that see two
    thirds of the images have 7 iterations an epoch: 147, and 3360/147 = 22.86, so 23 and 1.006 of the passes.
    """
    runs = runs_of(
        pgd_at="defense.name=pgd_at,train.epochs=16",
        natural="defense.name=natural,train.epochs=16",
        uniform="defense.transfer_rule=uniform,train.epochs=16",
        single="defense.name=pgd_at,train.epochs=16,ensemble.members=1",
        split="defense.name=pgd_at,train.epochs=16,ensemble.split.rule=leave_one_out",
        wide="defense.name=pgd_at,train.epochs=40,ensemble.members=1",
    )

    found = equal_passes(
        runs,
        reference="pgd_at",
        own_epochs={"wide"},
        iterations_per_epoch=lambda run: 7 if run.row == "split" else 10,
    )

    assert {row: got.epochs for (_, row), got in found.items()} == {
        "pgd_at": 16,
        "natural": 112,
        "uniform": 14,
        "single": 48,
        "split": 23,
        "wide": 40,  # which it set itself
    }
    assert found["digits", "split"] == Allotment(23, pytest.approx(23 * 147 / 3360))
    assert found["digits", "wide"].share == pytest.approx(40 * 70 / 3360)
    assert {found["digits", row].share for row in ("pgd_at", "natural", "uniform", "single")} == {1.0}


def test_a_row_that_costs_more_than_the_budget_still_has_an_epoch_after_its_warm_up() -> None:
    runs = runs_of(
        natural="defense.name=natural,train.epochs=2",
        dear="defense.transfer_rule=joint,train.epochs=9,train.warmup_epochs=3",
    )
    found = equal_passes(runs, reference="natural", own_epochs=set(), iterations_per_epoch=lambda run: 5)

    assert found["digits", "dear"].epochs == 4
    assert found["digits", "dear"].share == pytest.approx(4 * 17 / 2)


# How many at once


@pytest.mark.parametrize(
    ("nodes", "settings", "at_once", "resources"),
    [
        ([Node(2, 0)], "cluster.backend=local", 2, {"CPU": 1.0}),
        ([Node(2, 0)], "cluster.backend=local,ensemble.members=6", 2, {"CPU": 1.0}),  # all of them in one process
        ([Node(16, 0), Node(3, 0)], "cluster.backend=local,cluster.threads_per_member=2", 9, {"CPU": 2.0}),
        ([Node(16, 4)], "cluster.backend=local", 4, {"CPU": 1.0, "GPU": 1.0}),
        ([Node(16, 4)], "cluster.backend=local,cluster.device=cpu", 16, {"CPU": 1.0}),
        ([Node(16, 1)], "cluster.backend=local,cluster.gpus_per_member=0.25", 4, {"CPU": 1.0, "GPU": 0.25}),
        ([Node(8, 0)], "cluster.backend=ray", 2, {}),
        ([Node(8, 0)], "cluster.backend=ray,ensemble.members=1", 8, {}),
        ([Node(8, 8)], "cluster.backend=ray,ensemble.members=2,cluster.replicas_per_member=2", 2, {}),
    ],
)
def test_runs_fill_the_cluster_by_what_their_processes_take(
    nodes: list[Node], settings: str, at_once: int, resources: dict[str, float]
) -> None:
    config = override(RunConfig(), *settings.split(","))

    found = capacity_of_runs(nodes, config, runs=100, concurrent=None)

    assert (found.concurrent, dict(found.resources)) == (at_once, resources)
    threads = config.cluster.threads_per_member or 1
    assert config.cluster.backend == "ray" or found.cluster.threads_per_member == threads
    assert capacity_of_runs(nodes, config, runs=1, concurrent=None).concurrent == 1


@pytest.mark.parametrize(
    ("settings", "concurrent", "message"),
    [
        (
            "cluster.backend=local,cluster.threads_per_member=4",
            None,
            "4 CPU each; .*room for 0. Lower cluster.threads_p",
        ),
        ("cluster.backend=local", 3, r"3 run processes \(3 runs at once × 1\) need 1 CPU each; .*Lower --concurrent"),
        ("cluster.backend=ray,cluster.cpus_per_member=1", None, "3 members need 1 CPU each; .*Lower ensemble.members"),
        ("cluster.backend=ray,cluster.cpus_per_member=0.5", 2, r"6 members \(2 runs at once × 3\) need 0.5 CPU each"),
    ],
)
def test_runs_that_do_not_fit_are_refused_with_the_arithmetic(
    settings: str, concurrent: int | None, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        capacity_of_runs([Node(2, 0)], override(RunConfig(), *settings.split(",")), runs=9, concurrent=concurrent)


def test_a_fault_that_all_rows_share_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("name: digits\ncluster: {backend: local}\n")
    (tmp_path / "study.yaml").write_text(
        "base: digits.yaml\nrows: {a: {defense.name: natural}, b: {defense.name: pgd_at}}\n"
    )
    study = load_study(tmp_path / "study.yaml", ["train.epoch=3"])

    with pytest.raises(ConfigError) as refused:
        plan_runs(study, local=True)

    assert str(refused.value).count("train.epoch") == 1
    assert "row " not in str(refused.value)
