"""What each protocol consists of."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from eat_dist.attacks.ball import Norm
from eat_dist.config import EvaluationConfig
from eat_dist.evaluation import OBJECTIVES
from eat_dist.evaluation.crafting import attack_of
from eat_dist.evaluation.plan import (
    COMPARED_ON,
    OBJECTIVES_OF_FULL,
    OBJECTIVES_OF_STANDARD,
    Part,
    Plan,
    plan,
)
from eat_dist.evaluation.sizes import Sizes

GROUPS = ("main", "square", "curves", "ladder", "norms", "transfer", "checks", "detector")
QUICK = ("nearest_wrong_centroid", "random_wrong_centroid", "nearest_negative")


def sizes_of(config: EvaluationConfig, *, norm: Norm = "linf", epsilon: float = 0.1, numbers: int = 64) -> Sizes:
    return Sizes.of(config, norm=norm, epsilon=epsilon, numbers_of_an_image=numbers)


def planned(
    protocol: str, *, members: int = 1, norm: Norm = "linf", epsilon: float = 0.1, other: bool = False, **settings: Any
) -> Plan:
    config = EvaluationConfig(protocol=protocol, **settings)  # type: ignore[arg-type]
    return plan(config, sizes_of(config, norm=norm, epsilon=epsilon), members=members, queries=1000, other=other)


def counts(found: Plan) -> dict[str, int]:
    return {name: len(getattr(found, name)) for name in GROUPS if getattr(found, name)}


def sources(parts: Iterable[Part]) -> dict[str, int]:
    return dict(Counter(part.source for part in parts))


@pytest.mark.parametrize("members", [1, 3])
def test_quick_is_pgd_with_the_configured_objectives_on_the_ensemble_and_each_member(members: int) -> None:
    found = planned("quick", members=members, num_steps=7)
    names = ["ensemble"] + [f"member_{rank}" for rank in range(members if members > 1 else 0)]
    assert found.parts == tuple(
        Part(name, (name,), "pgd", "linf", 0.1, 7, objective, keep="last") for name in names for objective in QUICK
    )
    assert found == Plan(found.parts)
    assert planned("quick", members=members, objectives=("proxy",)).main[0].objective == "proxy"


def test_without_members_the_ensemble_alone_is_attacked_at_first_hand() -> None:
    """Of the full protocol, what goes through members stays: their sum and the transfer matrix attack the ensemble."""
    config = EvaluationConfig(protocol="quick", members=False)
    assert sources(plan(config, sizes_of(config), members=3, queries=1000).main) == {"ensemble": 3}
    config = EvaluationConfig(protocol="full", members=False)
    assert sources(plan(config, sizes_of(config), members=3, queries=1000).main) == {"ensemble": 5, "members": 5}


@pytest.mark.parametrize(
    ("batch_size", "sample", "queries", "third"),
    [(256, 500, 1000, 85), (256, 60, 1000, 20), (256, 500, 30, 10), (1, 5, 9, 2)],
)
def test_the_check_of_batches_forms_other_batches_however_few_images_there_are(
    batch_size: int, sample: int, queries: int, third: int
) -> None:
    config = EvaluationConfig(protocol="full", batch_size=batch_size, sample=sample)
    checks = dict(plan(config, sizes_of(config), members=1, queries=queries).checks)
    assert checks["other_batch_size"].batch_size == third


@pytest.mark.parametrize("members", [1, 3])
def test_standard_is_apgd_50_with_four_objectives_and_square_on_the_sample(members: int) -> None:
    found = planned("standard", members=members)
    models = members + 1 if members > 1 else 1
    assert counts(found) == {"main": 4 * models, "square": 1}
    assert {(part.attack, part.num_steps, part.restarts, part.keep) for part in found.main} == {("apgd", 50, 1, "best")}
    assert [part.objective for part in found.main[:4]] == list(OBJECTIVES_OF_STANDARD)
    assert all(part.targets == (part.source,) for part in found.main)
    [square] = found.square
    assert (square.attack, square.num_steps, square.objective, square.sampled) == ("square", 1000, COMPARED_ON, True)


def test_full_on_three_members_has_every_group() -> None:
    """Main: 5 objectives × (ensemble, 3 members, all members at once). Curves: 5 × (ε/4, ε/2, ε, 2ε)."""
    found = planned("full", members=3)
    assert counts(found) == {
        "main": 25,
        "square": 1,
        "curves": 20,
        "ladder": 6,
        "norms": 4,
        "transfer": 6,
        "checks": 5,
        "detector": 2,
    }
    assert {(part.attack, part.num_steps, part.restarts) for part in found.main} == {("apgd", 100, 5)}
    assert sources(found.main) == {"ensemble": 5, "member_0": 5, "member_1": 5, "member_2": 5, "members": 5}
    # Every way to attack the ensemble is shown to the ensemble.
    assert all("ensemble" in part.targets for part in found.main)
    assert all(part.targets[0] == part.source for part in found.main if part.source != "members")
    assert [part.objective for part in found.main[:5]] == list(OBJECTIVES_OF_FULL)
    assert [part.label for part in found.ladder] == [
        "random_noise",
        "fgsm",
        "mi_fgsm20",
        "pgd20",
        "apgd100",
        "square5000",
    ]
    assert [part.slopes for part in found.ladder] == [False, False, False, True, False, False]
    assert {(part.norm, part.attack) for part in found.norms} == {
        ("l2", "pgd"),
        ("l2", "apgd"),
        ("l2", "cw"),
        ("l0", "jsma"),
    }
    assert [part.source for part in found.transfer] == [
        f"{kind}_{rank}" for rank in range(3) for kind in ("member", "without")
    ]
    assert {part.targets for part in found.transfer} == {("member_0", "member_1", "member_2", "ensemble")}
    assert [name for name, _ in found.checks] == [
        "zero_epsilon",
        "few_steps",
        "many_steps",
        "other_batch_size",
        "unbounded",
    ]
    assert [part.objective for part in found.detector] == [COMPARED_ON, "undetected"]
    everything = (*found.square, *found.ladder, *found.norms, *found.transfer, *dict(found.checks).values())
    assert all(part.sampled and part.objective == COMPARED_ON for part in everything)
    assert not any(part.sampled for part in (*found.main, *found.curves, *found.detector))


def test_full_on_one_model_leaves_out_what_needs_members() -> None:
    found = planned("full")
    assert counts(found) == {"main": 5, "square": 1, "curves": 20, "ladder": 6, "norms": 4, "checks": 5}
    assert sources(found.parts) == {"ensemble": len(found.parts)}


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("protocol", ["quick", "standard", "full"])
def test_another_model_adds_one_attack_that_is_shown_to_all(protocol: str, members: int) -> None:
    found, without = (planned(protocol, members=members, other=other) for other in (True, False))
    [added] = set(found.parts) - set(without.parts)
    assert set(without.parts) < set(found.parts)
    assert (added.source, added.targets[0]) == ("other", "ensemble")
    assert len(added.targets) == (1 if members == 1 else 4)
    assert added in found.transfer


def test_an_l2_evaluation_has_no_attack_that_is_for_linf_alone() -> None:
    """Square and the check at ε = 0.5 are L∞'s; the L2 attacks of the other norms are at the main radius then."""
    found = planned("full", members=3, norm="l2", epsilon=1.5)
    assert found.square == ()
    assert "unbounded" not in dict(found.checks)
    assert {part.norm for part in found.parts} == {"l2", "l0"}
    assert {part.epsilon for part in found.norms if part.norm == "l2"} == {1.5}
    assert {part.epsilon for part in found.curves} == {0.375, 0.75, 1.5, 3.0}


def test_curves_and_fractions_come_with_any_protocol_that_is_asked_for_them() -> None:
    found = planned("quick", members=3, epsilons=(0.0, 0.05, 0.2), objectives=("proxy", "displacement"))
    assert [(part.objective, part.epsilon) for part in found.curves] == [
        ("proxy", 0.05),
        ("proxy", 0.2),
        ("displacement", 0.05),
        ("displacement", 0.2),
    ]
    assert all(part.label == "pgd20" and part.source == "ensemble" for part in found.curves)
    assert counts(planned("standard", epsilons=(0.0, 0.1)))["curves"] == 4
    assert sizes_of(EvaluationConfig(fractions=(0.25, 1.0))).fractions == (0.25,)
    assert sizes_of(EvaluationConfig()).fractions == ()
    assert sizes_of(EvaluationConfig(protocol="full")).fractions == (0.1, 0.5)


SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "one epsilon in all norms": {"epsilons": (0.1,), "epsilon_l2": 0.1, "epsilon_l0": 0.1},
    "epsilons side by side": {"epsilons": (0.1, 0.100001, 0.2)},
    "as many steps in all": {"apgd_steps": 20, "restarts": 1, "num_steps": 20, "square_queries": 20},
    "a batch of one": {"batch_size": 1},
    "a batch of two": {"batch_size": 2},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("protocol", ["quick", "standard", "full"])
def test_no_two_different_parts_share_a_file(protocol: str, norm: Norm, settings: str) -> None:
    """Or they would take turns in it, and each be measured again at every start."""
    for members, other, epsilon in itertools.product((1, 3), (False, True), (0.1, 0.5)):
        parts = planned(protocol, members=members, other=other, norm=norm, epsilon=epsilon, **SETTINGS[settings]).parts
        assert len({part.file for part in parts}) == len(parts) == len(set(parts))
        assert not any(set(part.file) & set("/\\ :") for part in parts)


def test_no_two_figures_of_a_target_share_a_key() -> None:
    found = planned("full", members=3, other=True)
    for target in ("ensemble", "member_0", "member_1", "member_2"):
        keys = [part.key(target) for part in (*found.main, *found.square) if target in part.targets]
        assert len(keys) == len(set(keys))


def test_keys_name_attack_steps_restarts_objective_and_another_source() -> None:
    part = Part("member_0", ("member_0", "ensemble"), "apgd", "linf", 0.1, 100, "proxy", restarts=5)
    assert part.key("member_0") == "apgd100x5/proxy"
    assert part.key("ensemble") == "apgd100x5/proxy@member_0"
    assert Part("ensemble", ("ensemble",), "fgsm", "linf", 0.1, 1, "proxy").key("ensemble") == "fgsm/proxy"
    assert Part("ensemble", ("ensemble",), "pgd", "linf", 0.1, 20, "proxy").label == "pgd20"
    assert part.file == "member_0-apgd100x5-proxy-linf-0.1"


def test_sizes_are_the_configs_before_the_protocols() -> None:
    """The L2 radius: a quarter of ε·√(C·H·W) = 0.1 · 8 / 4."""
    standard, full = (sizes_of(EvaluationConfig(protocol=protocol)) for protocol in ("standard", "full"))
    assert (standard.apgd_steps, standard.restarts, standard.square_queries, standard.kmeans_seeds) == (50, 1, 1000, 3)
    assert (full.apgd_steps, full.restarts, full.square_queries, full.kmeans_seeds) == (100, 5, 5000, 10)
    assert (standard.epsilons, full.epsilons) == ((), (0.0, 0.025, 0.05, 0.1, 0.2))
    assert full.epsilon_l2 == pytest.approx(0.2)
    own: dict[str, Any] = {"apgd_steps": 7, "restarts": 2, "square_queries": 3, "kmeans_seeds": 4, "epsilon_l2": 0.0}
    for protocol in ("standard", "full"):
        found = sizes_of(EvaluationConfig(protocol=protocol, epsilons=(0.0, 0.3), **own))
        assert {name: getattr(found, name) for name in own} == own
        assert found.epsilons == (0.0, 0.3)


def test_the_usual_radii_are_pixels_and_not_repeated() -> None:
    """2ε is cut at 1 in L∞ and not in L2; at ε = 0 there is nothing to draw a curve of."""
    full = EvaluationConfig(protocol="full")
    assert sizes_of(full, epsilon=0.75).epsilons == (0.0, 0.1875, 0.375, 0.75, 1.0)
    assert sizes_of(full, epsilon=1.0).epsilons == (0.0, 0.25, 0.5, 1.0)
    assert sizes_of(full, norm="l2", epsilon=3.0).epsilons[-1] == 6.0
    assert sizes_of(full, epsilon=0.0).epsilons == (0.0,)


def test_draws_reach_every_part() -> None:
    assert {part.draws for part in planned("full", members=3, eot_draws=20).parts} == {20}


def test_the_other_batch_size_is_another_one() -> None:
    """A third; a batch of one has no smaller one, and is compared with batches of two."""
    for batch_size, expected in ((256, 85), (3, 1), (2, 1), (1, 2)):
        part = dict(planned("full", batch_size=batch_size).checks)["other_batch_size"]
        assert part.batch_size == expected


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_attack_of_a_plan_exists_and_is_defined_for_its_norm(norm: Norm) -> None:
    for part in planned("full", members=3, norm=norm, other=True).parts:
        assert attack_of(part).ball.norm == part.norm
        assert part.objective in (*OBJECTIVES, "undetected")
        assert math.isfinite(attack_of(part).passes)
