"""cluster.yaml and its variant for Google Cloud, as far as they can be tried without a cloud.

Ray's own code reads the files, EC2's description checks the launch requests, and Ray's launcher starts the machines at
moto's EC2: roles, key, subnets, security group, head and spot workers.
"""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "deploy"))

import aws_profiles
import check_cluster

AWS = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text(encoding="utf-8"))
GCP = yaml.safe_load(
    re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "docs" / "cluster_gcp.md").read_text(encoding="utf-8"), re.DOTALL)[0]
)
Fault = Callable[[dict[str, Any]], Any]


def filled(config: dict[str, Any]) -> dict[str, Any]:
    """With what a user must set."""
    return dict(json.loads(json.dumps(config).replace(check_cluster.UNSET, "my-bucket")))


def gpu(config: dict[str, Any]) -> dict[str, Any]:
    return dict.__getitem__(config["available_node_types"], "gpu")


@pytest.mark.parametrize("config", [AWS, GCP], ids=["aws", "gcp"])
def test_a_file_whose_settings_are_made_has_no_fault(config: dict[str, Any]) -> None:
    assert check_cluster.faults_of(filled(config)) == []


@pytest.mark.parametrize(
    ("config", "settings"),
    [(AWS, ["bucket"]), (GCP, ["project", "account", "bucket", "machine_image"])],
    ids=["aws", "gcp"],
)
def test_all_that_must_be_set_stands_under_metadata_and_is_missed_by_name(
    config: dict[str, Any], settings: list[str]
) -> None:
    assert check_cluster.faults_of(config) == [f"metadata.{name}: still says CHANGE-ME" for name in settings]

    buried = filled(copy.deepcopy(config))
    buried["setup_commands"].append("wget CHANGE-ME")
    assert check_cluster.faults_of(buried) == ["'wget CHANGE-ME' stands outside metadata, where nobody looks for it"]


FAULTS: dict[str, tuple[dict[str, Any], Fault, str]] = {
    "a key that Ray does not know": (AWS, lambda c: c.update(idle_timeout_minuts=5), "idle_timeout_minuts"),
    "a head type that is not there": (AWS, lambda c: c.update(head_node_type="haed"), "head_node_type"),
    "half a GPU": (AWS, lambda c: gpu(c)["resources"].update(GPU=0.5), "0.5 is not of type 'integer'"),
    "more workers at least than at most": (AWS, lambda c: gpu(c).update(min_workers=9), "max_workers"),
    "a docker option in the wrong place": (AWS, lambda c: gpu(c)["docker"].update(run_options=[]), "run_options"),
    "a misspelt key of the launch": (AWS, lambda c: gpu(c)["node_config"].update(InstanceTyp="x"), "InstanceTyp"),
    "a number as text": (
        AWS,
        lambda c: gpu(c)["node_config"]["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="200"),
        "VolumeSize",
    ),
    "a market that is none": (
        AWS,
        lambda c: gpu(c)["node_config"]["InstanceMarketOptions"].update(MarketType="spt"),
        "MarketType: 'spt' is not known to EC2; expected one of spot",
    ),
    "spot options beside their place": (
        AWS,
        lambda c: gpu(c)["node_config"].update(SpotOptions={}),
        'Unknown parameter in input: "SpotOptions"',
    ),
    "a machine that is none": (
        AWS,
        lambda c: gpu(c)["node_config"].update(InstanceType="g5.3xlarge"),
        "'g5.3xlarge' is not known to EC2",
    ),
    "more GPUs than the machine has": (
        AWS,
        lambda c: gpu(c)["resources"].update(GPU=4),
        "resources.GPU is 4, but a g5.2xlarge has 1",
    ),
    "fewer GPUs than the machine has": (
        AWS,
        lambda c: gpu(c)["node_config"].update(InstanceType="g5.12xlarge"),
        "resources.GPU is 1, but a g5.12xlarge has 4",
    ),
    "shared memory that is too small for Ray": (
        AWS,
        lambda c: gpu(c)["docker"].update(worker_run_options=["--gpus all", "--shm-size=8g"]),
        "--shm-size=8g",
    ),
    "a cluster without a token": (
        AWS,
        lambda c: c["docker"]["run_options"].remove("-e RAY_AUTH_MODE=token"),
        "RAY_AUTH_MODE=token",
    ),
    "a cloud that is not known": (AWS, lambda c: c["provider"].update(type="aliyun"), "expected one of aws, gcp"),
    "a misspelt key for Google": (
        GCP,
        lambda c: gpu(c)["node_config"].update(machinType="x"),
        "'machinType' was unexpected",
    ),
    "a model of provisioning that is none": (
        GCP,
        lambda c: gpu(c)["node_config"]["scheduling"].update(provisioningModel="SPOTT"),
        "scheduling.provisioningModel: 'SPOTT' is not one of ['STANDARD', 'SPOT']",
    ),
    "more GPUs than Google's machine has": (
        GCP,
        lambda c: gpu(c)["resources"].update(GPU=2),
        "resources.GPU is 2, but a g2-standard-8 has 1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str) -> None:
    config, break_it, message = FAULTS[name]
    broken = filled(copy.deepcopy(config))
    break_it(broken)

    found = check_cluster.faults_of(broken)

    assert any(message in fault for fault in found), found


def test_the_largest_cluster_has_room_for_a_member_a_worker_and_none_on_the_head() -> None:
    full = check_cluster.as_ray_reads(filled(AWS))

    assert check_cluster.room_in(full) == AWS["metadata"]["workers"] == 8
    assert [node.gpus for node in check_cluster.promised_nodes(full)] == [0] + [1] * 8
    assert check_cluster.promised_nodes(full)[0].cpus == 0


def test_the_command_says_what_is_wrong_before_money_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(filled(AWS)))

    assert check_cluster.main(["cluster.yaml"]) == 2
    said = capsys.readouterr().err
    assert "there is no '~/.ray/auth_token' here: ray get-auth-token --generate" in said
    assert "there is no './dist' here: make dist" in said

    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    (tmp_path / "dist").mkdir()
    assert check_cluster.main(["cluster.yaml", "--members", "4"]) == 0
    assert "room for 8 members with a GPU each" in capsys.readouterr().out
    assert check_cluster.main(["cluster.yaml", "--members", "9"]) == 2
    assert "grows to 8 GPU(s), too few for 9 members" in capsys.readouterr().err
    assert check_cluster.main(["none.yaml"]) == 2
    file.write_text("provider: [")
    assert check_cluster.main(["cluster.yaml"]) == 2
    file.write_text("a: 1")
    assert check_cluster.main(["cluster.yaml"]) == 2
    assert capsys.readouterr().err.count("error: ") == 3


@pytest.mark.parametrize("config", [AWS, GCP], ids=["aws", "gcp"])
def test_both_files_do_the_same_on_their_nodes(config: dict[str, Any]) -> None:
    for key in ("setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert config[key] == AWS[key]
    assert config["file_mounts"] == AWS["file_mounts"]
    assert "-e RAY_AUTH_TOKEN_PATH=/home/ray/token/auth_token" in config["docker"]["run_options"]
    assert "/home/ray/token/auth_token" in config["file_mounts"]


@pytest.mark.parametrize("config", [AWS, GCP], ids=["aws", "gcp"])
def test_every_command_on_a_node_is_bash_that_parses(config: dict[str, Any]) -> None:
    commands = [command for key, group in config.items() if key.endswith("_commands") for command in group]
    assert len(commands) > 8
    for command in [*commands]:
        assert "~" not in command  # Ray writes it out as the container's home, wherever the command runs
        assert subprocess.run(["bash", "-n", "-c", command], check=False, capture_output=True).returncode == 0, command
    assert subprocess.run(["bash", "-n", "-c", "(false"], check=False, capture_output=True).returncode != 0


def test_a_node_that_cannot_write_to_the_bucket_fails_at_setup(tmp_path: Path) -> None:
    probe = next(command for command in AWS["setup_commands"] if "EAT_DIST_BUCKET" in command)
    probe = probe.replace("python", sys.executable, 1)

    def run(bucket: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "EAT_DIST_BUCKET": bucket, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.run(["bash", "-c", probe], env=environment, check=False, capture_output=True, text=True)

    assert run(str(tmp_path)).returncode == 0
    (tmp_path / "file").touch()
    refused = run(str(tmp_path / "file"))
    assert refused.returncode != 0
    assert "cannot write to" in refused.stderr


def test_the_images_have_the_versions_that_are_pinned() -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (REPOSITORY / "requirements.lock").read_text("utf-8"), re.MULTILINE))
    image = f"rayproject/ray:{pinned['ray']}-py311-gpu"

    assert AWS["metadata"]["image"] == GCP["metadata"]["image"] == image
    assert f"FROM {image}\n" in (REPOSITORY / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    assert "boto3" in pinned  # with which the head's autoscaler speaks to EC2


# ---------------------------------------------------------------------------------------------- at moto's EC2


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An AWS on loopback, with a bucket, and a home for the key that Ray makes."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_DEFAULT_REGION", AWS["metadata"]["region"])
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3").create_bucket(
            Bucket="my-bucket", CreateBucketConfiguration={"LocationConstraint": AWS["metadata"]["region"]}
        )
        yield
    server.stop()


@pytest.mark.usefixtures("aws")
def test_rays_launcher_starts_a_head_and_spot_workers_in_a_closed_group_and_ends_them_all() -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    assert aws_profiles.main(["create", "s3://my-bucket"]) == 0
    ec2 = boto3.client("ec2")
    config = bootstrap_aws(check_cluster.as_ray_reads(filled(AWS)))
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for node_type, kind in (("head", "head"), ("gpu", "worker")):
        tags = {"ray-node-type": kind, "ray-user-node-type": node_type, "ray-cluster-name": "eat-dist"}
        provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)

    machines = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    started = {m["InstanceType"]: m for m in machines}
    assert set(started) == {"m6i.2xlarge", "g5.2xlarge"}
    assert started["g5.2xlarge"]["InstanceLifecycle"] == "spot"
    assert "InstanceLifecycle" not in started["m6i.2xlarge"]  # a head that vanishes ends all jobs
    assert started["g5.2xlarge"]["IamInstanceProfile"]["Arn"].endswith("/eat-dist-worker")
    assert started["m6i.2xlarge"]["IamInstanceProfile"]["Arn"].endswith("/eat-dist-head")
    groups = {g["GroupId"] for m in machines for g in m["SecurityGroups"]}
    rules = ec2.describe_security_groups(GroupIds=list(groups))["SecurityGroups"][0]["IpPermissions"]
    open_ports = {rule.get("FromPort") for rule in rules if rule["IpRanges"]}
    assert open_ports == {22}  # neither dashboard nor MLflow

    provider.non_terminated_nodes({})
    provider.terminate_nodes([m["InstanceId"] for m in machines])

    left = [m for r in ec2.describe_instances()["Reservations"] for m in r["Instances"]]
    assert {m["State"]["Name"] for m in left} == {"terminated"}  # none is merely stopped


@pytest.mark.usefixtures("aws")
def test_the_machines_have_what_ray_would_find_on_them() -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    kinds = [name for name in check_cluster.MACHINES if "." in name]
    config = check_cluster.as_ray_reads(filled(AWS))
    for kind in kinds:
        config["available_node_types"][kind] = {"resources": {}, "node_config": {"InstanceType": kind}}

    found = AWSNodeProvider.fillout_available_node_types_resources(config)["available_node_types"]

    for kind in kinds:
        gpus, cpus, _ = check_cluster.MACHINES[kind]
        assert (found[kind]["resources"].get("GPU", 0), found[kind]["resources"]["CPU"]) == (gpus, cpus), kind


@pytest.mark.usefixtures("aws")
def test_profiles_are_made_twice_without_harm_and_removed_without_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    import boto3

    iam = boto3.client("iam")
    assert aws_profiles.main(["create", "my-bucket"]) == 0
    assert aws_profiles.main(["create", "my-bucket"]) == 0
    profile = iam.get_instance_profile(InstanceProfileName=aws_profiles.WORKER)["InstanceProfile"]
    assert [role["RoleName"] for role in profile["Roles"]] == [aws_profiles.WORKER]

    assert aws_profiles.main(["delete"]) == 0
    assert aws_profiles.main(["delete"]) == 0

    assert not [role for role in iam.list_roles()["Roles"] if role["RoleName"].startswith("eat-dist")]
    assert iam.list_instance_profiles()["InstanceProfiles"] == []
    capsys.readouterr()
    assert aws_profiles.main(["create", "no-such-bucket"]) == 2
    assert aws_profiles.main(["create", "No Bucket"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "is the bucket 'no-such-bucket' there" in said[0]
    assert "'No Bucket' is no name of a bucket" in said[1]


def test_a_worker_may_use_the_bucket_and_nothing_else() -> None:
    worker = aws_profiles.policy_of_a_worker("my-bucket")["Statement"]
    head = aws_profiles.policy_of_the_head("my-bucket", worker_role="arn:aws:iam::1:role/eat-dist-worker")["Statement"]

    assert {statement["Resource"] for statement in worker} == {"arn:aws:s3:::my-bucket", "arn:aws:s3:::my-bucket/*"}
    assert all(action.startswith("s3:") for statement in worker for action in statement["Action"])
    actions = {a for s in head for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}
    assert {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"} <= actions
    assert not any(action.endswith("*") for action in actions)
    passed = next(statement for statement in head if statement["Action"] == "iam:PassRole")
    assert passed["Resource"].endswith("role/eat-dist-worker")


# ------------------------------------------------------------------------------------------------- on the head


def _answer(port: str, *, host: str) -> int:
    """Status of a call of MLflow's interface that names its server so."""
    where = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    call = urllib.request.Request(where, headers={"Host": host})
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_head_starts_an_mlflow_server_that_outlives_the_shell_and_is_not_started_twice(tmp_path: Path) -> None:
    """Fifteen seconds: a real server."""
    import psutil

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = AWS["head_start_ray_commands"][1].replace("5000", port).replace("/home/ray", str(tmp_path))
    command = command.replace("setsid mlflow", f"setsid {sys.executable} -m mlflow")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "EAT_DIST_BUCKET": str(tmp_path), "HOME": str(tmp_path)}

    def start(**more: str) -> None:
        subprocess.run(["bash", "-c", command], env={**environment, **more}, check=True, timeout=60)

    def servers() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if {port, "server"} <= set(p.info["cmdline"] or [])]

    try:
        start(MLFLOW_TRACKING_URI="https://mlflow.example.com")
        assert servers() == []  # the user's own is named
        start()
        for _ in range(800):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.25)
        assert _answer(port, host="10.1.2.3:5000") == 200  # as a worker calls it
        assert _answer(port, host="elsewhere.example.com") == 403
        before = {process.pid for process in servers()}
        start()
        time.sleep(1)
        assert {process.pid for process in servers()} == before
        assert (tmp_path / "mlflow" / "mlflow.db").exists()
    finally:
        for process in [c for p in servers() for c in (*p.children(recursive=True), p)]:
            process.kill()
