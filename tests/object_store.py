"""A real S3 server on loopback (moto's) in a process of its own, so that Ray's workers reach it, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eat_dist.storage import Folder

# In the environment of all tests (conftest.py), and so of Ray's workers.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "only-for-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class ObjectStore:
    """The server, and a client that is not ours."""

    endpoint: str

    @property
    def client(self) -> Any:
        return self.service("s3")

    def service(self, name: str, access_key: str = "tests", secret_key: str = "only-for-tests") -> Any:
        import boto3  # half a second that few tests need

        return boto3.client(
            name,
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
        )

    def url(self, path: str) -> str:
        return f"s3://{path}?endpoint_override={self.endpoint}"

    def folder(self, path: str) -> Folder:
        return Folder.at(self.url(path))

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Of all objects; a name that ends in / is an empty marker and no file."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key for key in keys if not key.endswith("/")]

    def require_permission(self) -> None:
        """From now on a request needs an access key whose policies permit it."""
        kind = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", data=b"0", headers=kind)
        urllib.request.urlopen(request, timeout=10).close()

    def user(self, name: str, *actions: str) -> tuple[str, str]:
        """A new user's access key and secret; give it before permission is required."""
        iam = self.service("iam")
        iam.create_user(UserName=name)
        self.permit(name, *actions)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def permit(self, name: str, *actions: str, by: tuple[str, str] = ("tests", "only-for-tests")) -> None:
        """Replace what a user may do; none: nothing."""
        statement = {"Effect": "Allow", "Action": list(actions) or ["sts:GetCallerIdentity"], "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self.service("iam", *by).put_user_policy(UserName=name, PolicyName="own", PolicyDocument=document)


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """A server with no buckets, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | CREDENTIALS,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port, "the S3 server did not start"
        yield ObjectStore(f"http://127.0.0.1:{port}")
    finally:
        process.stdin.close()  # which ends it; so does the death of this process
        process.wait(timeout=10)
