"""Retrieval and clustering figures against values worked by hand and against naive loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from eat_dist.evaluation.figures import Retrieval
from eat_dist.metrics import ami, hits_at_k, kmeans_labels, map_at_r, nmi, pairwise_f1, recall_at_k, search
from eat_dist.metrics.kmeans import _lloyd
from eat_dist.seeding import generator


def directions(*degrees: float) -> torch.Tensor:
    """[N, 2] unit vectors; the nearer two angles, the greater the cosine."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1).float()


def random_set(name: str, *, count: int, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and labels; with ties, of few different vectors (the zero vector too), each many times."""
    drawn = generator("test metrics", name)
    if ties:
        embeddings = torch.randint(-1, 2, (count, 3), generator=drawn).float()
    else:
        embeddings = torch.randn(count, 8, generator=drawn)
    return embeddings, torch.arange(count) % 4


def naive_ranking(query, query_label, gallery, gallery_labels, excluded):
    """For one query the list of "is of its class", nearest first, other classes first among equals."""
    entries = []
    for position, (sample, label) in enumerate(zip(gallery, gallery_labels, strict=True)):
        if position == excluded:
            continue
        lengths = np.linalg.norm(query) * np.linalg.norm(sample)
        cosine = np.float32(np.dot(query, sample) / lengths) if lengths else np.float32(0)
        entries.append((-cosine, bool(label == query_label)))
    return [is_positive for _, is_positive in sorted(entries)]


def naive_rankings(query, query_labels, gallery, gallery_labels, exclude_self):
    excluded = [None] * len(query) if exclude_self is None else exclude_self.tolist()
    return [
        naive_ranking(one, label, gallery.double().numpy(), gallery_labels.numpy(), own)
        for one, label, own in zip(query.double().numpy(), query_labels.numpy(), excluded, strict=True)
    ]


def naive_average_precision(ranking):
    relevant = sum(ranking)
    return sum(sum(ranking[: i + 1]) / (i + 1) for i in range(relevant) if ranking[i]) / relevant


def both_ways():
    """Leave-one-out on one set, and queries apart from their gallery; each with and without ties."""
    for ties in (False, True):
        embeddings, labels = random_set("set", count=41, ties=ties)
        yield embeddings, labels, embeddings, labels, torch.arange(41)
        query, query_labels = random_set("query", count=13, ties=ties)
        yield query, query_labels, embeddings, labels, None


def test_recall_and_map_of_two_queries_worked_by_hand():
    """Gallery a b a a at 10°, 20°, 30° and 40°, both queries at 0°.

    Class a, R = 3: a b a are retrieved, MAP@R = (1/1 + 0 + 2/3) / 3 = 5/9, R@1 = 1.
    Class b, R = 1: a is retrieved, MAP@R = 0, R@1 = 0, R@2 = 1.
    """
    gallery, gallery_labels = directions(10, 20, 30, 40), torch.tensor([0, 1, 0, 0])
    query, labels = directions(0, 0), torch.tensor([0, 1])
    recall = recall_at_k(query, labels, gallery, gallery_labels, ks=(1, 2), exclude_self=None)
    assert recall == {1: 0.5, 2: 1.0}
    value = map_at_r(query, labels, gallery, gallery_labels, exclude_self=None)
    assert value == pytest.approx((5 / 9 + 0) / 2)


def test_the_length_of_an_embedding_does_not_matter():
    gallery, labels = directions(10, 20, 30, 40), torch.tensor([0, 1, 0, 1])
    lengths = torch.tensor([[9.0], [0.1], [3.0], [70.0]])
    own = torch.arange(4)
    plain = hits_at_k(gallery, labels, gallery, labels, ks=(1, 2), exclude_self=own)
    scaled = hits_at_k(gallery * lengths, labels, gallery * lengths, labels, ks=(1, 2), exclude_self=own)
    assert torch.equal(plain, scaled)


def test_leave_one_out_leaves_out_the_own_image_and_nothing_else():
    """At 0° 1° 50° 51° with classes a b a b each image's neighbour is of the other class."""
    embeddings, labels = directions(0, 1, 50, 51), torch.tensor([0, 1, 0, 1])
    own = torch.arange(4)
    assert recall_at_k(embeddings, labels, embeddings, labels, ks=[1], exclude_self=None) == {1: 1.0}
    assert recall_at_k(embeddings, labels, embeddings, labels, ks=[1], exclude_self=own) == {1: 0.0}
    twice, twice_labels = embeddings.repeat(2, 1), labels.repeat(2)
    own = torch.arange(8)
    assert recall_at_k(twice, twice_labels, twice, twice_labels, ks=[1], exclude_self=own) == {1: 1.0}


@pytest.mark.parametrize("sets", list(both_ways()))
def test_retrieval_equals_naive_loops(sets):
    query, query_labels, gallery, gallery_labels, exclude_self = sets
    rankings = naive_rankings(query, query_labels, gallery, gallery_labels, exclude_self)
    ks = (1, 2, 4, 30)
    expected = torch.tensor([[any(ranking[:k]) for k in ks] for ranking in rankings])
    hits = hits_at_k(query, query_labels, gallery, gallery_labels, ks=ks, exclude_self=exclude_self)
    assert torch.equal(hits, expected)
    value = map_at_r(query, query_labels, gallery, gallery_labels, exclude_self=exclude_self)
    assert value == pytest.approx(np.mean([naive_average_precision(ranking) for ranking in rankings]))


@pytest.mark.parametrize("sets", list(both_ways()))
@pytest.mark.parametrize("block_size", [3, 100])
def test_one_pass_gives_the_figures_of_two(sets, block_size):
    query, query_labels, gallery, gallery_labels, own = sets
    sides = (query, query_labels, gallery, gallery_labels)
    # More than the gallery has, too: every query's class is found there.
    ks = (1, 2, 4, 30, 50)
    found = search(*sides, ks=ks, exclude_self=own, block_size=block_size)
    assert torch.equal(found.hits, hits_at_k(*sides, ks=ks, exclude_self=own))
    assert float(found.average_precision.mean()) == map_at_r(*sides, exclude_self=own)
    rankings = naive_rankings(query, query_labels, gallery, gallery_labels, own)
    expected = [naive_average_precision(ranking) for ranking in rankings]
    assert found.average_precision.tolist() == pytest.approx(expected)
    assert found.hits[:, -1].all()


def test_classes_of_very_different_sizes_keep_their_own_r():
    """Classes of 2 and of 30: padding a small class up to the largest must not count."""
    embeddings, _ = random_set("uneven", count=32, ties=False)
    labels, own = torch.tensor([0, 1] + [0] * 14 + [1] + [0] * 15), torch.arange(32)
    found = search(embeddings, labels, embeddings, labels, ks=(1, 2), exclude_self=own, block_size=5)
    rankings = naive_rankings(embeddings, labels, embeddings, labels, own)
    assert found.average_precision.tolist() == pytest.approx([naive_average_precision(r) for r in rankings])
    assert found.hits.tolist() == [[r[0], any(r[:2])] for r in rankings]


def all_against_all(labels: torch.Tensor) -> Retrieval:
    everything = torch.arange(len(labels))
    return Retrieval("all_against_all", (1, 2, 4, 8), labels, everything, everything)


def test_retrieved_are_the_bits_of_the_figures_for_any_part_in_any_order():
    clean, labels = random_set("set", count=41, ties=False)
    attacked = clean + 0.7 * torch.randn(41, 8, generator=generator("test metrics", "attack"))
    _, bits = all_against_all(labels).figures(attacked, clean)
    assert 0 < int(bits.sum()) < 41
    for part in (torch.randperm(41, generator=generator("test metrics", "part"))[:17], torch.tensor([3, 3]), bits[:0]):
        indices = part.long()
        found = all_against_all(labels).retrieved(attacked[indices], indices, clean)
        assert torch.equal(found, bits[indices])


def test_retrieved_leaves_out_the_own_clean_copy_and_counts_a_tie_as_lost():
    """At 0° 1° 50° 51° with classes a b a b each is nearest to itself and then to the other class.

    Image 0 moved to 50° meets its class there; moved to 0.5°, it is nearest to b, its own clean copy apart; moved to
    25.5°, b at 1° and a at 50° are equally far (24.5°), and the tie is lost.
    """
    clean, labels = directions(0, 1, 50, 51), torch.tensor([0, 1, 0, 1])
    attacked, indices = directions(50, 0.5, 25.5), torch.zeros(3, dtype=torch.int64)
    assert all_against_all(labels).retrieved(attacked, indices, clean).tolist() == [True, False, False]


def test_retrieved_asks_nothing_of_an_image_that_is_no_query():
    """Queries 0 (class a, at 0°) and 3 (b, at 30°) against a gallery of a at 40° and b at 10°: both miss."""
    labels, clean = torch.tensor([0, 0, 1, 1]), directions(0, 40, 10, 30)
    retrieval = Retrieval("query_gallery", (1,), labels, torch.tensor([0, 3]), torch.tensor([1, 2]))
    indices = torch.tensor([3, 2, 1, 0])
    found = retrieval.retrieved(clean[indices], indices, clean)
    assert found.tolist() == [False, True, True, False]
    assert retrieval.figures(clean, clean)[1].tolist() == [False, False]
    moved = retrieval.retrieved(directions(39, 11), torch.tensor([0, 3]), clean)
    assert moved.tolist() == [True, True]


@pytest.mark.parametrize("block_size", [1, 7, 41, 100])
@pytest.mark.parametrize("ties", [False, True])
def test_block_size_does_not_change_retrieval(block_size, ties):
    embeddings, labels = random_set("set", count=41, ties=ties)
    sets, own = (embeddings, labels, embeddings, labels), torch.arange(41)
    ks = (1, 2, 4)
    whole = hits_at_k(*sets, ks=ks, exclude_self=own)
    assert torch.equal(hits_at_k(*sets, ks=ks, exclude_self=own, block_size=block_size), whole)
    expected = map_at_r(*sets, exclude_self=own)
    assert map_at_r(*sets, exclude_self=own, block_size=block_size) == pytest.approx(expected, abs=1e-12)


def test_the_order_of_the_gallery_does_not_decide_ties():
    embeddings, labels = random_set("set", count=41, ties=True)
    query, query_labels = random_set("query", count=13, ties=True)
    shuffled = torch.randperm(41, generator=generator("test metrics", "order"))
    for figure in (
        lambda gallery, its: map_at_r(query, query_labels, gallery, its, exclude_self=None),
        lambda gallery, its: recall_at_k(query, query_labels, gallery, its, ks=(1, 2), exclude_self=None),
    ):
        assert figure(embeddings, labels) == figure(embeddings[shuffled], labels[shuffled])


def test_a_collapsed_model_retrieves_nothing():
    embeddings, labels, own = torch.ones(12, 4), torch.arange(12) % 3, torch.arange(12)
    recall = recall_at_k(embeddings, labels, embeddings, labels, ks=(1, 8, 9), exclude_self=own)
    assert recall == {1: 0.0, 8: 0.0, 9: 1.0}
    assert map_at_r(embeddings, labels, embeddings, labels, exclude_self=own) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    good, labels, own = directions(0, 1, 2, 3), torch.tensor([0, 0, 1, 1]), torch.arange(4)
    bad = good.clone()
    bad[2, 0] = value
    with pytest.raises(ValueError, match="query embedding must be finite; 1 of 4"):
        recall_at_k(bad, labels, good, labels, ks=[1], exclude_self=own)
    with pytest.raises(ValueError, match="gallery embedding must be finite; 1 of 4"):
        map_at_r(good, labels, bad, labels, exclude_self=own)
    with pytest.raises(ValueError, match="1 of 4 hold NaN or infinity"):
        kmeans_labels(bad, 2, seed=0)


def test_a_class_of_one_image_and_a_k_of_zero_are_refused():
    embeddings, labels, own = directions(0, 1, 2), torch.tensor([0, 0, 1]), torch.arange(3)
    with pytest.raises(ValueError, match="query 2 of class 1 has none"):
        map_at_r(embeddings, labels, embeddings, labels, exclude_self=own)
    with pytest.raises(ValueError, match="K must be at least 1"):
        hits_at_k(embeddings, labels, embeddings, labels, ks=(0, 1), exclude_self=None)


def test_nmi_and_ami_worked_by_hand():
    """Classes 0 0 1 1 in clusters 0 0 1 2: I = ln 2, H = ln 2 and 1.5 ln 2, NMI = 2 / 2.5.

    In clusters 0 1 0 1, I = 0; of the 2×2 tables with these margins 1/3 have I = ln 2 and 2/3 have I = 0, so
    E[I] = ln 2 / 3 and AMI = (0 − 1/3) / (1 − 1/3) = −1/2.
    """
    assert nmi([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(0.8)
    assert nmi([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0.0)
    assert ami([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)


def test_pairwise_f1_worked_by_hand():
    """0 0 0 1 1 in clusters 0 0 1 1 1: TP = 1 + 1, 3 + 1 pairs in classes, 1 + 3 in clusters: F1 = 4 / 8."""
    assert pairwise_f1([0, 0, 0, 1, 1], [0, 0, 1, 1, 1]) == 0.5
    assert pairwise_f1([0, 1, 2], [5, 4, 3]) == 1.0
    assert pairwise_f1([0, 0, 1, 1], [0, 1, 2, 3]) == 0.0


def test_pairwise_f1_equals_a_loop_over_all_pairs():
    drawn = generator("test metrics", "pairs")
    labels = torch.randint(4, (60,), generator=drawn)
    clusters = torch.randint(6, (60,), generator=drawn)
    pairs = list(itertools.combinations(range(60), 2))
    true = [bool(labels[i] == labels[j]) for i, j in pairs]
    found = [bool(clusters[i] == clusters[j]) for i, j in pairs]
    both = sum(a and b for a, b in zip(true, found, strict=True))
    precision, recall = both / sum(found), both / sum(true)
    assert pairwise_f1(labels, clusters) == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("figure", [nmi, ami, pairwise_f1])
def test_clustering_figures_are_one_for_the_classes_under_other_names(figure):
    labels = torch.arange(30) % 5
    renamed = torch.tensor([7, 3, 0, 9, 4])[labels]
    assert figure(labels, renamed) == pytest.approx(1.0)


def test_many_random_clusters_raise_nmi_but_not_ami():
    labels = torch.arange(200) % 20
    clusters = torch.randint(100, (200,), generator=generator("test metrics", "clusters"))
    assert nmi(labels, clusters) > 0.5
    assert abs(ami(labels, clusters)) < 0.1


def test_kmeans_finds_separate_clusters_and_depends_on_its_seed_alone():
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 4, generator=generator("test metrics", "kmeans"))
    clusters = kmeans_labels(10 * torch.eye(3, 4)[labels] + noise, 3, seed=2**40 + 1)
    assert nmi(labels, clusters) == pytest.approx(1.0)
    one, again = (kmeans_labels(noise, 5, seed=3, n_init=1) for _ in range(2))
    assert np.array_equal(one, again)
    others = [kmeans_labels(noise, 5, seed=seed, n_init=1) for seed in range(4, 9)]
    assert any(nmi(one, other) < 0.999 for other in others)


def test_kmeans_refuses_more_clusters_than_samples():
    with pytest.raises(ValueError, match="got 3 and 4 clusters"):
        kmeans_labels(directions(0, 1, 2), 4, seed=0)


def test_kmeans_reaches_the_sum_of_squares_of_scikit_learn_and_plain_starts_do_not():
    """400 samples around 40 centres that lie close together, where the choice of the starts tells."""
    drawn = generator("test metrics", "close clusters")
    labels = torch.arange(400) % 40
    embeddings = torch.randn(40, 12, generator=drawn)[labels] + 0.6 * torch.randn(400, 12, generator=drawn)
    points = embeddings.double().numpy()

    def mean_sum(cluster):
        found = [cluster(seed) for seed in range(8)]
        return np.mean([sum(np.square(points[c == k] - points[c == k].mean(0)).sum() for k in set(c)) for c in found])

    ours = mean_sum(lambda seed: kmeans_labels(embeddings, 40, seed=seed, n_init=2))
    theirs = mean_sum(lambda seed: KMeans(40, n_init=2, random_state=seed).fit_predict(points))
    random = mean_sum(lambda seed: KMeans(40, init="random", n_init=2, random_state=seed).fit_predict(points))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert random > 1.04 * ours


def test_kmeans_of_equal_samples_and_of_as_many_clusters_as_samples():
    assert set(kmeans_labels(torch.ones(6, 2), 3, seed=0)) <= {0, 1, 2}
    assert sorted(kmeans_labels(directions(0, 40, 90, 180), 4, seed=0)) == [0, 1, 2, 3]
    assert set(kmeans_labels(directions(0, 40, 90, 180), 1, seed=0)) == {0}


def test_kmeans_does_not_depend_on_the_number_of_threads_and_leaves_it_as_it_was():
    embeddings = torch.randn(600, 24, generator=generator("test metrics", "threads"))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(kmeans_labels(embeddings, 200, seed=0, n_init=1))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*found)


def test_lloyds_iteration_ends_in_means_that_are_nearest_to_their_own_samples():
    embeddings = torch.randn(300, 6, generator=generator("test metrics", "lloyd"))
    clusters = torch.from_numpy(kmeans_labels(embeddings, 12, seed=0, n_init=1))
    means = torch.stack([embeddings[clusters == k].mean(dim=0) for k in range(12)])
    assert torch.equal(torch.cdist(embeddings.double(), means.double()).argmin(dim=1), clusters)


def test_an_empty_cluster_restarts_at_the_sample_farthest_from_its_centre():
    """Samples at 0, 1 and 9 on a line with centres at 0 and at 100: the second has none, and 9 is farthest."""
    points = torch.tensor([[0.0], [1.0], [9.0]])
    total, clusters = _lloyd(points, torch.tensor([[0.0], [100.0]]))
    assert clusters.tolist() == [0, 0, 1]
    assert total == pytest.approx(0.5)
