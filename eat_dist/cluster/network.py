"""Over which network the members of a run talk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

_VARIABLE = "GLOO_SOCKET_IFNAME"


@dataclass
class OverRaysNetwork(TorchConfig):  # type: ignore[misc]  # Ray has no types
    """The process group of Ray Train, its gloo connections over the interface that Ray itself uses.

    Left alone, gloo listens where the node's hostname points. On many installations that is loopback (Debian and Ubuntu
    write ``127.0.1.1 HOSTNAME`` into ``/etc/hosts``), so members on several nodes would never find each other. NCCL
    leaves loopback out by itself. What ``GLOO_SOCKET_IFNAME`` says in a worker's environment goes first.
    """

    @property
    def backend_cls(self) -> type:
        """The parent's, with one thing done before it starts."""
        parent: Any = super().backend_cls

        class Backend(parent):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                worker_group.execute(_choose_interface)
                super().on_start(worker_group, backend_config)

        return Backend


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
