"""The quick protocol on small ensembles: what its figures must obey, and that it resumes."""

import copy
import json

import pytest
import torch

from eat_dist.attacks import Ball
from eat_dist.config import DataConfig, EvaluationConfig, LossConfig, ModelConfig
from eat_dist.data.images import LabelledImages
from eat_dist.data.load import load_dataset
from eat_dist.errors import ConfigError
from eat_dist.evaluation import OBJECTIVES, References, attack_batches, embed_images, evaluate
from eat_dist.losses import make_loss
from eat_dist.models.embedder import build_embedder
from eat_dist.models.ensemble import EmbeddingEnsemble, cpu_state, weights_digest
from eat_dist.seeding import generator
from eat_dist.storage import Folder

MODEL = ModelConfig(widths=(16, 32), embedding_dim=16)
CONFIG = EvaluationConfig(num_steps=10, kmeans_seeds=2)
QUICK_OBJECTIVES = EvaluationConfig().objectives
KEYS = [f"pgd10/{objective}" for objective in QUICK_OBJECTIVES]
CLUSTERING = ("nmi", "ami", "f1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small run slower on several threads than on one, up to 25 times where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig(dataset="digits"))


@pytest.fixture(scope="module")
def test_set(digits):
    """30 images of each of the 5 test classes."""
    chosen = torch.cat([(digits.test.labels == label).nonzero()[:30, 0] for label in range(5)])
    return LabelledImages(
        digits.test.images[chosen],
        digits.test.labels[chosen],
        digits.test.class_names,
        tuple(digits.test.names[index] for index in chosen.tolist()),
    )


def trained(digits, seed):
    """An undefended member after two seconds of training, clean R@1 above 0.8."""
    model = build_embedder(MODEL, in_channels=1, generator=generator(seed, "weights"))
    loss = make_loss(LossConfig(), num_classes=5, embedding_dim=16, generator=generator(seed, "proxies"))
    groups = [{"params": model.parameters()}, {"params": loss.parameters(), "lr": 0.1}]
    optimiser = torch.optim.AdamW(groups, lr=1e-3)
    drawn = generator(seed, "batches")
    for _ in range(120):
        indices = torch.randint(len(digits.train), (60,), generator=drawn)
        batch = digits.train.batch(indices, "cpu")
        optimiser.zero_grad()
        loss(model(batch.images), batch.labels).backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def undefended(digits):
    return EmbeddingEnsemble([trained(digits, seed) for seed in range(2)])


def untrained(members, seed=0):
    return EmbeddingEnsemble(
        [build_embedder(MODEL, in_channels=1, generator=generator(seed, rank)).eval() for rank in range(members)]
    )


def measure(ensemble, images, location, **changes):
    settings = {"config": CONFIG, "norm": "linf", "epsilon": 0.2, "seed": 0, "device": "cpu"}
    return evaluate(ensemble, images, **(settings | changes), folder=Folder.at(location))


@pytest.fixture(scope="module")
def results(undefended, test_set, tmp_path_factory):
    """The undefended ensemble at ε = 0.2."""
    return measure(undefended, test_set, tmp_path_factory.mktemp("results"))


def embed(model, images):
    [embeddings] = embed_images([model], images, batch_size=150, device="cpu")
    return embeddings


def craft(model, images, objective, *, norm="linf", epsilon=0.2, num_steps=10, batch_size=150, seed=0):
    """All attacked images."""
    batches = attack_batches(
        model,
        images,
        objective=objective,
        references=References.of(embed(model, images), images, seed=seed),
        ball=Ball(norm, epsilon),
        num_steps=num_steps,
        step_size=epsilon / 4,
        batch_size=batch_size,
        seed=seed,
        device="cpu",
    )
    return torch.cat([batch.adversarial for batch in batches])


def stamps(folder):
    """Which file each part is: a rewritten one is a new file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (folder / "parts").iterdir()}


def rewritten(folder, before):
    return {name for name, stamp in stamps(folder).items() if before.get(name) != stamp}


def test_embedding_restores_the_mode_and_keeps_the_running_statistics(test_set):
    model = untrained(1).train()
    before = weights_digest([cpu_state(model)])
    embeddings = embed(model, test_set)
    assert all(module.training for module in model.modules())
    assert weights_digest([cpu_state(model)]) == before
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (150, 16)
    assert not embeddings.requires_grad
    assert torch.equal(embeddings, embed(model.eval(), test_set))


def test_several_models_are_embedded_as_each_alone(test_set):
    models = [untrained(2), *untrained(2, seed=1).members]
    together = embed_images(models, test_set, batch_size=150, device="cpu")
    for model, embeddings in zip(models, together, strict=True):
        assert torch.equal(embeddings, embed(model, test_set))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", QUICK_OBJECTIVES)
def test_attacked_images_stay_inside_the_ball_and_the_pixel_range(undefended, test_set, objective, norm):
    epsilon = {"linf": 0.2, "l2": 1.0}[norm]
    attacked = craft(undefended, test_set, objective, norm=norm, epsilon=epsilon)
    clean = test_set.batch(torch.arange(len(test_set)), "cpu").images
    order = float("inf") if norm == "linf" else 2
    lengths = torch.linalg.vector_norm((attacked - clean).flatten(1), ord=order, dim=1)
    assert attacked.dtype == torch.float32
    assert float(lengths.max()) <= epsilon + 1e-6
    assert float(lengths.min()) > epsilon / 2
    assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1


@pytest.mark.parametrize("objective", QUICK_OBJECTIVES)
def test_the_batch_size_does_not_change_the_attack(undefended, test_set, objective):
    """Up to rounding: another kernel for another batch size may flip the sign of a gradient near zero."""
    whole = craft(undefended, test_set, objective)
    for batch_size in (7, 64):
        parts = craft(undefended, test_set, objective, batch_size=batch_size)
        different = (parts - whole).abs() > 1e-6
        assert different.float().mean() < 0.01


def test_random_starts_depend_on_seed_objective_and_image(test_set):
    model = untrained(1)

    def starts(images, seed, objective):
        return craft(model, images, objective, num_steps=0, batch_size=64, seed=seed)

    first = starts(test_set, 0, "displacement")
    assert torch.equal(first, starts(test_set, 0, "displacement"))
    assert not torch.equal(first, starts(test_set, 1, "displacement"))
    assert not torch.equal(first, starts(test_set, 0, "random_wrong_centroid"))
    same_image = LabelledImages(
        test_set.images[:1].expand(2, -1, -1, -1).clone(), torch.tensor([0, 1]), ("a", "b"), ("a", "b")
    )
    one, other = starts(same_image, 0, "displacement")
    assert not torch.equal(one, other)


def test_wrong_classes_are_wrong_and_of_all_kinds(test_set):
    references = References.of(embed(untrained(1), test_set), test_set, seed=0)
    assert not (references.wrong_classes == test_set.labels).any()
    pairs = set(zip(test_set.labels.tolist(), references.wrong_classes.tolist(), strict=True))
    assert len(pairs) == 5 * 4


def test_an_unknown_objective_is_named_with_the_known_ones(test_set):
    with pytest.raises(ConfigError, match=r"no evaluation objective is called 'displacemen'.*displacement"):
        craft(untrained(1), test_set, "displacemen")
    assert set(QUICK_OBJECTIVES) <= set(OBJECTIVES)


def test_epsilon_zero_gives_exactly_the_clean_figures(undefended, test_set, tmp_path):
    results = measure(undefended, test_set, tmp_path, epsilon=0.0)
    for target in (results["ensemble"], *results["members"]):
        for attacked in target["attacked"].values():
            assert {name: attacked[name] for name in target["clean"]} == target["clean"]
            assert attacked["r_at_1_all_attacked"] == target["clean"]["r_at_1"]
            assert (attacked["success_rate"], attacked["largest_perturbation"]) == (0.0, 0.0)
        assert target["worst"] == {name: target["clean"][name] for name in ("r_at_1", *CLUSTERING)}


def test_a_larger_epsilon_is_not_weaker_and_a_large_one_breaks_an_undefended_ensemble(
    undefended, test_set, results, tmp_path
):
    runs = [measure(undefended, test_set, tmp_path, epsilon=epsilon) for epsilon in (0.05, 0.1)]
    runs += [results, measure(undefended, test_set, tmp_path, epsilon=1.0)]
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
            assert target["worst"][name] == min(a[name] for a in attacked)


def test_the_reported_perturbation_is_inside_the_ball_and_moves_the_embeddings(results):
    for target in (results["ensemble"], *results["members"]):
        for attacked in target["attacked"].values():
            assert 0.1 < attacked["largest_perturbation"] <= 0.2 + 1e-6
            assert 0 < attacked["mean_displacement"] <= 2


def test_results_are_the_file_and_have_the_promised_form(undefended, test_set, tmp_path):
    results = measure(undefended, test_set, tmp_path, norm="l2", epsilon=1)
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
    head = {key: value for key, value in results.items() if key not in ("ensemble", "members")}
    assert head == {
        "schema": 2,
        "protocol": "quick",
        "norm": "l2",
        "epsilon": 1,
        "num_steps": 10,
        "seed": 0,
        "images": 150,
        "classes": 5,
        "retrieval": "all_against_all",
        "queries": 150,
        "gallery": 150,
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
    for target in (results["ensemble"], *results["members"]):
        assert set(target["clean"]) == figures
        assert list(target["attacked"]) == KEYS
        assert all(set(attacked) == figures | more for attacked in target["attacked"].values())
        assert set(target["worst"]) == {"r_at_1", *CLUSTERING}


def test_the_batch_size_does_not_change_the_figures(undefended, test_set, results, tmp_path):
    config = CONFIG.model_copy(update={"batch_size": 32})
    other = measure(undefended, test_set, tmp_path, config=config)
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


def test_an_ensemble_of_one_is_its_member_and_is_measured_once(undefended, test_set, results, tmp_path):
    alone = measure(EmbeddingEnsemble([undefended.members[0]]), test_set, tmp_path)
    assert alone["members"] == [alone["ensemble"]] == [results["members"][0]]
    assert {name.split("-")[0] for name in stamps(tmp_path)} == {"ensemble"}


def test_progress_counts_every_image_once_whether_attacked_or_found(test_set, tmp_path):
    for _ in range(2):
        calls = []

        def keep(part, done, total, calls=calls):
            calls.append((part, done, total))

        measure(untrained(2), test_set, tmp_path, on_progress=keep)
        done = [call[1] for call in calls]
        assert done == sorted(done)
        assert done[-1] == 3 * 3 * 150
        assert {call[2] for call in calls} == {3 * 3 * 150}
        assert {call[0] for call in calls} == {
            f"{target} {key}" for target in ("ensemble", "member_0", "member_1") for key in KEYS
        }


def test_an_interrupted_evaluation_goes_on_and_ends_as_an_uninterrupted_one(test_set, tmp_path):
    whole = measure(untrained(2), test_set, tmp_path / "whole")

    def interrupt(part, done, total):
        if part == "member_0 pgd10/nearest_wrong_centroid":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(untrained(2), test_set, tmp_path / "stopped", on_progress=interrupt)
    before = stamps(tmp_path / "stopped")
    finished = {f"ensemble-pgd10-{name}.json" for name in QUICK_OBJECTIVES}
    assert set(before) == finished | {
        "ensemble-clean.json",
        "member_0-clean.json",
        "member_0-pgd10-displacement.json",
    }
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert measure(untrained(2), test_set, tmp_path / "stopped") == whole
    assert not rewritten(tmp_path / "stopped", before) & set(before)
    assert set(stamps(tmp_path / "stopped")) == set(stamps(tmp_path / "whole"))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_digit(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    content["figures"]["r_at_1"] = 1.0
    path.write_text(json.dumps(content), encoding="utf-8")


def damage_foreign(path):
    path.write_text("[1, 2]", encoding="utf-8")


@pytest.mark.parametrize("damage", [damage_truncate, damage_digit, damage_foreign, lambda path: path.unlink()])
def test_only_a_missing_or_damaged_part_is_measured_again(test_set, tmp_path, damage):
    first = measure(untrained(1), test_set, tmp_path)
    damage(tmp_path / "parts" / "ensemble-pgd10-displacement.json")
    before = stamps(tmp_path)
    assert measure(untrained(1), test_set, tmp_path) == first
    assert rewritten(tmp_path, before) == {"ensemble-pgd10-displacement.json"}


def test_a_part_is_measured_again_when_what_it_depends_on_has_changed(test_set, tmp_path):
    clean = {"ensemble-clean.json"}
    attacked = {f"ensemble-pgd2-{name}.json" for name in QUICK_OBJECTIVES}
    two_steps = EvaluationConfig(num_steps=2, kmeans_seeds=2)
    other_range = untrained(1)
    other_range.members[0].mean += 0.1
    fewer = LabelledImages(test_set.images[1:], test_set.labels[1:], test_set.class_names, test_set.names[1:])
    other_pixels = copy.deepcopy(test_set)
    other_pixels.images[0, 0, 0, 0] += 1
    one_seed = two_steps.model_copy(update={"kmeans_seeds": 1})
    batches = two_steps.model_copy(update={"batch_size": 100})
    for ensemble, images, changes, expected in (
        (untrained(1), test_set, {}, set()),
        (untrained(1), test_set, {"config": batches}, set()),
        (untrained(1), test_set, {"epsilon": 0.1}, attacked),
        (untrained(1), test_set, {"norm": "l2"}, attacked),
        (untrained(1), test_set, {"seed": 1}, clean | attacked),
        (untrained(1), test_set, {"config": one_seed}, clean | attacked),
        (untrained(1, seed=1), test_set, {}, clean | attacked),
        (other_range, test_set, {}, clean | attacked),
        (untrained(1), fewer, {}, clean | attacked),
        (untrained(1), other_pixels, {}, clean | attacked),
    ):
        measure(untrained(1), test_set, tmp_path, config=two_steps)
        before = stamps(tmp_path)
        measure(ensemble, images, tmp_path, **({"config": two_steps} | changes))
        assert rewritten(tmp_path, before) == expected, changes


def test_a_model_with_nan_weights_is_refused(test_set, tmp_path):
    ensemble = untrained(1)
    with torch.no_grad():
        ensemble.members[0].head.bias[0] = float("nan")
    with pytest.raises(ValueError, match="must be finite; 150 of 150"):
        measure(ensemble, test_set, tmp_path)
