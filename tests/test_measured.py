"""What figures were measured with: when two may be compared, by whoever compares them."""

from __future__ import annotations

from typing import Any

import pytest

from eat_dist.evaluation.measured import measurement, unlike
from eat_dist.report.groups import disagreements
from eat_dist.report.page import make_page
from eat_dist.runs.summary import flat_figures, measured_with
from evaluation_folders import BARE, run_of

ABOUT: dict[str, Any] = {
    "protocol": "quick",
    "norm": "linf",
    "num_steps": 20,
    "images": 9,
    "classes": 3,
    "epsilon": 0.1,
}
ABOUT |= {"epsilons": [], "sample": None, "transfer_from": False, "kmeans_seeds": 5, "images_sha256": "a", "seed": 3}


def test_what_was_measured_with_is_empty_where_nothing_was() -> None:
    assert measured_with({"name": "a"}) == {}


def test_networks_of_different_size_are_measured_alike() -> None:
    """An ensemble is attacked through its members, too, which a single network has not."""
    three = measurement(ABOUT, ["apgd100x5/proxy", "apgd100x5/proxy@members", "apgd100x5/proxy@member_0"], seed=3)
    assert unlike([three, measurement(ABOUT, ["apgd100x5/proxy"], seed=3)]) == []
    assert unlike([three, measurement(ABOUT, ["apgd100x5/nearest_negative"], seed=3)]) == ["attacks"]


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("epsilons", [0.05], "epsilons"),
        ("sample", 500, "sample"),
        ("transfer_from", True, "transfer_from"),
        ("kmeans_seeds", 7, "kmeans_seeds"),
        ("images_sha256", "b", "test images"),
        ("epsilon", 0.2, "ε"),
        ("num_steps", 50, "steps"),
    ],
)
def test_figures_that_other_settings_gave_are_measured_unlike(name: str, value: object, word: str) -> None:
    """Curves below ε, a transferred attack and the size of the sample count in ``worst``, and in no other entry."""
    assert unlike([measurement(ABOUT, [], seed=3), measurement(ABOUT | {name: value}, [], seed=3)]) == [word]


def test_runs_of_several_seeds_are_measured_alike_if_each_by_its_own() -> None:
    own = [measurement(ABOUT | {"seed": seed}, [], seed=seed) for seed in (0, 1)]
    other = measurement(ABOUT | {"seed": 99}, [], seed=0)
    foreign = measurement(ABOUT | {"seed": 7}, [], seed=None)
    assert unlike(own) == []
    assert unlike([*own, other]) == ["seed"]
    assert unlike([*own, foreign]) == []


def test_what_an_older_measurement_does_not_say_is_no_difference() -> None:
    older = {name: value for name, value in ABOUT.items() if name not in ("images_sha256", "seed")}
    assert unlike([measurement(ABOUT, [], seed=3), measurement(older, [], seed=3)]) == []


def test_the_page_of_runs_marks_no_best_where_the_comparison_marks_none() -> None:
    alike = [run_of("a", **BARE, kmeans_seeds=3), run_of("b", **BARE, kmeans_seeds=3, strength=0.5)]
    assert disagreements(alike) == []
    runs = [alike[0], run_of("b", **BARE, kmeans_seeds=10, strength=0.5)]
    assert disagreements(runs) == ["kmeans_seeds"]
    assert "differ in kmeans_seeds" in " ".join(make_page(runs).warnings)


def test_an_attacks_lowest_figure_is_that_with_one_image_spared_where_it_is_lower() -> None:
    """Of few classes an attack on every image writes labels into NMI, so clustering counts as ``worst`` has it."""
    attacked = {
        "pgd20/displacement": {"nmi": 0.3, "nmi_spared": 0.2, "nmi_std_spared": 0.01},
        "pgd20/proxy": {"nmi": 0.25},
    }
    assert flat_figures({"attacked": attacked})["attacked/pgd20/nmi"] == 0.2
