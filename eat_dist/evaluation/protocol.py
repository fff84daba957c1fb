"""An evaluation from its models to its results; each finished attack is kept, so it goes on where it stopped.

What it writes into its folder:

    parts/ensemble-clean.json, parts/ensemble-apgd100x5-proxy-linf-0.1.json, …   one finished measurement each
    results.parquet                     a row a figure (docs/evaluation_files.md)
    showcase.safetensors, .json         a few images and embeddings, clean and attacked, for the report (full)
    summary.json                        what :func:`evaluate` returns; its presence says that the evaluation is finished
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from eat_dist import __version__
from eat_dist.attacks.ball import Norm
from eat_dist.config import EvaluationConfig
from eat_dist.data.images import ImageSet
from eat_dist.evaluation.plan import plan
from eat_dist.evaluation.results import results_of, write_results
from eat_dist.evaluation.running import SCHEMA, Progress, Running
from eat_dist.evaluation.sizes import Sizes
from eat_dist.evaluation.victim import Alone, Victim, Workers
from eat_dist.storage import Folder


def evaluate(
    model: nn.Module,
    test: ImageSet,
    *,
    config: EvaluationConfig,
    norm: Norm,
    epsilon: float,
    seed: int,
    folder: Folder,
    device: torch.device | str,
    workers: Callable[[Victim], Workers] = Alone,
    other: nn.Module | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, clean and under every attack of the config's protocol (docs/evaluation.md).

    An :class:`EmbeddingEnsemble` is attacked on its fused embedding, and each of its members alone; any other module
    is one model. One behind a defense at inference is attacked adaptively, through the defense; beside that stands what
    an attacker who does not know of it reaches. Which queries search which gallery follows from the test set
    (:class:`eat_dist.evaluation.figures.Retrieval`), and the R@K are named accordingly.

    One seed gives one result on one machine, however many workers there are and whether interrupted or not; finished
    parts are taken as they are if all that they depend on is the same (:func:`eat_dist.evaluation.parts.resumed`).
    Models compute in float32.

    Args:
        model: Maps images in [0, 1] to embeddings of length 1. Not changed; a copy is moved to ``device``.
        test: Classes unseen in training, two or more, each with two images or more, and each query's with one in the
            gallery.
        config: The protocol and its sizes; its ``epsilon`` is not read.
        norm: Of the main attacks.
        epsilon: Their radius, pixel units.
        seed: Of everything random.
        folder: Where parts and results go.
        device: Where to compute, without other workers.
        workers: From the models here, who does the work: this process, or a cluster's.
        other: Another model, on which transfer attacks are crafted.
        about: Put into the results as it is (``target``, ``dataset``, ``command``, …); JSON-ready.
        on_progress: Called after each batch of images and after each part, also of one that was there already.

    Returns:
        What ``summary.json`` holds (docs/evaluation_files.md).

    Raises:
        StorageError: The folder cannot be written.
        ValueError: A model's embeddings are not finite, or a query has no other image of its class to find.
    """
    victim = Victim.of(copy.deepcopy(model), test, seed=seed, device=device, other=copy.deepcopy(other))
    defense = victim.defense
    sizes = Sizes.of(
        config,
        norm=norm,
        epsilon=epsilon,
        numbers_of_an_image=math.prod(test.image_shape),
        randomised=defense is not None and defense.randomised,
    )
    todo = plan(
        config,
        sizes,
        members=victim.members,
        queries=len(victim.retrieval.queries),
        defended=defense is not None,
        other=other is not None,
    )
    running = Running(victim, todo, sizes, config, seed, folder, workers(victim), on_progress)
    results = {
        "schema": SCHEMA,
        "eat_dist": __version__,
        **(about or {}),
        **results_of(
            config=config,
            sizes=sizes,
            seed=seed,
            plan=todo,
            test=test,
            retrieval=victim.retrieval,
            members=running.members,
            clean={name: running.clean_part(name) for name in running.shown_to},
            measured={part: running.attacked_part(part) for part in todo.parts},
            ers=running.ers() if config.protocol == "full" else None,
            defense=None if defense is None else defense.settings,
            randomised=running.randomised,
        ),
    }
    if config.protocol == "full":
        running.showcase(results)
    write_results(folder, results)
    return results
