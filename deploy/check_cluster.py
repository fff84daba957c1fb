"""Find the faults of a cluster.yaml before `ray up` does, offline and without costs.

What Ray checks (unknown keys, the head's type) is checked by Ray's own code. What Ray hands on unread is checked here:
the launch request against EC2's description of it, resources against what the machine has, the settings under
`metadata`. What only the cloud knows (quotas, permissions, whether the image exists) is not.

    python deploy/check_cluster.py cluster.yaml [--members 4]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from eat_dist.cluster.resources import Node, place
from eat_dist.config import ClusterConfig
from eat_dist.errors import ClusterError

UNSET = "CHANGE-ME"
# GPUs, CPUs and memory in GiB of the machines that the pages name. Sources: the clouds' lists of instance types.
MACHINES = {
    "m6i.xlarge": (0, 4, 16),
    "m6i.2xlarge": (0, 8, 32),
    "m6i.4xlarge": (0, 16, 64),
    "g4dn.xlarge": (1, 4, 16),
    "g4dn.2xlarge": (1, 8, 32),
    "g4dn.12xlarge": (4, 48, 192),
    "g5.xlarge": (1, 4, 16),
    "g5.2xlarge": (1, 8, 32),
    "g5.4xlarge": (1, 16, 64),
    "g5.12xlarge": (4, 48, 192),
    "g5.48xlarge": (8, 192, 768),
    "g6.xlarge": (1, 4, 16),
    "g6.2xlarge": (1, 8, 32),
    "g6.4xlarge": (1, 16, 64),
    "g6.12xlarge": (4, 48, 192),
    "g6e.2xlarge": (1, 8, 64),
    "g6e.12xlarge": (4, 48, 384),
    "e2-standard-8": (0, 8, 32),
    "n2-standard-8": (0, 8, 32),
    "g2-standard-8": (1, 8, 32),
    "g2-standard-24": (2, 24, 96),
    "g2-standard-48": (4, 48, 192),
}


def _keys(**kinds: Any) -> dict[str, Any]:
    """JSON schema of an object that has these keys and no others."""
    return {"type": "object", "properties": kinds, "additionalProperties": False}


_TEXT, _NUMBER, _TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
# Of an instance of Compute Engine's API v1, what the pages use.
_COMPUTE_ENGINE = _keys(
    machineType=_TEXT,
    disks={
        "type": "array",
        "items": _keys(
            boot=_TRUTH,
            autoDelete=_TRUTH,
            type={"enum": ["PERSISTENT", "SCRATCH"]},
            initializeParams=_keys(diskSizeGb=_NUMBER, sourceImage=_TEXT, diskType=_TEXT),
        ),
    },
    guestAccelerators={"type": "array", "items": _keys(acceleratorType=_TEXT, acceleratorCount=_NUMBER)},
    scheduling=_keys(
        provisioningModel={"enum": ["STANDARD", "SPOT"]},
        instanceTerminationAction={"enum": ["DELETE", "STOP"]},
        onHostMaintenance={"enum": ["MIGRATE", "TERMINATE"]},
        automaticRestart=_TRUTH,
    ),
    serviceAccounts={"type": "array", "items": _keys(email=_TEXT, scopes={"type": "array", "items": _TEXT})},
    metadata=_keys(items={"type": "array", "items": _keys(key=_TEXT, value=_TEXT)}),
    labels={"type": "object"},
    networkInterfaces={"type": "array"},
)


def faults_of(config: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a cluster file; empty where nothing was found.

    Args:
        config: The file, read.
    """
    cloud = config["provider"].get("type")
    if cloud not in _LAUNCHES:
        return [f"provider.type: '{cloud}' is not known here; expected one of {', '.join(_LAUNCHES)}"]
    try:
        full = as_ray_reads(config)
    except (ValueError, RuntimeError, AssertionError, KeyError, TypeError, AttributeError) as error:
        return [" ".join(f"Ray refuses the file: {error!r}".split())]
    except jsonschema.ValidationError as error:
        return [_said(error)]
    settings = full.get("metadata", {})
    found = [f"metadata.{name}: still says {UNSET}" for name, value in settings.items() if UNSET in str(value)]
    elsewhere = {text for text in _texts({**full, "metadata": {}}) if UNSET in text} - set(_texts(settings))
    found += [f"'{text}' stands outside metadata, where nobody looks for it" for text in sorted(elsewhere)]
    if full["docker"].get("image") and "-e RAY_AUTH_MODE=token" not in full["docker"].get("run_options", []):
        found.append("docker.run_options: without '-e RAY_AUTH_MODE=token' anybody in the network may use the cluster")
    for name, node_type in full["available_node_types"].items():
        found += [
            f"available_node_types.{name}.node_config: {fault}" for fault in _LAUNCHES[cloud](node_type["node_config"])
        ]
        found += [f"available_node_types.{name}: {fault}" for fault in machine_faults(node_type, full, name)]
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def _said(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message[:200]}"


def as_ray_reads(config: dict[str, Any]) -> dict[str, Any]:
    """The file with Ray's defaults, as Ray accepts it.

    Raises:
        jsonschema.ValidationError: A key or value that Ray does not know.
        ValueError: Types of nodes that do not fit together.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # Ray's remarks on its own defaults
        full: dict[str, Any] = prepare_config(config)
        validate_config(full)
    return full


def ec2_faults(node_config: dict[str, Any]) -> list[str]:
    """A launch request that EC2 would not understand: by the description of RunInstances that botocore brings."""
    from botocore.loaders import Loader  # noqa: PLC0415  (a file for GCP needs none of it)
    from botocore.model import ServiceModel  # noqa: PLC0415
    from botocore.validate import ParamValidator  # noqa: PLC0415

    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    # Ray sets the counts, and makes one subnet of its own key SubnetIds.
    request = {**{key: value for key, value in node_config.items() if key != "SubnetIds"}, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(request, shape)
    if report.has_errors():
        return report.generate_report().splitlines()
    return list(_unknown_values(request, shape, ""))


def _unknown_values(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Words outside the list of those that are allowed, which the validator lets pass."""
    if shape.type_name == "structure":
        for key, inner in value.items():
            yield from _unknown_values(inner, shape.members[key], f"{path}.{key}".lstrip("."))
    elif shape.type_name == "list":
        for index, inner in enumerate(value):
            yield from _unknown_values(inner, shape.member, f"{path}[{index}]")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        known = ", ".join(shape.enum[:6]) + (", …" if len(shape.enum) > 6 else "")
        yield f"{path}: '{value}' is not known to EC2; expected one of {known}"


def compute_engine_faults(node_config: dict[str, Any]) -> list[str]:
    """A launch request with other keys or values than those that are known here of Compute Engine."""
    return [_said(error) for error in jsonschema.Draft7Validator(_COMPUTE_ENGINE).iter_errors(node_config)]


_LAUNCHES = {"aws": ec2_faults, "gcp": compute_engine_faults}


def machine_faults(node_type: dict[str, Any], config: dict[str, Any], name: str) -> list[str]:
    """Resources that the machine has not got, and shared memory that is too small for Ray."""
    is_head = name == config["head_node_type"]
    machine = node_type["node_config"].get("InstanceType") or node_type["node_config"].get("machineType")
    if machine not in MACHINES:
        return []  # the caller says so: see `unknown_machines`
    gpus, cpus, memory = MACHINES[machine]
    found = []
    promised = {"GPU": node_type["resources"].get("GPU", gpus), "CPU": node_type["resources"].get("CPU", cpus)}
    for kind, there in (("GPU", gpus), ("CPU", cpus)):
        if promised[kind] > there or (not is_head and promised[kind] < there):
            found.append(f"resources.{kind} is {promised[kind]}, but a {machine} has {there}")
    if is_head and gpus:
        found.append(f"the head is a {machine}, whose {gpus} GPU(s) nobody would use")
    options = [
        *config["docker"].get("run_options", []),
        *config["docker"].get("head_run_options" if is_head else "worker_run_options", []),
        *node_type.get("docker", {}).get("worker_run_options", []),
    ]
    shared = [int(o.removeprefix("--shm-size=").removesuffix("g")) for o in options if o.startswith("--shm-size=")]
    if shared and not 0.3 * memory < shared[-1] < memory:
        found.append(f"--shm-size={shared[-1]}g; Ray's object store takes 30 % of the {memory} GiB of a {machine}")
    return found


def unknown_machines(config: dict[str, Any]) -> list[str]:
    """Types of machine that are not in the table, so that their GPUs were not compared."""
    named = [
        node_type["node_config"].get("InstanceType") or node_type["node_config"].get("machineType")
        for node_type in config["available_node_types"].values()
    ]
    return [str(machine) for machine in named if machine not in MACHINES]


def promised_nodes(config: dict[str, Any]) -> list[Node]:
    """The largest cluster that a file allows: the head, and of each type as many workers as it may have.

    Args:
        config: As Ray reads it.
    """
    nodes = []
    left = config["max_workers"]
    for name, node_type in config["available_node_types"].items():
        is_head = name == config["head_node_type"]
        count = 1 if is_head else min(node_type["max_workers"], left)
        left -= 0 if is_head else count
        offered = node_type["resources"]
        nodes += [Node(cpus=offered.get("CPU", 0), gpus=offered.get("GPU", 0))] * count
    return nodes


def room_in(config: dict[str, Any]) -> int:
    """The largest ensemble that fits, a GPU a member."""
    nodes, members = promised_nodes(config), 0
    with contextlib.suppress(ClusterError):
        while True:
            place(nodes, members=members + 1, config=ClusterConfig(device="cuda"))
            members += 1
    return members


def missing_files(config: dict[str, Any]) -> list[str]:
    """Files to copy to the nodes that are not on this machine, as seen from the working folder."""
    how = {"dist": ": make dist", "auth_token": ": ray get-auth-token --generate"}
    absent = [here for here in config.get("file_mounts", {}).values() if not Path(here).expanduser().exists()]
    return [f"file_mounts: there is no '{here}' here{how.get(Path(here).name, '')}" for here in absent]


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--members", type=int, default=1, help="M of the run that is to fit")
    chosen = parser.parse_args(arguments)
    try:
        config = yaml.safe_load(chosen.file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        print(f"error: cannot read '{chosen.file}': {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not isinstance(config, dict) or not isinstance(config.get("provider"), dict):
        print(f"error: '{chosen.file}' is no cluster file: it has no provider", file=sys.stderr)
        return 2
    found = faults_of(config) + missing_files(config)
    if not found and (room := room_in(as_ray_reads(config))) < chosen.members:
        found = [f"the cluster grows to {room} GPU(s), too few for {chosen.members} members; raise metadata.workers"]
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    if found:
        return 2
    full = as_ray_reads(config)
    print(f"{chosen.file}: no fault found; it grows to room for {room_in(full)} members with a GPU each")
    for machine in unknown_machines(full):
        print(
            f"a {machine} is not known here: compare its GPUs, CPUs and memory with resources and --shm-size yourself"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
