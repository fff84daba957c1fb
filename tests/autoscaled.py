"""A head without CPUs, Ray's own autoscaler and its provider of processes for nodes: a cloud on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

# What the provider calls the head.
_HEAD_ID, _HEAD_TYPE = "f" * 51 + "0" * 5, "ray.head.default"


@contextlib.contextmanager
def autoscaled_cluster(folder: Path, *, most: int) -> Iterator[dict[str, str]]:
    """Start it, require a token as cluster.yaml does, and end all its processes.

    Args:
        folder: Short, for the sockets in it; logs and token.
        most: Workers, with one CPU and one GPU (by name only) each.

    Yields:
        Environment of a driver.
    """
    port = _free_port()
    address = f"{_own_address()}:{port}"
    token = folder / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    config = folder / "cluster.json"
    config.write_text(json.dumps(_config(address, most)))
    client = {
        **os.environ,
        "HOME": str(folder),
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    head = {
        **client,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    }
    head.pop("RAY_ADDRESS")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--autoscaling-config={config}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={folder}"]
    command += ["--object-store-memory=100000000"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=head, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_for(port, process, folder / "head.log")
        yield client
    finally:
        _end(process, folder)


def _config(address: str, most: int) -> dict[str, object]:
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": _HEAD_ID,
        "launch_multiple": True,
        "gcs_address": address,
    }
    worker = {
        "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000},
        "node_config": {},
        "min_workers": 0,
        "max_workers": most,
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    commands = [f"{who}_{what}_commands" for who in ("head", "worker") for what in ("setup", "start_ray")]
    return {
        "cluster_name": "autoscaled",
        "provider": provider,
        "max_workers": most,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 5,
        "available_node_types": {_HEAD_TYPE: head, "worker": worker},
        "head_node_type": _HEAD_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in (*lists, *commands)},
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _own_address() -> str:
    import ray.util

    return str(ray.util.get_node_ip_address())


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(720):  # three minutes: on a busy machine a head takes one
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), socket.create_connection((_own_address(), port), timeout=1):
            return
        time.sleep(0.25)
    raise AssertionError(log.read_text())


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """The nodes' processes are no children of ``ray start``; all of them name the folder."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    for other in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in other.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                other.kill()
