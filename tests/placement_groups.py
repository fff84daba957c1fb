"""What is left of the resources that were asked of Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any


def groups_left() -> list[Mapping[str, Any]]:
    """Placement groups that still hold, or wait for, resources."""
    from ray.util import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def settled_groups() -> list[Mapping[str, Any]]:
    """The same, once Ray has had time to carry out what it was told."""
    for _ in range(100):
        if not groups_left():
            break
        time.sleep(0.1)
    return groups_left()
