"""Every way to make batches gives the same batches, at any iteration, and ends with one line when it cannot."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from eat_dist.batch import Batch
from eat_dist.config import DataConfig
from eat_dist.data.images import ImageSet, Indices, LabelledImages
from eat_dist.data.loader import Loader, make_loader
from eat_dist.data.samplers import make_sampler
from eat_dist.errors import ConfigError, DataError
from eat_dist.seeding import derive_seed, generator

CPU = torch.device("cpu")
COUNT, CLASSES, SIZE = 40, 4, 12


@dataclass
class Ragged:
    """Images of many sizes that are made when they are asked for, as a set on disk decodes its own."""

    image_shape: tuple[int, int, int] = (3, SIZE, SIZE)
    claimed: int = 1  # each side is said to be this × as long
    bad: int | None = None
    labels: torch.Tensor = field(default_factory=lambda: torch.arange(COUNT) % CLASSES)
    class_names: tuple[str, ...] = tuple("abcd")
    names: tuple[str, ...] = tuple(f"{index}.jpg" for index in range(COUNT))
    is_query: torch.Tensor | None = None
    num_classes: int = CLASSES

    @property
    def sizes(self) -> torch.Tensor:
        return torch.randint(1, 30, (COUNT, 2), generator=generator("sizes")) * self.claimed

    def __len__(self) -> int:
        return COUNT

    def stored(self, index: int) -> torch.Tensor:
        if index == self.bad:
            raise DataError(f"cannot decode image '{self.names[index]}': truncated")
        height, width = (self.sizes[index] // self.claimed).tolist()
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator("pixels", index))

    def batch(self, indices: Indices, device: torch.device | str) -> Batch:
        chosen = torch.as_tensor(indices)
        scaled = [functional.resize(self.stored(index), [SIZE, SIZE]) for index in chosen.tolist()]
        return Batch(images=torch.stack(scaled).to(device) / 255, labels=self.labels[chosen].to(device), indices=chosen)

    def digest(self) -> str:
        return ""


def in_memory() -> LabelledImages:
    pixels = torch.randint(0, 256, (COUNT, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator("in memory"))
    return LabelledImages(pixels, Ragged().labels, Ragged().class_names, Ragged().names)


def config_of(**settings: Any) -> DataConfig:
    return DataConfig(**{"batch_size": 8, "images_per_class": 4, "augmentation": "crop_flip", **settings})


def loader_of(config: DataConfig, images: ImageSet, split: Any = None, **settings: Any) -> Loader:
    settings = {"seed": 0, "rank": 0, "device": CPU, "members_here": 1, "cpus": 2, **settings}
    return make_loader(config, images, split=np.arange(COUNT) if split is None else split, **settings)


def same(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("images", "labels", "indices"))


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_replica_gets_its_own_rows_of_the_images_and_all_labels(augmentation: str, cache: str) -> None:
    config = config_of(augmentation=augmentation, cache=cache, workers=0)
    whole = loader_of(config, Ragged()).batch(3)
    for index in range(2):
        part = loader_of(config, Ragged(), rows=slice(index, None, 2)).batch(3)
        assert torch.equal(part.images, whole.images[index::2])
        assert torch.equal(part.labels, whole.labels)
        assert torch.equal(part.indices, whole.indices)


@dataclass
class Streaming:
    """Loaders with worker processes, each of a thread of its own, as members of one process have them."""

    loaders: dict[str, Loader]
    threads: dict[str, ThreadPoolExecutor]
    random_state_kept: bool

    def batch(self, name: str, iteration: int) -> Batch:
        return self.threads[name].submit(self.loaders[name].batch, iteration).result()


@pytest.fixture(scope="module")
def streaming() -> Iterator[Streaming]:
    """Started once: a process takes seconds to import torch."""
    before = torch.get_rng_state()
    loaders = {
        "crop_flip": loader_of(config_of(cache="none", workers=2), Ragged()),
        "none": loader_of(config_of(cache="none", workers=1, augmentation="none"), Ragged()),
    }
    threads = {name: ThreadPoolExecutor(1) for name in loaders}
    started = [threads[name].submit(loader.batch, 0) for name, loader in loaders.items()]
    for first in started:
        first.result()
    yield Streaming(loaders, threads, torch.equal(torch.get_rng_state(), before))
    for name, loader in loaders.items():
        threads[name].submit(loader.close).result()
        threads[name].shutdown()
    assert not multiprocessing.active_children(), "close must end the workers"


@pytest.mark.parametrize("augmentation", ["crop_flip", "none"])
def test_cache_and_workers_do_not_change_a_bit_of_any_batch(streaming: Streaming, augmentation: str) -> None:
    decoded_once = loader_of(config_of(cache="device", augmentation=augmentation), Ragged())
    anew = loader_of(config_of(cache="none", workers=0, augmentation=augmentation), Ragged())
    for iteration in range(12):
        expected = anew.batch(iteration)
        assert same(decoded_once.batch(iteration), expected)
        assert same(streaming.batch(augmentation, iteration), expected)


def test_any_iteration_can_be_asked_for_at_any_time(streaming: Streaming) -> None:
    in_order = loader_of(config_of(cache="device"), Ragged())
    expected = [in_order.batch(iteration) for iteration in range(30)]
    for iteration in (7, 8, 3, 3, 29, 0, 1, 2, 15):  # on, back, again, far on
        assert same(streaming.batch("crop_flip", iteration), expected[iteration])
        assert same(loader_of(config_of(cache="device"), Ragged()).batch(iteration), expected[iteration])


def test_nothing_is_drawn_from_the_global_generator(streaming: Streaming) -> None:
    assert streaming.random_state_kept
    before = torch.get_rng_state()
    loader_of(config_of(cache="device"), Ragged()).batch(0)
    streaming.batch("crop_flip", 100)  # starts the stream anew
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("images", [Ragged(), in_memory()])
@pytest.mark.parametrize("augmentation", ["crop_flip", "none"])
def test_a_batch_holds_the_samplers_images_with_their_labels(images: ImageSet, augmentation: str) -> None:
    config = config_of(augmentation=augmentation)
    split = np.arange(0, COUNT, 1)[::-3]
    loader = loader_of(config, images, split=split, seed=3, rank=2)
    sampler = make_sampler(config, images.labels[split.copy()], seed=derive_seed(3, "sampler", 2))
    for iteration in range(10):
        batch = loader.batch(iteration)
        assert np.array_equal(batch.indices.numpy(), split[sampler.batch_indices(iteration)])
        assert torch.equal(batch.labels, images.labels[batch.indices])
        assert batch.images.shape == (8, 3, SIZE, SIZE)
        assert batch.images.dtype == torch.float32
        assert 0 <= float(batch.images.min()) < 0.1
        assert 0.9 < float(batch.images.max()) <= 1
        if augmentation == "none":
            assert torch.equal(batch.images, images.batch(batch.indices, "cpu").images)


@pytest.mark.parametrize("cache", ["device", "none"])
def test_a_member_sees_its_split_only_and_repeats_in_it_are_allowed(cache: str) -> None:
    split = np.array([1, 1, 5, 6, 9, 10, 10, 14])
    loader = loader_of(config_of(cache=cache, workers=0), Ragged(bad=2), split=split)  # image 2 is not even decoded
    seen = {index for iteration in range(20) for index in loader.batch(iteration).indices.tolist()}
    assert seen == set(split.tolist())


def test_members_see_different_batches_and_a_run_repeats_itself() -> None:
    first, again, other = (loader_of(config_of(), in_memory(), rank=rank) for rank in (0, 0, 1))
    assert same(first.batch(4), again.batch(4))
    assert not torch.equal(first.batch(4).indices, other.batch(4).indices)


def test_an_image_is_cropped_otherwise_whenever_it_is_drawn() -> None:
    # Every iteration draws all eight images.
    loader = loader_of(config_of(images_per_class=2), in_memory(), split=np.arange(8))
    first, second = (dict(zip(b.indices.tolist(), b.images, strict=True)) for b in map(loader.batch, (0, 1)))
    assert all(not torch.equal(first[index], second[index]) for index in first)


def test_a_bad_image_is_one_line_from_a_worker_and_from_the_cache() -> None:
    images = Ragged(bad=5)
    line = r"^cannot decode image '5\.jpg': truncated$"
    with pytest.raises(DataError, match=line):
        loader_of(config_of(cache="device"), images)

    def iterate() -> None:
        with loader_of(config_of(cache="none", workers=1), images) as loader:
            for iteration in range(20):
                loader.batch(iteration)

    with ThreadPoolExecutor(1) as thread, pytest.raises(DataError, match=line):
        thread.submit(iterate).result()


def test_a_worker_that_dies_is_one_line_that_says_what_to_do() -> None:
    known = {child.pid for child in multiprocessing.active_children()}

    def iterate() -> None:
        with loader_of(config_of(cache="none", workers=1), Ragged()) as loader:
            loader.batch(0)
            (worker,) = (child for child in multiprocessing.active_children() if child.pid not in known)
            os.kill(worker.pid or 0, signal.SIGKILL)
            for iteration in range(1, 10):  # some were made already
                loader.batch(iteration)

    # A thread, as a member is: in the main thread torch would raise from its own signal handler.
    with ThreadPoolExecutor(1) as thread, pytest.raises(DataError, match=r"data\.workers") as caught:
        thread.submit(iterate).result()
    assert "\n" not in str(caught.value)


def test_auto_keeps_images_that_fit_and_decodes_anew_what_does_not() -> None:
    assert "in memory already" in loader_of(config_of(), in_memory()).description
    assert "decoded once" in loader_of(config_of(), Ragged()).description
    huge = Ragged(claimed=10**5)
    assert "decoded anew" in loader_of(config_of(), huge).description
    assert "decoded once" in loader_of(config_of(augmentation="none"), huge).description  # 12 × 12 is all that is kept
    assert "decoded anew" in loader_of(config_of(), Ragged(), members_here=10**9).description


def test_a_cache_that_cannot_fit_is_refused_with_what_is_needed_and_there() -> None:
    with pytest.raises(ConfigError, match=r"40 decoded images take \d+\.\d GiB, .* GiB of memory is free") as caught:
        loader_of(config_of(cache="device"), Ragged(claimed=10**5))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has CPUs
def test_workers_are_by_default_the_cpus_but_one() -> None:
    # No process is started before the first batch.
    described = {cpus: loader_of(config_of(cache="none"), Ragged(), cpus=cpus).description for cpus in (1, 2, 5, 99)}
    assert "worker" not in described[1]
    for cpus, workers in ((2, 1), (5, 4), (99, 8)):
        assert f"worker processes ({workers}," in described[cpus]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("augmentation", ["crop_flip", "none"])
def test_on_a_gpu_batches_are_within_one_level_and_nothing_waits_for_it(augmentation: str) -> None:
    config = config_of(cache="device", augmentation=augmentation)
    loader = loader_of(config, Ragged(), device=torch.device("cuda", 0))
    loader.batch(0)  # pins memory for the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [loader.batch(iteration) for iteration in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = loader_of(config, Ragged())
    for iteration, batch in enumerate(batches):
        expected = on_cpu.batch(iteration)
        assert torch.equal(batch.labels.cpu(), expected.labels)
        assert float((batch.images.cpu() - expected.images).abs().max()) < 1.001 / 255
