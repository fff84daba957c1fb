"""The protocols standard and full on a small undefended ensemble: what is there, and what the figures must obey."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eat_dist.config import EvaluationConfig
from eat_dist.evaluation.crafting import Craft
from eat_dist.evaluation.figures import clustering_figures
from eat_dist.evaluation.plan import OBJECTIVES_OF_FULL, OBJECTIVES_OF_STANDARD
from eat_dist.seeding import generator
from eat_dist.storage import Folder
from evaluation_cases import (
    CLUSTERING,
    FULL,
    content,
    crafted,
    full_evaluation,
    images_of,
    measure,
    quick_part,
    rewritten,
    stamps,
    undefended,
    unseen,
    untrained,
    victim_of,
)

CHECKS = [
    "zero_epsilon",
    "gradients",
    "rising_strength",
    "more_steps",
    "unbounded",
    "black_box",
    "transfer",
    "batch_size",
    "better_than_chance",
    "clusters_not_written",
    "randomness",
]


def refuse(constant: str) -> float:
    raise AssertionError(constant)


def parts_of(folder: Path) -> dict[str, Any]:
    """By file name; JSON has no NaN."""
    files = sorted((folder / "parts").iterdir())
    return {path.stem: json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse) for path in files}


def attacked_parts(folder: Path) -> list[dict[str, Any]]:
    return [part for part in parts_of(folder).values() if "targets" in part]


def test_every_group_of_the_full_protocol_is_there() -> None:
    """Five objectives; radii 0, 0.1 and 0.2; two members, so four sources and three targets."""
    results = full_evaluation().results
    main = {f"apgd8x2/{objective}" for objective in OBJECTIVES_OF_FULL}
    through = {f"{key}@{source}" for key in main for source in ("member_0", "member_1", "members")}
    assert set(results["ensemble"]["attacked"]) == main | through | {"square20/nearest_negative"}
    assert [set(member["attacked"]) for member in results["members"]] == [main, main]
    assert [(row["objective"], row["epsilon"]) for row in results["curves"]] == list(
        itertools.product(OBJECTIVES_OF_FULL, (0.0, 0.1, 0.2))
    )
    assert {row["attack"] for row in results["curves"]} == {"clean", "pgd20"}
    assert [(row["objective"], row["fraction"]) for row in results["fractions_table"]] == list(
        itertools.product(OBJECTIVES_OF_FULL, (0.1, 0.5, 1.0))
    )
    ladder = ["random_noise", "fgsm", "mi_fgsm20", "pgd20", "apgd8", "square20"]
    assert [row["attack"] for row in results["ladder"]] == ladder
    assert [(row["norm"], row["attack"]) for row in results["norms"]] == [
        ("l2", "pgd20"),
        ("l2", "apgd8"),
        ("l2", "cw100"),
        ("l0", "jsma20"),
    ]
    assert results["transfer"]["sources"] == ["member_0", "without_0", "member_1", "without_1"]
    assert results["transfer"]["targets"] == ["member_0", "member_1", "ensemble"]
    assert [len(row) for row in results["transfer"]["success_rate"]] == [3] * 4
    assert results["ers"]["images"] == 5
    assert results["detector"]["unaware"]["success_rate"] >= results["detector"]["aware"]["success_rate"]
    assert [check["name"] for check in results["sanity"]] == CHECKS
    assert {row["images"] for row in (*results["ladder"], *results["norms"], results["transfer"])} == {20}


def test_with_two_members_leaving_one_out_is_the_other_one() -> None:
    """The ensemble without member 0 is member 1 alone, and the transfer matrix must say so."""
    rows = dict(zip(*(full_evaluation().results["transfer"][key] for key in ("sources", "success_rate")), strict=True))
    assert rows["without_0"] == rows["member_1"]
    assert rows["without_1"] == rows["member_0"]


def test_no_file_holds_nan_and_the_summary_is_what_was_returned() -> None:
    full = full_evaluation()
    assert len(parts_of(full.folder)) > 50
    written = json.loads((full.folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert written == {name: value for name, value in full.results.items() if name != "parts"}


def test_the_table_holds_every_figure_of_every_part() -> None:
    """Compared with the files of the parts, not with what the table was made from."""
    full = full_evaluation()
    expected: Counter[tuple[Any, ...]] = Counter()
    for name in ("ensemble", "member_0", "member_1"):
        clean = parts_of(full.folder)[f"{name}-clean"]["figures"]
        expected.update(
            (f"{name}-clean", name, "", "none", "linf", 0.0, 0, 0, 0, "", 60, *item) for item in clean.items()
        )
    for part in attacked_parts(full.folder):
        said = part["fingerprint"]
        about = [said[key] for key in ("source", "attack", "norm", "epsilon", "num_steps", "restarts", "draws")]
        for target, found in part["targets"].items():
            figures = found["figures"] | {key: part[key] for key in ("mean_value", "median_distance")}
            where = (said["part"], target, *about, said["objective"], said["attacked"])
            rows = ((*where, *item) for item in figures.items())
            expected.update(rows)
    table = pq.read_table(full.folder / "results.parquet")
    assert Counter(tuple(row.values()) for row in table.to_pylist()) == expected


def test_the_worst_case_is_a_query_that_nothing_within_the_radius_breaks() -> None:
    """From the bits of all parts at L∞ and ε ≤ 0.2, the curves and the black box among them; "-" breaks nothing."""
    full = full_evaluation()
    parts = parts_of(full.folder)
    for name, entry in zip(
        ("ensemble", "member_0", "member_1"), (full.results["ensemble"], *full.results["members"]), strict=True
    ):
        survived = [bit == "1" for bit in parts[f"{name}-clean"]["retrieved"]]
        for part in attacked_parts(full.folder):
            said = part["fingerprint"]
            if name in part["targets"] and said["norm"] == "linf" and 0 < said["epsilon"] <= 0.2:
                bits = part["targets"][name]["retrieved"]
                survived = [alive and bit != "0" for alive, bit in zip(survived, bits, strict=True)]
        assert entry["worst"]["r_at_1"] == sum(survived) / 60
        attacked = [figures for key, figures in entry["attacked"].items() if "square" not in key]
        assert entry["worst"]["r_at_1"] <= min(figures["r_at_1"] for figures in attacked)
        for figure in CLUSTERING:
            assert entry["worst"][figure] <= min(figures[figure] for figures in attacked)


def test_the_full_protocol_breaks_an_undefended_ensemble() -> None:
    ensemble = full_evaluation().results["ensemble"]
    assert ensemble["clean"]["r_at_1"] > 0.8
    assert ensemble["worst"]["r_at_1"] <= 0.02
    assert ensemble["worst"]["nmi"] < ensemble["clean"]["nmi"] - 0.3


def test_curves_start_at_the_clean_figure_and_fall() -> None:
    results = full_evaluation().results
    for objective in OBJECTIVES_OF_FULL:
        rows = [row for row in results["curves"] if row["objective"] == objective]
        clean = results["ensemble"]["clean"]
        assert (rows[0]["r_at_1"], rows[0]["nmi"], rows[0]["success_rate"]) == (clean["r_at_1"], clean["nmi"], 0.0)
        assert rows[0]["r_at_1"] > rows[1]["r_at_1"] >= rows[2]["r_at_1"]
        # Five classes: each point of an attack has both clusterings, and the worst of all is not above the lower one.
        assert results["ensemble"]["worst"]["nmi"] <= min(min(row["nmi"], row["nmi_spared"]) for row in rows[1:])


def test_an_attacked_fraction_mixes_attacked_and_clean_images_of_nested_subsets() -> None:
    """At 0.5 the first 30 images of one drawn order are attacked, at 0.1 the first 6 of them; R@1 and NMI by hand."""
    victim = victim_of(undefended(), unseen(12))
    part = quick_part("displacement", attack="apgd", num_steps=8, restarts=2, keep="best")
    batches = torch.arange(60).split(FULL.batch_size)
    attacked = torch.cat([Craft(part)(victim, batch).embeddings["ensemble"] for batch in batches])
    order = torch.randperm(60, generator=generator(0, "evaluation", "fraction"))
    rows = {
        row["fraction"]: row
        for row in full_evaluation().results["fractions_table"]
        if row["objective"] == "displacement"
    }
    for fraction, count in ((0.1, 6), (0.5, 30), (1.0, 60)):
        mixed = victim.clean["ensemble"].clone()
        mixed[order[:count]] = attacked[order[:count]]
        similarities = (mixed.double() @ mixed.double().T).float().fill_diagonal_(float("-inf"))
        hits = victim.test.labels[similarities.argmax(dim=1)] == victim.test.labels
        assert rows[fraction]["r_at_1"] == int(hits.sum()) / 60
        figures = clustering_figures(mixed, labels=victim.test.labels, num_classes=5, runs=1, seed=0)
        assert {name: rows[fraction][name] for name in figures} == figures
    all_attacked = full_evaluation().results["ensemble"]["attacked"]["apgd8x2/displacement"]
    assert rows[1.0]["r_at_1"] == all_attacked["r_at_1_all_attacked"]
    assert [rows[1.0][name] for name in CLUSTERING] == [all_attacked[name] for name in CLUSTERING]


@pytest.mark.parametrize("objective", ["displacement", "nearest_negative", "random_wrong_centroid"])
def test_restarts_are_spent_on_queries_still_retrieved_and_never_weaken_a_part(objective: str) -> None:
    """ε = 0.05: some queries fall at once, some never. A pass with gradient counts the images that are attacked."""
    victim = victim_of(undefended(), unseen(12))
    once = quick_part(objective, epsilon=0.05, num_steps=3)
    attacked: list[int] = []

    def count(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled() and inputs[0].requires_grad:
            attacked.append(len(inputs[0]))

    [first] = crafted(victim, once)
    hook = victim.models["ensemble"].register_forward_pre_hook(count)
    [thrice] = crafted(victim, replace(once, restarts=3))
    hook.remove()

    everything = torch.arange(60)

    def alive(embeddings: torch.Tensor) -> torch.Tensor:
        return victim.retrieval.retrieved(embeddings, everything, victim.clean["ensemble"])

    before, after = alive(first.embeddings["ensemble"]), alive(thrice.embeddings["ensemble"])
    assert 0 < int(before.sum()) < 60
    assert attacked[:6] == [60] * 3 + [int(before.sum())] * 3
    assert len(attacked) == 9
    assert int(after.sum()) <= attacked[6] <= int(before.sum())
    assert not (after & ~before).any()
    assert first.images is not None
    assert thrice.images is not None
    assert torch.equal(thrice.images[~before], first.images[~before])
    assert not torch.equal(thrice.images[before], first.images[before])
    assert (thrice.values >= first.values)[after].all()
    assert float((images_of([thrice]) - images_of([first])).abs().max()) > 0
    assert float(thrice.distances.max()) <= 0.05 + 1e-6


def test_the_showcase_holds_the_promised_tensors() -> None:
    full = full_evaluation()
    tensors = load_file(full.folder / "showcase.safetensors")
    about = json.loads((full.folder / "showcase.json").read_text(encoding="utf-8"))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "clean_embeddings": (60, 32),
        "attacked_embeddings": (60, 32),
        "labels": (60,),
        "clean_images": (6, 1, 8, 8),
        "attacked_images": (6, 1, 8, 8),
        "neighbours_before": (6, 3, 1, 8, 8),
        "neighbours_after": (6, 3, 1, 8, 8),
        "right_before": (6, 3),
        "right_after": (6, 3),
    }
    assert about["classes"] == list(unseen(12).class_names)
    assert set(about["names"]) <= set(unseen(12).names)
    attacked = full.results["ensemble"]["attacked"]
    own = {key: figures["r_at_1"] for key, figures in attacked.items() if "@" not in key and "square" not in key}
    assert own[about["attack"].replace("apgd8", "apgd8x2")] == min(own.values())
    moved = (tensors["attacked_images"] - tensors["clean_images"]).abs()
    assert 0.1 < float(moved.max()) <= 0.2 + 1e-6
    # The nearest neighbour is right before the attack and wrong after it: that is what is shown first.
    assert tensors["right_before"][:, 0].tolist() == [1] * 6
    assert tensors["right_after"][:, 0].tolist() == [0] * 6
    where = [unseen(12).names.index(name) for name in about["names"]]
    assert torch.equal(tensors["clean_images"], unseen(12).batch(torch.tensor(where), "cpu").images)
    # No image is its own neighbour.
    own_image = tensors["clean_images"][:, None]
    assert (tensors["neighbours_before"] != own_image).flatten(2).any(dim=2).all()


def test_a_damaged_showcase_is_made_again(tmp_path: Path) -> None:
    full = full_evaluation()
    for name, damaged in content(full.folder).items():
        Folder.at(tmp_path).write(name, damaged)
    before = stamps(tmp_path)
    (tmp_path / "showcase.json").write_text("{", encoding="utf-8")
    (tmp_path / "showcase.safetensors").write_bytes(b"")
    measure(undefended(), unseen(12), tmp_path, config=FULL)
    assert rewritten(tmp_path, before) == set()
    assert content(tmp_path) == content(full.folder)


def test_progress_of_the_full_protocol_never_goes_back_and_ends_at_its_total() -> None:
    """Restarts that no image needed, and parts that were there, are counted as done."""
    full = full_evaluation()
    assert full.progress[-1][1] == pytest.approx(full.progress[-1][2])
    assert all(after[1] >= before[1] - 1e-6 for before, after in itertools.pairwise(full.progress))
    assert len({call[2] for call in full.progress}) == 1


def test_standard_on_members_has_apgd_and_square_and_no_more(tmp_path: Path) -> None:
    config = EvaluationConfig(protocol="standard", apgd_steps=3, square_queries=4, sample=10, kmeans_seeds=1)
    results = measure(undefended(), unseen(12), tmp_path, config=config)
    main = [f"apgd3/{objective}" for objective in OBJECTIVES_OF_STANDARD]
    assert list(results["ensemble"]["attacked"]) == [*main, "square4/nearest_negative"]
    assert [list(member["attacked"]) for member in results["members"]] == [main, main]
    assert [results[name] for name in ("curves", "fractions_table", "ladder", "norms", "sanity")] == [[]] * 5
    assert [results[name] for name in ("transfer", "ers", "detector")] == [None] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "results.parquet", "summary.json"}


def test_quick_draws_curves_and_fractions_where_it_is_asked_for_them(tmp_path: Path) -> None:
    """20 steps and the radius of the main attack: two parts that differ in which iterate is kept."""
    config = EvaluationConfig(
        num_steps=20, objectives=("displacement",), epsilons=(0.0, 0.2), fractions=(0.5,), kmeans_seeds=1
    )
    results = measure(undefended(1), unseen(12), tmp_path, config=config)
    assert [(row["epsilon"], row["attack"]) for row in results["curves"]] == [(0.0, "clean"), (0.2, "pgd20")]
    assert [row["fraction"] for row in results["fractions_table"]] == [0.5, 1.0]
    best, last = (parts_of(tmp_path)[f"ensemble-pgd20-displacement-linf-0.2{end}"] for end in ("-best", ""))
    assert best["mean_value"] >= last["mean_value"]
    assert measure(undefended(1), unseen(12), tmp_path, config=config) == results


def test_a_foreign_model_has_no_members_and_takes_attacks_from_another_model(tmp_path: Path) -> None:
    model, other = undefended(2).members
    results = measure(model, unseen(12), tmp_path, other=other)
    assert results["members"] == []
    assert results["transfer"]["sources"] == ["other"]
    assert results["transfer"]["targets"] == ["ensemble"]
    [[success]] = results["transfer"]["success_rate"]
    assert success > 0.1
    # The same attack, from a model that knows nothing of digits, breaks next to nothing.
    [[unrelated]] = measure(model, unseen(12), tmp_path, other=untrained(1, seed=5))["transfer"]["success_rate"]
    assert unrelated < success


@pytest.mark.slow
def test_a_full_evaluation_in_l2_of_an_ensemble_of_one(tmp_path: Path) -> None:
    """Slow: a whole evaluation. Square and the check at ε = 0.5 are left out; nothing needs members."""
    config = FULL.model_copy(update={"epsilons": (0.5, 1.0)})
    results = measure(undefended(1), unseen(12), tmp_path, config=config, norm="l2", epsilon=1.0)
    assert results["members"] == [results["ensemble"]]
    assert list(results["ensemble"]["attacked"]) == [f"apgd8x2/{objective}" for objective in OBJECTIVES_OF_FULL]
    assert results["ensemble"]["worst"]["r_at_1"] < 0.1
    assert (results["transfer"], results["detector"]) == (None, None)
    absent = ("unbounded", "black_box", "transfer")
    assert [check["name"] for check in results["sanity"]] == [name for name in CHECKS if name not in absent]
    largest = [figures["largest_perturbation"] for figures in results["ensemble"]["attacked"].values()]
    assert 0.9 < max(largest) <= 1.0 + 1e-5
    assert {row["epsilon"] for row in results["norms"] if row["norm"] == "l2"} == {1.0}
    assert set(pq.read_table(tmp_path / "results.parquet")["target"].to_pylist()) == {"ensemble"}
    assert measure(undefended(1), unseen(12), tmp_path, config=config, norm="l2", epsilon=1.0) == results
