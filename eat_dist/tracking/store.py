"""Which MLflow store is used, how it is reached, and what is said when that fails."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eat_dist.credentials import redacted
from eat_dist.errors import StorageError

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the default, 7 with growing pauses, blocks for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",  # else importing mlflow asks its makers' host for a configuration
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # a fresh sqlite file costs lines of INFO on its tables
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output belongs to the command line
}
"""Set for the process where it is not set yet, before MLflow is imported."""

_NO_ACCESS = ("UNAUTHENTICATED", "PERMISSION_DENIED")  # HTTP 401 and 403
_CREDENTIALS = "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
_VERSION_LENGTH = 40
_GIVE = "give sqlite:///FILE.db, the URI of a database, or http://… of a server"


def store_uri(configured: str | None) -> str:
    """The store: the configured one, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working folder."""
    default = f"sqlite:///{Path.cwd().as_posix()}/mlflow.db"
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or default


def open_client(uri: str) -> Any:
    """MLflow's client of a store, which is its model registry, too; no request is made yet."""
    _quiet_mlflow()
    from mlflow import MlflowClient  # noqa: PLC0415  (takes seconds)

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_existing(uri: str, *, purpose: str) -> Any:
    """As :func:`open_client`, for reading: prepares the environment, and makes no store where there is none.

    Args:
        uri: The store.
        purpose: What is wanted of it, for the error message: "to find runs in".

    Raises:
        StorageError: The store is a sqlite file that is not there, or none that MLflow can use.
    """
    prepare_environment()
    database = sqlite_file(uri)
    if database is not None and not database.is_file():  # MLflow would make an empty one
        raise StorageError(
            f"there is no MLflow store at '{redacted(uri)}' {purpose}; set MLFLOW_TRACKING_URI, or the key "
            f"tracking.uri or the option --tracking-uri where there is one"
        )
    try:
        return open_client(uri)
    except Exception as error:  # MLflow of a kind of store that it has not, a database's driver that is not installed
        raise StorageError(f"no store {purpose}: {trouble(uri, error)}") from error


def prepare_environment() -> None:
    """Set what :data:`ENVIRONMENT` lists, where it is not set yet, so that a dead server is found out in seconds."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite store; None for any other."""
    scheme, _, rest = uri.partition(":///")
    return Path(rest.partition("?")[0]).absolute() if scheme == "sqlite" else None


def check_writable(database: Path) -> None:
    """Try a sqlite file. MLflow itself would try for minutes, with a warning each time."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("BEGIN IMMEDIATE")


def trouble(uri: str, error: BaseException) -> str:
    """What is wrong with a store that failed with ``error``, as the beginning of a sentence.

    A server that answers is asked for its version, as MLflow asks: with the credentials of the environment.
    """
    where = redacted(uri)
    if _system_error(error) is not None:
        return f"MLflow at {where} does not answer ({reason(error)})"
    if not uri.startswith(("http://", "https://")):
        return f"MLflow at {where} cannot be used" + (_wrong_kind(error) or f" ({reason(error)})")
    if "Invalid Host header" in str(error):
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"MLflow at {where} does not accept requests for the host '{host}': start it with --allowed-hosts {host}"
    if getattr(error, "error_code", None) in _NO_ACCESS:
        return f"{where} refuses access ({reason(error)}): set {_CREDENTIALS}"
    version, answer = _version_there(uri)
    if version is None:
        return f"what answers at {where} is no MLflow server ({answer})"
    return f"MLflow at {where} cannot be used ({reason(error)}{_if_another(version)})"


def version_note(uri: str) -> str:
    """``; the server is MLflow 2.9.2, this is 3.17.2`` where they differ, else nothing."""
    version = _version_there(uri)[0] if uri.startswith(("http://", "https://")) else None
    return "" if version is None else _if_another(version)


def reason(error: BaseException) -> str:
    """The system's word where there is one: what MLflow and its HTTP client wrap around it fills a screen."""
    error = _system_error(error) or error
    # Redacted first: of a password that is cut off the end would be missing by which it is known.
    return shortened(redacted(" ".join(str(error).split()) or type(error).__name__), 200)


def shortened(text: str, length: int) -> str:
    """At most ``length`` characters, the last an ellipsis where something was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _system_error(error: BaseException) -> OSError | None:
    """The innermost error of the operating system or the network behind another one."""
    cause: BaseException | None = error
    found = None
    while cause is not None:
        found = cause if isinstance(cause, OSError) else found
        cause = cause.__cause__ or cause.__context__
    return found


def _wrong_kind(error: BaseException) -> str | None:
    """What is to be said of a store of a kind that MLflow has not, or has no more; None of any other error."""
    if "filesystem tracking backend" in str(error):
        return f": MLflow keeps no runs in a plain folder any more; {_GIVE}"
    return f": MLflow has no store of that kind; {_GIVE}" if "unsupported URI" in str(error) else None


def _version_there(uri: str) -> tuple[str | None, str]:
    """MLflow's version by the server's own word, None if it is no MLflow; and what it answered."""
    from mlflow.utils.credentials import get_default_host_creds  # noqa: PLC0415
    from mlflow.utils.rest_utils import http_request  # noqa: PLC0415

    try:
        response = http_request(get_default_host_creds(uri), "/version", "GET")
    except Exception as error:  # whatever MLflow and its HTTP client raise
        return None, reason(error)
    text = response.text.strip()
    if response.status_code == 200 and len(text) < _VERSION_LENGTH and re.match(r"\d+\.\d+", text):
        return text, text
    kind = response.headers.get("Content-Type", "no content type").partition(";")[0]
    made_by = response.headers.get("Server", "unnamed")
    return None, f"it answers /version with HTTP {response.status_code}, {kind}; server software: {made_by}"


def _if_another(version: str) -> str:
    from mlflow import __version__ as own  # noqa: PLC0415

    return "" if version == own else f"; the server is MLflow {version}, this is {own}"


def _is_not_a_retry_of_mlflow(record: logging.LogRecord) -> bool:
    return "/mlflow" not in record.getMessage()


def _quiet_mlflow() -> None:
    # urllib3 would warn at every attempt during an outage, MLflow of every model without an example.
    logging.getLogger("urllib3.connectionpool").addFilter(_is_not_a_retry_of_mlflow)
    warnings.filterwarnings("ignore", message=".*An input example was not provided", category=UserWarning)
    if "mlflow" in sys.modules and os.environ.get("MLFLOW_LOGGING_LEVEL") == ENVIRONMENT["MLFLOW_LOGGING_LEVEL"]:
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # imported before the variable was set
