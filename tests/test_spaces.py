"""Search spaces: every kind, every fault, and nothing that a run's config would refuse."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from eat_dist.config import RunConfig, configured, load_config
from eat_dist.errors import ConfigError
from eat_dist.spaces import Choice, Integer, Space, Uniform, check_space, load_space, parse_space

READY = sorted((REPOSITORY / "tune_spaces").glob("*.yaml"))


def space_of(text: str) -> Space:
    return parse_space(yaml.safe_load(text), name="test", source="space")


def checked(text: str, *assignments: str) -> Space:
    return check_space(space_of(text), load_config(None, list(assignments)))[0]


@pytest.mark.parametrize(
    ("entry", "domain"),
    [
        ("attack.epsilon: {uniform: [2/255, 8/255]}", Uniform(2 / 255, 8 / 255)),
        ("attack.epsilon: {uniform: [0, 1]}", Uniform(0.0, 1.0)),
        ("optimiser.learning_rate: {log_uniform: [1e-4, 1e-2]}", Uniform(1e-4, 1e-2, log=True)),
        ("attack.num_steps: {integer: [1, 7]}", Integer(1, 7)),
        ("ensemble.split.rule: {choice: [all, bootstrap]}", Choice(("all", "bootstrap"))),
        ("attack.epsilon: {grid: [0.1, 0.2]}", Choice((0.1, 0.2))),
        ("attack.epsilon: {choice: [8/255, 0]}", Choice((8 / 255, 0.0))),
        ("attack.step_size: {choice: [null, 0.1]}", Choice((None, 0.1))),
        ("model.widths: {choice: [[8, 16], [16, 32]]}", Choice(([8, 16], [16, 32]))),
        ("attack.random_start: {choice: [true, false]}", Choice((True, False))),
    ],
)
def test_every_kind_is_read_as_the_config_understands_it(entry: str, domain: object) -> None:
    assert [parameter.domain for parameter in checked(entry).parameters] == [domain]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expected config keys with their values"),
        ("[a, b]", "expected config keys with their values"),
        ("attack.epsilom: {uniform: [0, 1]}", "unknown key 'attack.epsilom' (did you mean 'attack.epsilon'?)"),
        ("attack: {choice: [pgd]}", "unknown key 'attack'"),
        ("defense.lambda: {uniform: [0, 1]}", "unknown key 'defense.lambda'"),
        ("attack.epsilon: [0, 1]", "expected one of uniform, log_uniform, integer, choice, grid"),
        ("attack.epsilon: {uniform: [0, 1], choice: [1]}", "expected exactly one of"),
        ("attack.epsilon: {normal: [0, 1]}", "unknown normal"),
        ("attack.epsilon: {when: {attack.name: pgd}}", "got none"),
        ("attack.epsilon: {uniform: [0, 1, 2]}", "takes [low, high]"),
        ("attack.epsilon: {uniform: [1, 0]}", "low below high"),
        ("attack.epsilon: {uniform: [8/256x, 1]}", "expected a number such as 0.1, 8/255 or 1e-3; got '8/256x'"),
        ("attack.epsilon: {uniform: [.nan, 1]}", "expected a number"),
        ("attack.epsilon: {log_uniform: [0, 1]}", "numbers above 0"),
        ("attack.num_steps: {integer: [1, 2.5]}", "whole numbers"),
        ("attack.num_steps: {integer: [true, 2]}", "whole numbers"),
        ("attack.epsilon: {choice: []}", "a list of one or more values"),
        ("attack.epsilon: {choice: [0.1, 0.1]}", "lists a value twice"),
        ("evaluation.epsilon: {uniform: [0, 1]}", "all trials of a sweep share the section 'evaluation'"),
        ("cluster.device: {choice: [cpu]}", "share the section 'cluster'"),
        ("tracking.uri: {choice: [a]}", "share the section 'tracking'"),
        ("checkpoint.every: {integer: [1, 2]}", "share the section 'checkpoint'"),
        ("data.dataset: {choice: [digits]}", "measured on the same images"),
        ("data.validation_share: {uniform: [0.1, 0.2]}", "measured on the same images"),
        ("attack.norm: {choice: [linf, l2]}", "no comparison"),
        ("train.epochs: {integer: [1, 2]}", "epoch by epoch"),
        ("seed: {integer: [0, 9]}", "luckiest seed"),
        (
            "defense.temperature: {uniform: [1, 2], when: {defense.transfer_rule: hardest}}",
            "when names 'defense.transfer_rule', which is not a (valid) key above it",
        ),
        (
            "defense.transfer_rule: {choice: [uniform]}\n"
            "defense.temperature: {uniform: [1, 2], when: {defense.transfer_rule: hardest}}",
            "expects 'defense.transfer_rule' to be 'hardest', which it never is",
        ),
        (
            "attack.epsilon: {uniform: [0, 1]}\nattack.num_steps: {integer: [1, 2], when: {attack.epsilon: 0.5}}",
            "which is no choice",
        ),
        ("attack.num_steps: {integer: [1, 2], when: 3}", "when takes keys above it"),
    ],
)
def test_what_is_no_space_is_refused_with_the_reason(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        space_of(text)

    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attack.num_steps: {uniform: [1, 5]}", "attack.num_steps: input should be a valid integer; got 1.0"),
        ("attack.num_steps: {integer: [0, 5]}", "greater than or equal to 1; got 0"),
        ("defense.momentum: {uniform: [0.5, 1]}", "less than 1; got 1.0"),
        ("ensemble.split.rule: {choice: [all, none]}", "ensemble.split.rule: input should be 'all', 'leave_one_out'"),
        ("attack.epsilon: {uniform: [0, 2]}", "did you mean 2/255"),
        ("data.batch_size: {choice: [60, 100]}", "batch_size must be a multiple of images_per_class"),
        (
            "defense.transfer_rule: {choice: [uniform, relay]}\ndefense.diversity_weight: {uniform: [0, 1]}",
            "which the rule 'relay' has none of",
        ),
        ("defense.transfer_rule: {choice: [uniform, joint]}", "the rule 'joint' needs every member's input gradient"),
        (
            "attack.num_steps: {integer: [2, 8]}\ndefense.transfer_rule: {choice: [relay]}\n"
            "defense.relay_steps: {integer: [1, 4]}",
            "below attack.num_steps = 2; got 4",
        ),
    ],
)
def test_a_value_that_the_config_would_refuse_is_found_before_anything_starts(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        checked(text)

    assert expected.lower() in str(error.value).lower()
    assert "\n" not in str(error.value)


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as error:
        space_of(
            "attack.epsilom: {uniform: [0, 1]}\nevaluation.epsilon: {choice: [1]}\nattack.epsilon: {uniform: [1, 0]}"
        )
    for key in ("attack.epsilom", "evaluation.epsilon", "attack.epsilon: uniform"):
        assert key in str(error.value)

    with pytest.raises(ConfigError) as error:
        checked("attack.num_steps: {integer: [0, 5]}\ndefense.momentum: {uniform: [0.5, 1]}")
    assert "attack.num_steps" in str(error.value)
    assert "defense.momentum" in str(error.value)


def test_settings_that_hold_only_together_are_allowed() -> None:
    """Neither batch size fits the base's 12 images a class, and both fit the space's."""
    space = checked("data.images_per_class: {choice: [10, 20]}\ndata.batch_size: {choice: [100, 200]}")

    assert space.grid_size(100) == 4


def test_a_conditional_parameter_exists_with_its_condition_only() -> None:
    space = checked(
        "defense.transfer_rule: {choice: [none, uniform, hardest]}\n"
        "defense.diversity_weight: {log_uniform: [1e-3, 1], when: {defense.transfer_rule: [uniform, hardest]}}\n"
        "defense.temperature: {uniform: [0.5, 2], when: {defense.transfer_rule: hardest}}\n"
        "defense.peers: {choice: [2], when: {defense.transfer_rule: hardest}}\n"
    )
    drawn = [space.draw(0, number) for number in range(200)]

    expected = {
        "none": {"defense.transfer_rule"},
        "uniform": {"defense.transfer_rule", "defense.diversity_weight"},
        "hardest": {"defense.transfer_rule", "defense.diversity_weight", "defense.temperature", "defense.peers"},
    }
    assert {settings["defense.transfer_rule"] for settings in drawn} == set(expected)
    for settings in drawn:
        assert set(settings) == expected[settings["defense.transfer_rule"]]


def test_a_condition_on_a_number_is_understood_as_the_choice_is() -> None:
    space = checked(
        "attack.epsilon: {choice: [8/255, 0.2]}\nattack.num_steps: {choice: [3], when: {attack.epsilon: 8/255}}"
    )

    assert list(space.grid()) == [{"attack.epsilon": 8 / 255, "attack.num_steps": 3}, {"attack.epsilon": 0.2}]


def test_draws_stay_within_their_bounds_and_fill_them() -> None:
    space = checked(
        "attack.epsilon: {uniform: [0.1, 0.3]}\noptimiser.learning_rate: {log_uniform: [1e-4, 1e-2]}\n"
        "attack.num_steps: {integer: [2, 4]}\nensemble.split.rule: {choice: [all, bootstrap]}"
    )
    drawn = [space.draw(3, number) for number in range(400)]
    epsilons = [settings["attack.epsilon"] for settings in drawn]
    logs = [math.log10(settings["optimiser.learning_rate"]) for settings in drawn]

    assert 0.1 <= min(epsilons) < 0.11
    assert 0.29 < max(epsilons) <= 0.3
    assert -4 <= min(logs) < -3.9
    assert -2.1 < max(logs) <= -2
    assert abs(sum(logs) / len(logs) + 3) < 0.1, "log_uniform is not uniform in the logarithm"
    for key, values in (("attack.num_steps", {2, 3, 4}), ("ensemble.split.rule", {"all", "bootstrap"})):
        counted = Counter(settings[key] for settings in drawn)
        assert set(counted) == values
        assert min(counted.values()) > 100
    assert [space.draw(3, number) for number in range(400)] == drawn
    assert space.draw(4, 0) != drawn[0]


def test_a_grid_is_every_combination_once() -> None:
    space = checked(
        "attack.num_steps: {integer: [1, 3]}\nattack.name: {grid: [pgd, fgsm]}\n"
        "attack.random_start: {choice: [true, false], when: {attack.name: pgd}}"
    )
    points = list(space.grid())

    assert len(points) == 3 * (2 + 1) == space.grid_size(1000)
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert space.continuous == ()


def test_a_config_with_settings_differs_in_them_alone() -> None:
    base = RunConfig()
    config = configured(base, {"attack.epsilon": 0.1, "ensemble.split.rule": "bootstrap"})

    assert (config.attack.epsilon, config.ensemble.split.rule) == (0.1, "bootstrap")
    assert configured(config, {"attack.epsilon": 0.2, "ensemble.split.rule": "all"}) == base


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
@pytest.mark.parametrize("config", ["digits", "omniglot", "cub200"])
def test_the_spaces_that_come_with_it_fit_the_configs_that_come_with_it(path: Path, config: str) -> None:
    base = load_config(REPOSITORY / "configs" / f"{config}.yaml")
    space, tried = check_space(load_space(path), base)

    assert tried
    for number in range(50):
        configured(base, space.draw(0, number))


def test_the_spaces_that_come_with_it_are_those_that_the_docs_name() -> None:
    names = {"diversity_epsilon", "gamma_epsilon", "self_transfer", "optimiser", "smoke"}
    assert {path.stem for path in READY} == names


def test_a_file_that_is_missing_or_no_yaml_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    for path, expected in ((tmp_path / "none.yaml", "cannot read the space"), (tmp_path / "bad.yaml", "is not YAML")):
        with pytest.raises(ConfigError, match=expected) as error:
            load_space(path)
        assert "\n" not in str(error.value)


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("attack.epsilon: !!python/object/apply:os.system ['true']")

    with pytest.raises(ConfigError, match="is not YAML"):
        load_space(path)


def test_a_space_remembers_what_was_given(tmp_path: Path) -> None:
    given: dict[str, Any] = {"attack.epsilon": {"uniform": ["2/255", "8/255"]}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(given))

    space = load_space(path)

    assert (space.name, dict(space.given)) == ("mine", given)
