"""What the machines of cluster.yaml may do on AWS: two roles, as instance profiles, made or removed.

The head may start and end machines and use the bucket, a worker may use the bucket, and neither anything else. (The
role that Ray makes by default lets the head do everything on EC2 and S3, and the workers nothing.)

    python deploy/aws_profiles.py create BUCKET
    python deploy/aws_profiles.py delete
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

HEAD, WORKER = "eat-dist-head", "eat-dist-worker"
_POLICY = "eat-dist"
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}
_LAUNCHING = ("RunInstances", "TerminateInstances", "CreateTags", "DeleteTags", "CancelSpotInstanceRequests")
_LOOKING = (
    "DescribeInstances",
    "DescribeInstanceStatus",
    "DescribeInstanceTypes",
    "DescribeImages",
    "DescribeSubnets",
    "DescribeSecurityGroups",
    "DescribeKeyPairs",
    "DescribeAvailabilityZones",
    "DescribeSpotInstanceRequests",
)


def policy_of_a_worker(bucket: str) -> dict[str, Any]:
    """Read and write one bucket."""
    return {"Version": "2012-10-17", "Statement": _on_the_bucket(bucket)}


def policy_of_the_head(bucket: str, *, worker_role: str) -> dict[str, Any]:
    """Read and write the bucket; start and end machines, and give the workers among them their role.

    Args:
        bucket: Its name.
        worker_role: ARN.
    """
    return {
        "Version": "2012-10-17",
        "Statement": [
            *_on_the_bucket(bucket),
            {"Effect": "Allow", "Action": [f"ec2:{name}" for name in (*_LAUNCHING, *_LOOKING)], "Resource": "*"},
            {"Effect": "Allow", "Action": "iam:PassRole", "Resource": worker_role},
            # Where cluster.yaml names its machine image by a public parameter of AWS's.
            {"Effect": "Allow", "Action": "ssm:GetParameters", "Resource": "arn:aws:ssm:*::parameter/aws/service/*"},
        ],
    }


def _on_the_bucket(bucket: str) -> list[dict[str, Any]]:
    whole = ("ListBucket", "GetBucketLocation", "ListBucketMultipartUploads")
    objects = ("GetObject", "PutObject", "DeleteObject", "AbortMultipartUpload", "ListMultipartUploadParts")
    return [
        {"Effect": "Allow", "Action": [f"s3:{name}" for name in whole], "Resource": f"arn:aws:s3:::{bucket}"},
        {"Effect": "Allow", "Action": [f"s3:{name}" for name in objects], "Resource": f"arn:aws:s3:::{bucket}/*"},
    ]


def name_of_the_bucket(text: str) -> str:
    """The name in ``NAME`` or ``s3://NAME``.

    Raises:
        ValueError: It is none.
    """
    bucket = text.removeprefix("s3://").rstrip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise ValueError(f"'{text}' is no name of a bucket; expected e.g. my-bucket or s3://my-bucket")
    return bucket


def create(bucket: str) -> None:
    """Make both profiles, or bring them up to date."""
    iam = boto3.client("iam")
    with _unless("InvalidInput", "EntityAlreadyExists"):  # every account that ever used spot has it
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")
    worker_role = _role(iam, WORKER)
    _role(iam, HEAD)
    documents = {WORKER: policy_of_a_worker(bucket), HEAD: policy_of_the_head(bucket, worker_role=worker_role)}
    for name, document in documents.items():
        iam.put_role_policy(RoleName=name, PolicyName=_POLICY, PolicyDocument=json.dumps(document))
        with _unless("EntityAlreadyExists"):
            iam.create_instance_profile(InstanceProfileName=name)
        with _unless("LimitExceeded"):  # a profile holds one role, and has it already
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def delete() -> None:
    """Remove both profiles and roles; what is not there is no fault."""
    iam = boto3.client("iam")
    for name in (HEAD, WORKER):
        with _unless("NoSuchEntity"):
            iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
        with _unless("NoSuchEntity"):
            iam.delete_instance_profile(InstanceProfileName=name)
        with _unless("NoSuchEntity"):
            iam.delete_role_policy(RoleName=name, PolicyName=_POLICY)
        with _unless("NoSuchEntity"):
            iam.delete_role(RoleName=name)


def _role(iam: Any, name: str) -> str:
    with _unless("EntityAlreadyExists"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(_TRUST))
    return str(iam.get_role(RoleName=name)["Role"]["Arn"])


@contextlib.contextmanager
def _unless(*codes: str) -> Iterator[None]:
    """What AWS refuses with one of these codes is done already."""
    try:
        yield
    except ClientError as error:
        if error.response["Error"]["Code"] not in codes:
            raise


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create").add_argument("bucket", help="its name, or s3://NAME; it must exist")
    commands.add_parser("delete")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "delete":
            delete()
            print(f"removed {HEAD} and {WORKER}")
            return 0
        bucket = name_of_the_bucket(chosen.bucket)
        boto3.client("s3").head_bucket(Bucket=bucket)
        create(bucket)
    except ClientError as error:
        about = error.response["Error"]
        hint = f": is the bucket '{bucket}' there, and yours?" if error.operation_name == "HeadBucket" else ""
        print(f"error: AWS refused {error.operation_name}: {about['Code']} {about['Message']}{hint}", file=sys.stderr)
        return 2
    except (BotoCoreError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{HEAD}: may start and end machines, and use s3://{bucket}\n{WORKER}: may use s3://{bucket}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
