"""A real MLflow store that is not there at first: its folder's place is taken by a file until it comes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow_server import client


class LateStore:
    """A sqlite store.

    Args:
        place: Where its folder will be.
        empty: A sqlite file with MLflow's tables and nothing in them.
    """

    def __init__(self, place: Path, empty: Path) -> None:
        self.uri = f"sqlite:///{place}/mlflow.db"
        self._place, self._empty = place, empty
        place.write_text("in the way")

    def come(self) -> None:
        """From now on it answers."""
        if self._place.is_file():
            self._place.unlink()
            self._place.mkdir()
            shutil.copy(self._empty, self._place / "mlflow.db")

    def runs(self) -> list[Any]:
        """All, the oldest first."""
        store = client(self.uri)
        experiments = [experiment.experiment_id for experiment in store.search_experiments()]
        return list(store.search_runs(experiments, order_by=["attributes.start_time ASC"]))


def wait_until(holds: Callable[[], Any], limit: float = 60.0) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
