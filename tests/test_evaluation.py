"""The quick protocol on small ensembles: what its figures must obey."""

import copy
import json
import math

import pytest
import torch

from eat_dist import __version__
from eat_dist.attacks.objectives import draw_wrong_classes
from eat_dist.data.images import LabelledImages
from eat_dist.errors import ConfigError
from eat_dist.evaluation import OBJECTIVES, References, Victim
from eat_dist.evaluation.crafting import Crafted, Embed
from eat_dist.evaluation.embed import embed_batch
from eat_dist.evaluation.figures import Retrieval
from eat_dist.evaluation.measure import Measure
from eat_dist.models.ensemble import EmbeddingEnsemble, cpu_state, weights_digest
from eat_dist.seeding import generator
from evaluation_cases import (
    CLUSTERING,
    QUICK,
    QUICK_OBJECTIVES,
    crafted,
    images_of,
    measure,
    quick_part,
    stamps,
    undefended,
    unseen,
    untrained,
    victim_of,
)

KEYS = [f"pgd10/{objective}" for objective in QUICK_OBJECTIVES]


@pytest.fixture(scope="module")
def test_set():
    """30 images of each of the 5 test classes."""
    return unseen(30)


@pytest.fixture(scope="module")
def victim(test_set):
    """The undefended ensemble, which knows its clean embeddings."""
    return victim_of(undefended(), test_set)


@pytest.fixture(scope="module")
def results(test_set, tmp_path_factory):
    """The undefended ensemble at ε = 0.2."""
    return measure(undefended(), test_set, tmp_path_factory.mktemp("results"))


def everything(images):
    return images.batch(torch.arange(len(images)), "cpu").images


def test_embedding_restores_the_mode_and_keeps_the_running_statistics(test_set):
    model = untrained(1).train()
    before = weights_digest([cpu_state(model)])
    embeddings = embed_batch(model, everything(test_set))
    assert all(module.training for module in model.modules())
    assert weights_digest([cpu_state(model)]) == before
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (150, 16)
    assert not embeddings.requires_grad
    assert torch.equal(embeddings, embed_batch(model.eval(), everything(test_set)))


def test_several_models_are_embedded_as_each_alone(test_set):
    indices = torch.arange(150)
    models = {"ensemble": untrained(2), "other": untrained(1, seed=1).members[0]}
    models |= {f"member_{rank}": member for rank, member in enumerate(copy.deepcopy(models["ensemble"]).members)}
    together = Embed()(Victim.of(models["ensemble"], test_set, seed=0, device="cpu", other=models["other"]), indices)
    assert set(together) == set(models)
    for name, model in models.items():
        alone = Embed()(Victim.of(model, test_set, seed=0, device="cpu"), indices)
        assert torch.equal(together[name], alone["ensemble"]), name


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", QUICK_OBJECTIVES)
def test_attacked_images_stay_inside_the_ball_and_the_pixel_range(victim, test_set, objective, norm):
    epsilon = {"linf": 0.2, "l2": 1.0}[norm]
    [batch] = crafted(victim, quick_part(objective, norm=norm, epsilon=epsilon))
    attacked, clean = batch.images, everything(test_set)
    order = float("inf") if norm == "linf" else 2
    lengths = torch.linalg.vector_norm((attacked - clean).flatten(1), ord=order, dim=1)
    assert attacked.dtype == torch.float32
    assert float(lengths.max()) <= epsilon + 1e-6
    assert float(lengths.min()) > epsilon / 2
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    assert torch.allclose(batch.distances, lengths, atol=1e-6)
    assert torch.allclose(batch.embeddings["ensemble"], embed_batch(victim.models["ensemble"], attacked), atol=1e-6)


@pytest.mark.parametrize("objective", QUICK_OBJECTIVES)
def test_the_batch_size_does_not_change_the_attack(victim, objective):
    """Up to rounding: another kernel for another batch size may flip the sign of a gradient near zero."""
    whole = images_of(crafted(victim, quick_part(objective)))
    for batch_size in (7, 64):
        parts = images_of(crafted(victim, quick_part(objective), batch_size=batch_size))
        different = (parts - whole).abs() > 1e-6
        assert different.float().mean() < 0.01


def test_random_starts_depend_on_seed_objective_and_image(test_set):
    """One draw of ``random_noise`` is the point that every other attack starts from."""
    model = untrained(1)

    def starts(images, seed, objective):
        noise = quick_part(objective, attack="random_noise", num_steps=1)
        return images_of(crafted(victim_of(model, images, seed=seed), noise, 64))

    first = starts(test_set, 0, "displacement")
    assert torch.equal(first, starts(test_set, 0, "displacement"))
    assert not torch.equal(first, starts(test_set, 1, "displacement"))
    assert not torch.equal(first, starts(test_set, 0, "random_wrong_centroid"))
    same_image = LabelledImages(
        test_set.images[:1].expand(2, -1, -1, -1).clone(), torch.tensor([0, 1]), ("a", "b"), ("a", "b")
    )
    one, other = starts(same_image, 0, "displacement")
    assert not torch.equal(one, other)


def test_the_attack_is_pgd_from_the_images_own_start_written_out(test_set, victim):
    """Uniform start of each image by itself, ten steps of 2.5·ε/10 along the sign, the last iterate."""
    epsilon, clean = 0.2, everything(test_set)
    lowest, highest = (clean - epsilon).clamp(0, 1), (clean + epsilon).clamp(0, 1)
    key = (0, "evaluation", "start", "displacement")
    offsets = torch.stack([torch.rand(1, 8, 8, generator=generator(*key, index)) for index in range(150)])
    images = (clean + offsets * (2 * epsilon) - epsilon).clamp(lowest, highest)
    model, goal = victim.models["ensemble"], victim.clean["ensemble"]
    for _ in range(10):
        images = images.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad((model(images) - goal).square().sum(), images)
        images = (images + 2.5 * epsilon / 10 * gradient.sign()).clamp(lowest, highest)
    written_out = images.detach()
    different = (images_of(crafted(victim, quick_part("displacement"))) - written_out).abs() > 1e-6
    assert different.float().mean() < 0.01


def test_wrong_classes_are_wrong_and_of_all_kinds(test_set):
    clean = victim_of(untrained(1), test_set).clean["ensemble"]
    references = References.of(clean, test_set, seed=0)
    assert not (references.wrong_classes == test_set.labels).any()
    pairs = set(zip(test_set.labels.tolist(), references.wrong_classes.tolist(), strict=True))
    assert len(pairs) == 5 * 4


def test_an_unknown_objective_is_named_with_the_known_ones(test_set):
    with pytest.raises(ConfigError, match=r"no evaluation objective is called 'displacemen'.*displacement"):
        crafted(victim_of(untrained(1), test_set), quick_part("displacemen"))
    assert set(QUICK_OBJECTIVES) <= set(OBJECTIVES)


def test_epsilon_zero_gives_exactly_the_clean_figures(test_set, tmp_path):
    results = measure(undefended(), test_set, tmp_path, epsilon=0.0)
    for target in (results["ensemble"], *results["members"]):
        for attacked in target["attacked"].values():
            assert {name: attacked[name] for name in target["clean"]} == target["clean"]
            assert attacked["r_at_1_all_attacked"] == target["clean"]["r_at_1"]
            assert (attacked["success_rate"], attacked["largest_perturbation"]) == (0.0, 0.0)
        assert target["worst"] == {name: target["clean"][name] for name in ("r_at_1", *CLUSTERING)}


def test_a_larger_epsilon_is_not_weaker_and_a_large_one_breaks_an_undefended_ensemble(test_set, results, tmp_path):
    config = QUICK.model_copy(update={"members": False})
    weaker, weak, total = (
        measure(undefended(), test_set, tmp_path, config=config, epsilon=epsilon) for epsilon in (0.05, 0.1, 1.0)
    )
    runs = [weaker, weak, results, total]
    success = [run["ensemble"]["attacked"]["pgd10/nearest_wrong_centroid"]["success_rate"] for run in runs]
    worst = [run["ensemble"]["worst"]["r_at_1"] for run in runs]
    assert 0.1 < success[0] < success[-1]
    assert success == sorted(success)
    assert success[-1] >= 0.99
    assert worst == sorted(worst, reverse=True)
    assert worst[-1] <= 0.01


def test_nearest_wrong_centroid_destroys_the_retrieval_of_an_undefended_ensemble(results):
    for target in (results["ensemble"], *results["members"]):
        assert target["clean"]["r_at_1"] > 0.8
        assert target["attacked"]["pgd10/nearest_wrong_centroid"]["r_at_1"] < 0.15


def test_random_wrong_centroid_breaks_the_clusters_that_nearest_wrong_centroid_leaves(results):
    """A class sent to one wrong place stays a cluster; measured: NMI 0.68 clean, 0.34 and 0.13 attacked."""
    ensemble = results["ensemble"]
    nearest, random = (
        ensemble["attacked"][f"pgd10/{name}"] for name in ("nearest_wrong_centroid", "random_wrong_centroid")
    )
    assert random["nmi"] < nearest["nmi"] - 0.1
    assert random["nmi"] < ensemble["clean"]["nmi"] - 0.3
    assert nearest["r_at_1"] < random["r_at_1"]


def test_worst_is_not_better_than_any_objective(results):
    for target in (results["ensemble"], *results["members"]):
        attacked = list(target["attacked"].values())
        assert target["worst"]["r_at_1"] <= min(target["clean"]["r_at_1"], *(a["r_at_1"] for a in attacked))
        for name in CLUSTERING:
            assert target["worst"][name] == min(min(a[name], a[f"{name}_spared"]) for a in attacked)


def test_the_reported_perturbation_is_inside_the_ball_and_moves_the_embeddings(results):
    for target in (results["ensemble"], *results["members"]):
        for attacked in target["attacked"].values():
            assert 0.1 < attacked["largest_perturbation"] <= 0.2 + 1e-6
            assert 0 < attacked["mean_displacement"] <= 2


def test_results_are_the_file_and_have_the_promised_form(test_set, tmp_path):
    results = measure(undefended(), test_set, tmp_path, norm="l2", epsilon=1)
    written = {key: value for key, value in results.items() if key != "parts"}
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == written
    head = {key: value for key, value in written.items() if key not in ("ensemble", "members")}
    assert head == {
        "schema": 4,
        "eat_dist": __version__,
        "protocol": "quick",
        "norm": "l2",
        "epsilon": 1,
        "num_steps": 10,
        "epsilons": [],
        "seed": 0,
        "kmeans_seeds": 2,
        "images": 150,
        "classes": 5,
        "images_sha256": test_set.digest(),
        "retrieval": "all_against_all",
        "queries": 150,
        "gallery": 150,
        "sample": None,
        **{name: [] for name in ("curves", "fractions_table", "ladder", "norms", "sanity")},
        **dict.fromkeys(("inference", "transfer", "ers", "detector")),
    }
    assert len(results["members"]) == 2
    figures = {
        "r_at_1",
        "r_at_2",
        "r_at_4",
        "r_at_8",
        "map_at_r",
        *CLUSTERING,
        "nmi_std",
        "ami_std",
        "f1_std",
    }
    more = {"r_at_1_all_attacked", "success_rate", "mean_displacement", "largest_perturbation"}
    more |= {f"{name}{end}_spared" for name in CLUSTERING for end in ("", "_std")}
    for target in (results["ensemble"], *results["members"]):
        assert set(target["clean"]) == figures
        assert list(target["attacked"]) == KEYS
        assert all(set(attacked) == figures | more for attacked in target["attacked"].values())
        assert set(target["worst"]) == {"r_at_1", *CLUSTERING}


@pytest.mark.parametrize("classes", [2, 5])
def test_of_few_classes_an_attack_on_every_image_does_not_write_the_labels_into_nmi(classes):
    """Two classes exchanged are the same clusters under other names: attacked as a whole, NMI is still 1."""
    labels = torch.arange(40 * classes) // 40
    names = tuple(str(index) for index in range(len(labels)))
    test = LabelledImages(torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels, tuple("abcde"[:classes]), names)
    corners, nothing = torch.eye(classes), torch.zeros(len(labels))
    wrong = draw_wrong_classes(labels, classes, generator(0, "wrong"))
    measuring = Measure(test, Retrieval.of(test), {"ensemble": corners[labels]}, members=1, kmeans_seeds=1, seed=0)
    found = measuring.attacked_part(
        quick_part("random_wrong_centroid"),
        [Crafted({"ensemble": corners[wrong]}, nothing, nothing, None, None)],
        torch.arange(len(labels)),
        retrieved_clean={"ensemble": "1" * len(labels)},
    )
    figures = found["targets"]["ensemble"]["figures"]
    floor = 1 - math.log(classes - 1) / math.log(classes)
    assert figures["nmi"] == pytest.approx(floor, abs=0.05)
    assert figures["nmi_spared"] < 0.03 < floor
    assert figures["f1_spared"] < figures["f1"]


def test_draws_of_a_model_that_draws_nothing_do_not_soften_worst(test_set, tmp_path):
    """Only behind what is random are queries not counted one by one over all attacks."""
    config = QUICK.model_copy(update={"num_steps": 2, "members": False})
    once = measure(undefended(1), test_set, tmp_path / "1", config=config)
    twice = measure(undefended(1), test_set, tmp_path / "2", config=config.model_copy(update={"eot_draws": 2}))
    attacked = [figures["r_at_1"] for figures in twice["ensemble"]["attacked"].values()]
    assert twice["ensemble"]["worst"]["r_at_1"] == once["ensemble"]["worst"]["r_at_1"] < min(attacked)


def test_the_batch_size_does_not_change_the_figures(test_set, results, tmp_path):
    config = QUICK.model_copy(update={"batch_size": 32, "members": False})
    other = measure(undefended(), test_set, tmp_path, config=config)
    for key in KEYS:
        for name, value in results["ensemble"]["attacked"][key].items():
            assert other["ensemble"]["attacked"][key][name] == pytest.approx(value, abs=0.05), (key, name)


def test_evaluation_leaves_the_ensemble_as_it_was(test_set, tmp_path):
    ensemble = untrained(2).train()
    before = weights_digest([cpu_state(ensemble)])
    measure(ensemble, test_set, tmp_path)
    assert weights_digest([cpu_state(ensemble)]) == before
    assert all(module.training for module in ensemble.modules())
    assert all(parameter.requires_grad for parameter in ensemble.parameters())


def test_an_ensemble_of_one_is_its_member_and_is_measured_once(test_set, results, tmp_path):
    alone = measure(EmbeddingEnsemble([undefended().members[0]]), test_set, tmp_path)
    assert alone["members"] == [alone["ensemble"]] == [results["members"][0]]
    assert {name.split("-")[0] for name in stamps(tmp_path)} == {"ensemble"}
