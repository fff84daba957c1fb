"""The typed config: what it understands, what it refuses and how it says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from eat_dist.attacks import ATTACKS
from eat_dist.config import (
    AttackConfig,
    RunConfig,
    dump_config,
    effective_step_size,
    load_config,
    override,
    parse_config,
)
from eat_dist.data.datasets import DATASETS
from eat_dist.defenses import DEFENSES
from eat_dist.errors import ConfigError
from eat_dist.losses import LOSSES
from eat_dist.models import BACKBONES
from eat_dist.robustness.transfer import TRANSFER_RULES
from eat_dist.spaces import load_space
from eat_dist.studies.reading import load_study

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def fault_of(values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def set_value(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_an_empty_config_is_all_defaults() -> None:
    assert parse_config(None) == parse_config({}) == load_config(None) == RunConfig()


def test_all_faults_come_in_one_message() -> None:
    message = fault_of(
        {
            "data": {"batch_size": 90, "images_per_class": 4},
            "attack": {"epsilon": -1, "norm": "l1"},
            "ensemble": {"members": 0},
            "trian": {"epochs": 3},
        }
    )
    for fault in ("batch_size", "attack.epsilon", "attack.norm", "ensemble.members", "unknown key 'trian'"):
        assert fault in message


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("atack", "attack"), ("train.epoch", "epochs"), ("ensemble.split.rul", "rule"), ("attack.epsilom", "epsilon")],
)
def test_an_unknown_key_names_itself_and_the_nearest_known_one(path: str, nearest: str) -> None:
    assert f"unknown key '{path}' (did you mean '{nearest}'?)" in fault_of(set_value(path, 1))


def test_an_unknown_key_like_no_other_gets_no_hint() -> None:
    assert fault_of({"zzzz": 1}) == "config: unknown key 'zzzz'"


@pytest.mark.parametrize(
    ("written", "expected"), [("8/255", 8 / 255), ("1e-3", 0.001), (".25", 0.25), (0, 0.0), (1, 1.0), ("0.1", 0.1)]
)
def test_numbers_may_be_written_as_fractions_and_in_scientific_form(written: Any, expected: float) -> None:
    epsilon = parse_config({"attack": {"epsilon": written}}).attack.epsilon
    assert epsilon == expected
    assert isinstance(epsilon, float)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("attack.epsilon", -0.1),
        ("attack.num_steps", 0),
        ("attack.step_size", 0),
        ("ensemble.members", 0),
        ("ensemble.members", -1),
        ("cluster.replicas_per_member", 0),
        ("cluster.placement", "anywhere"),
        ("cluster.gpus_per_member", 1.5),
        ("loss.margin", 1),
        ("loss.alpha", 0),
        ("loss.positive_margin", 2),
        ("model.std", 0),
        ("model.std", [0.5, -1, 0.5]),
        ("model.mean", []),
        ("model.weights", ""),
        ("data.resize", 0),
        ("data.train_share", 1),
        ("data.workers", -1),
        ("optimiser.clip_value", 0),
        ("train.warmup_epochs", -1),
        ("train.precision", "fp16"),
        ("train.micro_batch_size", 0),
        ("model.widths", []),
        ("model.widths", [8, 0]),
        ("model.embedding_dim", 1),
        ("defense.adversarial_share", 1.01),
        ("defense.transfer_strength", -1),
        ("defense.temperature", 0),
        ("defense.momentum", 1),
        ("defense.peers", 0),
        ("seed", -1),
        ("train.epochs", 0),
        ("name", "two words"),
        ("name", "a/b"),
    ],
)
def test_values_out_of_range_are_refused_by_name(path: str, value: Any) -> None:
    assert path in fault_of(set_value(path, value))


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        "nan",
        "inf",
        "1/0",
        "8/255/2",
        "fast",
        True,
        None,
        [],
        pytest.param(10**400, id="1e400"),
    ],
)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    assert "defense.transfer_strength: " in fault_of(set_value("defense.transfer_strength", value))


@pytest.mark.parametrize("path", ["seed", "ensemble.members", "data.batch_size", "attack.num_steps", "train.epochs"])
@pytest.mark.parametrize("value", [True, False, 60.0, "60", None])
def test_booleans_floats_and_text_are_no_integers(path: str, value: Any) -> None:
    assert f"{path}: input should be a valid integer; got {value!r}" in fault_of(set_value(path, value))


def test_an_integer_is_no_boolean() -> None:
    assert "tracking.enabled" in fault_of({"tracking": {"enabled": 1}})


def test_pixel_units_of_0_to_255_are_recognised_and_corrected() -> None:
    assert "Did you mean 8/255?" in fault_of({"attack": {"epsilon": 8}})
    assert parse_config({"attack": {"epsilon": 8, "norm": "l2"}}).attack.epsilon == 8  # L2 lengths exceed 1


def test_a_batch_is_whole_classes_and_the_message_says_which_sizes_are() -> None:
    assert (
        "batch_size must be a multiple of images_per_class; got 90 and 4. Use 88 or 92."
        in fault_of({"data": {"batch_size": 90, "images_per_class": 4}})
    )  # fmt: skip
    assert parse_config({"data": {"batch_size": 88, "images_per_class": 4}}).data.batch_size == 88
    assert parse_config({"data": {"batch_size": 92, "images_per_class": 4}}).data.batch_size == 92


def test_a_batch_holds_at_least_two_classes() -> None:
    assert "at least two classes" in fault_of({"data": {"batch_size": 12, "images_per_class": 12}})
    # Smaller than one class: what is proposed must be valid itself.
    assert "Use 24 or 36" in fault_of({"data": {"batch_size": 8, "images_per_class": 12}})
    assert parse_config({"data": {"batch_size": 24, "images_per_class": 12}}).data.batch_size == 24


def test_shuffled_batches_need_no_whole_classes() -> None:
    assert parse_config({"data": {"sampler": "shuffle", "batch_size": 7}}).data.batch_size == 7


# What is in conflict, what the message says, and the nearest that is allowed; with three members, eat and five steps.
DISAGREEMENTS = {
    "joint needs all members in one process": (
        ["defense.transfer_rule=joint", "cluster.backend=ray"],
        "set cluster.backend to local",
        "cluster.backend=local",
    ),
    "relay needs two steps to share": (
        ["defense.transfer_rule=relay", "attack.num_steps=1"],
        "attack.num_steps must be at least 2",
        "attack.num_steps=2",
    ),
    "relay leaves steps to the receiver": (
        ["defense.transfer_rule=relay", "defense.relay_steps=5"],
        "below attack.num_steps = 5; got 5",
        "defense.relay_steps=4",
    ),
    "relay hands over to one peer": (
        ["defense.transfer_rule=relay", "defense.peers=2"],
        "defense.peers must be 1; got 2",
        "defense.peers=1",
    ),
    "hardest weighs at least two against each other": (
        ["defense.transfer_rule=hardest"],
        "defense.peers must be at least 2 (and ensemble.members at least 3); got 1",
        "defense.peers=2",
    ),
    "no more peers than others": (["defense.peers=3"], "at most members − 1 = 2; got 3", "defense.peers=2"),
    "diversity compares on transferred batches": (
        ["defense.transfer_rule=none", "defense.diversity_weight=1"],
        "'none' has none of",
        "defense.transfer_rule=uniform",
    ),
    "disjoint parts for every member": (
        ["ensemble.split.rule=disjoint", "ensemble.split.parts=2"],
        "at least as many parts as members; got 2 and 3",
        "ensemble.split.parts=3",
    ),
    "no more parts a member than there are": (
        ["ensemble.split.rule=k_of_n", "ensemble.split.parts_per_member=4"],
        "at most parts = 3; got 4",
        "ensemble.split.parts_per_member=3",
    ),
    "an epoch of training after the warm-up": (
        ["train.epochs=3", "train.warmup_epochs=3"],
        "below train.epochs = 3; got 3",
        "train.warmup_epochs=2",
    ),
    "micro-batches only with a frozen BatchNorm": (
        ["train.micro_batch_size=8"],
        "set model.freeze_batch_norm to true",
        "model.freeze_batch_norm=true",
    ),
    "replicas are processes": (
        ["cluster.replicas_per_member=2", "cluster.backend=local"],
        "with cluster.backend local it must be 1; got 2",
        "cluster.backend=ray",
    ),
    "replicas take equal parts of a batch": (
        ["cluster.replicas_per_member=8"],
        "a multiple of cluster.replicas_per_member = 8; got 60. Use 48 or 72",
        "data.batch_size=48",
    ),
    "replicas take at least an image each": (
        ["cluster.replicas_per_member=16", "data.batch_size=24"],
        "got 24. Use 48",
        "data.batch_size=48",
    ),
    "BatchNorm over replicas is not compiled": (
        ["cluster.replicas_per_member=2", "train.compile=true"],
        "train.compile cannot compile BatchNorm that talks to other replicas",
        "model.freeze_batch_norm=true",
    ),
}
BASE = ["ensemble.members=3", "defense.name=eat", "attack.num_steps=5"]


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_sections_that_disagree_are_refused_and_the_neighbouring_value_is_not(name: str) -> None:
    values, expected, mended = DISAGREEMENTS[name]
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(None, [*BASE, *values])
    load_config(None, [*BASE, *values, mended])


def test_joint_is_refused_with_replicas_on_either_backend() -> None:
    joint = [*BASE, "defense.transfer_rule=joint", "cluster.replicas_per_member=2"]
    for backend in ("ray", "local"):
        with pytest.raises(ConfigError, match=r"'joint' runs in one process: cluster.replicas_per_member must be 1"):
            load_config(None, [*joint, f"cluster.backend={backend}"])


def test_several_disagreements_come_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"defense\.peers must be .*; ensemble\.split\.rule 'disjoint' needs"):
        load_config(None, [*BASE, "defense.peers=3", "ensemble.split.rule=disjoint", "ensemble.split.parts=2"])


@pytest.mark.parametrize("other", ["defense.name=pgd_at", "ensemble.members=1"])
def test_rules_of_eat_bind_neither_other_defenses_nor_a_single_member(other: str) -> None:
    conflict = [*BASE, "defense.transfer_rule=joint", "defense.peers=9"]
    load_config(None, [*conflict, other])
    with pytest.raises(ConfigError, match=r"defense\.peers"):
        load_config(None, conflict)


@pytest.mark.parametrize("content", ["a: b: c", "[1, 2", "\t- x", "%", "data: 2024-02-30", "seed: !!int x"])
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"run\.yaml' is not YAML: .+"):
        load_config(path)


@pytest.mark.parametrize("load", [load_config, load_study, load_space])
def test_a_key_that_is_given_twice_is_an_error_and_not_the_last_of_both(tmp_path: Path, load: Any) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("train: {epochs: 7}\nseed: 1\ntrain: {precision: bf16}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not YAML: 'train' is given twice.*line 3"):
        load(path)
    with pytest.raises(ConfigError, match="'epochs' is given twice"):
        load_config(None, ["train={epochs: 1, epochs: 2}"])


def test_bytes_that_are_no_text_are_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(path)


@pytest.mark.parametrize("content", ["- 1", "hello"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="expected a mapping of sections"):
        load_config(path, ["train.epochs=2"])


def test_a_missing_file_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config '.*absent\.yaml': No such file"):
        load_config(tmp_path / "absent.yaml")


def test_overrides_reach_every_depth_and_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nattack:\n  epsilon: 0.2\n  num_steps: 7\n")
    config = load_config(
        path, ["seed=5", "attack.epsilon=8/255", "ensemble.split.rule=disjoint", "model.widths=[8,16]"]
    )
    assert config.seed == 5
    assert config.attack == AttackConfig(epsilon=8 / 255, num_steps=7)
    assert config.ensemble.split.rule == "disjoint"
    assert config.model.widths == (8, 16)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("attack.epsilon", "--set takes section.key=value"),
        ("=3", "--set takes section.key=value"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("attack.epsilon=[1", "the value is not YAML"),
        ("attack.epsilom=1", "did you mean 'epsilon'"),
        ("attack=3", "attack: "),
        ("attack.epsilon=", "attack.epsilon: "),
    ],
)
def test_a_bad_override_says_what_is_wrong_with_it(tmp_path: Path, assignment: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(path, [assignment])


def test_override_checks_again_and_leaves_the_original_alone() -> None:
    config = RunConfig()
    assert override(config, "seed=2").seed == 2
    assert config == RunConfig()
    with pytest.raises(ConfigError, match="at most members − 1 = 2"):
        override(config, *BASE, "defense.peers=3")


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().attack.epsilon = 0.51  # type: ignore[misc]


def test_dump_and_load_give_an_equal_config(tmp_path: Path) -> None:
    config = parse_config(
        {
            "name": "1e3",  # must come back as text
            "seed": 3,
            "attack": {"epsilon": "8/255", "step_size": "1e-7", "norm": "l2"},
            "model": {"widths": [4, 8]},
            "ensemble": {"members": 4, "split": {"rule": "k_of_n", "parts": 5, "parts_per_member": 2}},
            "tracking": {"uri": "sqlite:///ä.db"},
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(path) != RunConfig()


def test_the_default_step_is_two_and_a_half_radii_over_the_steps() -> None:
    assert effective_step_size(AttackConfig(epsilon=0.1, num_steps=5)) == pytest.approx(0.05)
    assert effective_step_size(AttackConfig(epsilon=0.1, num_steps=5, step_size=0.03)) == 0.03


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid_and_names_known_components(path: Path) -> None:
    config = load_config(path)
    assert config.data.dataset in DATASETS
    assert config.model.backbone in BACKBONES
    assert config.loss.name in LOSSES
    assert config.attack.name in ATTACKS
    assert config.defense.name in DEFENSES
    assert config.defense.transfer_rule in TRANSFER_RULES


def test_the_repository_has_configs() -> None:
    assert CONFIGS


def test_faults_of_single_values_and_between_sections_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"defense": {"peers": 9}, "train": {"epochs": 0}, "foo": 1})

    for part in ("train.epochs", "defense.peers must be at most", "unknown key 'foo'"):
        assert part in str(caught.value)
