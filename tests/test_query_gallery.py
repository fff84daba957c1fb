"""Evaluation of a test set with queries and a gallery, and of any image set: by hand, and against naive loops."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dataset_layouts import write_inshop
from eat_dist.batch import Batch
from eat_dist.config import DataConfig, EvaluationConfig
from eat_dist.data.images import ImageSet, Indices, LabelledImages
from eat_dist.data.load import load_dataset
from eat_dist.data.memory import in_memory
from eat_dist.data.shards import ShardImages
from eat_dist.evaluation import OBJECTIVES, References, evaluate
from eat_dist.evaluation.references import Aimed
from eat_dist.metrics import kmeans_labels, nmi
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.seeding import derive_seed, generator
from eat_dist.storage import Folder
from evaluation_cases import crafted, quick_part, victim_of

CONFIG = EvaluationConfig(num_steps=3, kmeans_seeds=1, batch_size=16)
KS = (1, 10, 20, 30)


class Pixels(nn.Module):
    """The embedding of an image is its pixels, scaled to length 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.float32
        return functional.normalize(images.flatten(1), dim=1)


class Decoding:
    """An image set that is not in memory: it has no ``images``, and counts how many were decoded."""

    def __init__(self, images: LabelledImages) -> None:
        self._images, self.decoded = images, 0
        self.labels, self.class_names, self.names = images.labels, images.class_names, images.names
        self.is_query, self.sizes, self.image_shape = images.is_query, images.sizes, images.image_shape
        self.num_classes = images.num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, index: int) -> torch.Tensor:
        return self._images.stored(index)

    def batch(self, indices: Indices, device: torch.device | str) -> Batch:
        self.decoded += len(indices)
        return self._images.batch(indices, device)

    def digest(self) -> str:
        return self._images.digest()


def measure(images: ImageSet, folder: Path, *, epsilon: float, members: int = 1) -> dict[str, Any]:
    ensemble = EmbeddingEnsemble([Pixels() for _ in range(members)])
    settings: dict[str, Any] = {"config": CONFIG, "norm": "linf", "epsilon": epsilon, "seed": 0, "device": "cpu"}
    return evaluate(ensemble, images, **settings, folder=Folder.at(folder))


def retrieved(folder: Path) -> dict[str, str]:
    """The bits of each part of the ensemble."""
    parts = (json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "parts").iterdir()))
    return {
        f"pgd3/{part['fingerprint']['objective']}" if "targets" in part else "clean": (
            part["targets"]["ensemble"] if "targets" in part else part
        )["retrieved"]
        for part in parts
    }


def angled(*samples: tuple[float, int, bool]) -> LabelledImages:
    """Images of two pixels whose embedding points at an angle, from (degrees, class, is a query)."""
    degrees, labels, is_query = zip(*samples, strict=True)
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    pixels = (255 * torch.stack([radians.cos(), radians.sin()], dim=1)).round().to(torch.uint8)
    return LabelledImages(
        images=pixels.view(-1, 1, 1, 2),
        labels=torch.tensor(labels),
        class_names=tuple("abcdefgh"[: max(labels) + 1]),
        names=tuple(f"{number}.png" for number in range(len(labels))),
        is_query=torch.tensor(is_query),
    )


@pytest.fixture
def by_hand() -> LabelledImages:
    """Twelve b at 1°, 2°, … 12° and one a at 20° are the gallery; a queries at 0° and 21°, b at 30° and 31°."""
    gallery = [(float(angle), 1, False) for angle in range(1, 13)] + [(20.0, 0, False)]
    queries = [(0.0, 0, True), (30.0, 1, True), (21.0, 0, True), (31.0, 1, True)]
    # Not in order: a query's number among the queries is not its position in the set.
    return angled(queries[0], *gallery[:5], queries[1], queries[2], *gallery[5:], queries[3])


@pytest.fixture
def random() -> LabelledImages:
    """70 images of 4 pixels and 7 classes in random order; 25 queries, none of the last class."""
    drawn = generator("test query gallery", "random")
    labels = torch.arange(70) % 7
    centres = torch.randint(40, 216, (7, 1, 2, 2), generator=drawn)
    images = (centres[labels] + torch.randint(-40, 40, (70, 1, 2, 2), generator=drawn)).to(torch.uint8)
    candidates = torch.arange(70)[labels < 6][torch.randperm(60, generator=drawn)]
    order = torch.randperm(70, generator=drawn)
    is_query = torch.zeros(70, dtype=torch.bool)
    is_query[candidates[:25]] = True
    names = tuple(f"{number}.png" for number in range(70))
    return LabelledImages(images[order], labels[order], tuple("abcdefg"), names, is_query[order])


def naive_rankings(searching: torch.Tensor, searched: torch.Tensor, images: LabelledImages) -> list[list[bool]]:
    """For each query which gallery images are of its class, nearest first, other classes first among equals."""
    assert images.is_query is not None
    rankings = []
    for query in range(len(images)):
        if not images.is_query[query]:
            continue
        entries = []
        for other in range(len(images)):
            if images.is_query[other]:
                continue
            cosine = np.float32(np.dot(searching[query].double().numpy(), searched[other].double().numpy()))
            entries.append((-cosine, bool(images.labels[other] == images.labels[query])))
        rankings.append([is_positive for _, is_positive in sorted(entries)])
    return rankings


def naive_average_precision(ranking: list[bool]) -> float:
    relevant = sum(ranking)
    return sum(sum(ranking[: i + 1]) / (i + 1) for i in range(relevant) if ranking[i]) / relevant


def clean_and_attacked(images: ImageSet, objective: str, *, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, D] embeddings of all clean and of all attacked images, computed outside the protocol."""
    victim = victim_of(Pixels(), images)
    part = quick_part(objective, epsilon=epsilon, num_steps=CONFIG.num_steps)
    [batch] = crafted(victim, part, batch_size=100)
    assert batch.images is not None
    return victim.clean["ensemble"], Pixels()(batch.images)


def test_queries_search_the_gallery_alone(by_hand: LabelledImages, tmp_path: Path) -> None:
    """Worked by hand; two queries of a class side by side do not find each other.

    a at 0° has the twelve b before the one a: found from K = 13 on, precision 0. Both b (30°, 31°) have the a first,
    then only b: AP = (1/2 + 2/3 + … + 11/12) / 12 = (12 − H₁₂) / 12. a at 21° finds a first: AP = 1.
    """
    results = measure(by_hand, tmp_path, epsilon=0.0)
    clean = results["ensemble"]["clean"]
    assert [clean[f"r_at_{k}"] for k in KS] == [0.25, 0.75, 1.0, 1.0]
    average_precision_of_b = (12 - sum(1 / i for i in range(1, 13))) / 12
    assert clean["map_at_r"] == pytest.approx((0 + 2 * average_precision_of_b + 1) / 4)
    # In the set's order the queries are a 0°, b 30°, a 21°, b 31°.
    assert set(retrieved(tmp_path).values()) == {"0010"}
    for attacked in results["ensemble"]["attacked"].values():
        assert {name: attacked[name] for name in clean} == clean
        assert (attacked["r_at_1_all_attacked"], attacked["success_rate"]) == (0.25, 0.0)
    assert results["ensemble"]["worst"]["r_at_1"] == 0.25


def test_results_say_which_retrieval_and_how_many_images_on_each_side(by_hand: LabelledImages, tmp_path: Path) -> None:
    about = {"retrieval": "query_gallery", "images": 17, "queries": 4, "gallery": 13, "classes": 2}
    results = measure(by_hand, tmp_path / "roles", epsilon=0.0)
    assert {key: results[key] for key in about} == about
    assert {"r_at_1", "r_at_10", "r_at_20", "r_at_30", "map_at_r"} < set(results["ensemble"]["clean"])
    assert "r_at_2" not in results["ensemble"]["clean"]
    without = measure(replace(by_hand, is_query=None), tmp_path / "none", epsilon=0.0)
    about = {"retrieval": "all_against_all", "images": 17, "queries": 17, "gallery": 17, "classes": 2}
    assert {key: without[key] for key in about} == about
    assert "r_at_10" not in without["ensemble"]["clean"]


@pytest.mark.parametrize("objective", CONFIG.objectives)
def test_attacked_figures_equal_naive_loops(random: LabelledImages, objective: str, tmp_path: Path) -> None:
    results = measure(random, tmp_path, epsilon=0.15)
    figures = results["ensemble"]["attacked"][f"pgd3/{objective}"]
    clean, attacked = clean_and_attacked(random, objective, epsilon=0.15)
    before, after = (naive_rankings(searching, clean, random) for searching in (clean, attacked))
    assert len(after) == 25
    for k in KS:
        assert figures[f"r_at_{k}"] == np.mean([any(ranking[:k]) for ranking in after])
        assert results["ensemble"]["clean"][f"r_at_{k}"] == np.mean([any(ranking[:k]) for ranking in before])
    assert figures["map_at_r"] == pytest.approx(np.mean([naive_average_precision(ranking) for ranking in after]))
    all_attacked = naive_rankings(attacked, attacked, random)
    assert figures["r_at_1_all_attacked"] == np.mean([ranking[0] for ranking in all_attacked])
    found = [ranking_after[0] for was, ranking_after in zip(before, after, strict=True) if was[0]]
    assert 0 < len(found) < 25
    assert figures["success_rate"] == pytest.approx(1 - np.mean(found))
    assert figures["mean_displacement"] == pytest.approx(float((attacked - clean).norm(dim=1).mean()))
    clusters = kmeans_labels(attacked, 7, seed=derive_seed(0, "evaluation", "kmeans", 0))
    assert figures["nmi"] == nmi(random.labels, clusters)
    bits = retrieved(tmp_path)
    assert bits["clean"] == "".join(str(int(ranking[0])) for ranking in before)
    assert bits[f"pgd3/{objective}"] == "".join(str(int(ranking[0])) for ranking in after)


def test_worst_counts_the_queries_that_survive_everything(random: LabelledImages, tmp_path: Path) -> None:
    results = measure(random, tmp_path, epsilon=0.15)["ensemble"]
    survivors = set(range(25))
    for bits in retrieved(tmp_path).values():
        survivors &= {query for query, bit in enumerate(bits) if bit == "1"}
    assert results["worst"]["r_at_1"] == len(survivors) / 25
    assert results["worst"]["r_at_1"] < min(attacked["r_at_1"] for attacked in results["attacked"].values())


def test_roles_change_retrieval_and_neither_attacks_on_centroids_nor_clustering(
    random: LabelledImages, tmp_path: Path
) -> None:
    without = replace(random, is_query=None)
    one, other = (measure(images, tmp_path / str(i), epsilon=0.15) for i, images in enumerate((random, without)))
    for key, attacked in one["ensemble"]["attacked"].items():
        if key.endswith("nearest_negative"):  # which aims at the gallery, and the roles decide what is in it
            continue
        same = ("nmi", "ami", "f1", "mean_displacement", "largest_perturbation")
        assert [attacked[name] for name in same] == [other["ensemble"]["attacked"][key][name] for name in same]
        assert attacked["map_at_r"] != other["ensemble"]["attacked"][key]["map_at_r"]


def test_centroids_are_of_queries_and_gallery_together() -> None:
    """Class a at 0° (query) and 20°, b at 60° and 80° (query): their centroids lie at 10° and 70°."""
    images = angled((80, 1, True), (0, 0, True), (60, 1, False), (20, 0, False))
    clean = victim_of(Pixels(), images).clean["ensemble"]
    references = References.of(clean, images, seed=0)
    angles = torch.atan2(references.centroids[:, 1], references.centroids[:, 0]).rad2deg()
    assert angles.tolist() == pytest.approx([10, 70], abs=0.2)
    # The fourth image (a, 20°) and the first (b, 80°), both asked about an embedding at 30°.
    chosen = Aimed(references, torch.tensor([3, 0]))
    asked = torch.tensor([[0.75**0.5, 0.5], [0.75**0.5, 0.5]])
    cosines = [
        [math.cos(math.radians(angle)) for angle in angles] for angles in ((70 - 30, 30 - 10), (30 - 10, 70 - 30))
    ]
    wrong = [other for other, _ in cosines]
    assert OBJECTIVES["random_wrong_centroid"](chosen)(asked).tolist() == pytest.approx(wrong, abs=0.01)
    margins = [other - own for other, own in cosines]
    assert OBJECTIVES["nearest_wrong_centroid"](chosen)(asked).tolist() == pytest.approx(margins, abs=0.01)
    assert OBJECTIVES["displacement"](chosen)(clean[[3, 0]]).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_a_part_is_measured_again_when_the_roles_have_changed(random: LabelledImages, tmp_path: Path) -> None:
    assert random.is_query is not None
    measure(random, tmp_path, epsilon=0.0)
    fewer = random.is_query.clone()
    fewer[fewer.nonzero()[0]] = False
    changed = replace(random, is_query=fewer)
    assert measure(changed, tmp_path, epsilon=0.0) == measure(changed, tmp_path / "alone", epsilon=0.0)


@pytest.mark.parametrize("roles", [True, False])
def test_a_set_that_is_not_in_memory_gives_the_same_and_is_decoded_once_a_pass(
    random: LabelledImages, roles: bool, tmp_path: Path
) -> None:
    images = random if roles else replace(random, is_query=None)
    decoding = Decoding(images)
    whole = measure(images, tmp_path / "memory", epsilon=0.1, members=2)
    assert measure(decoding, tmp_path / "decoded", epsilon=0.1, members=2) == whole
    # Once for the clean embeddings of all, and once for each of three attacks on two members and the ensemble.
    # Eight images, twice, tell code that is not ours from other code, and whether it draws random numbers.
    assert decoding.decoded == 70 * (1 + 3 * 3) + 16
    decoding.decoded = 0
    assert measure(decoding, tmp_path / "memory", epsilon=0.1, members=2) == whole
    assert decoding.decoded == 16


def test_a_test_set_in_shards_and_its_copy_in_memory_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_inshop(tmp_path / "inshop", classes=3, per_class=6)
    with pytest.warns(UserWarning, match="taken as a subset"):
        test = load_dataset(DataConfig(dataset="inshop", root=str(root), subset=True, image_size=8)).test
    assert isinstance(test, ShardImages)
    results = measure(test, tmp_path / "shards", epsilon=0.05)
    assert (results["retrieval"], results["queries"], results["gallery"]) == ("query_gallery", 9, 9)
    assert measure(in_memory(test), tmp_path / "memory", epsilon=0.05) == results


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_searching_many_images_never_holds_all_similarities() -> None:
    """8,000² float32 similarities alone would be 244 MiB."""
    script = """
import re, torch
from eat_dist.metrics import hits_at_k, map_at_r

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

embeddings = torch.randn(8_000, 8, generator=torch.Generator().manual_seed(0))
labels, own = torch.arange(8_000) // 4, torch.arange(8_000)
before = peak()
hits_at_k(embeddings, labels, embeddings, labels, ks=(1, 2, 4, 8), exclude_self=own)
map_at_r(embeddings, labels, embeddings, labels, exclude_self=own)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 150
