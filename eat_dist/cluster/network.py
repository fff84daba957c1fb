"""Over which network the members of a run talk, and what becomes of those that cannot be connected."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

# The only failure of the set-up after which Ray Train's controller starts all workers again.
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from eat_dist.errors import in_one_line

_VARIABLE = "GLOO_SOCKET_IFNAME"


@dataclass
class OverRaysNetwork(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """The process group of Ray Train, its gloo connections over the interface that Ray itself uses.

    Left alone, gloo listens where the node's hostname points. On many installations that is loopback (Debian and Ubuntu
    write ``127.0.1.1 HOSTNAME`` into ``/etc/hosts``), so members on several nodes would never find each other. NCCL
    leaves loopback out by itself. What ``GLOO_SOCKET_IFNAME`` says in a worker's environment goes first.

    Workers that cannot be connected are ended, with all that they hold, and started again.
    """

    @property
    def backend_cls(self) -> type:
        """The parent's, with one thing done before it starts, and one where that fails."""
        parent: Any = super().backend_cls

        class Backend(parent):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                with _given_up_whole(worker_group):
                    worker_group.execute(_choose_interface)
                    super().on_start(worker_group, backend_config)

        return Backend


@contextlib.contextmanager
def _given_up_whole(worker_group: Any) -> Iterator[None]:
    """In Ray Train's controller, while the workers are connected: none is left behind if that fails.

    Ray Train takes the workers for started by now, and ends only those that are not; the controller, whom the exception
    reaches, never gets to know them. Their placement group would hold their room for as long as the run lives: the next
    start would wait for it in vain (``ray/train/v2/_internal/execution/worker_group/worker_group.py``, ``_start``).

    Raises:
        WorkerGroupStartupFailedError: A worker died or could not be connected: as a rule because of one that died.
    """
    try:
        yield
    except Exception as error:
        worker_group.get_worker_group_state().shutdown()
        if not isinstance(error, ray.exceptions.RayError):
            raise
        # Those that a worker leaves behind may be the first to fail, which Ray Train would take for a fault of the run.
        raise WorkerGroupStartupFailedError(f"connecting the workers failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return "one of them died"
    cause = getattr(error, "cause", None)
    return in_one_line(cause if isinstance(cause, BaseException) else error)[-200:]


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has ``address`` (IPv4 or IPv6), if one has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return str(name)
    return None


def _choose_interface() -> None:
    """In a worker, before it joins the process group. An address that no interface has (NAT) is left to gloo."""
    if not os.environ.get(_VARIABLE) and (name := interface_of(ray.util.get_node_ip_address())):
        os.environ[_VARIABLE] = name
