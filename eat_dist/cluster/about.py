"""What a run says of the cluster it ran on."""

from __future__ import annotations

import json
import os

import ray

from eat_dist.cluster.session import connect, nodes
from eat_dist.config import ClusterConfig

# What Ray sets for the process of a submitted job: JSON with the job's id among the metadata.
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def cluster_tags(config: ClusterConfig) -> dict[str, str]:
    """Tags of a run on this cluster, which is joined.

    Returns:
        ``cluster``: the address, or ``local`` for a cluster that ends with the command; ``cluster.nodes``,
        ``cluster.cpus`` and ``cluster.gpus`` of the living nodes; ``ray.job_id``: of the submitted job
        (``raysubmit_…``), elsewhere Ray's own number of this driver.

    Raises:
        ClusterError: It cannot be joined.
    """
    connect(config)
    there = nodes()
    return {
        "cluster": _address(config),
        "cluster.nodes": str(len(there)),
        "cluster.cpus": f"{sum(node.cpus for node in there):g}",
        "cluster.gpus": f"{sum(node.gpus for node in there):g}",
        "ray.job_id": submitted_job() or ray.get_runtime_context().get_job_id(),
    }


def submitted_job() -> str | None:
    """The id of the Ray job that this process is; None outside of one."""
    try:
        job = json.loads(os.environ.get(_JOB_VARIABLE, ""))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(job)


def _address(config: ClusterConfig) -> str:
    named = config.address or os.environ.get("RAY_ADDRESS")
    context = ray.get_runtime_context()
    if named == "auto" or (named is None and context.get_actor_id() is not None):  # a trial runs in an actor
        return str(context.gcs_address)
    return named or "local"
