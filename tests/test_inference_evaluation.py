"""Ensembles behind a defense at inference, under attack: adaptively, and beside that without knowing of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from eat_dist.attacks import WhiteBox
from eat_dist.config import EvaluationConfig, InferenceConfig
from eat_dist.console import Console
from eat_dist.evaluation import Victim
from eat_dist.evaluation.crafting import Embed
from eat_dist.evaluation.plan import Part, Plan, plan
from eat_dist.evaluation.sanity import defense_checks
from eat_dist.evaluation.sizes import Sizes
from eat_dist.inference import defenses_of
from eat_dist.models import defend, undefended
from eat_dist.models.ensemble import EmbeddingEnsemble
from evaluation_cases import FULL, content, crafted, images_of, measure, quick_part, unseen, victim_of
from evaluation_cases import undefended as trained

OBJECTIVE = "nearest_wrong_centroid"
CONFIG = EvaluationConfig(num_steps=10, objectives=(OBJECTIVE,), kmeans_seeds=1, members=False, eot_draws=5)
IMAGES = 16
# Milder than the papers' where those leave nothing of 8×8 pixels.
DEFENSES: dict[str, dict[str, Any]] = {
    "randomisation": {"name": "randomisation"},
    "mixup_inference": {"name": "mixup_inference", "draws": 5, "pool": 20},
    "bart": {"name": "bart", "groups": 3},
    "crop_rescale": {"name": "input_transform", "transforms": ("crop_rescale",), "crop": 0.8},
    "bit_depth": {"name": "input_transform", "transforms": ("bit_depth",), "bits": 2},
    "jpeg": {"name": "input_transform", "transforms": ("jpeg",)},
    "total_variation": {"name": "input_transform", "drop": 0.3},
}


def defended(case: str, members: int = 2) -> EmbeddingEnsemble:
    """An ensemble of digits trained without a defense, behind one."""
    pool = (unseen(30).images[-20:]).clone()
    ensemble = defend(trained(members), InferenceConfig(**DEFENSES[case]), pool=pool)
    assert isinstance(ensemble, EmbeddingEnsemble)
    return ensemble


@functools.cache
def measured(case: str, folder: Path) -> dict[str, Any]:
    return measure(defended(case), unseen(IMAGES), folder, config=CONFIG)


@pytest.mark.parametrize("case", DEFENSES)
def test_a_defense_around_an_undefended_network_is_broken_by_who_knows_it(case: str, tmp_path: Path) -> None:
    """Adaptively R@1 falls far below clean, and success is not below that of images crafted without the defense."""
    results = measured(case, tmp_path)
    clean, [row] = results["ensemble"]["clean"], results["inference"]["attacks"]
    assert clean["r_at_1"] > 0.4
    assert row["adaptive"]["r_at_1"] < 0.5 * clean["r_at_1"]
    assert row["adaptive"]["success_rate"] >= row["non_adaptive"]["success_rate"] - 0.02
    assert {check["name"]: check["passed"] for check in results["sanity"]}["adaptive"]


def test_the_gradient_goes_around_what_has_none_and_the_mean_is_climbed() -> None:
    """Two bits have no slope at all, so what breaks them is BPDA; a reading averages the draws asked for."""
    model = defended("bit_depth", 1)
    victim = victim_of(model, unseen(IMAGES))
    surface = victim.surface("ensemble", OBJECTIVE, torch.arange(4), draws=3)
    assert isinstance(surface, WhiteBox)
    assert surface.draws == 3
    with surface.held():
        slopes = surface.read(victim.images(torch.arange(4))).gradient.flatten(1).norm(dim=1)
    assert float(slopes.min()) > 0


def test_a_non_adaptive_figure_stands_beside_the_adaptive_one_and_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = measured("randomisation", tmp_path)
    about = results["inference"]
    assert about["name"] == "randomisation"
    assert about["options"] == {"training": False, "draws": 1, "growth": pytest.approx(31 / 28)}
    assert about["eot_draws"] == 5
    [row] = about["attacks"]
    assert (row["attack"], row["objective"]) == ("pgd10", OBJECTIVE)
    assert row["adaptive"] == results["ensemble"]["attacked"][f"pgd10/{OBJECTIVE}"]
    assert row["non_adaptive"] != row["adaptive"]
    assert list(results["ensemble"]["attacked"]) == [f"pgd10/{OBJECTIVE}"]
    table = pq.read_table(tmp_path / "results.parquet").to_pylist()
    draws = {entry["source"]: entry["draws"] for entry in table}
    assert draws == {"": 0, "ensemble": 5, "undefended": 1}

    Console().evaluation(results | {"target": {"kind": "run", "name": "a"}, "dataset": "digits", "defense": "natural"})
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "behind the defense at inference 'randomisation', in %; adaptive: through it (BPDA, 5 draws a step)" in printed
    )
    assert "natural behind randomisation on digits" in printed
    assert f"pgd10/{OBJECTIVE} │ adaptive │" in printed
    assert printed.count("│ non-adaptive │") == 1
    assert "sanity check passed: an attacker who knows the defense at inference" in printed


def test_by_default_a_randomised_defense_is_averaged_over_twenty_draws_and_no_other(tmp_path: Path) -> None:
    images, sizes = {"norm": "linf", "epsilon": 0.1, "numbers_of_an_image": 64}, EvaluationConfig()
    assert Sizes.of(sizes, **images).draws == 1  # type: ignore[arg-type]
    assert Sizes.of(sizes, **images, randomised=True).draws == 20  # type: ignore[arg-type]
    fewer = sizes.model_copy(update={"eot_draws": 5})
    assert Sizes.of(fewer, **images, randomised=True).draws == 5  # type: ignore[arg-type]
    results = measure(
        defended("bit_depth", 1), unseen(IMAGES), tmp_path, config=CONFIG.model_copy(update={"eot_draws": None})
    )
    assert results["inference"]["eot_draws"] == 1
    assert [(check["name"], check["passed"]) for check in results["sanity"]] == [
        ("randomness", True),
        ("adaptive", True),
    ]


def test_too_few_draws_and_an_attack_that_gains_by_ignorance_fail(tmp_path: Path) -> None:
    results = measured("randomisation", tmp_path)
    assert [check["name"] for check in results["sanity"] if not check["passed"]] == ["randomness"]  # 5 of 20
    todo, parts = hand_made(adaptive=[0.4, 0.7], ignorant=[0.71, 0.2])
    [verdict] = defense_checks(todo, parts, randomised=True, averaged=False)
    assert verdict["passed"]
    todo, parts = hand_made(adaptive=[0.4, 0.7], ignorant=[0.73, 0.2])
    [verdict] = defense_checks(todo, parts, randomised=True, averaged=False)
    assert not verdict["passed"]
    assert verdict["measured"].startswith("strongest success 70.0% adaptive (nearest_wrong_centroid), 73.0% crafted on")
    todo, parts = hand_made(adaptive=[None, None], ignorant=[None, None])
    assert defense_checks(todo, parts, randomised=True, averaged=False)[0]["passed"]


def hand_made(
    *, adaptive: Sequence[float | None], ignorant: Sequence[float | None]
) -> tuple[Plan, dict[Part, dict[str, Any]]]:
    config = EvaluationConfig(objectives=("displacement", OBJECTIVE))
    sizes = Sizes.of(config, norm="linf", epsilon=0.1, numbers_of_an_image=64)
    todo = plan(config, sizes, members=3, queries=1000, defended=True)
    found = {}
    for (knowing, unknowing), one, other in zip(todo.pairs, adaptive, ignorant, strict=True):
        for part, success in ((knowing, one), (unknowing, other)):
            found[part] = {"targets": {"ensemble": {"figures": {"success_rate": success}}}}
    return todo, found


def test_the_plan_has_a_counterpart_for_each_main_attack_on_the_ensemble_alone() -> None:
    config = EvaluationConfig(protocol="standard", eot_draws=20)
    sizes = Sizes.of(config, norm="linf", epsilon=0.1, numbers_of_an_image=64)
    bare, behind = (plan(config, sizes, members=3, queries=1000, defended=flag) for flag in (False, True))
    assert (bare.non_adaptive, bare.pairs) == ((), ())
    assert replace(behind, non_adaptive=()) == bare
    assert len(behind.pairs) == 4
    for adaptive, ignorant in behind.pairs:
        assert (adaptive.source, adaptive.draws) == ("ensemble", 20)
        assert ignorant == replace(adaptive, source="undefended", targets=("ensemble",), draws=1)
        assert ignorant.file not in {part.file for part in bare.parts}


def test_one_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    one = measure(defended("bart"), unseen(4), tmp_path / "one", config=CONFIG)
    again = measure(defended("bart"), unseen(4), tmp_path / "again", config=CONFIG)
    assert one == again
    assert content(tmp_path / "one") == content(tmp_path / "again")
    other = measure(defended("bart"), unseen(4), tmp_path / "other", config=CONFIG, seed=1)
    assert other["ensemble"] != one["ensemble"]


def test_neither_the_batch_nor_the_others_in_it_matter() -> None:
    """Images and embeddings of attacked digits in batches of forty and of seven, each with draws of its own."""
    victim = victim_of(defended("randomisation"), unseen(IMAGES))
    part = quick_part(OBJECTIVE, num_steps=3, draws=3)
    one, other = (crafted(victim, part, batch_size=size) for size in (40, 7))
    torch.testing.assert_close(images_of(one), images_of(other), rtol=0, atol=1e-4)
    few = Embed()(victim, torch.tensor([5, 2]))
    torch.testing.assert_close(few["ensemble"], victim.clean["ensemble"][[5, 2]], rtol=0, atol=1e-5)


def test_restarts_are_judged_by_draws_that_nothing_is_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an attack is chosen by the luck of its own measurement: BaRT's R@1 fell from 0.42 to 0.28 by that."""
    victim = victim_of(defended("bart"), unseen(IMAGES))
    drawn: list[tuple[int | str, ...]] = []
    drawing = victim.drawing

    def recorded(indices: torch.Tensor, *purpose: int | str) -> Any:
        drawn.append(purpose)
        return drawing(indices, *purpose)

    monkeypatch.setattr(victim, "drawing", recorded)
    crafted(victim, quick_part(OBJECTIVE, num_steps=1, draws=2, restarts=3))
    judged = [purpose for purpose in drawn if purpose[0] == "judged"]
    assert judged == [("judged", OBJECTIVE, 1), ("judged", OBJECTIVE, 2)]
    assert drawn.count(("measured",)) == 1
    assert drawn[-1] == ("measured",)


def test_who_does_not_know_of_the_defense_asks_the_undefended_ensemble_which_restart_to_keep() -> None:
    victim = victim_of(defended("bart"), unseen(IMAGES))
    part = quick_part(OBJECTIVE, num_steps=2, epsilon=0.05, source="undefended", restarts=3)
    shown_to_the_defended = crafted(victim, replace(part, targets=("ensemble",)))
    shown_to_the_undefended = crafted(victim, replace(part, targets=("undefended",)))
    assert torch.equal(images_of(shown_to_the_defended), images_of(shown_to_the_undefended))
    assert not torch.equal(images_of(crafted(victim, replace(part, restarts=1))), images_of(shown_to_the_defended))


def test_the_worst_of_a_randomised_defense_is_its_strongest_attack_not_the_number_of_attacks() -> None:
    """Three attacks that each leave two of four queries, others each time; the third did not attack the last one."""
    from eat_dist.evaluation.results import _surviving

    bits = ["1110", "1100", "0110", "101-"]
    assert _surviving(bits, randomised=False) == 0
    assert _surviving(bits, randomised=True) == 0.5
    assert _surviving(["1000", "1100"], randomised=True) == 0.25


def test_an_evaluation_leaves_the_global_generators_and_the_model_as_they_were(tmp_path: Path) -> None:
    model, before = defended("randomisation", 1), torch.get_rng_state()
    state = copy.deepcopy(model.state_dict())
    measure(model, unseen(4), tmp_path, config=CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(defense.generators is None for defense in defenses_of([model]))


def test_another_strength_of_the_same_defense_is_measured_again(tmp_path: Path) -> None:
    digests = set()
    for bits in (1, 2):
        config = InferenceConfig(name="input_transform", transforms=("bit_depth",), bits=bits)
        victim = Victim.of(defend(trained(1), config), unseen(4), seed=0, device="cpu")
        digests |= {victim.digest("ensemble"), victim.digest("undefended")}
    assert len(digests) == 3  # the undefended networks are the same


def test_members_are_defended_each_by_itself_and_undefended_is_the_way_back() -> None:
    ensemble = trained(2)
    behind = defend(ensemble, InferenceConfig(name="randomisation"))
    assert isinstance(behind, EmbeddingEnsemble)
    assert [defense.model for defense in defenses_of([behind])] == list(ensemble.members)
    back = undefended(behind)
    assert isinstance(back, EmbeddingEnsemble)
    assert list(back.members) == list(ensemble.members)
    assert defend(ensemble, InferenceConfig()) is undefended(ensemble) is ensemble
    alone = ensemble.members[0]
    assert undefended(defend(alone, InferenceConfig(name="bart"))) is alone


def test_the_full_protocol_runs_behind_a_randomised_defense(tmp_path: Path) -> None:
    """Its checks on single images hold although the model draws: what is drawn belongs to the image."""
    config = FULL.model_copy(
        update={"eot_draws": 2, "apgd_steps": 3, "restarts": 2, "square_queries": 5, "sample": 10, "ers_images": 2}
    )
    config = config.model_copy(update={"epsilons": (0.0, 0.2), "batch_size": 15})
    results = measure(defended("randomisation", 1), unseen(4), tmp_path, config=config)
    passed = {check["name"]: check["passed"] for check in results["sanity"]}
    assert passed["zero_epsilon"]
    assert passed["batch_size"]
    assert passed["gradients"]
    assert not passed["randomness"]  # two draws of twenty
    assert list(passed)[-1] == "adaptive"
    assert len(results["inference"]["attacks"]) == 5
    assert results["ers"] is not None
