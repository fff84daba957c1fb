"""Warm-up, clipping, precision and micro-batches, as whole runs in this process; and what is checked before a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.data.load import load_dataset
from eat_dist.errors import CheckpointError, ConfigError, StorageError
from eat_dist.history import read_history
from eat_dist.models import build_embedder
from eat_dist.runs import resume_run, start_run
from eat_dist.seeding import generator
from eat_dist.storage import Folder
from small_runs import PHOTOGRAPHS, largest_difference, needs_photographs, small_config, train_locally, weights


def first_weights(config: RunConfig, rank: int) -> dict[str, torch.Tensor]:
    return build_embedder(config.model, in_channels=1, generator=generator(config.seed, "weights", rank)).state_dict()


def test_warm_up_trains_head_and_proxies_and_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    config = small_config("train.epochs=2", "train.warmup_epochs=1")
    train_locally(config, tmp_path)

    before = first_weights(config, 0)
    after_warm_up = load_file(tmp_path / "checkpoints" / "00000005" / "member_0.safetensors")
    names = [name for name in before if name.startswith("backbone") and name.endswith(("weight", "bias"))]
    assert len(names) == 6
    assert all(torch.equal(after_warm_up[f"model.{name}"], before[name]) for name in names)
    assert not torch.equal(after_warm_up["model.head.weight"], before["head.weight"])
    at_the_end = weights(tmp_path)[0]
    assert not any(torch.equal(at_the_end[name], before[name]) for name in names if "blocks.0.weight" in name)


def test_a_run_resumed_within_its_warm_up_ends_with_the_same_weights(tmp_path: Path) -> None:
    config = small_config("train.epochs=3", "train.warmup_epochs=2", "data.augmentation=crop_flip")
    train_locally(config, tmp_path / "whole")
    train_locally(config, tmp_path / "resumed")
    for name in ("00000010", "00000015"):
        Folder.at(tmp_path / "resumed" / "checkpoints").delete(name)
    train_locally(config, tmp_path / "resumed")

    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "resumed")) == 0


def test_clipping_bounds_the_first_update_of_plain_entries(tmp_path: Path) -> None:
    """Adam's first step is the sign of the gradient whatever its size, so clipping shows from the second step on."""
    clipped, plain = small_config("train.epochs=1", "optimiser.clip_value=1e-4"), small_config("train.epochs=1")
    train_locally(clipped, tmp_path / "clipped")
    train_locally(plain, tmp_path / "plain")

    moments = load_file(tmp_path / "clipped" / "checkpoints" / "00000005" / "member_0.safetensors")
    first = [value for name, value in moments.items() if name.endswith("exp_avg")]
    assert first
    assert max(float(value.abs().max()) for value in first) <= 1e-4 * (1 + 1e-6)
    assert largest_difference(weights(tmp_path / "clipped"), weights(tmp_path / "plain")) > 0
    norms = read_history(Folder.at(tmp_path / "clipped").child("statistics"))["gradient_norm"].to_pylist()
    assert max(norm for norm in norms if norm is not None) > 1e-2  # what is on record is from before clipping


@pytest.mark.parametrize("rule", ["uniform", "relay"])
def test_micro_batches_change_no_weight_beyond_rounding(rule: str, tmp_path: Path) -> None:
    options = ["model.freeze_batch_norm=true", "train.epochs=1", f"defense.transfer_rule={rule}", "attack.norm=l2"]
    options += ["attack.epsilon=1"]  # in L∞ a gradient near zero changes its sign by rounding alone
    train_locally(small_config(*options), tmp_path / "whole")
    train_locally(small_config(*options, "train.micro_batch_size=64"), tmp_path / "parts")

    moved = largest_difference(
        weights(tmp_path / "whole"), [first_weights(small_config(*options), rank) for rank in range(3)]
    )
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 0.02 * moved


def test_a_run_in_bfloat16_and_channels_last_learns_in_finite_fp32_losses(tmp_path: Path) -> None:
    config = small_config("train.precision=bf16", "train.channels_last=true", "data.augmentation=crop_flip")
    train_locally(config, tmp_path)

    history = read_history(Folder.at(tmp_path).child("statistics"))
    losses = history["clean_loss"].to_pylist()
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-15:]) < sum(losses[:15])
    assert all(value.dtype != torch.bfloat16 for member in weights(tmp_path) for value in member.values())


def test_waiting_for_data_is_on_record_for_every_iteration_but_the_first(tmp_path: Path) -> None:
    train_locally(small_config("train.epochs=1"), tmp_path)

    history = read_history(Folder.at(tmp_path).child("statistics")).to_pylist()
    waits = [row["data_wait_ms"] for row in history if row["iteration"] > 0]
    assert len(waits) == 12
    assert all(0 < wait < row["iteration_ms"] for wait, row in zip(waits, history[3:], strict=True))


@needs_photographs
def test_photographs_train_through_shards_and_resume_only_with_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    finished = start_run(small_config(*PHOTOGRAPHS), run_dir=str(folder), overwrite=False, console=Console())

    (shards,) = (tmp_path / "cache" / "eat_dist" / "shards").iterdir()
    assert (shards / "manifest.json").exists()
    assert finished.summary["evaluation"]["retrieval"] == "all_against_all"
    assert finished.summary["evaluation"]["images"] == 146
    assert all(memory > 100 for memory in finished.summary["peak_memory_mib"])
    assert "148 decoded images" in finished.summary["loading"]
    spec = json.loads((folder / "model" / "ensemble.json").read_text())
    assert (spec["image_shape"], spec["resize"]) == ([3, 32, 32], 37)

    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("resize: null", "resize: 32"))
    with pytest.raises(CheckpointError, match="it belongs to a run with another configuration"):
        resume_run(str(folder), console=Console())
    config.write_text(config.read_text().replace("resize: 32", "resize: null"))
    about = json.loads((folder / "run.json").read_text())
    about["data"]["train"] = "0" * 64  # as if a file had been replaced since
    (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="the images are not those that"):
        resume_run(str(folder), console=Console())


@needs_photographs
def test_cached_and_streamed_photographs_train_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, options in (("cached", ["data.cache=device"]), ("streamed", ["data.cache=none", "data.workers=0"])):
        train_locally(small_config(*PHOTOGRAPHS, *options), tmp_path / name)

    assert largest_difference(weights(tmp_path / "cached"), weights(tmp_path / "streamed")) == 0


def test_pretrained_weights_start_every_member_with_its_own_head(tmp_path: Path) -> None:
    config = small_config("train.epochs=2", "train.warmup_epochs=1", f"model.weights={tmp_path / 'w.safetensors'}")
    other = build_embedder(small_config().model, in_channels=1, generator=generator(7))
    save_file(other.backbone.state_dict(), tmp_path / "w.safetensors")
    train_locally(config, tmp_path / "run")

    states = [
        load_file(tmp_path / "run" / "checkpoints" / "00000005" / f"member_{rank}.safetensors") for rank in range(3)
    ]
    name = "model.backbone.blocks.0.weight"
    assert all(torch.equal(state[name], other.state_dict()["backbone.blocks.0.weight"]) for state in states)
    assert not torch.equal(states[0]["model.head.weight"], states[1]["model.head.weight"])


@pytest.mark.parametrize(
    ("assignments", "error", "message"),
    [
        (["model.weights=absent.safetensors"], StorageError, r"model\.weights: cannot read '.*absent\.safetensors'"),
        (["model.weights=imagenet"], ConfigError, "no ImageNet weights for backbone 'convnet'"),
        (["loss.name=triplet", "loss.alpha=2"], ConfigError, "alpha"),
        (["loss.name=triplet", "defense.transfer_rule=class_risk"], ConfigError, "which the loss 'triplet' cannot"),
        (["data.resize=4"], ConfigError, r"data\.resize.*at least data\.image_size = 8; got 4"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_written(
    assignments: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config("cluster.backend=local", *assignments)

    with pytest.raises(error, match=message):
        start_run(config, run_dir="run", overwrite=False, console=Console())
    assert list(tmp_path.iterdir()) == []


def test_frozen_batch_norm_without_pretrained_weights_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(
        "model.freeze_batch_norm=true", "train.epochs=1", "evaluation.protocol=none", "cluster.backend=local"
    )
    start_run(config, run_dir=str(tmp_path / "run"), overwrite=False, console=Console())

    assert "leaves BatchNorm at mean 0 and variance 1" in capsys.readouterr().err


def test_data_that_stay_the_same_keep_their_digest_and_others_do_not() -> None:
    first = load_dataset(small_config().data).train.digest()

    assert load_dataset(small_config().data).train.digest() == first
    assert load_dataset(small_config("data.image_size=16").data).train.digest() != first


def test_a_training_that_withstands_nothing_is_warned_of_and_one_that_learns_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eat_dist.runs.run._LONG_ENOUGH", 1)
    options = ("defense.name=pgd_at", "evaluation.protocol=none", "cluster.backend=local", "ensemble.members=1")
    summaries = {}
    for rate, epochs, epsilon in (("1e-9", 1, 0.2), ("1e-2", 12, 0.05)):
        own = (f"optimiser.learning_rate={rate}", f"train.epochs={epochs}", f"attack.epsilon={epsilon}")
        config = small_config(*options, *own)
        finished = start_run(config, run_dir=str(tmp_path / rate), overwrite=False, console=Console())
        summaries[rate] = finished.summary, capsys.readouterr().err
    stuck, told = summaries["1e-9"]
    assert stuck["fooled_by_chance"] == 0.8
    assert stuck["fooled_rate"] > 0.76
    assert "as chance would (80 %): nothing was learnt that withstands it. Try another optimiser.learning_rate" in told
    learnt, told = summaries["1e-2"]
    assert learnt["fooled_rate"] < 0.5
    assert "nothing was learnt" not in told
