"""The exchange between members in their own Ray workers.

Adversarial batches go from member to member through the torch process group that Ray Train sets up (NCCL between
GPUs, gloo between CPUs); statistics and agreements go through the coordinator.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import nn

from eat_dist.cluster.answer import Answer
from eat_dist.cluster.lateness import Reporter
from eat_dist.errors import ClusterError
from eat_dist.exchange import Models, Pending, Tensors
from eat_dist.robustness.statistics import EnsembleStatistics, MemberStatistics
from eat_dist.robustness.transfer import TransferPlan

# Beyond the coordinator's own timeout, which names the late member; this one only guards against a lost coordinator.
_GRACE_S = 30.0


class RayExchange:
    """One member's end.

    Args:
        coordinator: The actor's handle.
        rank: The member.
        grid: The worker, by its rank in the process group, of each member's replicas; [M][R].
        replica: Which of the member's replicas this is; it trades with the same replica of the peers.
        generation: Grows with every restart of the members; equal in all of them.
        timeout: Seconds until a late member is an error.
        group: Of all workers, for the batches; held by nobody else. None: torch's own.
    """

    def __init__(
        self,
        coordinator: Any,
        *,
        rank: int,
        replica: int,
        grid: Sequence[Sequence[int]],
        generation: int,
        timeout: float,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.rank = rank
        self.size = len(grid)
        self._workers = [replicas[replica] for replicas in grid]
        self._caller = caller = rank * len(grid[0]) + replica
        self.generation = generation
        self.timeout = timeout + _GRACE_S
        self._group = group
        self._counts: dict[str, int] = {}
        self._has_submitted = False
        coordinator.join.remote(generation, caller, f"node {ray.util.get_node_ip_address()} (process {os.getpid()})")
        self._reporter = Reporter(lambda at, waits: coordinator.stands.remote(generation, caller, at, waits))

    def close(self) -> None:
        """No more calls will come."""
        self._reporter.close()

    def leave(self) -> None:
        """Close the connections to the other members, so that those who wait for this one fail."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def send(self, plan: TransferPlan, tensors: Tensors) -> Pending:
        """See :class:`eat_dist.exchange.Exchange`. Receiving buffers are shaped like what is sent."""
        self._reporter.step()
        staged = self.size > 1 and dist.get_backend() == "gloo"  # gloo moves CPU memory only
        outgoing = {name: _contiguous(tensor.detach(), staged) for name, tensor in tensors.items()}
        incoming: list[tuple[int, dict[str, torch.Tensor]]] = []
        operations = []
        for sender in plan.sources[self.rank]:
            buffers = {name: torch.empty_like(tensor) for name, tensor in outgoing.items()}
            incoming.append((sender, buffers))
            operations += [
                dist.P2POp(dist.irecv, buffer, self._workers[sender], self._group) for buffer in buffers.values()
            ]
        for target in plan.targets(self.rank):
            operations += [
                dist.P2POp(dist.isend, tensor, self._workers[target], self._group) for tensor in outgoing.values()
            ]
        works = dist.batch_isend_irecv(operations) if operations else []
        devices = {name: tensor.device for name, tensor in tensors.items()}
        return _Arriving(works, incoming, outgoing, devices, self._reporter)

    def submit(self, statistics: MemberStatistics, previous: EnsembleStatistics) -> Pending:
        """See :class:`eat_dist.exchange.Exchange`."""
        self._reporter.step()
        start_from = None if self._has_submitted else previous
        self._has_submitted = True
        reference = self.coordinator.merge.remote(self.generation, self._caller, statistics, start_from)
        return _Merged(_Answer(reference, self.timeout, self._reporter), previous)

    def agree(self, topic: str, value: Any) -> list[Any]:
        """See :class:`eat_dist.exchange.Exchange`."""
        self._reporter.step()
        number = self._counts.get(topic, 0)
        self._counts[topic] = number + 1
        reference = self.coordinator.gather.remote(self.generation, topic, number, self._caller, value)
        everybody: list[Any] = _Answer(reference, self.timeout, self._reporter).wait()
        return everybody

    def every_model(self, model: nn.Module, loss: nn.Module) -> AbstractContextManager[Models]:
        """Not here: parameters never leave their worker.

        Raises:
            ClusterError: Always.
        """
        raise ClusterError("the rule 'joint' runs in one process only; set cluster.backend to local")


class _Answer:
    def __init__(self, reference: Any, timeout: float, reporter: Reporter) -> None:
        self.reference = reference
        self.timeout = timeout
        self.reporter = reporter

    def wait(self) -> Any:
        try:
            with self.reporter.waiting():
                return ray.get(self.reference, timeout=self.timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise ClusterError(f"the coordinator did not answer within {self.timeout:g} s") from error


class _Merged:
    def __init__(self, answer: _Answer, previous: EnsembleStatistics) -> None:
        self.answer = answer
        self.previous = previous

    def wait(self) -> EnsembleStatistics:
        changes: Answer = self.answer.wait()
        return changes.applied_to(self.previous)


class _Arriving:
    """Batches under way. Keeps what is being sent alive until it has been sent."""

    def __init__(
        self,
        works: list[Any],
        incoming: list[tuple[int, dict[str, torch.Tensor]]],
        outgoing: dict[str, torch.Tensor],
        devices: dict[str, torch.device],
        reporter: Reporter,
    ) -> None:
        self.works = works
        self.incoming = incoming
        self.outgoing = outgoing
        self.devices = devices
        self.reporter = reporter

    def wait(self) -> list[tuple[int, Tensors]]:
        with self.reporter.waiting():
            for work in self.works:
                work.wait()
        return [
            (sender, {name: buffer.to(self.devices[name]) for name, buffer in buffers.items()})
            for sender, buffers in self.incoming
        ]


def _contiguous(tensor: torch.Tensor, staged: bool) -> torch.Tensor:
    return (tensor.cpu() if staged else tensor).contiguous()
