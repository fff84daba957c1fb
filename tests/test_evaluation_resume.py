"""An evaluation that is interrupted, damaged or run again: what is kept, what is measured again, and the same bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from eat_dist.attacks import straight_through
from eat_dist.config import EvaluationConfig
from eat_dist.data.images import LabelledImages
from eat_dist.evaluation import evaluate
from eat_dist.models.ensemble import EmbeddingEnsemble
from eat_dist.storage import Folder
from evaluation_cases import (
    FULL,
    QUICK_OBJECTIVES,
    content,
    full_evaluation,
    measure,
    rewritten,
    stamps,
    undefended,
    unseen,
    untrained,
)

TWO_STEPS = EvaluationConfig(num_steps=2, kmeans_seeds=2)
ATTACKED = {f"ensemble-pgd2-{name}-linf-0.2.json" for name in QUICK_OBJECTIVES}


@dataclass(frozen=True)
class Stopping(Folder):
    """A folder whose writer is interrupted right after its n-th file."""

    files: int = 1
    written: list[str] = field(default_factory=list)

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        self.written.append(name)
        if len(self.written) == self.files:
            raise KeyboardInterrupt

    @classmethod
    def after(cls, files: int, location: Path) -> Stopping:
        folder = Folder.at(location)
        return cls(folder.filesystem, folder.path, files=files)


def part_names(attack: str) -> list[str]:
    """Of the quick protocol on two members, in the order in which they are measured."""
    models = ("ensemble", "member_0", "member_1")
    attacked = [f"{model}-{attack}-{name}-linf-0.2" for model in models for name in QUICK_OBJECTIVES]
    return [*(f"{model}-clean" for model in models), *attacked]


def stopped_after(files: int, location: Path, config: EvaluationConfig, **changes: Any) -> list[str] | None:
    """Evaluate; the names of the files written until the interruption, None where it did not come to one."""
    folder = Stopping.after(files, location)
    settings = {"config": config, "norm": "linf", "epsilon": 0.2, "seed": 0, "device": "cpu"} | changes
    try:
        evaluate(undefended(), unseen(12), **settings, folder=folder)
    except KeyboardInterrupt:
        return folder.written
    return None


def test_progress_counts_every_image_and_pass_once_whether_attacked_or_found(tmp_path: Path) -> None:
    """Three models, three objectives, two passes, 60 images; 50 a batch."""
    for _ in range(2):
        calls: list[tuple[str, float, float]] = []
        config = TWO_STEPS.model_copy(update={"batch_size": 50})
        measure(untrained(2), unseen(12), tmp_path, config=config, on_progress=lambda *call, to=calls: to.append(call))
        done = [call[1] for call in calls]
        assert done == sorted(done)
        assert done[-1] == 3 * 3 * 2 * 60
        assert {call[2] for call in calls} == {3 * 3 * 2 * 60}
        assert list(dict.fromkeys(call[0] for call in calls)) == part_names("pgd2")[3:]


def test_an_interrupted_evaluation_goes_on_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Interrupted in the middle of a part, by the user."""
    whole = measure(untrained(2), unseen(12), tmp_path / "whole", config=TWO_STEPS)

    def interrupt(part: str, done: float, total: float) -> None:
        if part.startswith("member_0-pgd2-random_wrong_centroid"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(untrained(2), unseen(12), tmp_path / "stopped", config=TWO_STEPS, on_progress=interrupt)
    before = stamps(tmp_path / "stopped")
    clean = {f"{name}-clean.json" for name in ("ensemble", "member_0", "member_1")}
    assert set(before) == ATTACKED | clean | {"member_0-pgd2-nearest_wrong_centroid-linf-0.2.json"}
    assert not (tmp_path / "stopped" / "summary.json").exists()
    assert measure(untrained(2), unseen(12), tmp_path / "stopped", config=TWO_STEPS) == whole
    assert not rewritten(tmp_path / "stopped", before) & set(before)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        measure(undefended(), unseen(12), tmp_path / name, config=TWO_STEPS, seed=seed)
    first = content(tmp_path / "first")
    assert set(first) >= {"summary.json", "results.parquet", "parts/ensemble-clean.json"}
    assert content(tmp_path / "again") == first
    other = content(tmp_path / "other")
    assert (
        other["parts/ensemble-pgd2-nearest_wrong_centroid-linf-0.2.json"]
        != first["parts/ensemble-pgd2-nearest_wrong_centroid-linf-0.2.json"]
    )


def test_stopped_after_every_single_file_it_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    """Every boundary of the quick protocol: each start writes one more file, and touches none that is there."""
    measure(undefended(), unseen(12), tmp_path / "whole", config=TWO_STEPS)
    written: list[str] = []
    while "summary.json" not in written:
        assert not (tmp_path / "stopped" / "summary.json").exists()
        # The table is written by every start that comes so far.
        written += stopped_after(1 + ("results.parquet" in written), tmp_path / "stopped", TWO_STEPS) or []
    names = [f"parts/{name}.json" for name in part_names("pgd2")]
    assert written == [*names, "results.parquet", "results.parquet", "summary.json"]
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("files", [20, 47, -1])
def test_a_full_evaluation_stopped_at_a_boundary_ends_as_an_uninterrupted_one(files: int, tmp_path: Path) -> None:
    """Slow: each is nearly a whole evaluation. Amid attacks; amid the ERS; −1: before the summary.

    The same configuration as the undisturbed one, whose bytes it must meet; what was there is not written again.
    """
    whole = content(full_evaluation().folder)
    count = len(whole) - 1 if files < 0 else files
    written = stopped_after(count, tmp_path, FULL)
    assert written is not None
    assert len(written) == count
    before = stamps(tmp_path)
    measure(undefended(), unseen(12), tmp_path, config=FULL)
    assert not rewritten(tmp_path, before) & set(before)
    assert content(tmp_path) == whole


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_digit(path: Path) -> None:
    part = json.loads(path.read_text(encoding="utf-8"))
    part["targets"]["ensemble"]["figures"]["r_at_1"] = 1.0
    path.write_text(json.dumps(part), encoding="utf-8")


def damage_foreign(path: Path) -> None:
    path.write_text("[1, 2]", encoding="utf-8")


@pytest.mark.parametrize("damage", [damage_truncate, damage_digit, damage_foreign, Path.unlink])
def test_only_a_missing_or_damaged_part_is_measured_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    first = measure(untrained(1), unseen(12), tmp_path, config=TWO_STEPS)
    name = "ensemble-pgd2-nearest_wrong_centroid-linf-0.2.json"
    damage(tmp_path / "parts" / name)
    before = stamps(tmp_path)
    assert measure(untrained(1), unseen(12), tmp_path, config=TWO_STEPS) == first
    assert rewritten(tmp_path, before) == {name}


def test_a_part_is_measured_again_when_what_it_depends_on_has_changed(tmp_path: Path) -> None:
    """Radius and norm are in the name, so parts of other ones lie side by side."""
    test_set = unseen(12)
    clean = {"ensemble-clean.json"}
    smaller = {name.replace("0.2", "0.1") for name in ATTACKED}
    euclidean = {name.replace("linf", "l2") for name in ATTACKED}
    other_range = untrained(1)
    other_range.members[0].mean += 0.1
    fewer = LabelledImages(test_set.images[1:], test_set.labels[1:], test_set.class_names, test_set.names[1:])
    other_pixels = copy.deepcopy(test_set)
    other_pixels.images[0, 0, 0, 0] += 1
    one_seed = TWO_STEPS.model_copy(update={"kmeans_seeds": 1})
    batches = TWO_STEPS.model_copy(update={"batch_size": 40})
    more_draws = TWO_STEPS.model_copy(update={"eot_draws": 2})
    for ensemble, images, changes, expected in (
        (untrained(1), test_set, {}, set()),
        (untrained(1), test_set, {"config": batches}, set()),
        (untrained(1), test_set, {"epsilon": 0.1}, smaller),
        (untrained(1), test_set, {"norm": "l2"}, euclidean),
        (untrained(1), test_set, {"config": more_draws}, ATTACKED),
        (untrained(1), test_set, {"seed": 1}, clean | ATTACKED),
        (untrained(1), test_set, {"config": one_seed}, clean | ATTACKED),
        (untrained(1, seed=1), test_set, {}, clean | ATTACKED),
        (other_range, test_set, {}, clean | ATTACKED),
        (untrained(1), fewer, {}, clean | ATTACKED),
        (untrained(1), other_pixels, {}, clean | ATTACKED),
    ):
        measure(untrained(1), test_set, tmp_path, config=TWO_STEPS)
        before = stamps(tmp_path)
        measure(ensemble, images, tmp_path, **({"config": TWO_STEPS} | changes))
        assert rewritten(tmp_path, before) == expected, changes


class Scaled(torch.nn.Module):
    """Code that weights do not show: a factor on the pixels."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = untrained(1).members[0], factor

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.inner(images * self.factor)
        return embeddings


def test_a_foreign_models_parts_are_measured_again_when_its_code_has_changed(tmp_path: Path) -> None:
    measure(Scaled(1.0), unseen(12), tmp_path, config=TWO_STEPS)
    before = stamps(tmp_path)
    measure(Scaled(1.0), unseen(12), tmp_path, config=TWO_STEPS)
    assert rewritten(tmp_path, before) == set()
    measure(Scaled(0.5), unseen(12), tmp_path, config=TWO_STEPS)
    assert rewritten(tmp_path, before) == ATTACKED | {"ensemble-clean.json"}


class Rounded(torch.nn.Module):
    """Rounded pixels, which have no slope; mended with the step that is straight through."""

    def __init__(self, *, mended: bool) -> None:
        super().__init__()
        self.inner, self.mended = untrained(1).members[0], mended

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rounded = (images * 15).round() / 15
        embeddings: torch.Tensor = self.inner(straight_through(images, rounded) if self.mended else rounded)
        return embeddings


def test_a_model_whose_masked_gradient_was_mended_does_not_get_its_old_figures_back(tmp_path: Path) -> None:
    """The same answers to the bit: the backward pass alone is another."""
    masked = measure(Rounded(mended=False), unseen(12), tmp_path / "one", config=TWO_STEPS)
    mended = measure(Rounded(mended=True), unseen(12), tmp_path / "one", config=TWO_STEPS)
    assert mended == measure(Rounded(mended=True), unseen(12), tmp_path / "fresh", config=TWO_STEPS)
    assert mended["ensemble"]["worst"]["r_at_1"] < masked["ensemble"]["worst"]["r_at_1"]


@pytest.mark.parametrize("build", [lambda factor: EmbeddingEnsemble([Scaled(factor)]), lambda _: untrained(1)])
def test_foreign_code_inside_an_ensemble_or_to_craft_on_is_noticed_too(
    build: Callable[[float], torch.nn.Module], tmp_path: Path
) -> None:
    for factor in (1.0, 0.5):
        found = measure(build(factor), unseen(12), tmp_path / "one", config=TWO_STEPS, other=Scaled(factor))
    assert found == measure(build(0.5), unseen(12), tmp_path / "fresh", config=TWO_STEPS, other=Scaled(0.5))


def test_a_part_in_which_only_the_checksum_is_wrong_is_measured_again(tmp_path: Path) -> None:
    """A negative control of the checksum itself: the fingerprint is right, and the figures look right."""
    measure(untrained(1), unseen(12), tmp_path, config=TWO_STEPS)
    path = tmp_path / "parts" / "ensemble-clean.json"
    part = json.loads(path.read_text(encoding="utf-8"))
    before = stamps(tmp_path)
    path.write_text(json.dumps(part | {"checksum": "0" * 64}), encoding="utf-8")
    measure(untrained(1), unseen(12), tmp_path, config=TWO_STEPS)
    assert rewritten(tmp_path, before) == {"ensemble-clean.json"}


class Noisy(torch.nn.Module):
    """A randomised defence: noise on the pixels, from torch's global generator."""

    def __init__(self) -> None:
        super().__init__()
        [self.inner] = undefended(1).members

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.inner(images + 0.1 * torch.randn_like(images))
        return embeddings


def test_a_randomised_model_gives_the_same_bytes_again_whatever_else_was_drawn(tmp_path: Path) -> None:
    """And whether it was interrupted or not; the caller's own random numbers go on as if there had been no model."""
    config = TWO_STEPS.model_copy(update={"eot_draws": 2, "batch_size": 25})
    model = Noisy()
    for name, seed in (("first", 1), ("again", 2)):
        torch.manual_seed(seed)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        measure(model, unseen(12), tmp_path / name, config=config)
        assert torch.equal(torch.rand(3), expected)
    assert content(tmp_path / "first") == content(tmp_path / "again")
    for path in sorted((tmp_path / "again" / "parts").iterdir())[1:]:
        path.unlink()
    measure(model, unseen(12), tmp_path / "again", config=config)
    assert content(tmp_path / "first") == content(tmp_path / "again")
