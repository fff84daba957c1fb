"""The sanity checks: each one's boundary on hand-made parts, and models that are broken on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from eat_dist.config import EvaluationConfig
from eat_dist.console import Console
from eat_dist.data.images import LabelledImages
from eat_dist.evaluation.plan import Part, Plan, plan
from eat_dist.evaluation.sanity import sanity_checks
from eat_dist.evaluation.sizes import Sizes
from evaluation_cases import measure, undefended, unseen

# Large enough that the attacks mean something, without what takes long.
CONFIG = EvaluationConfig(
    protocol="full",
    epsilons=(0.0, 0.2),
    fractions=(1.0,),
    apgd_steps=30,
    restarts=1,
    square_queries=200,
    sample=40,
    ers_images=3,
    kmeans_seeds=1,
    batch_size=60,
)

# By hand: 100 queries of ten classes, the first 50 in the sample, all retrieved clean; APGD gains 1 over noise.
VALUES = {"random_noise": 0.0, "fgsm": 0.5, "mi_fgsm": 0.7, "pgd": 0.9, "apgd": 1.0, "square": 0.6}


def hand_made(members: int = 2) -> tuple[Plan, dict[str, dict[str, Any]], dict[Part, dict[str, Any]]]:
    """The plan of a full evaluation, clean parts and measured parts that pass every check."""
    sizes = Sizes.of(CONFIG, norm="linf", epsilon=0.1, numbers_of_an_image=64)
    todo = plan(CONFIG, sizes, members=members, queries=1000)
    clean = {"ensemble": {"retrieved": "1" * 100, "figures": {"r_at_1": 1.0, "nmi": 0.8}}}
    return todo, clean, {part: sound(part) for part in todo.parts}


def sound(part: Part) -> dict[str, Any]:
    figures: dict[str, Any] = {"largest_perturbation": part.epsilon, "mean_displacement": part.epsilon}
    figures |= {"success_rate": 1.0 if part.epsilon else 0.0, "nmi": 0.1}
    lost = part.epsilon > 0
    bits = ("0" if lost else "1") * 50 + ("-" if part.sampled else "0" if lost else "1") * 50
    targets = {target: {"figures": dict(figures), "retrieved": bits} for target in part.targets}
    value = VALUES.get(part.attack, 0.0)
    if part.attack == "pgd":
        value = {5: 0.8, 100: 0.95}.get(part.num_steps, value)
    return {"targets": targets, "mean_value": value, "finite_slopes": 1.0}


def bits(lost: int, *, alive: int = 50) -> str:
    """Of the sample; the others are not attacked."""
    return "0" * lost + "1" * (alive - lost) + "-" * 50


Change = Callable[[Plan, dict[str, dict[str, Any]], dict[Part, dict[str, Any]]], object]


def in_check(name: str, **changes: Any) -> Change:
    return lambda todo, _, measured: alter(measured[dict(todo.checks)[name]], **changes)


def in_ladder(attack: str, **changes: Any) -> Change:
    def change(todo: Plan, _: object, measured: dict[Part, dict[str, Any]]) -> None:
        for part in todo.ladder:
            if part.attack == attack:
                alter(measured[part], **changes)

    return change


def alter(found: dict[str, Any], **changes: Any) -> None:
    for name, value in changes.items():
        if name in ("mean_value", "finite_slopes"):
            found[name] = value
        for target in found["targets"].values():
            if name == "retrieved":
                target["retrieved"] = value
            elif name not in found:
                target["figures"][name] = value


def all_values(value: float) -> Change:
    def change(todo: Plan, _: object, measured: dict[Part, dict[str, Any]]) -> None:
        for part in measured.values():
            part["mean_value"] = value

    return change


def white_box_loses(lost: int) -> Change:
    """All attacks by gradient break the first ``lost`` queries, and Square three."""

    def change(todo: Plan, _: object, measured: dict[Part, dict[str, Any]]) -> None:
        for part in (*todo.main, *todo.ladder):
            alter(measured[part], retrieved=bits(3) if part.attack == "square" else bits(lost))

    return change


def transfer_success(source: str, on_member_0: float, own: float = 0.5) -> Change:
    def change(todo: Plan, _: object, measured: dict[Part, dict[str, Any]]) -> None:
        for part in todo.transfer:
            figures = measured[part]["targets"]["member_0"]["figures"]
            figures["success_rate"] = {"member_0": own, source: on_member_0}.get(part.source, 0.0)

    return change


def transfer_to_the_ensemble(success: float, own: float = 0.5) -> Change:
    """From one member, beside what the attack on the ensemble itself achieves."""

    def change(todo: Plan, _: object, measured: dict[Part, dict[str, Any]]) -> None:
        for part in todo.transfer:
            figures = measured[part]["targets"]["ensemble"]["figures"]
            figures["success_rate"] = success if part.source == "member_1" else 0.0
        for part in todo.ladder:
            measured[part]["targets"]["ensemble"]["figures"]["success_rate"] = own

    return change


def clean_recall(value: float) -> Change:
    return lambda _, clean, __: clean["ensemble"]["figures"].update(r_at_1=value)


def main_nmi(value: float) -> Change:
    def change(todo: Plan, _: object, measured: dict[Part, dict[str, Any]]) -> None:
        for part in todo.main:
            alter(measured[part], nmi=value)

    return change


BOUNDARIES: list[tuple[str, Change, bool]] = [
    ("zero_epsilon", in_check("zero_epsilon", mean_displacement=1e-3), True),
    ("zero_epsilon", in_check("zero_epsilon", mean_displacement=1.1e-3), False),
    ("zero_epsilon", in_check("zero_epsilon", largest_perturbation=1e-9), False),
    ("zero_epsilon", in_check("zero_epsilon", retrieved=bits(1)), False),
    ("gradients", in_ladder("pgd", finite_slopes=0.991), True),
    ("gradients", in_ladder("pgd", finite_slopes=0.99), False),
    ("rising_strength", in_ladder("fgsm", mean_value=0.919), True),
    ("rising_strength", in_ladder("fgsm", mean_value=0.921), False),
    ("rising_strength", in_ladder("pgd", mean_value=1.019), True),
    ("rising_strength", in_ladder("pgd", mean_value=1.021), False),
    ("rising_strength", all_values(0.3), False),
    ("more_steps", in_check("few_steps", mean_value=0.919), True),
    ("more_steps", in_check("few_steps", mean_value=0.921), False),
    ("more_steps", in_check("many_steps", mean_value=0.881), True),
    ("more_steps", in_check("many_steps", mean_value=0.879), False),
    ("unbounded", in_check("unbounded", success_rate=0.95), True),
    ("unbounded", in_check("unbounded", success_rate=0.94), False),
    ("unbounded", in_check("unbounded", success_rate=None), False),
    ("black_box", white_box_loses(2), True),
    ("black_box", white_box_loses(1), False),
    ("transfer", transfer_success("without_0", 0.51), True),
    ("transfer", transfer_success("without_0", 0.53), False),
    ("transfer", transfer_success("member_1", 1.0), True),
    ("transfer", transfer_to_the_ensemble(0.51), True),
    ("transfer", transfer_to_the_ensemble(0.53), False),
    ("batch_size", in_check("other_batch_size", retrieved=bits(49)), True),
    ("batch_size", in_check("other_batch_size", retrieved=bits(48)), False),
    ("better_than_chance", clean_recall(0.1), True),
    ("better_than_chance", clean_recall(100 * 9 / (100 * 99)), False),
    ("clusters_not_written", main_nmi(0.8199), True),
    ("clusters_not_written", main_nmi(0.8201), False),
]


def ten_classes() -> LabelledImages:
    labels = torch.arange(100) // 10
    return LabelledImages(
        torch.zeros(100, 1, 1, 1, dtype=torch.uint8), labels, tuple("abcdefghij"), tuple(map(str, range(100)))
    )


def verdicts(change: Change = lambda *_: None, **settings: Any) -> dict[str, bool]:
    todo, clean, measured = hand_made()
    change(todo, clean, measured)
    found = sanity_checks(todo, clean, measured, ten_classes(), **({"randomised": False} | settings))
    return {check["name"]: check["passed"] for check in found}


def test_sound_parts_pass_every_check() -> None:
    assert len(verdicts()) == 11
    assert all(verdicts().values())


@pytest.mark.parametrize("case", range(len(BOUNDARIES)), ids=lambda case: f"{BOUNDARIES[case][0]}-{case}")
def test_each_check_fails_just_beyond_its_threshold_and_no_other_with_it(case: int) -> None:
    name, change, passes = BOUNDARIES[case]
    found = verdicts(change)
    assert found[name] is passes
    touched = {"rising_strength", "more_steps"} if name in ("rising_strength", "more_steps") else {name}
    if name == "black_box":
        touched.add("batch_size")  # the ladder's PGD is one side of it
    assert all(passed for other, passed in found.items() if other not in touched)


@pytest.mark.parametrize(("randomised", "draws", "passes"), [(False, 1, True), (True, 19, False), (True, 20, True)])
def test_a_randomised_model_needs_20_draws(randomised: bool, draws: int, passes: bool) -> None:
    todo, clean, measured = hand_made()
    todo = replace(todo, main=tuple(replace(part, draws=draws) for part in todo.main))
    measured |= {part: sound(part) for part in todo.main}
    found = sanity_checks(todo, clean, measured, ten_classes(), randomised=randomised)
    assert {check["name"]: check["passed"] for check in found}["randomness"] is passes


def test_a_randomised_model_may_answer_the_same_image_otherwise() -> None:
    """Of radius 0 the images alone must be the same; of a model that draws nothing the answers, too."""
    moved = in_check("zero_epsilon", mean_displacement=0.4, retrieved=bits(12))
    changed = in_check("zero_epsilon", largest_perturbation=1e-9)
    assert [verdicts(moved, randomised=flag)["zero_epsilon"] for flag in (False, True)] == [False, True]
    assert not verdicts(changed, randomised=True)["zero_epsilon"]


class Masked(nn.Module):
    """A defence by gradient masking: pixels are rounded to eight values before a network without any defence."""

    def __init__(self) -> None:
        super().__init__()
        [self.inner] = undefended(1).members

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.inner((images * 7).round() / 7)
        return embeddings


class Collapsed(nn.Module):
    """Every image at the same place."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 0 * images.flatten(1)[:, :2] + torch.tensor([1.0, 0.0])


class ByBatch(nn.Module):
    """The pixels as they are; in a batch of fewer than 30 images, those of each image in another order."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1) - 0.3
        return functional.normalize(pixels if len(images) >= 30 else pixels.flip(1), dim=1)


@functools.cache
def evaluated(build: Callable[[], nn.Module], folder: Path) -> dict[str, Any]:
    about = {"command": "", "target": {"kind": "module", "name": "mine"}, "dataset": "digits", "defense": None}
    return measure(build(), unseen(12), folder, config=CONFIG, about=about)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("models")
    return lambda name: base / name


def failed(results: dict[str, Any]) -> set[str]:
    return {check["name"] for check in results["sanity"] if not check["passed"]}


def test_a_model_that_masks_its_gradients_fails_and_is_not_to_be_quoted(
    folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its gradient is zero everywhere, so attacks by gradient end where they start; Square sees through it."""
    results = evaluated(Masked, folders("masked"))
    checks = {check["name"]: check for check in results["sanity"]}
    assert failed(results) >= {"gradients", "rising_strength", "black_box", "unbounded"}
    assert "0.0% of the images" in checks["gradients"]["measured"]
    Console().evaluation(results)
    printed = capsys.readouterr().out
    assert f"{len(failed(results))} of {len(checks)} sanity checks failed" in printed
    assert "the attacked figures are not to be quoted" in printed
    for name, check in checks.items():
        sign = "FAILED" if name in failed(results) else "passed"
        assert f"sanity check {sign}: {check['claim']}" in printed


def test_the_same_network_without_the_mask_passes_every_check(
    folders: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The mask hides the network's weakness and mends nothing: without it, hardly a query survives."""
    naked = evaluated(lambda: undefended(1).members[0], folders("naked"))
    assert failed(naked) == set()
    Console().evaluation(naked)
    assert f"All {len(naked['sanity'])} sanity checks passed." in capsys.readouterr().out
    masked = evaluated(Masked, folders("masked"))["ensemble"]
    white_box = "apgd30/nearest_negative"
    assert masked["clean"]["r_at_1"] > 0.6
    assert masked["attacked"][white_box]["r_at_1"] > naked["ensemble"]["attacked"][white_box]["r_at_1"] + 0.4


def test_a_collapsed_model_fails_better_than_chance_and_gives_figures_without_nan(
    folders: Callable[[str], Path],
) -> None:
    """Ties count against a query, so nothing is retrieved, and there is no success rate to speak of."""
    results = evaluated(Collapsed, folders("collapsed"))
    assert failed(results) >= {"better_than_chance", "gradients", "unbounded", "rising_strength"}
    assert results["ensemble"]["clean"]["r_at_1"] == 0
    assert {row["success_rate"] for row in results["ladder"]} == {None}
    assert (folders("collapsed") / "summary.json").exists()


def test_a_model_that_depends_on_its_batch_fails_batch_size(folders: Callable[[str], Path]) -> None:
    """The sample of 40 in one batch, and in two of 20."""
    assert "batch_size" in failed(evaluated(ByBatch, folders("by batch")))
