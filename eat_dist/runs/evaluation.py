"""Evaluating a target: from what the user named to the results in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from eat_dist.config import RunConfig
from eat_dist.console import Console
from eat_dist.cpus import usable_cpus
from eat_dist.data.images import ImageSet
from eat_dist.data.load import load_test_set
from eat_dist.errors import ClusterError, ConfigError
from eat_dist.evaluation import Alone, Victim, Workers, evaluate
from eat_dist.evaluation.model_check import check_epsilons, check_images, check_model
from eat_dist.evaluation.sizes import ENOUGH_DRAWS
from eat_dist.in_process import choose_device
from eat_dist.runs.defended import with_defense
from eat_dist.runs.target import Target, open_target
from eat_dist.storage import Folder


@dataclass(frozen=True)
class Subject:
    """What is evaluated, in words: every worker opens it for itself.

    Attributes:
        target: As :func:`eat_dist.runs.target.open_target` takes it.
        config: The test set, the sizes of the attacks, seed and cluster.
        normalise: Scale a foreign model's embeddings to length 1.
        other: Another target, on which transfer attacks are crafted.
    """

    target: str
    config: RunConfig
    normalise: bool = False
    other: str | None = None

    @cached_property
    def opened(self) -> Target:
        """The target, behind the config's defense at inference."""
        return with_defense(self._open(self.target), self.config)

    @cached_property
    def opened_other(self) -> Target | None:
        """The other target, as it was saved."""
        return None if self.other is None else self._open(self.other)

    @cached_property
    def test(self) -> ImageSet:
        """The test set, checked against what the models were built for.

        Raises:
            DataError: The images are of another shape, or have black and white exchanged.
        """
        data = load_test_set(self.config.data)
        for target in (self.opened, self.opened_other):
            if target is not None:
                check_images(data.test, model_shape=target.image_shape)
                if target.image_shape is not None and target.inverted != data.inverted:
                    raise ConfigError(
                        f"'{target.name}' was trained on images with black and white "
                        f"{'exchanged' if target.inverted else 'as they are'}, those of the test set "
                        f"'{self.config.data.dataset}' are {'exchanged' if data.inverted else 'not'}; choose its data"
                    )
        return data.test

    def victim(self, device: torch.device) -> Victim:
        """The models with the test set, on a device."""
        other = None if self.opened_other is None else self.opened_other.model
        return Victim.of(self.opened.model, self.test, seed=self.config.seed, device=device, other=other)

    def __getstate__(self) -> dict[str, Any]:
        """Words alone travel to workers, not what was opened here."""
        return {name: getattr(self, name) for name in ("target", "config", "normalise", "other")}

    def _open(self, text: str) -> Target:
        return open_target(text, config=self.config, normalise=self.normalise, tracking_uri=self.config.tracking.uri)


def evaluate_subject(
    subject: Subject, folder: Folder, *, workers: int, command: str, console: Console
) -> dict[str, Any]:
    """Evaluate; finished attacks in ``folder`` are not repeated.

    Args:
        subject: What.
        folder: Of the evaluation (``RUN/evaluation/PROTOCOL``).
        workers: Processes on the Ray cluster; 1: this process, or one on a GPU where only the cluster has one.
        command: Recorded in the results.
        console: Where progress goes.

    Returns:
        The results; see :func:`eat_dist.evaluation.protocol.evaluate`.

    Raises:
        EatError: Anything that the user can mend.
    """
    config, target = subject.config, subject.opened
    epsilon = config.evaluation_epsilon
    check_epsilons((epsilon,), config.attack.norm)
    if config.evaluation.epsilons:
        check_epsilons(config.evaluation.epsilons, config.attack.norm)
    _set_threads(config)
    with _workers(subject, workers, console) as (pool, device):
        if target.kind == "module":
            _check(subject, device, console)
        with console.working("evaluating") as progress:
            return evaluate(
                target.model,
                subject.test,
                config=config.evaluation,
                norm=config.attack.norm,
                epsilon=epsilon,
                seed=config.seed,
                folder=folder,
                device=device,
                workers=pool,
                other=None if subject.opened_other is None else subject.opened_other.model,
                about=_about(subject, command),
                on_progress=progress,
            )


def _check(subject: Subject, device: torch.device, console: Console) -> None:
    """Find out in a second whether somebody's model can be evaluated at all; our own networks are known."""
    config = subject.config.evaluation
    victim = subject.victim(device)
    facts = check_model(victim.models["ensemble"], subject.test, batch_size=config.batch_size, device=device)
    averaged = victim.defense is not None and victim.defense.randomised
    for warning in facts.warnings(eot_draws=config.eot_draws or (ENOUGH_DRAWS if averaged else 1)):
        console.warn(warning)


def _about(subject: Subject, command: str) -> Mapping[str, Any]:
    target, config = subject.opened, subject.config
    known = target.kind == "run"
    return {
        "command": command,
        "target": {"kind": target.kind, "name": target.name},
        "dataset": config.data.dataset,
        "defense": config.defense.name if known else None,
    }


@contextmanager
def _workers(subject: Subject, count: int, console: Console) -> Iterator[tuple[Any, torch.device]]:
    """Who works (from the victim here), and the device of this process."""
    cluster = subject.config.cluster
    joined = cluster.backend == "ray" and bool(cluster.address or os.environ.get("RAY_ADDRESS"))
    if count == 1 and (not joined or cluster.device == "cpu" or torch.cuda.is_available()):
        yield Alone, choose_device(cluster)
        return
    from eat_dist.cluster.evaluate import RayWorkers, has_gpus  # noqa: PLC0415  (in process needs no Ray)

    if count == 1 and not has_gpus(cluster):
        if cluster.device == "cuda":  # what torch sees here is not what is missing
            raise ClusterError(
                "the evaluation asks for a GPU (cluster.device is cuda), and no living node of the cluster has one; "
                "when one is back, continue: what is trained and measured is kept"
            )
        yield Alone, choose_device(cluster)
        return
    console.say(f"Evaluating on {count} Ray worker{'s' if count > 1 else ''}; finished attacks are kept.")
    pool = RayWorkers(subject.victim, count=count, config=cluster)
    try:
        yield partial(_already, pool), torch.device("cpu")
    finally:
        pool.close()


def _already(pool: Workers, victim: Victim) -> Workers:
    return pool


def _set_threads(config: RunConfig) -> None:
    # Half of the cores: on a core that something else wants, OpenMP's threads wait for each other by spinning, and an
    # evaluation on all of them takes 25 times as long (measured on two cores) for the little that a second one gains.
    torch.set_num_threads(config.cluster.threads_per_member or max(1, usable_cpus() // 2))


def evaluation_folder(folder: Folder, config: RunConfig) -> Folder:
    """Where a run folder, or one like it, has the evaluation of the config's protocol."""
    return folder.child("evaluation").child(config.evaluation.protocol)
