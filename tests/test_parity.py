"""Who is behind the exchange changes no number: in one process and on Ray, three members, 20 iterations."""

from __future__ import annotations

from pathlib import Path

import pytest

from eat_dist.config import RunConfig, override
from eat_dist.data.load import with_shards
from eat_dist.storage import Folder
from small_runs import PHOTOGRAPHS, largest_difference, needs_photographs, small_config, train_locally, weights

RULES = {
    "uniform": ["defense.transfer_rule=uniform", "defense.diversity_weight=0.5"],
    "relay": ["defense.transfer_rule=relay"],
}


def train_on_ray(config: RunConfig, folder: Path, *, iterations: int = 20) -> None:
    from eat_dist.cluster.train import train_on_ray

    results = train_on_ray(config, num_classes=5, run_folder=Folder.at(folder))
    assert [result.iterations for result in results] == [iterations] * 3


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_ray_and_in_process_training_give_the_same_weights(rule: str, tmp_path: Path, ray_session: None) -> None:
    """Slow: Ray Train needs ten to twenty seconds to start three workers."""
    config = small_config(*RULES[rule])
    train_locally(config, tmp_path / "local")
    train_on_ray(config, tmp_path / "ray")

    assert largest_difference(weights(tmp_path / "local"), weights(tmp_path / "ray")) <= 1e-6


@needs_photographs
@pytest.mark.ray
@pytest.mark.slow
def test_photographs_that_ray_workers_stream_from_shards_train_the_same_weights_as_cached_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    """Slow: three Ray workers, each of which starts a process that decodes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = small_config(*PHOTOGRAPHS, "cluster.backend=ray")
    config = config.model_copy(update={"data": with_shards(config.data)})
    train_locally(override(config, "data.cache=device"), tmp_path / "local")
    train_on_ray(override(config, "data.cache=none", "data.workers=1"), tmp_path / "ray", iterations=3)

    assert largest_difference(weights(tmp_path / "local"), weights(tmp_path / "ray")) <= 1e-6


def test_without_transfer_the_weights_differ(tmp_path: Path) -> None:
    """The negative control: parity would be worth nothing if the exchange had no influence."""
    train_locally(small_config("defense.transfer_rule=uniform"), tmp_path / "with")
    train_locally(small_config("defense.transfer_rule=none"), tmp_path / "without")

    assert largest_difference(weights(tmp_path / "with"), weights(tmp_path / "without")) > 1e-3


@pytest.mark.parametrize("rule", ["uniform", "hardest", "class_risk", "relay", "joint"])
def test_the_same_seed_gives_the_same_weights_and_another_does_not(rule: str, tmp_path: Path) -> None:
    peers = "defense.peers=2" if rule == "hardest" else "defense.peers=1"
    rule_of = [f"defense.transfer_rule={rule}", peers, "cluster.backend=local", "train.epochs=1"]
    train_locally(small_config(*rule_of), tmp_path / "first")
    train_locally(small_config(*rule_of), tmp_path / "again")
    train_locally(small_config(*rule_of, "seed=1"), tmp_path / "other")

    assert largest_difference(weights(tmp_path / "first"), weights(tmp_path / "again")) == 0
    assert largest_difference(weights(tmp_path / "first"), weights(tmp_path / "other")) > 1e-3
