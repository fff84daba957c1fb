"""Measurements kept one a file, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from eat_dist.errors import StorageError
from eat_dist.storage import Folder


def resumed(
    folder: Folder,
    file: str,
    *,
    fingerprint: Mapping[str, Any],
    measure: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """A part as it lies in the folder, or, where it does not, measured and written.

    A part that is missing, damaged (not JSON, or its checksum is wrong) or of another fingerprint is
    measured.

    Args:
        folder: Of the evaluation.
        file: Name in it.
        fingerprint: Everything that the measurement depends on, JSON-ready.
        measure: Gives the part, JSON-ready, without NaN. Numbers come back from JSON as they were, to the
            last bit.

    Returns:
        What ``measure`` gave, with ``fingerprint``.

    Raises:
        StorageError: The part cannot be written.
    """
    found = _read(folder, file)
    if found is not None and found["fingerprint"] == fingerprint:
        return found
    part = {"fingerprint": dict(fingerprint), **measure()}
    folder.write_json(file, part | {"checksum": _checksum(part)})
    return part


def _read(folder: Folder, file: str) -> dict[str, Any] | None:
    """A whole part, without its checksum; None if there is none."""
    try:
        content = folder.read_json(file)
    except StorageError:
        return None
    if not isinstance(content, dict):
        return None
    stated = content.pop("checksum", None)
    return content if stated == _checksum(content) else None


def _checksum(part: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()
