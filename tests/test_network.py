"""Members' connections run over the network that Ray runs over, wherever the nodes' hostnames point."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest


def test_an_interface_is_found_by_its_address() -> None:
    from eat_dist.cluster.network import interface_of

    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert "127.0.0.1" in [entry.address for entry in psutil.net_if_addrs()[loopback]]
    assert interface_of("203.0.113.7") is None  # reserved for documentation: nobody has it


@pytest.mark.ray
def test_gloo_connects_over_the_interface_that_ray_uses(tmp_path: Path, ray_session: None) -> None:
    """A hostname that means loopback, as many installations have it, would keep members on several nodes apart."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from eat_dist.cluster.network import OverRaysNetwork, interface_of

    def report(loop: dict[str, Any]) -> None:
        """In a worker, which cannot import this file: the interface it has chosen, and where its connections end."""
        import ray
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.ones(1))
        mine = psutil.Process().net_connections(kind="tcp")
        ports = {c.laddr.port for c in mine if c.status == psutil.CONN_LISTEN}
        everybody: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (os.getpid(), sorted(ports)))
        theirs = {port for pid, listening in everybody if pid != os.getpid() for port in listening}
        # Gloo's connections, and the store's, which go to Ray's address anyway.
        shared = {c.laddr.ip for c in mine if c.raddr and (c.raddr.port in theirs or c.laddr.port in ports)}
        lines = [os.environ.get("GLOO_SOCKET_IFNAME", ""), ray.util.get_node_ip_address(), *sorted(shared)]
        Path(loop["out"], str(dist.get_rank())).write_text("\n".join(lines))

    TorchTrainer(
        report,
        train_loop_config={"out": str(tmp_path)},
        torch_config=OverRaysNetwork(backend="gloo", timeout_s=60),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    for rank in range(2):
        interface, address, *connected = (tmp_path / str(rank)).read_text().split("\n")
        assert interface == interface_of(address)
        assert connected, "no connection between the workers was seen"
        assert {socket.inet_pton(socket.AF_INET, ip.removeprefix("::ffff:")) for ip in connected} == {
            socket.inet_pton(socket.AF_INET, address)
        }
