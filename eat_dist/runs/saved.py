"""What a run folder holds, read back."""

from __future__ import annotations

import yaml

from eat_dist.config import RunConfig, parse_config
from eat_dist.errors import ConfigError, StorageError
from eat_dist.storage import Folder


def config_of(folder: Folder) -> RunConfig:
    """The config saved in a run folder.

    Raises:
        StorageError: It is not a run folder.
    """
    if not folder.exists("config.yaml"):
        raise StorageError(f"'{folder}' is not a run folder: it has no config.yaml")
    try:
        values = yaml.safe_load(folder.read("config.yaml"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{folder.child('config.yaml')}' is not YAML: {' '.join(str(error).split())}") from error
    return parse_config(values, source=f"{folder.child('config.yaml')}")
