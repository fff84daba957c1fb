"""Members' connections run over the network that Ray runs over, wherever the nodes' hostnames point."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from placement_groups import settled_groups


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


@pytest.mark.ray
@pytest.mark.parametrize("how", ["dies", "fails"])
def test_a_worker_that_is_lost_while_all_are_connected_keeps_no_room_from_the_restart(
    tmp_path: Path, ray_session: None, how: str
) -> None:
    """The workers need all CPUs, so a placement group left behind would let nothing start again."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from eat_dist.cluster.network import OverRaysNetwork

    lost = tmp_path / "lost"

    def arrange(path: str, how: str) -> None:
        """In a worker: the second one is lost, once, when it is to join."""
        import signal
        from pathlib import Path

        import ray.train
        import torch.distributed as dist

        join, flag = dist.init_process_group, Path(path)

        def init_process_group(*arguments: Any, **options: Any) -> None:
            if ray.train.get_context().get_world_rank() == 1 and not flag.exists():
                flag.touch()
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise dist.DistNetworkError("a peer closed the connection")
            join(*arguments, **options)

        dist.init_process_group = init_process_group

    class Losing(OverRaysNetwork):
        @property
        def backend_cls(self) -> type:
            parent: Any = super().backend_cls

            class Backend(parent):  # type: ignore[misc]
                def on_start(self, worker_group: Any, backend_config: Any) -> None:
                    worker_group.execute(arrange, str(lost), how)
                    super().on_start(worker_group, backend_config)

            return Backend

    def finish(loop: dict[str, Any]) -> None:
        from pathlib import Path

        Path(loop["out"]).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
        TorchTrainer(
            finish,
            train_loop_config={"out": str(tmp_path / "finished")},
            torch_config=Losing(backend="gloo", timeout_s=60),
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                storage_path=str(tmp_path / "ray"), failure_config=ray.train.FailureConfig(controller_failure_limit=2)
            ),
        ).fit()

    assert lost.exists()
    assert (tmp_path / "finished").exists()
    assert settled_groups() == []
