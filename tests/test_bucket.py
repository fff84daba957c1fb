"""Folders in a bucket, on a real S3 server: addresses that lead back, writes that are whole, errors of one line."""

from __future__ import annotations

import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from object_store import ObjectStore, serving
from torch import tensor

import eat_dist.bucket
from eat_dist.checkpoint import Checkpoints, MemberState
from eat_dist.errors import StorageError
from eat_dist.storage import Folder
from small_runs import small_config

PARTS = 12 * 2**20  # two parts of pyarrow's 10 MiB


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket?endpoint_override=http://127.0.0.1:9",
        "s3://bucket/runs/a?endpoint_override=http://127.0.0.1:9",
        "s3://bucket/runs/a?region=eu-west-1",
        "s3://bucket/runs/a?endpoint_override=127.0.0.1:9&scheme=http&region=eu-west-1",
        "s3://bucket/my%20runs/%C3%A4?region=eu-west-1",
        "gs://bucket/runs/a",
        "gs://bucket/runs/a?endpoint_override=127.0.0.1:9&scheme=http",
    ],
)
def test_the_words_for_a_folder_lead_to_it_again(url: str) -> None:
    """No request is made: an endpoint or a region is given, and Google's client asks for neither."""
    folder = Folder.at(url)
    assert str(folder) == url
    for again in (Folder.at(str(folder)), pickle.loads(pickle.dumps(folder))):
        assert again.path == folder.path
        assert str(again.child("b c")) == str(folder.child("b c"))
        assert Folder.at(str(folder.child("b c"))).path == f"{folder.path}/b c"


def test_a_file_is_named_with_the_query_behind_it() -> None:
    folder, name = Folder.of_file("s3://bucket/a/x.html?region=eu-west-1")
    assert (str(folder), name) == ("s3://bucket/a?region=eu-west-1", "x.html")
    assert str(folder.child(name)) == "s3://bucket/a/x.html?region=eu-west-1"
    assert folder.argument == "'s3://bucket/a?region=eu-west-1'"
    for location in ("s3://bucket?region=eu-west-1", "s3://bucket/a/?region=eu-west-1", "a/"):
        with pytest.raises(StorageError, match="names a folder; expected a file"):
            Folder.of_file(location)


def test_the_endpoint_may_come_from_the_environment_on_every_node(
    s3: ObjectStore, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    folder = Folder.at(f"s3://{bucket}/a")
    folder.write("x", b"1")
    assert s3.keys(bucket) == ["a/x"]
    assert str(folder) == f"s3://{bucket}/a"


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA123:{}@bucket/a?region=us-east-1",
        "s3://{}@bucket/a?region=us-east-1",
        "gs://user:{}@bucket/a",
        "s3://bucket/a?endpoint_override=http://user:{}@127.0.0.1:9",
        "s3://bucket/a?region=us-east-1&secret_key={}",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StorageError, match=r"^cannot open '(s3|gs)://bucket/a': ") as caught:
        Folder.at(url.format("VERY-SECRET"))
    assert "VERY-SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/a?regoin=x", "unknown option 'regoin' in the URL's query; known: endpoint_override, region, "),
        ("s3:///a", "it names no bucket"),
        ("s3://bucket/a#1?region=x", "write # in a URL as %23"),
        ("abfss://bucket/a", "expected a path or a URL of s3, gs or file"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        Folder.at(url)


# Files


def test_what_is_written_is_read_back_without_markers_of_folders(s3: ObjectStore, bucket: str) -> None:
    folder = s3.folder(f"{bucket}/runs/a")
    assert not folder.exists()
    folder.write("a/b c/ä.bin", b"\x00one")
    folder.write("a/b c/ä.bin", b"two")
    folder.write("empty", b"")
    assert folder.read("a/b c/ä.bin") == b"two"
    assert folder.child("a").read("b c/ä.bin") == b"two"
    assert folder.read("empty") == b""
    assert folder.exists()
    assert folder.exists("a/b c")
    assert folder.names() == ["a", "empty"]
    found = [entry["Key"] for entry in s3.client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert found == ["runs/a/a/b c/ä.bin", "runs/a/empty"]  # a permission for runs/a/ is enough


def test_deleting_takes_files_and_whole_folders_and_does_not_mind_missing_ones(s3: ObjectStore, bucket: str) -> None:
    folder = s3.folder(f"{bucket}/runs/a")
    for name in ("a/one", "a/two", "b", "c"):
        folder.write(name, b"1")
    s3.folder(f"{bucket}/runs/ab").write("beside", b"1")
    for name in ("absent", "b", "a"):
        folder.delete(name)
    assert folder.names() == ["c"]
    folder.delete()
    folder.delete()
    assert not folder.exists()
    assert s3.keys(bucket) == ["runs/ab/beside"]


def test_a_folder_of_more_than_a_thousand_files_is_listed_and_deleted_whole(s3: ObjectStore, bucket: str) -> None:
    """S3 answers with a thousand names at a time, and deletes as many."""
    names = [f"{number:04d}" for number in range(1, 1102)]
    for name in names:  # unsigned, in a third of the time
        address = f"{s3.endpoint}/{bucket}/a/{name}"
        urllib.request.urlopen(urllib.request.Request(address, b"1", method="PUT"), timeout=10).close()
    folder = s3.folder(f"{bucket}/a")
    assert len(s3.client.list_objects_v2(Bucket=bucket)["Contents"]) == 1000
    assert folder.names() == names
    assert list(folder.files()) == names
    folder.delete()
    assert s3.keys(bucket) == []


# Writes that are whole or not there


@pytest.mark.parametrize("before", [None, b"before"])
def test_a_process_that_is_killed_while_it_uploads_changes_nothing(
    s3: ObjectStore, bucket: str, before: bytes | None
) -> None:
    if before is not None:
        s3.client.put_object(Bucket=bucket, Key="a/x", Body=before)
    process = uploading(s3, bucket, 10 * PARTS)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert pending_uploads(s3, bucket), "the upload ended first: nothing was shown"
    assert s3.keys(bucket) == ([] if before is None else ["a/x"])
    if before is not None:
        assert s3.folder(f"{bucket}/a").read("x") == before


def test_ctrl_c_while_it_uploads_leaves_the_whole_file(s3: ObjectStore, bucket: str) -> None:
    process = uploading(s3, bucket, 3 * PARTS)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    assert s3.client.head_object(Bucket=bucket, Key="a/x")["ContentLength"] == 3 * PARTS


_UPLOAD = "import sys; from eat_dist.storage import Folder; Folder.at(sys.argv[1]).write('x', bytes(int(sys.argv[2])))"


def uploading(s3: ObjectStore, bucket: str, size: int) -> subprocess.Popen[bytes]:
    """A process that has begun to upload, but not ended."""
    command = [sys.executable, "-c", _UPLOAD, s3.url(f"{bucket}/a"), str(size)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not pending_uploads(s3, bucket):
        assert process.poll() is None, "the upload ended first"
        time.sleep(0.005)
    return process


def pending_uploads(s3: ObjectStore, bucket: str) -> list[str]:
    return [upload["Key"] for upload in s3.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]


def test_a_writer_that_raises_leaves_nothing_and_the_earlier_file(s3: ObjectStore, bucket: str) -> None:
    folder = s3.folder(f"{bucket}/a")
    for expected in ([], ["a/x"]):
        with pytest.raises(RuntimeError, match="halfway"):
            write_half(folder.writing("x"))
        assert s3.keys(bucket) == expected
        folder.write("x", b"earlier")
    assert folder.read("x") == b"earlier"


def test_pyarrows_own_stream_would_have_left_a_part(s3: ObjectStore, bucket: str) -> None:
    """Why :meth:`Folder.writing` collects first; when this fails it need not any more."""
    folder = s3.folder(f"{bucket}/a")
    with pytest.raises(RuntimeError, match="halfway"):
        write_half(folder.filesystem.open_output_stream(folder.file("x")))
    assert len(folder.read("x")) == PARTS


def write_half(opened: AbstractContextManager[Any]) -> None:
    with opened as stream:
        stream.write(bytes(PARTS))
        raise RuntimeError("halfway")


def test_of_two_writers_one_wins_and_a_reader_sees_no_mixture(s3: ObjectStore, bucket: str) -> None:
    folders = [s3.folder(f"{bucket}/a") for _ in range(3)]
    contents = [b"a" * PARTS, b"b" * (PARTS + 1000)]
    folders[2].write("x", contents[0])

    def rewrite(writer: int) -> None:
        for _ in range(2):
            folders[writer].write("x", contents[writer])

    writers = [threading.Thread(target=rewrite, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(folders[2].read("x"))
    seen.add(folders[2].read("x"))
    assert seen <= set(contents)


# Checkpoints


def checkpoints(s3: ObjectStore, bucket: str, *, keep: int = 2) -> Checkpoints:
    config = small_config("ensemble.members=2", f"checkpoint.keep={keep}")
    return Checkpoints(s3.folder(f"{bucket}/run/checkpoints"), config)


def save(saved: Checkpoints, iteration: int) -> None:
    state = MemberState({"weights": tensor([float(iteration)] * 1000)}, {"iteration": iteration})
    saved.commit(iteration, [saved.write_member(iteration, rank, state) for rank in range(2)])


def without_manifest(s3: ObjectStore, bucket: str) -> None:
    s3.client.delete_object(Bucket=bucket, Key="run/checkpoints/00000010/checkpoint.json")


def truncated(s3: ObjectStore, bucket: str) -> None:
    place = {"Bucket": bucket, "Key": "run/checkpoints/00000010/member_1.safetensors"}
    content = s3.client.get_object(**place)["Body"].read()
    s3.client.put_object(**place, Body=content[:-1])


def lost(s3: ObjectStore, bucket: str) -> None:
    s3.client.delete_object(Bucket=bucket, Key="run/checkpoints/00000010/member_0.json")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (without_manifest, "it has no checkpoint.json, so saving it was interrupted"),
        (truncated, "member_1.safetensors is damaged (its SHA-256 differs from the manifest's)"),
        (lost, "No such file or directory"),
    ],
)
def test_a_checkpoint_whose_upload_was_cut_is_passed_over(
    s3: ObjectStore, bucket: str, damage: Callable[[ObjectStore, str], None], why: str
) -> None:
    saved = checkpoints(s3, bucket)
    save(saved, 5)
    save(saved, 10)
    newest = saved.newest()
    assert newest is not None
    assert (newest.iteration, newest.passed_over) == (10, ())
    damage(s3, bucket)
    found = saved.newest()
    assert found is not None
    assert found.iteration == 5
    assert why in found.passed_over[0]
    assert saved.read_member(found, 1).tensors["weights"][0] == 5


def test_old_checkpoints_are_deleted_from_the_bucket(s3: ObjectStore, bucket: str) -> None:
    saved = checkpoints(s3, bucket, keep=2)
    for iteration in (5, 10, 15, 20):
        save(saved, iteration)
    assert saved.folder.names() == ["00000015", "00000020"]
    assert len(s3.keys(bucket, "run/checkpoints/")) == 2 * (2 * 2 + 1)


# What cannot be reached or is not permitted


@pytest.fixture
def guarded() -> Iterator[tuple[ObjectStore, Callable[..., Folder]]]:
    """A server that checks permissions; a function that opens a folder as a user who may do these actions only."""
    users = {
        "everything": ("s3:*",),
        "reader": ("s3:ListBucket", "s3:GetObject"),
        "writer-only": ("s3:PutObject", "s3:ListBucket"),
        "nobody": (),
    }
    with serving() as store, pytest.MonkeyPatch.context() as patch:
        store.client.create_bucket(Bucket="guarded")
        keys = {name: store.user(name, *actions) for name, actions in users.items()}
        keys["unknown"] = ("AKIAUNKNOWN", "secret-of-unknown")
        keys["wrong-secret"] = (keys["everything"][0], "wrong-secret")
        store.require_permission()

        def open_as(name: str) -> Folder:
            patch.setenv("AWS_ACCESS_KEY_ID", keys[name][0])
            patch.setenv("AWS_SECRET_ACCESS_KEY", keys[name][1])
            return store.folder("guarded/runs/a")

        yield store, open_as


def test_a_missing_permission_is_found_by_the_first_try_in_one_line(
    guarded: tuple[ObjectStore, Callable[..., Folder]],
) -> None:
    _, open_as = guarded
    open_as("everything").create()
    for user, why in (
        ("reader", "ACCESS_DENIED during CreateMultipartUpload"),
        ("writer-only", "ACCESS_DENIED during (DeleteObject|HeadObject)"),
        ("nobody", "ACCESS_DENIED during CreateMultipartUpload"),
        ("unknown", "INVALID_ACCESS_KEY_ID during CreateMultipartUpload"),
        ("wrong-secret", "SIGNATURE_DOES_NOT_MATCH during CreateMultipartUpload"),
    ):
        with pytest.raises(StorageError, match=f"^cannot write to 's3://guarded/runs/a.*': {why}") as caught:
            open_as(user).create()
        assert "Check the bucket's name, endpoint and credentials, and what they permit" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
    with pytest.raises(StorageError, match=r"^cannot reach 's3://guarded/runs/a.*': ACCESS_DENIED during HeadObject\."):
        open_as("nobody").exists()


def test_a_bucket_that_does_not_exist_is_named(s3: ObjectStore) -> None:
    folder = s3.folder("no-such-bucket/runs/a")
    assert not folder.exists()
    assert folder.names() == []
    with pytest.raises(StorageError, match="NO_SUCH_BUCKET during CreateMultipartUpload: The specified bucket does"):
        folder.create()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts: how the waiting ends, in less of it."""
    monkeypatch.setattr(eat_dist.bucket, "_ATTEMPTS", 2)
    monkeypatch.setattr(eat_dist.bucket, "_SILENCE_S", 1.0)
    monkeypatch.setattr(eat_dist.bucket, "_GCS_RETRY_S", 1)


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.usefixtures("impatient")
def test_an_endpoint_that_refuses_or_says_nothing_is_one_line(silent: str) -> None:
    for endpoint, why in (("127.0.0.1:9", "Could not connect|Failed to connect"), (silent, "Operation too slow")):
        folder = Folder.at(f"s3://bucket/a?endpoint_override=http://{endpoint}")
        with pytest.raises(StorageError, match=f"^cannot write to '.*': NETWORK_CONNECTION during .*({why})") as caught:
            folder.create()
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("impatient")
def test_an_unreachable_google_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Against nothing but a closed port: buckets of Google have not been tried."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = Folder.at("gs://bucket/a?endpoint_override=127.0.0.1:9&scheme=http")
    with pytest.raises(StorageError, match=r"^cannot reach 'gs://bucket/a.*': .*Check the bucket's name") as caught:
        folder.exists()
    assert "\n" not in str(caught.value)
    assert "error_info" not in str(caught.value)
