"""Reaching a cluster's job server: its address, whether it answers, and the token it may ask for."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eat_dist.errors import ClusterError

TIMEOUT_S = 15.0
_WHERE = "in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token, on this machine"
_ASK = "`ray get-auth-token` on the cluster's head prints it"


@dataclass(frozen=True)
class Token:
    """A cluster's token.

    Attributes:
        value: The secret itself; never shown.
        source: Where it was found.
    """

    value: str = field(repr=False)
    source: str


@dataclass(frozen=True)
class Access:
    """A job server that has answered.

    Attributes:
        address: Its URL.
        headers: What every request needs; empty where no token is asked for.
    """

    address: str
    headers: dict[str, str] = field(repr=False)

    def shell(self, command: str) -> str:
        """A command of Ray's for this server, as the user would type it."""
        mode = "RAY_AUTH_MODE=token " if self.headers and os.environ.get("RAY_AUTH_MODE") != "token" else ""
        return f"{mode}ray job {command} --address {self.address}"


def job_address(given: str | None, environment: Mapping[str, str]) -> str:
    """The URL of the job server: as given, else ``RAY_API_SERVER_ADDRESS``, else ``RAY_ADDRESS`` where that is a URL.

    Raises:
        ClusterError: There is none, or it is of another form.
    """
    # Ray's own client lets the variables win over what is typed.
    variables = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    for source, address in (("--address", given), *((name, environment.get(name)) for name in variables)):
        if not address or (source == "RAY_ADDRESS" and not address.startswith(("http://", "https://"))):
            continue
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClusterError(
                f"{source} must be the URL of the head's dashboard, e.g. http://10.0.0.1:8265; got '{address}'"
            )
        return address.rstrip("/")
    raise ClusterError("which cluster? Give --address http://HEAD:8265 (its dashboard), or set RAY_API_SERVER_ADDRESS")


def find_token(environment: Mapping[str, str]) -> Token | None:
    """The token where Ray itself looks for it: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ``~/.ray/auth_token``.

    Raises:
        ClusterError: ``RAY_AUTH_TOKEN_PATH`` names no file with a token.
    """
    if value := environment.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    named = environment.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named) if named else Path(environment.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        value = ""
    if value:
        return Token(value, str(path))
    if named:
        raise ClusterError(f"RAY_AUTH_TOKEN_PATH names '{named}', which is no file with a token; correct or unset it")
    return None


def reach(address: str, environment: Mapping[str, str]) -> Access:
    """Ask the job server for its version, with a token only if it asks for one.

    So a token goes to no cluster that does not ask, and ``RAY_AUTH_MODE`` need not be set;
    ``RAY_AUTH_MODE=disabled`` forbids sending it.

    Raises:
        ClusterError: Nothing answers, what answers is no Ray, or the token is missing or wrong.
    """
    status = _ask_version(address, {})
    if status == 200:
        return Access(address, {})
    if environment.get("RAY_AUTH_MODE", "").lower() == "disabled":
        raise ClusterError(
            f"the cluster at {address} asks for a token, and RAY_AUTH_MODE is 'disabled' here: set RAY_AUTH_MODE=token "
            f"on this machine, or unset it"
        )
    token = find_token(environment)
    if token is None:
        raise ClusterError(f"the cluster at {address} asks for a token, and there is none: put it {_WHERE}; {_ASK}")
    headers = {"Authorization": f"Bearer {token.value}"}
    if _ask_version(address, headers) != 200:
        raise ClusterError(
            f"the cluster at {address} does not accept the token from {token.source}: put that of this cluster "
            f"{_WHERE} (the first of these that is set counts); {_ASK}"
        )
    return Access(address, headers)


def check_answers(access: Access) -> None:
    """Whether the job server is still there, found out in ``TIMEOUT_S``.

    Raises:
        ClusterError: It is not.
    """
    _ask_version(access.address, access.headers)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token must not travel to wherever an answer points."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _ask_version(address: str, headers: dict[str, str]) -> int:
    """200 from a Ray of any version, 401 or 403 from one that wants a (different) token."""
    request = urllib.request.Request(f"{address}/api/version", headers=headers)
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            if "ray_version" in json.load(answer):
                return 200
        reason = "it does not say its version"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return error.code
        reason = f"HTTP {error.code}"
    except ValueError:
        reason = "its answer is not JSON"
    except OSError as error:  # refused, unknown host, no answer in time
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        raise ClusterError(
            f"no cluster answers at {address} ({reason}): is the head up, and is this its dashboard (port 8265)? From "
            f"outside it takes a tunnel, e.g. `ray dashboard cluster.yaml`"
        ) from error
    raise ClusterError(f"what answers at {address} is no Ray dashboard ({reason}); it has port 8265 by default")
