"""Manifold mixup (Verma et al., ICML 2019, section 2), on metric losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from eat_dist.attacks import whole_batch
from eat_dist.batch import Batch
from eat_dist.defenses.mixing import Mix, mixed_step
from eat_dist.defenses.table import Learner, StepResult, register
from eat_dist.robustness.statistics import EnsembleStatistics


@register("manifold_mixup", mix_alpha=2.0)
def manifold_mixup(learner: Learner, batch: Batch, ensemble: EnsembleStatistics) -> StepResult:
    """As :func:`~eat_dist.defenses.mixup.mixup`, mixed after a random stage k of the backbone. One pass.

    k is drawn anew for each batch, uniformly from 0 (the images) to the number of the backbone's stages (its feature
    maps, :attr:`~eat_dist.models.table.Backbone.stages`). Layers below k see the unmixed batch, those above the mixed
    one, BatchNorm included. α is ``mix_alpha``, 2 by default, as in the
    official commands for CIFAR.

    Deviation: k goes to the end of the backbone; the official code for residual networks stops after the second of four
    groups of blocks.

    The stage's output is changed by a forward hook. Hence no ``train.compile`` and no ``train.micro_batch_size``, and
    no replicas, whose partners' features would be another process's (the configuration refuses them).
    """
    numbers = whole_batch(learner.generator("mix"))
    mix = Mix.draw(numbers, batch.labels, alpha=learner.options["mix_alpha"])
    stages = learner.embedder.backbone.stages
    k = int(numbers.integers(len(stages) + 1))
    if k == 0:
        embeddings = learner.model(mix.of(batch.images))
    else:
        with _output_changed(stages[k - 1], mix.of):
            embeddings = learner.model(batch.images)
    return mixed_step(learner, batch, ensemble, embeddings, mix)


@contextmanager
def _output_changed(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()
