"""What settings of different sections demand of each other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eat_dist.config.sections import RunConfig

# Defenses that compare images of one batch; that climb away from where an embedding is; that attack whole tuples.
_WITH_TUPLES = ("robust_dml", "est", "act", "hm")
_DISPLACING = ("est", "adversarial_metric")
_ATTACKING_TUPLES = ("act", "hm")


def disagreements(config: RunConfig) -> Iterable[str]:
    """One line for each pair of settings that cannot hold together."""
    yield from _of_defense(config)
    yield from _of_transfer(config)
    yield from _of_tuples(config)
    yield from _of_split(config)
    yield from _of_training(config)
    yield from _of_replicas(config)
    if config.tracking.register_as is not None and not config.tracking.enabled:
        yield "tracking.register_as (--register) registers in MLflow, so tracking.enabled must be true"


def _of_defense(config: RunConfig) -> Iterable[str]:
    members, defense = config.ensemble.members, config.defense
    if defense.name in ("adp", "dverge") and members == 1:
        yield f"the defense '{defense.name}' sets members apart, so ensemble.members must be at least 2; got 1"
    if defense.name == "adp" and config.ensemble.split.rule != "all":
        yield (
            f"the defense 'adp' trains all members on the same batches, so ensemble.split.rule must be all; got "
            f"{config.ensemble.split.rule}"
        )
    if defense.name == "manifold_mixup" and config.train.compile:
        yield "the defense 'manifold_mixup' mixes images inside the network, uncompiled: set train.compile to false"
    if defense.name == "manifold_mixup" and config.train.micro_batch_size is not None:
        yield (
            "the defense 'manifold_mixup' mixes the images of a batch inside the network, so that it must hold all of "
            "them: leave out train.micro_batch_size"
        )


def _of_transfer(config: RunConfig) -> Iterable[str]:
    members, defense = config.ensemble.members, config.defense
    if defense.name != "eat" or members == 1:
        return
    if defense.peers > members - 1:
        yield f"defense.peers must be at most members − 1 = {members - 1}; got {defense.peers}"
    if defense.transfer_rule == "hardest" and defense.peers < 2:
        yield (
            f"the rule 'hardest' weighs received batches against each other, so defense.peers must be at least 2 (and "
            f"ensemble.members at least 3); got {defense.peers}. With one batch 'uniform' is the same"
        )
    if defense.transfer_rule == "relay":
        steps = 1 if config.attack.name == "fgsm" else config.attack.num_steps
        if steps < 2:
            yield (
                f"the rule 'relay' shares the attack's steps, so attack.num_steps must be at least 2 (and fgsm has "
                f"one); got {config.attack.name} with {config.attack.num_steps}"
            )
        elif defense.relay_steps is not None and defense.relay_steps >= config.attack.num_steps:
            yield (
                f"defense.relay_steps must leave steps to the receiver: below attack.num_steps = "
                f"{config.attack.num_steps}; got {defense.relay_steps}"
            )
        if defense.peers != 1:
            yield f"the rule 'relay' hands each batch to one peer, so defense.peers must be 1; got {defense.peers}"
    if defense.diversity_weight > 0 and defense.transfer_rule in ("none", "relay", "joint"):
        yield (
            f"defense.diversity_weight compares members on transferred batches, which the rule "
            f"'{defense.transfer_rule}' has none of; set it to 0 or choose uniform, hardest or class_risk"
        )
    if defense.transfer_rule == "joint" and config.cluster.backend != "local":
        yield (
            "the rule 'joint' needs every member's input gradient at each attack step, so it runs in one process: "
            "set cluster.backend to local, or choose another defense.transfer_rule"
        )
    if defense.transfer_rule == "joint" and config.inference.training:
        yield (
            "the rule 'joint' runs every member's passes in turn, in no fixed order, so none can draw random "
            "numbers: set inference.training to false, or choose another defense.transfer_rule"
        )


def _of_tuples(config: RunConfig) -> Iterable[str]:
    name, attack = config.defense.name, config.attack
    if name in _WITH_TUPLES and config.data.sampler != "class_balanced":
        yield (
            f"the defense '{name}' compares each image with another one of its class, so data.sampler must be "
            f"class_balanced; got {config.data.sampler}"
        )
    if name in _DISPLACING and (attack.name == "fgsm" or not attack.random_start):
        yield (
            f"the defense '{name}' moves an embedding away from where it is, where there is no slope, so its attack "
            f"must start elsewhere: attack.random_start true and attack.name pgd; got {attack.random_start} and "
            f"{attack.name}"
        )


def _of_split(config: RunConfig) -> Iterable[str]:
    members, split = config.ensemble.members, config.ensemble.split
    parts = split.parts or max(members, 2)
    if split.rule == "disjoint" and parts < members:
        yield f"ensemble.split.rule 'disjoint' needs at least as many parts as members; got {parts} and {members}"
    if split.parts_per_member is not None and split.parts_per_member > parts:
        yield f"ensemble.split.parts_per_member must be at most parts = {parts}; got {split.parts_per_member}"


def _of_training(config: RunConfig) -> Iterable[str]:
    train, model = config.train, config.model
    if train.warmup_epochs >= train.epochs:
        yield (
            f"train.warmup_epochs trains head and proxies only, so it must be below train.epochs = {train.epochs}; "
            f"got {train.warmup_epochs}"
        )
    if train.micro_batch_size is not None and not model.freeze_batch_norm:
        yield (
            "train.micro_batch_size is exact only where BatchNorm keeps its statistics (else they would be those of "
            "the part, not of the batch): set model.freeze_batch_norm to true, or leave it out"
        )


def _of_replicas(config: RunConfig) -> Iterable[str]:
    replicas, data = config.cluster.replicas_per_member, config.data
    if replicas == 1:
        return
    if config.cluster.backend == "local":
        yield (
            f"cluster.replicas_per_member are processes of their own: with cluster.backend local it must be 1; got "
            f"{replicas}"
        )
    if data.batch_size % replicas:
        step = math.lcm(replicas, data.images_per_class) if data.sampler == "class_balanced" else replicas
        higher = math.ceil(data.batch_size / step) * step
        yield (
            f"each of a member's replicas takes an equal part of its batch: data.batch_size must be a multiple of "
            f"cluster.replicas_per_member = {replicas}; got {data.batch_size}. Use "
            + (f"{higher - step} or {higher}" if higher > step else f"{higher}")
        )
    if config.defense.name == "eat" and config.defense.transfer_rule == "joint" and config.ensemble.members > 1:
        yield f"the rule 'joint' runs in one process: cluster.replicas_per_member must be 1; got {replicas}"
    if config.defense.name == "manifold_mixup":
        yield (
            f"the defense 'manifold_mixup' mixes features of the whole batch, of which a replica holds a part: "
            f"cluster.replicas_per_member must be 1; got {replicas}"
        )
    if config.defense.name in _ATTACKING_TUPLES:
        yield (
            f"the defense '{config.defense.name}' attacks tuples, whose images different replicas hold: "
            f"cluster.replicas_per_member must be 1; got {replicas}"
        )
    if config.train.compile and not config.model.freeze_batch_norm:
        yield (
            "train.compile cannot compile BatchNorm that talks to other replicas: set model.freeze_batch_norm to true, "
            "train.compile to false, or cluster.replicas_per_member to 1"
        )
