"""The manifests for KubeRay: pods against Kubernetes' schema, the rest against the fields that KubeRay documents."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml

from conftest import REPOSITORY
from eat_dist.cli import app
from eat_dist.cluster.resources import Node, place
from eat_dist.config import load_config

FOLDER = REPOSITORY / "deploy" / "kuberay"
CLUSTER = yaml.safe_load((FOLDER / "raycluster.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
SETTINGS = yaml.safe_load((FOLDER / "settings.yaml").read_text(encoding="utf-8"))
KUBERNETES = "1.30"

TEXT, COUNT, TRUTH, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}, {}
TEXTS = {"type": "object", "additionalProperties": TEXT}


def keys(required: str = "", **kinds: Any) -> dict[str, Any]:
    """JSON schema of an object that has these keys and no others."""
    return {"type": "object", "properties": kinds, "additionalProperties": False, "required": required.split()}


# The parts of KubeRay's API ray.io/v1 that the manifests use, as its API reference (v1.5 to v1.7) and the types of the
# operator name them. Pod templates are left to Kubernetes' own schema.
HEAD = keys(
    "rayStartParams template",
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    rayStartParams=TEXTS,
    template=ANY,
    enableIngress=TRUTH,
)
WORKERS = keys(
    "groupName template maxReplicas minReplicas",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    rayStartParams=TEXTS,
    template=ANY,
)
AUTOSCALER = keys(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=COUNT,
    resources=ANY,
    env=ANY,
    envFrom=ANY,
)
CLUSTER_SPEC = keys(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=keys(mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=TRUTH,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
    suspend=TRUTH,
)
JOB_SPEC = keys(
    "entrypoint rayClusterSpec",
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterConfig=keys(backoffLimit=COUNT),
    submitterPodTemplate=ANY,
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=TRUTH,
    ttlSecondsAfterFinished=COUNT,
    runtimeEnvYAML=TEXT,
    suspend=TRUTH,
    rayClusterSpec=CLUSTER_SPEC,
)
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return dict.get(spec, "rayClusterSpec", spec)


def templates(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = cluster_of(manifest)
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in manifest["spec"]:
        yield "submitter", manifest["spec"]["submitterPodTemplate"]


def faults_of(manifest: dict[str, Any]) -> list[str]:
    """What Kubernetes or the operator would refuse."""
    whole = keys("apiVersion kind metadata spec", apiVersion={"const": "ray.io/v1"}, kind=TEXT, metadata=ANY, spec=ANY)
    found = [error.message for error in jsonschema.Draft7Validator(whole).iter_errors(manifest)]
    spec = jsonschema.Draft7Validator(SPECS[manifest["kind"]])
    found += [error.message for error in spec.iter_errors(manifest["spec"])]
    if found:
        return found
    name = manifest["metadata"].get("name", "")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):  # names of pods and services are made of it
        found.append(f"metadata.name: {name}")
    for who, template in templates(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}}
        try:
            kubernetes_validate.validate({**pod, "spec": template["spec"]}, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{who}: {'.'.join(map(str, error.path))}: {error.message}")
        mounted = {m["name"] for c in template["spec"]["containers"] for m in c.get("volumeMounts", [])}
        found += [
            f"{who}: no volume {name}" for name in mounted - {v["name"] for v in template["spec"].get("volumes", [])}
        ]
    return found + list(contradictions(manifest))


def contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """What the operator refuses although every field by itself is good."""
    spec, cluster = manifest["spec"], cluster_of(manifest)
    version = tuple(int(part) for part in cluster["rayVersion"].split("."))
    if cluster.get("authOptions", {}).get("mode") == "token" and version < (2, 52, 0):
        yield "token authentication needs Ray 2.52"
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"{group['groupName']}: replicas"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("submissionMode") != "K8sJobMode" and "submitterPodTemplate" in spec:
        yield "submitterPodTemplate needs K8sJobMode"


@pytest.mark.parametrize("manifest", [CLUSTER, JOB], ids=["RayCluster", "RayJob"])
def test_a_manifest_has_no_fault(manifest: dict[str, Any]) -> None:
    assert faults_of(manifest) == []


def gpu(manifest: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = cluster_of(manifest)["workerGroupSpecs"][0]
    return group


def container(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = gpu(manifest)["template"]["spec"]["containers"][0]
    return found


FAULTS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any], str]] = {
    "a misspelt field of the job": (JOB, lambda m: m["spec"].update(ttlSecondAfterFinish=1), "ttlSecondAfterFinish"),
    "a mode of submission that is none": (JOB, lambda m: m["spec"].update(submissionMode="JobMode"), "JobMode"),
    "no entrypoint": (JOB, lambda m: m["spec"].pop("entrypoint"), "'entrypoint' is a required property"),
    "a mode of authentication that is none": (
        CLUSTER,
        lambda m: cluster_of(m).update(authOptions={"mode": "tokens"}),
        "'tokens' is not one of",
    ),
    "a number where Ray's start command wants text": (
        CLUSTER,
        lambda m: cluster_of(m)["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        "0 is not of type 'string'",
    ),
    "a misspelt field of a pod": (CLUSTER, lambda m: gpu(m)["template"]["spec"].update(nodeSelect={}), "nodeSelect"),
    "a toleration with an effect that is none": (
        CLUSTER,
        lambda m: gpu(m)["template"]["spec"]["tolerations"][0].update(efect="NoSchedule"),
        "efect",
    ),
    "a container without a name": (JOB, lambda m: container(m).pop("name"), "'name' is a required property"),
    "a variable whose value is a number": (
        JOB,
        lambda m: container(m).update(env=[{"name": "A", "value": 1}]),
        "1 is not of type",
    ),
    "a mount without a volume": (JOB, lambda m: gpu(m)["template"]["spec"].pop("volumes"), "no volume shared-memory"),
    "more replicas than the most": (CLUSTER, lambda m: gpu(m).update(replicas=9), "gpu: replicas"),
    "a Ray that knows no token": (CLUSTER, lambda m: cluster_of(m).update(rayVersion="2.40.0"), "needs Ray 2.52"),
    "a cluster that is to go, but not with its job": (
        JOB,
        lambda m: m["spec"].update(shutdownAfterJobFinishes=False),
        "needs shutdownAfterJobFinishes",
    ),
    "a name that is too long for pods": (JOB, lambda m: m["metadata"].update(name="a" * 48), "metadata.name"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(name: str) -> None:
    manifest, break_it, message = FAULTS[name]
    broken = copy.deepcopy(manifest)
    break_it(broken)

    found = faults_of(broken)

    assert any(message in fault for fault in found), found


def test_the_settings_are_a_config_map_that_every_container_reads() -> None:
    kubernetes_validate.validate(SETTINGS, KUBERNETES, strict=True)

    for manifest in (CLUSTER, JOB):
        for _, template in templates(manifest):
            sources = [source for c in template["spec"]["containers"] for source in c["envFrom"]]
            assert {"configMapRef": {"name": SETTINGS["metadata"]["name"]}} in sources
            assert {"secretRef": {"name": "eat-dist-bucket", "optional": True}} in sources
    assert not any("KEY" in name or "TOKEN" in name for name in SETTINGS["data"])  # no secret in a file


def test_one_image_is_to_be_set_in_each_manifest_and_two_settings() -> None:
    texts = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.yaml")}

    assert {name: text.count("CHANGE-ME") for name, text in texts.items()} == {
        "raycluster.yaml": 1,
        "rayjob.yaml": 1,
        "settings.yaml": 2,
    }
    for manifest in (CLUSTER, JOB):
        assert len({c["image"] for _, t in templates(manifest) for c in t["spec"]["containers"]}) == 1


@pytest.mark.parametrize("manifest", [CLUSTER, JOB], ids=["RayCluster", "RayJob"])
def test_a_worker_is_a_whole_gpu_with_shared_memory_and_the_head_takes_no_member(manifest: dict[str, Any]) -> None:
    limits = container(manifest)["resources"]["limits"]

    assert limits["nvidia.com/gpu"] == container(manifest)["resources"]["requests"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu(manifest)["template"]["spec"][
        "tolerations"
    ]
    for _, template in list(templates(manifest))[:2]:
        shared = next(v for v in template["spec"]["volumes"] if v["name"] == "shared-memory")
        memory = int(template["spec"]["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi"))
        # Ray's object store takes 30 % of the memory, and shared memory counts as the container's.
        assert 0.3 * memory < int(shared["emptyDir"]["sizeLimit"].removesuffix("Gi")) <= 0.5 * memory
        assert {"name": "shared-memory", "mountPath": "/dev/shm"} in template["spec"]["containers"][0]["volumeMounts"]
    assert cluster_of(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster_of(manifest)["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_the_jobs_command_is_one_that_the_command_line_takes_and_its_members_fit_the_workers() -> None:
    words = shlex.split(JOB["spec"]["entrypoint"].replace("$EAT_DIST_BUCKET", "s3://bucket"))
    assert words[:2] == ["python", "/home/ray/eat_dist/jobs/train.py"]  # where deploy/Dockerfile puts it
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    options = train.make_context("train", words[2:]).params
    assert options["resume_or_start"]  # with which backoffLimit is worth something

    assert options["run_dir"] == "s3://bucket/runs/cub200-eat"
    file = str(options["config"]).removeprefix("/home/ray/eat_dist/")
    config = load_config(REPOSITORY / file, options["assignments"])
    group = gpu(JOB)
    nodes = [Node(0, 0)] + [Node(8, 1)] * group["minReplicas"]
    assert place(nodes, members=config.ensemble.members, config=config.cluster).gpus == 1
    assert config.ensemble.members == group["replicas"] == group["maxReplicas"]  # none is paid for in vain
    assert config.data.shards == "s3://bucket/shards/cub200"


def test_a_command_that_the_command_line_does_not_take_is_noticed() -> None:
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]

    with pytest.raises(Exception, match="No such option"):
        train.make_context("train", ["--run_dir", "a"])


def test_the_image_holds_what_the_job_names_and_nothing_that_is_not_there() -> None:
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text("utf-8")
    copied = re.findall(r"^COPY --chown=\S+ (\S+)", dockerfile, re.MULTILINE)
    let_through = re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text("utf-8"), re.MULTILINE)

    assert {path.split("/")[0] for path in copied} == set(let_through)
    assert all((REPOSITORY / name).is_dir() for name in let_through if name != "dist")  # which `make dist` makes
    assert "WORKDIR /home/ray/eat_dist\n" in dockerfile


def test_the_versions_are_those_that_are_pinned() -> None:
    ray = re.findall(r"^ray==(\S+)$", (REPOSITORY / "requirements.lock").read_text("utf-8"), re.MULTILINE)[0]

    assert cluster_of(CLUSTER)["rayVersion"] == cluster_of(JOB)["rayVersion"] == ray
