"""URLs of buckets → pyarrow filesystems: every wait has an end, and a URL has no place for secrets."""

from __future__ import annotations

import datetime
import os
import re
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from pyarrow import ArrowException, fs

from eat_dist.errors import StorageError

# What the query of a URL may say. None of it is secret: it is printed, and kept in configs and MLflow.
OPTIONS = {
    "s3": ("endpoint_override", "region", "scheme", "tls_ca_file_path"),
    "gs": ("endpoint_override", "scheme"),
}

# The SDK's own limits let a silent S3 server block for 100 s and an unreachable Google for 15 minutes. These bridge a
# fault of a few seconds, and end in half a minute (docs/storage.md).
_ATTEMPTS = 5
_CONNECT_S = 3.0
_SILENCE_S = 5.0
_GCS_RETRY_S = 15

_AWS = re.compile(r"AWS Error (\S+) during (\w+) operation: ?(.*)")
_REQUEST_ID = re.compile(r"\s*\(Request ID: [^)]*\)")


def open_bucket(url: str) -> tuple[fs.FileSystem, str, str]:
    """Open ``s3://bucket/path?…`` or ``gs://bucket/path?…``.

    Credentials come from the environment, as the cloud's own tools find them.

    Args:
        url: The query may hold :data:`OPTIONS`. Where it names no S3 endpoint, ``AWS_ENDPOINT_URL_S3`` or
            ``AWS_ENDPOINT_URL`` does, if set; where it names neither endpoint nor region, the bucket is asked for its
            region.

    Returns:
        (Filesystem, path in it, the query as it is to be printed: empty or with its ``?``).

    Raises:
        StorageError: The URL holds credentials or an unknown option, names no bucket, or the bucket's region cannot be
            found out.
    """
    parts = urlsplit(url)
    options = _options(parts)
    bucket = parts.netloc
    if not bucket:
        raise StorageError(f"cannot open '{url}': it names no bucket; expected {parts.scheme}://BUCKET/PATH")
    path = f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")
    try:
        filesystem = _s3(bucket, options) if parts.scheme == "s3" else _gcs(options)
    except (ArrowException, OSError) as error:
        raise StorageError(f"cannot open '{url}': {reason(error)}") from error
    return filesystem, path, f"?{urlencode(options, safe='/:')}" if options else ""


def reason(error: BaseException) -> str:
    """What pyarrow raised, without what a user has no use for: one line."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    text = " ".join(str(error).split()) or type(error).__name__
    if found := _AWS.search(text):
        code, operation, words = found.groups()
        words = _REQUEST_ID.sub("", words).rpartition("; Details: ")[2].rstrip(". ")
        known = words and words != "No response body"  # the answer to HEAD has none
        return f"{code} during {operation}" + (f": {words}" if known else "")
    if text.startswith("google::cloud::Status("):
        return text.removeprefix("google::cloud::Status(").partition(" error_info=")[0].rstrip(")")
    # Of a local disk: "… Detail: [errno 28] No space left on device".
    return text.rsplit("] ", maxsplit=1)[-1]


def _options(parts: SplitResult) -> dict[str, str]:
    """The query, checked. A URL that may hold a secret is not repeated in the message."""
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "@" in parts.netloc or "@" in options.get("endpoint_override", ""):
        raise StorageError(
            f"cannot open '{shown}': the URL holds credentials, which would be printed and stored with the run. Give "
            "them by the environment or a role (docs/storage.md)."
        )
    known = OPTIONS[parts.scheme]
    if unknown := [name for name in options if name not in known]:
        raise StorageError(
            f"cannot open '{shown}': unknown option '{unknown[0]}' in the URL's query; known: {', '.join(known)}"
        )
    if parts.fragment:
        raise StorageError(f"cannot open '{shown}': write # in a URL as %23")
    return options


def _s3(bucket: str, options: dict[str, str]) -> fs.FileSystem:
    settings = dict(options)
    environment = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if environment:
        settings.setdefault("endpoint_override", environment)
    if not settings.keys() & {"endpoint_override", "region"}:
        settings["region"] = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENCE_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **settings,
    )


def _gcs(options: dict[str, str]) -> fs.FileSystem:
    return fs.GcsFileSystem(retry_time_limit=datetime.timedelta(seconds=_GCS_RETRY_S), **options)
