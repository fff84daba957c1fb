"""Several processes that train one member compute what one process does: two real processes over gloo, in float64.

Each process holds its part of every member's batch. The members share the process, a thread each, so every rule of
transfer is tried without Ray; tests/test_replicas_on_ray.py trains whole runs there.
"""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_defenses import Case
from torch import nn

from eat_dist.attacks.ball import Ball
from eat_dist.batch import Batch
from eat_dist.errors import ClusterError
from eat_dist.models.execution import Execution
from eat_dist.models.whole_batch_norm import WholeBatchNorm2d
from eat_dist.replicas import ALONE, ReplicaGroup
from eat_dist.seeding import generator

REPLICAS = 2
TIMEOUT_S = 60
STEPS: dict[str, dict[str, Any]] = {
    "natural": {"members": 2, "name": "natural"},
    "pgd_at": {"members": 1, "name": "pgd_at"},
    "adversarial images alone": {"members": 1, "name": "pgd_at", "adversarial_share": 1.0},
    "robust_dml": {"members": 1, "name": "robust_dml", "perturbed_role": "anchor"},
    "adversarial_metric": {"members": 1, "name": "adversarial_metric"},
    "est": {"members": 2, "name": "est", "mining": "softhard"},
    "uniform, diversity": {"members": 3, "transfer_rule": "uniform", "peers": 2, "diversity_weight": 2.0},
    "hardest": {"members": 3, "transfer_rule": "hardest", "peers": 2},
    "class_risk": {"members": 2, "transfer_rule": "class_risk"},
    "relay": {"members": 3, "transfer_rule": "relay"},
    "trades": {"members": 1, "name": "trades"},
    "mixup": {"members": 1, "name": "mixup"},
    "iat": {"members": 1, "name": "iat"},
    "adp": {"members": 2, "name": "adp"},
    "dverge": {"members": 3, "name": "dverge"},
    "micro-batches": {"members": 2, "transfer_rule": "uniform", "micro_batch_size": 3},
}


def case_of(*, micro_batch_size: int | None = None, **settings: Any) -> Case:
    """Micro-batches are exact with a frozen BatchNorm alone."""
    case = Case(**settings)
    for learner in case.learners if micro_batch_size else ():
        learner.model.freeze_batch_norm = True
        learner.model.train_head_only(False)
        learner.model.train().execution = Execution(micro_batch_size=micro_batch_size)
    return case


def left_by_step(case: Case) -> dict[str, Any]:
    """Gradients and buffers of every member, and the merged statistics."""
    merged = [result.ensemble for result in case.step()]
    tensors = {}
    for learner in case.learners:
        trained = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
        for name, parameter in (*trained.items(), ("proxies", learner.loss.proxies)):
            tensors[f"{learner.rank}.{name}.grad"] = parameter.grad
        for name, buffer in learner.model.named_buffers():
            tensors[f"{learner.rank}.{name}"] = buffer
    measured = [(e.clean_loss, e.adversarial_loss, e.fooled_rate, e.displacement) for e in merged[0].members]
    received = [[(peer.loss, peer.fooled_rate) for peer in entry.received] for entry in merged[0].members]
    return {
        "tensors": tensors,
        "measured": [[0.0 if value is None else value for value in values] for values in measured],
        "received": received,
        "batch_sizes": [entry.batch_size for entry in merged[0].members],
        "class_risk": merged[0].class_risk.tolist(),
    }


def left_by_replica(groups: list[ReplicaGroup], gathered: bool, **settings: Any) -> dict[str, Any]:
    """The same of a step of which this process computes a part; without gathering, for the negative control."""
    case = case_of(**settings)
    inner = [learner.model for learner in case.learners]
    for learner, group in zip(case.learners, groups, strict=False):
        batch, rank = case.batches[learner.rank], learner.rank
        if gathered:
            learner.model, learner.replicas = group.wrap(learner.model), group
            case.batches[rank] = Batch(batch.images[group.rows], batch.labels, batch.indices)
            learner.generator = lambda purpose, group=group, rank=rank: group.generators(generator(purpose, rank))
        else:  # as data parallelism does it that knows nothing of the loss: each part a batch of its own
            case.batches[rank] = Batch(batch.images[group.rows], batch.labels[group.rows], batch.indices[group.rows])
    step = case.step

    def step_and_sum() -> Any:
        results = step()
        for learner, model, group in zip(case.learners, inner, groups, strict=False):
            learner.model = model
            group.sum_gradients(model, learner.loss)
            if not gathered:
                for parameter in model.parameters():
                    parameter.grad /= group.size
        return results

    case.step = step_and_sum  # type: ignore[method-assign]
    return left_by_step(case)


def batch_norm_input() -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.randn(6, 3, 4, 5, generator=generator("features"), dtype=torch.float64) * 3 + 7
    return features, torch.randn(features.shape, generator=generator("gradient"), dtype=torch.float64)


def new_batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3, momentum=0.3).double()
    nn.init.normal_(norm.weight, generator=generator("weight"))
    nn.init.normal_(norm.bias, generator=generator("bias"))
    return norm


def through_batch_norm(norm: nn.BatchNorm2d, rows: slice) -> dict[str, torch.Tensor]:
    features, gradient = batch_norm_input()
    features = features[rows].contiguous(memory_format=torch.channels_last).requires_grad_()
    normalised = norm(features)
    normalised.backward(gradient[rows])
    assert features.grad is not None
    norm.eval()
    return {
        "normalised": normalised.detach(),
        "of images": features.grad,
        "of weight": norm.weight.grad,
        "of bias": norm.bias.grad,
        "evaluated": norm(features).detach(),
        **{name: buffer.clone() for name, buffer in norm.named_buffers()},
    }


def replica_process(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=index, world_size=REPLICAS, timeout=timeout
    )
    groups = [ReplicaGroup(dist.new_group()) for _ in range(3)]
    found: dict[str, Any] = {name: left_by_replica(groups, True, **case) for name, case in STEPS.items()}
    found["not gathered"] = left_by_replica(groups, False, **STEPS["pgd_at"])
    group = groups[0]
    found["BatchNorm"] = through_batch_norm(WholeBatchNorm2d(new_batch_norm(), group), group.rows)
    bfloat16 = WholeBatchNorm2d(new_batch_norm().float(), group)(batch_norm_input()[0][group.rows].bfloat16())
    found["bfloat16"] = bfloat16.detach()
    features = batch_norm_input()[0].requires_grad_()
    whole = group.gather(features[group.rows])
    (whole * batch_norm_input()[1]).sum().backward()
    found["gathered"], found["of gathered"] = whole.detach(), features.grad
    group.require_equal({"weights": "ab", "proxies": "cd"})
    with pytest.raises(ClusterError) as different:
        group.require_equal({"weights": "ab", "proxies": str(index)})
    found["different"] = str(different.value)
    begin, left = time.monotonic(), groups.pop()
    if index == 0:
        left.leave()
    else:
        with pytest.raises(RuntimeError):
            left.all_sum(torch.zeros(1))
    found["seconds"] = time.monotonic() - begin
    dist.barrier()  # whose process ends has left by that
    torch.save(found, f"{folder}/{index}.pt")
    dist.destroy_process_group()


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes left, started once for all tests here."""
    folder = tmp_path_factory.mktemp("replicas")
    spawning = multiprocessing.get_context("spawn")
    processes = [spawning.Process(target=replica_process, args=(index, str(folder))) for index in range(REPLICAS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * REPLICAS
    return [torch.load(folder / f"{index}.pt", weights_only=True) for index in range(REPLICAS)]


@pytest.mark.parametrize("name", STEPS)
def test_two_replicas_leave_the_gradients_buffers_and_statistics_of_one_process(name: str, found: Found) -> None:
    whole = left_by_step(case_of(**STEPS[name]))
    for replica in found:
        assert replica[name]["batch_sizes"] == whole["batch_sizes"] == [8] * len(whole["batch_sizes"])
        for figures in ("measured", "received", "class_risk"):
            torch.testing.assert_close(
                torch.tensor(replica[name][figures]), torch.tensor(whole[figures]), equal_nan=True
            )
        for tensor, expected in whole["tensors"].items():
            scale = float(expected.abs().max()) if expected.numel() else 1.0
            assert scale > 0, tensor
            torch.testing.assert_close(
                replica[name]["tensors"][tensor], expected, rtol=0, atol=1e-10 * scale, msg=f"{name}: {tensor}"
            )


@pytest.mark.parametrize("name", STEPS)
def test_replicas_end_a_step_with_the_same_bits(name: str, found: Found) -> None:
    first, second = (replica[name]["tensors"] for replica in found)
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


def test_without_gathering_the_gradient_is_another_one(found: Found) -> None:
    """The negative control: the loss, the attack and BatchNorm couple the images of a batch."""
    whole = left_by_step(case_of(**STEPS["pgd_at"]))["tensors"]
    for tensor in ("0.head.weight.grad", "0.proxies.grad", "0.backbone.blocks.0.weight.grad"):
        off = (found[0]["not gathered"]["tensors"][tensor] - whole[tensor]).abs().max() / whole[tensor].abs().max()
        assert off > 0.01


def test_batch_norm_over_two_parts_is_batch_norm_over_the_batch_forward_and_backward(found: Found) -> None:
    whole = through_batch_norm(new_batch_norm(), slice(None))
    for index, replica in enumerate(found):
        rows = slice(index, None, REPLICAS)
        for name in ("normalised", "of images", "evaluated"):
            torch.testing.assert_close(replica["BatchNorm"][name], whole[name][rows], rtol=0, atol=1e-12)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(replica["BatchNorm"][name], whole[name], rtol=1e-12, atol=0)
    for name in ("of weight", "of bias"):
        shares = sum(replica["BatchNorm"][name] for replica in found)
        torch.testing.assert_close(shares, whole[name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(shares, found[0]["BatchNorm"][name])
    alone = through_batch_norm(new_batch_norm(), slice(0, None, REPLICAS))
    assert (alone["normalised"] - whole["normalised"][::REPLICAS]).abs().max() > 0.01


def test_batch_norm_of_bfloat16_features_is_computed_in_float32(found: Found) -> None:
    whole = new_batch_norm().float()(batch_norm_input()[0].bfloat16().float())
    for index, replica in enumerate(found):
        assert replica["bfloat16"].dtype == torch.bfloat16
        torch.testing.assert_close(replica["bfloat16"].float(), whole[index::REPLICAS].detach(), rtol=2**-8, atol=1e-5)


def test_gathering_restores_the_batch_and_gives_each_replica_the_gradient_of_its_own_rows(found: Found) -> None:
    features, gradient = batch_norm_input()
    for index, replica in enumerate(found):
        assert torch.equal(replica["gathered"], features)
        own = torch.zeros_like(gradient)
        own[index::REPLICAS] = gradient[index::REPLICAS]
        assert torch.equal(replica["of gathered"], own)


def test_a_replica_that_differs_is_named(found: Found) -> None:
    for replica in found:
        assert replica["different"].startswith("proxies and weights of replica 1 differ from those of replica 0")


def test_batch_norms_keep_their_parameters_and_names_when_they_are_replaced() -> None:
    from eat_dist.models.whole_batch_norm import use_whole_batch_statistics

    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    before = dict(model.state_dict(keep_vars=True))
    names = [name for name, _ in model.named_parameters()]
    use_whole_batch_statistics(model, None)  # type: ignore[arg-type]  # in evaluation mode it talks to nobody

    assert isinstance(model[1][0], WholeBatchNorm2d)
    assert [name for name, _ in model.named_parameters()] == names
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    images = torch.rand(2, 1, 4, 4)
    plain = nn.Sequential(copy.deepcopy(model[0]), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_one_process_alone_uses_the_very_same_model_and_generator_and_touches_no_gradient() -> None:
    model, random = nn.Linear(2, 2), torch.Generator()
    model.weight.grad = torch.ones(2, 2)
    ALONE.sum_gradients(model, nn.Identity())
    ALONE.require_equal({"a": "b"})

    assert ALONE.wrap(model) is model
    assert ALONE.generators(random) is random
    assert torch.equal(model.weight.grad, torch.ones(2, 2))
    assert list(range(5))[ALONE.rows] == list(range(5))


@pytest.mark.parametrize("norm", ["linf", "l2", "l0"])
def test_parts_of_a_batch_start_their_attack_where_the_whole_batch_does(norm: Any) -> None:
    from eat_dist.attacks import Interleaved

    images = torch.rand(6, 3, 4, 4, generator=generator("images"))
    ball = Ball(norm, 0.2)
    whole = ball.random_point(images, generator("start"))
    for index in range(3):
        part = ball.random_point(images[index::3], Interleaved(generator("start"), index, 3))
        assert torch.equal(part, whole[index::3])


def test_who_waits_for_a_replica_that_has_left_fails_at_once(found: Found) -> None:
    assert found[1]["seconds"] < TIMEOUT_S / 4
