"""Passwords in the URI of a service: found, to be refused in a config, and blotted out of what is printed or kept."""

from __future__ import annotations

import re

# user:password@ before the host, the password with whatever was not escaped in it; or an option that is named as one.
_BEFORE_HOST = re.compile(r"(://)(?:[^/\s]*|[^/\s:@]+:\S*)@")
_OPTION = re.compile(r"([?&][^=&\s]*(?:passw|pwd|secret|token|odbc_connect)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def holds_credentials(uri: str) -> bool:
    """Whether a user, password or token is part of it."""
    return bool(_BEFORE_HOST.search(uri) or _OPTION.search(uri))


def redacted(text: str) -> str:
    """Without the credentials of URIs in it: what is printed and kept ends up in files that are shared."""
    return _OPTION.sub(r"\1***", _BEFORE_HOST.sub(r"\1***@", text))
