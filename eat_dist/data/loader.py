"""A member's batches, any iteration at once: from images decoded once, or decoded anew by worker processes.

What a batch holds is a pure function of run, member and iteration (:class:`BatchPlan`); how it is made does not change
it, so a resumed run needs no state. docs/loading.md says when which way is taken, and what it costs.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from eat_dist.batch import Batch
from eat_dist.config import DataConfig
from eat_dist.data.augmentation import Crops, crop_and_flip, crop_and_flip_batch, draw_crops
from eat_dist.data.cache import Decoded, Decoding, Pixels, decoded_bytes, free_memory, readable, sent
from eat_dist.data.images import ImageSet, LabelledImages
from eat_dist.data.samplers import Sampler, make_sampler
from eat_dist.errors import ConfigError, DataError, EatError
from eat_dist.seeding import derive_seed, generator

Indices = npt.NDArray[np.int64]

_PREFETCH = 2  # batches each worker makes ahead
_MOST_WORKERS = 8  # by default: a batch takes an attack's many passes, so a few decoders keep up with a GPU


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """What every iteration of a member sees; picklable.

    Attributes:
        sampler: Draws from the split.
        split: [n] int64, the member's images in the training set; repeats are allowed.
        sizes: [N, 2] int64, height and width of the training set's images; None: they are not augmented.
        seed: The run's.
        rank: The member's.
        rows: Of each batch, those whose images are made: all but where several replicas train a member.
    """

    sampler: Sampler
    split: Indices
    sizes: torch.Tensor | None
    seed: int
    rank: int
    rows: slice

    def draw(self, iteration: int) -> tuple[torch.Tensor, Crops | None]:
        """[B] int64 indices into the training set and, with augmentation, the crop of each."""
        indices = torch.from_numpy(self.split[self.sampler.batch_indices(iteration)])
        if self.sizes is None:
            return indices, None
        return indices, draw_crops(self.sizes[indices], generator(self.seed, "augmentation", self.rank, iteration))


class Loader:
    """One member's batches. A context manager: leaving it ends the worker processes.

    Attributes:
        description: One line: how batches are made, why so, and with how much memory.
    """

    def __init__(self, source: _Source, labels: torch.Tensor, device: torch.device, description: str) -> None:
        self._source = source
        self._labels = labels
        self._device = device
        self.description = description

    def batch(self, iteration: int) -> Batch:
        """The batch of an iteration. Asked for in order, workers have it ready; any other one may be asked for.

        Nothing here waits for a GPU.

        Returns:
            Images [B, C, S, S] float32 in [0, 1] (of the plan's rows alone) and labels on the device, indices into the
            training set on the CPU.

        Raises:
            DataError: An image cannot be decoded, or a worker process died.
        """
        images, indices = self._source.take(iteration)
        if images.dtype == torch.uint8:  # they travel so, a quarter of the float32 bytes
            images = images.to(self._device, non_blocking=True).float().div_(255)
        return Batch(images=images, labels=sent(self._labels[indices], self._device), indices=indices)

    def close(self) -> None:
        """End the worker processes, if there are any; the last call."""
        self._source.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def make_loader(
    config: DataConfig,
    images: ImageSet,
    *,
    split: npt.ArrayLike,
    seed: int,
    rank: int,
    device: torch.device,
    members_here: int,
    cpus: int,
    rows: slice = slice(None),
) -> Loader:
    """The configured way to a member's batches.

    Args:
        config: ``cache``, ``workers``, ``augmentation``, and the sampler's settings.
        images: The training set.
        split: [n] indices of the member's images in it.
        seed: The run's.
        rank: The member's.
        device: Where batches go.
        members_here: Members that share the device's memory: one GPU's, or on CPUs the machine's.
        cpus: CPUs of this member; ``workers`` leaves one of them to training by default.
        rows: Of each batch, those whose images are wanted.

    Raises:
        ConfigError: ``cache`` is ``device``, and the decoded images do not fit.
        DataError: The split holds fewer than two classes, or an image to be kept cannot be decoded.
    """
    split = np.ascontiguousarray(split, dtype=np.int64)
    sampler = make_sampler(config, images.labels[torch.from_numpy(split)], seed=derive_seed(seed, "sampler", rank))
    sizes = images.sizes if config.augmentation == "crop_flip" else None
    plan = BatchPlan(sampler, split, sizes, seed, rank, rows)
    decoding = _BatchMaker(plan, Decoding(images), images.image_shape[1])
    if config.cache != "none" and isinstance(images, LabelledImages) and device.type == "cpu":
        return Loader(decoding, images.labels, device, f"{len(images)} images, in memory already")

    kept = np.unique(split)
    needed = decoded_bytes(images, kept, as_stored=sizes is not None)
    free = free_memory(device) // members_here
    sharing = f" for each of {members_here} members" if members_here > 1 else ""
    what = f"{len(kept)} decoded images take {readable(needed)}, {readable(free)} of memory is free{sharing}"
    if config.cache == "device" and needed > free:
        raise ConfigError(f"data.cache is device, but {what} ({device}); prepare smaller images, or set it to none")
    if config.cache == "device" or (config.cache == "auto" and needed <= free / 2):
        decoded = Decoded(images, kept, as_stored=sizes is not None, device=device, threads=max(1, cpus))
        maker = _BatchMaker(plan, decoded, images.image_shape[1])
        return Loader(maker, images.labels, device, f"decoded once and kept on {device}: {what}")
    why = "data.cache is none" if config.cache == "none" else f"{what} ({device})"
    workers = _default_workers(cpus, device) if config.workers is None else config.workers
    if not workers:
        return Loader(decoding, images.labels, device, f"decoded anew for each batch: {why}")
    ahead = readable(workers * _PREFETCH * config.batch_size * int(np.prod(images.image_shape)))
    description = f"decoded anew by worker processes ({workers}, with {ahead} of batches ahead): {why}"
    source = _Workers(decoding, workers, pin=device.type == "cuda", seed=derive_seed(seed, "loader", rank))
    return Loader(source, images.labels, device, description)


class _Source(Protocol):
    """Where images come from: [B, C, S, S], uint8 on the CPU or device or float32 in [0, 1], and the [B] indices.

    The images are those of the plan's rows, the indices the whole batch's.
    """

    def take(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]: ...

    def close(self) -> None: ...


class _BatchMaker:
    """Carries out the plan on decoded images, in the process and thread that asks."""

    def __init__(self, plan: BatchPlan, pixels: Pixels, size: int) -> None:
        self._plan = plan
        self._pixels = pixels
        self._size = size

    def take(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices, crops = self._plan.draw(iteration)
        rows = self._plan.rows
        if crops is None:
            return self._pixels.centred(indices[rows]), indices
        crops, wanted = crops[rows], indices[rows].tolist()
        # Each image once, in the order on disk: neighbours are read together.
        different = {index: self._pixels.stored(index) for index in sorted(set(wanted))}
        stored = [different[index] for index in wanted]
        if stored[0].is_cuda:
            return crop_and_flip_batch(stored, crops, self._size), indices
        # Filled, for stack would take on the memory format of decoded images.
        cropped = torch.empty(len(stored), len(stored[0]), self._size, self._size, dtype=torch.uint8)
        for room, image, crop in zip(cropped, stored, crops, strict=True):
            room.copy_(crop_and_flip(image, crop, self._size))
        return cropped, indices

    def close(self) -> None:
        pass


class _InWorker(Dataset[Any]):
    """What a worker process runs. An error of the user's is handed over as it is: raised, torch would wrap it."""

    def __init__(self, maker: _BatchMaker) -> None:
        self._maker = maker

    def __getitem__(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor] | EatError:
        try:
            return self._maker.take(iteration)
        except EatError as error:
            return error


class _Iterations:
    """Iteration numbers from ``first`` on, without an end."""

    first = 0

    def __iter__(self) -> Iterator[int]:
        return count(self.first)


class _Workers:
    """A stream of batches that worker processes make ahead; an iteration out of order starts it anew.

    The processes are spawned, from any thread: a forked one could inherit a lock that another member's thread, CUDA or
    Ray holds. They start with the first batch.
    """

    def __init__(self, maker: _BatchMaker, workers: int, *, pin: bool, seed: int) -> None:
        self._iterations = _Iterations()
        self._loader = DataLoader(
            _InWorker(maker),
            batch_size=None,  # an item is a whole batch
            sampler=self._iterations,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            persistent_workers=True,
            pin_memory=pin,
            multiprocessing_context="spawn",
            worker_init_fn=_end_with_member,
            generator=torch.Generator().manual_seed(seed),  # else it would draw from the global one
        )
        self._stream: Any = None
        self._next = 0

    def take(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            if self._stream is None or iteration != self._next:
                self._iterations.first = iteration
                self._stream = iter(self._loader)
            made = next(self._stream)
        except (RuntimeError, OSError, EOFError) as error:
            if not _is_death(error):
                raise
            raise DataError(
                "a process that decodes images died; if memory or shared memory (/dev/shm) ran out, lower data.workers "
                "(0: decode in the member's own process) or prepare smaller images"
            ) from error
        self._next = iteration + 1
        if isinstance(made, EatError):
            raise made
        images, indices = made
        return images, indices

    def close(self) -> None:
        if self._stream is not None:
            self._stream._shutdown_workers()  # torch has no public way that does not wait for garbage collection


def _end_with_member(worker: int) -> None:
    """In a worker: end when the member's process ends, whatever ends it; torch's own watch begins too late."""
    member = multiprocessing.parent_process()
    assert member is not None

    def watch() -> None:
        member.join()
        os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def _default_workers(cpus: int, device: torch.device) -> int:
    least = 1 if device.type == "cuda" else 0  # beside a GPU the training process hardly computes
    return min(_MOST_WORKERS, max(least, cpus - 1))


def _is_death(error: Exception) -> bool:
    """Whether torch says that a worker died, or its connection broke; what a living worker raised says so instead."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in str(error)
