"""What a run folder holds, read back."""

from __future__ import annotations

from eat_dist.config import RunConfig, parse_config, parse_yaml
from eat_dist.errors import StorageError
from eat_dist.storage import Folder


def config_of(folder: Folder) -> RunConfig:
    """The config saved in a run folder.

    Raises:
        StorageError: It is not a run folder.
    """
    if not folder.exists("config.yaml"):
        raise StorageError(f"'{folder}' is not a run folder: it has no config.yaml")
    file = folder.child("config.yaml")
    return parse_config(parse_yaml(folder.read("config.yaml"), f"'{file}'"), source=str(file))
