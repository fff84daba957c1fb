"""The coordinator's arithmetic, worked by hand for two, three and four members."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eat_dist.config import load_config
from eat_dist.errors import ConfigError
from eat_dist.history import SCHEMA, HistoryWriter, read_history, rows
from eat_dist.robustness.diversity import wrong_class_alignment
from eat_dist.robustness.statistics import (
    ClassCounts,
    EnsembleStatistics,
    MemberStatistics,
    Policy,
    Received,
    fooled,
    merge,
)
from eat_dist.robustness.transfer import TRANSFER_RULES, TransferPlan, class_weights, rotating_plan
from eat_dist.storage import Folder

NAN = float("nan")


def policy(members: int = 2, *, rule: str = "uniform", peers: int = 1, temperature: float = 1.0) -> Policy:
    return Policy(members, num_classes=4, rule=rule, peers=peers, temperature=temperature, momentum=0.75)


def counts(**by_class: tuple[int, int]) -> ClassCounts:
    """c0=(fooled, seen), …"""
    wrong, seen = zip(*by_class.values(), strict=True)
    return ClassCounts(np.array([int(name[1:]) for name in by_class]), np.array(wrong), np.array(seen))


def entry(
    member: int, iteration: int, fooled_rate: float, *received: Received, by_class: ClassCounts | None = None
) -> MemberStatistics:
    return MemberStatistics(member, iteration, 4, fooled_rate=fooled_rate, received=received, by_class=by_class)


def test_plans_by_hand() -> None:
    assert [rotating_plan(t, members=2, peers=1).sources for t in range(2)] == [((1,), (0,))] * 2
    assert [rotating_plan(t, members=3, peers=1).sources for t in range(3)] == [
        ((1,), (2,), (0,)),
        ((2,), (0,), (1,)),
        ((1,), (2,), (0,)),
    ]
    assert rotating_plan(0, members=4, peers=2).sources == ((1, 2), (2, 3), (3, 0), (0, 1))
    assert rotating_plan(2, members=4, peers=2).sources == ((3, 1), (0, 2), (1, 3), (2, 0))  # shifts 3 and 1
    assert rotating_plan(5, members=1, peers=1).sources == ((),)
    assert rotating_plan(5, members=3, peers=0).sources == ((), (), ())


@pytest.mark.parametrize(("members", "peers"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (7, 2)])
def test_every_pair_meets_equally_often_and_everyone_sends_as_much_as_it_receives(members: int, peers: int) -> None:
    met = np.zeros((members, members), int)
    for iteration in range(members - 1):
        plan = rotating_plan(iteration, members=members, peers=peers)
        for member, sources in enumerate(plan.sources):
            assert len(set(sources)) == peers
            assert len(plan.targets(member)) == peers
            assert plan.targets(member) == tuple(i for i in range(members) if member in plan.sources[i])
            for sender in sources:
                met[member, sender] += 1
                assert member in plan.targets(sender)
    assert np.array_equal(met, peers * (1 - np.eye(members, dtype=int)))


def test_targets_by_hand() -> None:
    plan = TransferPlan(((1, 2), (2, 3), (3, 0), (0, 1)))
    assert [plan.targets(member) for member in range(4)] == [(2, 3), (0, 3), (0, 1), (1, 2)]


def test_uniform_weights_are_shares_of_one() -> None:
    for rule in ("uniform", "class_risk"):
        weights = TRANSFER_RULES[rule].weights
        assert weights(np.array([5.0, 1.0, 3.0, 9.0], np.float32), 1.0).tolist() == [0.25] * 4
        assert weights(np.zeros(0, np.float32), 1.0).tolist() == []


def test_hardest_weights_are_a_softmax_of_the_losses() -> None:
    """Losses 1 and 1 + ln 3: 1 : 3 at τ = 1, 1 : 9 at τ = 1/2. Large losses must not overflow."""
    weights = TRANSFER_RULES["hardest"].weights
    losses = np.array([1, 1 + math.log(3)], np.float32)
    np.testing.assert_allclose(weights(losses, 1.0), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(weights(losses, 0.5), [0.1, 0.9], rtol=1e-6)
    assert weights(np.array([0, 10_000], np.float32), 0.1).tolist() == [0.0, 1.0]
    assert weights(np.zeros(0, np.float32), 1.0).tolist() == []


def test_an_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"known: class_risk, hardest, joint, none, relay, uniform\. .*'uniform'"):
        TRANSFER_RULES["unifrom"]


def test_class_weights_by_hand() -> None:
    """Risks 0.2 and 0.6; class 2 was never measured and counts as their mean, 0.4. The batch's mean risk is 0.35."""
    risk = np.array([0.2, 0.6, NAN], np.float32)
    weights = class_weights(risk, np.array([0, 0, 1, 2]))
    np.testing.assert_allclose(weights, [4 / 7, 4 / 7, 12 / 7, 8 / 7], rtol=1e-6)
    assert weights.dtype == np.float32
    assert float(weights.mean()) == pytest.approx(1)


def test_a_class_that_is_never_fooled_keeps_a_twentieth_of_the_mean() -> None:
    """Risks 0 and 1, mean 0.5: the floor is 0.025, so 0.025 and 1, divided by their mean 0.5125."""
    weights = class_weights(np.array([0, 1], np.float32), np.array([0, 1]))
    np.testing.assert_allclose(weights, [2 / 41, 80 / 41], rtol=1e-6)


@pytest.mark.parametrize("risk", [[NAN, NAN, NAN], [0, 0, 0], [0, 0, 1], [0, NAN, 0]])
def test_without_any_risk_in_the_batch_every_image_counts_once(risk: list[float]) -> None:
    assert class_weights(np.array(risk, np.float32), np.array([0, 1, 1])).tolist() == [1.0, 1.0, 1.0]


def two_iterations() -> list[list[MemberStatistics]]:
    return [
        [
            entry(0, 0, 0.5, Received(1, 2.0, 0.25), by_class=counts(c0=(1, 1), c2=(2, 2))),
            entry(1, 0, 1.0, Received(0, 1.0, 0.75), by_class=counts(c0=(0, 3), c1=(0, 2))),
        ],
        [
            entry(0, 1, 0.1, Received(1, 3.0, 0.65), by_class=counts(c3=(1, 4))),
            entry(1, 1, 0.2, Received(0, 4.0, 0.35), by_class=counts(c0=(1, 1), c2=(0, 3))),
        ],
    ]


def test_two_iterations_of_two_members_by_hand() -> None:
    """Momentum 0.75. The first measurement is taken as it is, afterwards 0.75 · old + 0.25 · new.

    Class risk pools images, not rates: of class 0 member 0 saw 1 (fooled) and member 1 saw 3 (not fooled): 1/4.
    """
    first, second = two_iterations()
    start = EnsembleStatistics.initial(policy())
    assert np.isnan(start.transfer_matrix).all()
    assert np.isnan(start.class_risk).all()
    assert start.shared_vulnerability is None

    merged = merge(start, first, policy=policy())
    np.testing.assert_allclose(merged.transfer_matrix, [[0.5, 0.25], [0.75, 1.0]])
    np.testing.assert_allclose(merged.class_risk, [0.25, 0, 1, NAN])
    assert merged.shared_vulnerability == pytest.approx(0.5)  # (0.25 + 0.75) / 2
    assert merged.iteration == 1

    merged = merge(merged, second, policy=policy())
    # 0.375 + 0.025, 0.1875 + 0.1625; 0.5625 + 0.0875, 0.75 + 0.05
    np.testing.assert_allclose(merged.transfer_matrix, [[0.4, 0.35], [0.65, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(merged.class_risk, [0.1875 + 0.25, 0, 0.75, 0.25], rtol=1e-6)
    assert merged.shared_vulnerability == pytest.approx(0.5)
    assert merged.iteration == 2
    assert [weights.tolist() for weights in merged.weights] == [[1.0], [1.0]]


def test_three_members_fill_the_matrix_as_pairs_meet() -> None:
    """k = 1: member i meets i + 1 at iteration 0 and i + 2 at iteration 1; the rest is NaN until then."""
    state = EnsembleStatistics.initial(policy(3))
    expected = [
        [[0.5, 0.1, NAN], [NAN, 0.5, 0.2], [0.3, NAN, 0.5]],
        [[0.5, 0.1, 0.4], [0.5, 0.5, 0.2], [0.3, 0.6, 0.5]],
    ]
    measured = [(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]
    for iteration in range(2):
        assert state.plan == rotating_plan(iteration, members=3, peers=1)
        gathered = [
            entry(i, iteration, 0.5, Received(state.plan.sources[i][0], 1.0, measured[iteration][i])) for i in range(3)
        ]
        state = merge(state, gathered, policy=policy(3))
        np.testing.assert_allclose(state.transfer_matrix, expected[iteration], rtol=1e-6)
        assert state.shared_vulnerability == pytest.approx([0.2, 0.35][iteration])
    assert state.plan == rotating_plan(2, members=3, peers=1)


def test_weights_follow_the_order_in_which_batches_are_received() -> None:
    """Member 2 of three receives from 0 and 1, with losses ln 3 and 0."""
    rule = policy(3, rule="hardest", peers=2)
    start = EnsembleStatistics.initial(rule)
    assert start.plan.sources[2] == (0, 1)
    hard, easy = Received(0, math.log(3), 0.5), Received(1, 0.0, 0.5)
    gathered = [
        entry(0, 0, 0.5, Received(1, 2.0, 0.5), Received(2, 2.0, 0.5)),
        entry(1, 0, 0.5, Received(2, 2.0, 0.5), replace(hard, loss=2.0)),
        entry(2, 0, 0.5, hard, easy),
    ]
    weights = merge(start, gathered, policy=rule).weights
    np.testing.assert_allclose(weights, [[0.5, 0.5], [0.5, 0.5], [0.75, 0.25]], rtol=1e-6)


def test_merging_is_pure_and_blind_to_the_order_of_the_entries() -> None:
    first, second = two_iterations()
    start = EnsembleStatistics.initial(policy())
    one = merge(start, first, policy=policy())
    kept = one.transfer_matrix.copy(), one.class_risk.copy()
    forward, backward = (merge(one, gathered, policy=policy()) for gathered in (second, second[::-1]))
    assert np.isnan(start.transfer_matrix).all()
    assert np.array_equal(one.transfer_matrix, kept[0])
    assert np.array_equal(one.class_risk, kept[1], equal_nan=True)
    assert np.array_equal(forward.transfer_matrix, backward.transfer_matrix)
    assert np.array_equal(forward.class_risk, backward.class_risk)
    assert forward.members == backward.members == tuple(replace(one, by_class=None) for one in second)


def test_members_that_measure_no_robustness_leave_the_averages_unmeasured() -> None:
    natural = policy(rule="none")
    gathered = [MemberStatistics(rank, 0, 4, clean_loss=1.0) for rank in range(2)]
    merged = merge(EnsembleStatistics.initial(natural), gathered, policy=natural)
    assert np.isnan(merged.transfer_matrix).all()
    assert merged.shared_vulnerability is None
    assert merged.plan.sources == ((), ())
    assert [weights.tolist() for weights in merged.weights] == [[], []]


def test_entries_of_another_iteration_or_twice_the_same_member_are_bugs() -> None:
    first, second = two_iterations()
    for gathered in ([first[0], second[1]], [first[0], first[0]], [first[0]], second):
        with pytest.raises(AssertionError):
            merge(EnsembleStatistics.initial(policy()), gathered, policy=policy())


def test_the_averages_survive_json_with_their_gaps() -> None:
    merged = merge(
        EnsembleStatistics.initial(policy(), 7), [replace(e, iteration=7) for e in two_iterations()[0]], policy=policy()
    )
    merged.transfer_matrix[0, 1] = NAN
    back = EnsembleStatistics.from_json(json.loads(json.dumps(merged.to_json(), allow_nan=False)))
    assert (back.iteration, back.members, back.plan) == (8, (), merged.plan)
    pairs = [(back.transfer_matrix, merged.transfer_matrix), (back.class_risk, merged.class_risk)]
    for mine, other in pairs + list(zip(back.weights, merged.weights, strict=True)):
        assert mine.dtype == np.float32
        assert np.array_equal(mine, other, equal_nan=True)


def test_class_counts_by_hand() -> None:
    counted = ClassCounts.of(np.array([True, False, True, True, False]), np.array([9, 2, 2, 9, 5]))
    assert counted.classes.tolist() == [2, 5, 9]
    assert counted.fooled.tolist() == [1, 0, 2]
    assert counted.seen.tolist() == [2, 1, 2]


def test_fooled_means_that_the_nearest_proxy_is_anothers() -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.1, 0.3]])
    assert fooled(similarities, torch.tensor([0, 0])).tolist() == [False, True]


def test_a_members_statistics_stay_below_10_kb_with_11318_classes() -> None:
    """A batch of 180 images of 180 classes, as large as in the published recipes, and five received batches."""
    labels = np.arange(11_318 - 180, 11_318)
    statistics = MemberStatistics(
        member=3,
        iteration=100_000,
        batch_size=180,
        clean_loss=1.5,
        adversarial_loss=2.5,
        fooled_rate=0.5,
        displacement=0.3,
        gradient_norm=7.0,
        received=tuple(Received(sender, 1.25, 0.125) for sender in range(5)),
        by_class=ClassCounts.of(labels % 2 == 0, labels),
    )
    assert len(pickle.dumps(statistics)) < 10_000


def test_the_policy_follows_the_defense() -> None:
    defense = ["transfer_rule=hardest", "peers=2", "temperature=3", "momentum=0.25"]
    assignments = ["ensemble.members=4", "defense.name=eat", *(f"defense.{value}" for value in defense)]
    assert Policy.of(load_config(None, assignments), 5) == Policy(
        members=4, num_classes=5, rule="hardest", peers=2, temperature=3.0, momentum=0.25
    )
    alone = Policy.of(load_config(None, [*assignments, "defense.name=pgd_at"]), 5)
    assert alone.rule == "none"
    assert alone.plan(0).sources == ((), (), (), ())
    for rule, traffic in {"none": 0, "joint": 0, "uniform": 1, "hardest": 1, "class_risk": 1, "relay": 1}.items():
        assert [len(sources) for sources in policy(3, rule=rule).plan(0).sources] == [traffic] * 3


def alignment(own: list[float], senders: list[float]) -> float:
    """Class 0 is the true one."""
    return float(wrong_class_alignment(torch.tensor([own]), torch.tensor([senders]), torch.tensor([0])))


def test_alignment_by_hand() -> None:
    """Wrong similarities (0.3, 0.2, 0.1) centre to (0.1, 0, −0.1)."""
    own = [0.9, 0.3, 0.2, 0.1]
    assert alignment(own, own) == pytest.approx(1)
    assert alignment(own, [-0.9, 0.8, 0.7, 0.6]) == pytest.approx(
        1, abs=1e-5
    )  # same direction, other level and own class
    assert alignment(own, [0.9, 0.1, 0.2, 0.3]) == pytest.approx(1, abs=1e-5)  # opposite: squared
    assert alignment(own, [0.9, 0.1, -0.2, 0.1]) == pytest.approx(0, abs=1e-10)
    # (0, 1, −1) against (1, 0, −1): cosine 1/2
    assert alignment([0.9, 1.0, 0.0, -1.0], [0.9, 0.0, 1.0, -1.0]) == pytest.approx(0.25)
    assert alignment([0.9, 0.3], [0.9, 0.1]) == 0  # two classes: one wrong similarity has no direction
    assert alignment([0.9, 0.3, 0.2], [0.9, 0.1, 0.8]) == 0  # three: two have a sign alone, which squared says nothing


def test_alignment_is_the_mean_over_images_with_classes_of_their_own() -> None:
    own = torch.tensor([[0.9, 1.0, 0.0, -1.0], [4.0, 3.0, 0.9, 2.0]])  # each image on a level of its own
    senders = torch.tensor([[0.9, 0.0, 1.0, -1.0], [1.0, 0.0, -0.9, -1.0]])
    assert float(wrong_class_alignment(own, senders, torch.tensor([0, 2]))) == pytest.approx((0.25 + 1) / 2)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_the_gradient_of_alignment_reaches_the_own_wrong_classes_alone(num_classes: int) -> None:
    own = torch.tensor([[0.9, 1.0, 0.0, -1.0]])[:, :num_classes].requires_grad_(True)
    senders = torch.tensor([[0.9, 0.0, 1.0, -1.0]])[:, :num_classes].requires_grad_(True)
    wrong_class_alignment(own, senders, torch.tensor([0])).backward()
    assert senders.grad is None
    assert own.grad is not None
    if num_classes < 4:
        assert own.grad.tolist() == [[0] * num_classes]
    else:
        assert float(own.grad[0, 0]) == 0
        assert float(own.grad[0, 1:].abs().max()) > 0.1
        assert float(own.grad.sum()) == pytest.approx(0, abs=1e-6)  # the level does not matter


def recorded(writer: HistoryWriter, iterations: range) -> None:
    state = EnsembleStatistics.initial(policy(), iterations.start)
    for iteration in iterations:
        gathered = [replace(e, iteration=iteration, gradient_norm=None) for e in two_iterations()[0]]
        gathered[0] = replace(
            gathered[0],
            clean_loss=float(iteration),
            coordinator_wait=0.25,
            exchange_wait=0.5,
            data_wait=0.125,
            iteration_time=2,
        )
        state = merge(state, gathered, policy=policy())
        writer.add(rows(state, epoch=iteration // 2, learning_rate=0.5))


def test_history_comes_back_as_one_row_a_member_and_iteration(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "statistics")
    assert read_history(folder).num_rows == 0
    writer = HistoryWriter(folder, 0)
    writer.flush()
    assert folder.names() == []
    recorded(writer, range(3))
    writer.flush()
    table = read_history(folder)
    assert table.schema == SCHEMA
    history = table.to_pylist()
    assert [(row["iteration"], row["member"], row["epoch"]) for row in history] == [
        (0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 1)
    ]  # fmt: skip
    assert history[4] == {
        "iteration": 2,
        "epoch": 1,
        "member": 0,
        "learning_rate": 0.5,
        "clean_loss": 2.0,
        "adversarial_loss": None,
        "fooled_rate": 0.5,
        "displacement": None,
        "gradient_norm": None,
        "received_from": [1],
        "received_loss": [2.0],
        "received_fooled_rate": [0.25],
        "shared_vulnerability": 0.5,
        "coordinator_wait_ms": 250.0,
        "exchange_wait_ms": 500.0,
        "data_wait_ms": 125.0,
        "iteration_ms": 2000,
    }


def test_history_of_an_abandoned_attempt_is_deleted_and_the_rest_kept(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    writer = HistoryWriter(folder, 0)
    for stretch in (range(4), range(4, 6), range(6, 10)):  # three checkpoints
        recorded(writer, stretch)
        writer.flush()
        writer.flush()  # nothing is written twice
    assert folder.names() == ["00000000.parquet", "00000004.parquet", "00000006.parquet"]
    assert read_history(folder)["iteration"].to_pylist() == [t for t in range(10) for _ in range(2)]
    writer = HistoryWriter(folder, 6)  # back to the second checkpoint
    assert read_history(folder)["iteration"].to_pylist() == [t for t in range(6) for _ in range(2)]
    recorded(writer, range(6, 7))
    writer.flush()
    assert read_history(folder)["iteration"].to_pylist() == [t for t in range(7) for _ in range(2)]
