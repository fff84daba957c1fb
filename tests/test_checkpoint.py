"""A checkpoint is whole or it is none, and a resumed run ends with the weights of an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from eat_dist.checkpoint import Checkpoints, MemberState, fingerprint
from eat_dist.config import EvaluationConfig
from eat_dist.errors import CheckpointError, NonFiniteLossError
from eat_dist.history import SCHEMA, last_fooled_rate, read_history, waiting_shares
from eat_dist.storage import Folder
from small_runs import largest_difference, small_config, train_locally, weights


def stop_after(iterations: int, folder: Path, *assignments: str) -> None:
    """Train and be interrupted in the middle of an epoch."""

    class StoppedError(Exception):
        pass

    def on_iteration(ensemble: object) -> None:
        if ensemble.iteration == iterations:  # type: ignore[attr-defined]
            raise StoppedError

    with pytest.raises(StoppedError):
        train_locally(small_config(*assignments), folder, on_iteration)


@pytest.mark.parametrize("rule", ["uniform", "class_risk", "relay"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(rule: str, tmp_path: Path) -> None:
    rule_of = f"defense.transfer_rule={rule}"
    train_locally(small_config(rule_of), tmp_path / "whole")
    stop_after(13, tmp_path / "stopped", rule_of)

    results = train_locally(small_config(rule_of), tmp_path / "stopped")

    assert [result.resumed_from for result in results] == [10, 10, 10]
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "stopped")) == 0


def test_a_resumed_run_has_every_iteration_on_record_once(tmp_path: Path) -> None:
    stop_after(13, tmp_path)
    train_locally(small_config(), tmp_path)

    history = read_history(Folder.at(tmp_path / "statistics"))

    assert history.num_rows == 20 * 3
    assert sorted(set(history["iteration"].to_pylist())) == list(range(20))
    assert pc.min(history["fooled_rate"]).as_py() >= 0


def test_passes_are_counted_over_the_whole_run(tmp_path: Path) -> None:
    stop_after(7, tmp_path)

    (result, *_) = train_locally(small_config(), tmp_path)

    # 20 iterations of 2 attack steps, the clean, the own adversarial and the received batch.
    assert result.passes == 20 * (2 + 1 + 1 + 1)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    train_locally(small_config("checkpoint.keep=2"), tmp_path)

    assert Folder.at(tmp_path / "checkpoints").names() == ["00000015", "00000020"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_that_was_killed_costs_no_later_checkpoint(keep: int, tmp_path: Path) -> None:
    """Killed while saving 200, then resumed from 150 with a lower checkpoint.every: 160 comes before what is left."""
    folder = Folder.at(tmp_path)
    checkpoints = Checkpoints(folder, small_config(f"checkpoint.keep={keep}", "ensemble.members=1"))

    def write(iteration: int) -> dict[str, str]:
        return checkpoints.write_member(iteration, 0, MemberState({"w": torch.zeros(2)}, {"iteration": iteration}))

    for iteration in (100, 150):
        checkpoints.commit(iteration, [write(iteration)])
    write(200)
    for iteration in (160, 170):
        checkpoints.commit(iteration, [write(iteration)])
        found = checkpoints.newest()
        assert found is not None
        assert (found.iteration, found.passed_over) == (iteration, ())

    assert folder.names() == ["00000160", "00000170"][-keep:]


@pytest.mark.parametrize("damage", ["truncated", "missing manifest", "missing member", "manifest is no JSON"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str, tmp_path: Path) -> None:
    train_locally(small_config(), tmp_path)
    newest = tmp_path / "checkpoints" / "00000020"
    match damage:
        case "truncated":
            content = (newest / "member_1.safetensors").read_bytes()
            (newest / "member_1.safetensors").write_bytes(content[: len(content) // 2])
        case "missing manifest":
            (newest / "checkpoint.json").unlink()
        case "missing member":
            (newest / "member_2.json").unlink()
        case _:
            (newest / "checkpoint.json").write_text("{")

    found = Checkpoints(Folder.at(tmp_path / "checkpoints"), small_config()).newest()

    assert found is not None
    assert found.iteration == 15
    assert len(found.passed_over) == 1
    assert "00000020 is passed over" in found.passed_over[0]


def test_a_foreign_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    train_locally(small_config(), tmp_path)
    checkpoints = Checkpoints(Folder.at(tmp_path / "checkpoints"), small_config("seed=7"))

    with pytest.raises(CheckpointError, match="belongs to a run with another configuration"):
        checkpoints.newest()


def test_where_and_how_a_run_is_tracked_does_not_make_its_checkpoints_foreign(tmp_path: Path) -> None:
    train_locally(small_config(), tmp_path)
    elsewhere = small_config("name=other", "cluster.max_restarts=9", "tracking.experiment=x", "checkpoint.keep=9")

    found = Checkpoints(Folder.at(tmp_path / "checkpoints"), elsewhere).newest()

    assert found is not None
    assert found.iteration == 20


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    train_locally(small_config("train.epochs=1"), tmp_path)

    for file in (tmp_path / "checkpoints" / "00000005").iterdir():
        assert file.suffix in {".json", ".safetensors"}
        if file.suffix == ".json":
            json.loads(file.read_text())


def test_a_loss_that_is_not_finite_stops_the_run_before_any_member_uses_it(tmp_path: Path) -> None:
    # A learning rate that overflows float32 within the second epoch.
    config = small_config("optimiser.learning_rate=1e30", "optimiser.schedule=constant", "train.epochs=2")

    with pytest.raises(NonFiniteLossError, match=r"member \d: the .* loss is (nan|inf) in epoch 1, iteration \d+"):
        train_locally(config, tmp_path)

    assert not (tmp_path / "model").exists()


def test_the_last_good_checkpoint_is_named_when_a_loss_is_not_finite(tmp_path: Path) -> None:
    from eat_dist.config import override
    from eat_dist.data.load import load_dataset
    from eat_dist.data.splits import make_splits
    from eat_dist.exchange import Board, LocalExchange
    from eat_dist.member import Member
    from eat_dist.robustness.statistics import Policy

    config = override(small_config(), "ensemble.members=1", "cluster.backend=local")
    train = load_dataset(config.data).train
    member = Member(
        config,
        train,
        splits=make_splits(train.labels, config.ensemble.split, members=1, seed=0),
        exchange=LocalExchange(Board(1, timeout=10), 0, policy=Policy.of(config, train.num_classes)),
        run_folder=Folder.at(tmp_path),
        device=train.images.device,
        on_iteration=lambda ensemble: poison(member) if ensemble.iteration == 7 else None,
    )

    def poison(member: Member) -> None:
        next(iter(member.model.parameters())).data.fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match=r"epoch 2, iteration 7; .*checkpoints/00000005"):
        member.run()


def test_a_run_that_died_while_saving_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    train_locally(small_config(), tmp_path / "whole")
    half = tmp_path / "died" / "checkpoints" / "00000005"
    half.mkdir(parents=True)
    (half / "member_0.safetensors").write_bytes(b"half")

    results = train_locally(small_config(), tmp_path / "died")

    assert results[0].resumed_from == 0
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "died")) == 0


def test_moving_the_data_does_not_make_checkpoints_foreign(tmp_path: Path) -> None:
    assert fingerprint(small_config("data.root=here")) == fingerprint(small_config("data.root=there"))
    assert fingerprint(small_config("data.image_size=9")) != fingerprint(small_config())


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    """What a kill in the middle of saving leaves: one member's files, no manifest."""
    train_locally(small_config(), tmp_path)
    half = tmp_path / "checkpoints" / "00000025"
    half.mkdir()
    shutil.copy(tmp_path / "checkpoints" / "00000020" / "member_0.safetensors", half)

    found = Checkpoints(Folder.at(tmp_path / "checkpoints"), small_config()).newest()

    assert found is not None
    assert found.iteration == 20
    assert "interrupted" in found.passed_over[0]


def test_another_default_of_what_decides_no_weight_leaves_checkpoints_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a later version: the objectives that the quick protocol asks for were others once."""
    before = fingerprint(small_config())
    monkeypatch.setattr(EvaluationConfig.model_fields["objectives"], "default", ("proxy",))
    EvaluationConfig.model_rebuild(force=True)
    try:
        assert EvaluationConfig().objectives == ("proxy",)
        assert fingerprint(small_config()) == before
    finally:
        monkeypatch.undo()
        EvaluationConfig.model_rebuild(force=True)
    assert EvaluationConfig().objectives != ("proxy",)


def test_the_member_that_waits_least_is_the_one_the_others_wait_for() -> None:
    def row(member: int, coordinator: float, exchange: float) -> dict[str, object]:
        waits = {"coordinator_wait_ms": coordinator, "exchange_wait_ms": exchange, "iteration_ms": 100.0}
        return {"member": member, **waits}

    first = {"coordinator_wait_ms": 0.0, "exchange_wait_ms": 0.0, "iteration_ms": 0.0}  # nothing was measured before it
    table = pa.Table.from_pylist(
        [first | {"member": 0}, row(0, 10.0, 20.0), row(0, 30.0, 20.0), first | {"member": 1}, row(1, 1.0, 0.0)],
        schema=SCHEMA,
    )

    assert waiting_shares(table, 3) == pytest.approx([0.4, 0.01, 0.0])


def test_the_last_fooled_rate_is_the_mean_of_the_last_epoch_where_it_was_measured() -> None:
    entries = [(0, 0, 0.9), (1, 0, 0.5), (1, 1, 0.25), (1, 2, None)]
    rows = [{"epoch": epoch, "member": member, "fooled_rate": rate} for epoch, member, rate in entries]
    assert last_fooled_rate(pa.Table.from_pylist(rows, schema=SCHEMA)) == 0.375
    assert last_fooled_rate(pa.Table.from_pylist(rows[-1:], schema=SCHEMA)) is None
