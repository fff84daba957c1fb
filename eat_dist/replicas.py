"""One member trained by several processes, its replicas, each of which computes a part of every batch.

Replica r of R holds the rows r, r + R, r + 2R … of the member's batch. Its network gives the embeddings of these; they
are gathered, so that every replica has the embeddings of the whole batch, computes the whole loss, and measures what
one process would. (Dealing the rows out in turn, instead of in blocks, makes gathering and concatenating batches
commute: a step may put clean and adversarial images together, and gets the two whole batches back.)

**Why the gradients add up.** With e_r(θ) the embeddings of replica r's rows and P the proxies, the loss is
L(e_0(θ), …, e_{R−1}(θ), P). By the chain rule dL/dθ = Σ_r (∂L/∂e_r)(de_r/dθ). Replica r knows all e_s as numbers and
e_r as a function of θ, so its backward pass gives exactly the r-th term; the gradient of the network is the sum over
replicas (not the mean, as in DistributedDataParallel, where each process has a mean loss of its own). The proxies stand
in L beside the embeddings, so every replica has ∂L/∂P whole and needs no sum. The mean is taken nevertheless: the
replicas' values are equal but for the order in which a GPU may add, and replicas must not drift apart. An image's
gradient, which an attack climbs, is whole in the replica that holds the image, since in evaluation mode no other
embedding depends on it.

BatchNorm in training mode couples the images within the network: see :mod:`eat_dist.models.whole_batch_norm`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from eat_dist.attacks import Generators, Interleaved
from eat_dist.errors import ClusterError
from eat_dist.models.whole_batch_norm import use_whole_batch_statistics


class Replicas(Protocol):
    """What the training loop knows of the other processes that train the same member.

    Attributes:
        index: This process's number r, from 0; number 0 writes and reports for all.
        size: R.
    """

    index: int
    size: int

    @property
    def rows(self) -> slice:
        """This process's rows of a batch."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the training step calls it: own rows [B/R, C, H, W] → embeddings of the whole batch [B, D].

        ``model`` itself is changed where its training depends on the whole batch (BatchNorm).
        """
        ...

    def generators(self, generator: torch.Generator) -> Generators:
        """The own rows' share of what the generator draws for the whole batch."""
        ...

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Own rows [B/R, …] → the whole batch [B, …], with gradient to the own rows alone."""
        ...

    def sum_gradients(self, model: nn.Module, loss: nn.Module) -> None:
        """After the backward passes: make of every process's gradients the whole ones, the same in all."""
        ...

    def require_equal(self, digests: Mapping[str, str]) -> None:
        """Hold that all replicas have the same state.

        Args:
            digests: Name → SHA-256 of what must be equal.

        Raises:
            ClusterError: They have not.
        """
        ...

    def leave(self) -> None:
        """Close the connections, so that those who wait for this process fail; no more calls will come."""
        ...


class Alone:
    """One process trains the member: nothing to do, and nothing that costs or changes a number."""

    index = 0
    size = 1
    rows = slice(None)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model."""
        return model

    def generators(self, generator: torch.Generator) -> Generators:
        """The generator."""
        return generator

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """The batch."""
        return own

    def sum_gradients(self, model: nn.Module, loss: nn.Module) -> None:
        """They are whole."""

    def require_equal(self, digests: Mapping[str, str]) -> None:
        """There is nobody to differ from."""

    def leave(self) -> None:
        """There are no connections."""


ALONE = Alone()


class ReplicaGroup:
    """One of several replicas, over a torch process group of theirs.

    Args:
        group: The member's replicas, in order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.index = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # gloo is given CPU memory only, as by the exchange between members.
        self._staged = dist.get_backend(group) == "gloo"

    @property
    def rows(self) -> slice:
        """See :class:`Replicas`."""
        return slice(self.index, None, self.size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """See :class:`Replicas`."""
        use_whole_batch_statistics(model, self)
        return _WholeBatch(model, self)

    def generators(self, generator: torch.Generator) -> Generators:
        """See :class:`Replicas`."""
        return Interleaved(generator, self.index, self.size)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """See :class:`Replicas`."""
        parts = self.all_gather(own)
        parts[self.index] = own
        return torch.stack(parts, dim=1).flatten(0, 1)

    def sum_gradients(self, model: nn.Module, loss: nn.Module) -> None:
        """See :class:`Replicas`. All of them travel as one tensor."""
        of_network, of_proxies = (
            [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            for module in (model, loss)
        )
        gradients = [*of_network, *of_proxies]
        flat = [gradient.reshape(-1) for gradient in of_network]
        flat += [gradient.reshape(-1) / self.size for gradient in of_proxies]
        summed = torch.split(self.all_sum(torch.cat(flat)), [gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, summed, strict=True):
            gradient.copy_(total.view(gradient.shape))

    def require_equal(self, digests: Mapping[str, str]) -> None:
        """See :class:`Replicas`."""
        mine = hashlib.sha256(repr(sorted(digests.items())).encode()).digest()
        others = self.all_gather(torch.tensor(list(mine), dtype=torch.uint8))
        different = [str(index) for index, other in enumerate(others) if not torch.equal(other, others[0])]
        if different:
            raise ClusterError(
                f"{' and '.join(sorted(digests))} of replica {', '.join(different)} differ from those of replica 0, so "
                f"one of these processes computed something else; look for GPUs of different kinds or a defective one"
            )

    def leave(self) -> None:
        """See :class:`Replicas`. Over gloo alone, whose connections last as long as somebody holds the group."""
        if self._staged:
            dist.destroy_process_group(self.group)
            del self.group

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every replica's tensor, in order, detached."""
        sent = self._sent(tensor)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return [part.to(tensor.device) for part in parts]

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every replica's tensor, detached; bit for bit the same in all."""
        total = self._sent(tensor).clone()
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return (tensor.cpu() if self._staged else tensor).contiguous()


class _WholeBatch(nn.Module):
    """A member's network as its training step sees it."""

    def __init__(self, model: nn.Module, replicas: ReplicaGroup) -> None:
        super().__init__()
        self.model = model
        self.replicas = replicas

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.replicas.gather(self.model(images))
