"""Study files (docs/studies.md): read, with every fault in one message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eat_dist.config import RunConfig, flat, load_config, read_assignment, read_yaml
from eat_dist.errors import ConfigError

Settings = dict[str, Any]
"""Config key (``section.key``) → value."""

_KEYS = ("name", "base", "datasets", "set", "rows", "seeds", "budget")
_LABEL = re.compile(r"[A-Za-z0-9._-]+")
_OF_THE_STUDY = {
    "name": "the study names its runs",
    "seed": "all rows have the study's seeds; list them under 'seeds'",
    "tracking.register_as": "a study's runs are not registered; register the one you choose",
}
_OF_ALL_ROWS = {
    "tracking": "all runs of a study are recorded in one place; set it under 'set'",
    "cluster.address": "all runs of a study are on one cluster; set it under 'set'",
}


@dataclass(frozen=True)
class Study:
    """A study as it was asked for.

    Attributes:
        name: For people, and of the folder by default.
        datasets: Label → base config, and the settings over it (those of all runs, then the dataset's own, then the
            command line's).
        rows: Label → settings, over the dataset's.
        seeds: Of every row.
        budget_row: Every row gets the passes of this one; None: each has the epochs of its config.
        text: The file as it stands.
    """

    name: str
    datasets: Mapping[str, tuple[RunConfig, Settings]]
    rows: Mapping[str, Settings]
    seeds: tuple[int, ...]
    budget_row: str | None = None
    text: str = field(default="", compare=False)


def load_study(path: str | Path, assignments: Sequence[str] = ()) -> Study:
    """Read a study from a YAML file.

    Args:
        path: The file; the config files that it names are found from its folder.
        assignments: ``section.key=value`` for every run, over the file's; a row's own settings are above them.

    Raises:
        ConfigError: It is missing, no YAML, or not a study; every fault in one message.
    """
    text, values = read_yaml(path, "study")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping with 'base' and 'rows'; got {type(values).__name__}")
    reader = _Reader(Path(path))
    study = reader.study(values, dict(map(read_assignment, assignments)), text)
    if reader.faults or study is None:
        raise ConfigError(f"{path}: " + "; ".join(reader.faults))
    return study


class _Reader:
    """Collects faults; what has one is left out of what is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []

    def study(self, values: dict[Any, Any], assigned: Settings, text: str) -> Study | None:
        for key in values:
            if key not in _KEYS:
                self.faults.append(f"unknown key '{key}'{_hint(str(key), _KEYS)}")
        name = str(values.get("name", self.path.stem))
        self._check_label("name", name)
        common = self._settings("set", values.get("set"), forbidden=_OF_THE_STUDY)
        above = self._settings("--set", assigned, forbidden=_OF_THE_STUDY)
        datasets = self._datasets(values, common, above)
        rows = {
            label: self._settings(f"rows.{label}", settings, forbidden=_OF_THE_STUDY | _OF_ALL_ROWS)
            for label, settings in self._mapping("rows", values.get("rows"), "natural: {defense.name: natural}").items()
        }
        seeds = self._seeds(values.get("seeds", [0]))
        budget_row = self._budget(values.get("budget"), rows)
        return None if self.faults else Study(name, datasets, rows, seeds, budget_row, text)

    def _datasets(
        self, values: dict[Any, Any], common: Settings, above: Settings
    ) -> dict[str, tuple[RunConfig, Settings]]:
        if ("base" in values) == ("datasets" in values):
            self.faults.append(
                "expected either 'base', the config file of one dataset, or 'datasets', e.g. "
                "{omniglot: {base: ../omniglot.yaml, train.epochs: 50}}"
            )
            return {}
        if "base" in values:
            base = self._base("base", values["base"])
            return {} if base is None else {base.name: (base, common | above)}
        found = {}
        for label, given in self._mapping("datasets", values["datasets"], "omniglot: {base: ../omniglot.yaml}").items():
            where = f"datasets.{label}"
            rest = dict(given) if isinstance(given, dict) else {}
            base = self._base(f"{where}.base", rest.pop("base", None) if isinstance(given, dict) else given)
            own = self._settings(where, rest, forbidden=_OF_THE_STUDY | _OF_ALL_ROWS)
            if base is not None:
                found[label] = (base, common | own | above)
        return found

    def _base(self, where: str, given: Any) -> RunConfig | None:
        if not isinstance(given, str):
            self.faults.append(f"{where}: expected the path of a config file; got {given!r}")
            return None
        try:
            return load_config(self.path.parent / given)
        except ConfigError as error:
            self.faults.append(str(error))
            return None

    def _mapping(self, where: str, given: Any, example: str) -> dict[str, Any]:
        if not isinstance(given, dict) or not given:
            self.faults.append(f"{where}: expected one or more names, e.g. '{example}'; got {given!r}")
            return {}
        for label in given:
            self._check_label(where, str(label))
        return {str(label): value for label, value in given.items()}

    def _check_label(self, where: str, label: str) -> None:
        if not _LABEL.fullmatch(label):
            self.faults.append(f"{where}: a name may have letters, digits, '.', '_' and '-'; got '{label}'")

    def _settings(self, where: str, given: Any, *, forbidden: Mapping[str, str]) -> Settings:
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.faults.append(f"{where}: expected config keys with values, e.g. 'train.epochs: 50'; got {given!r}")
            return {}
        settings = {str(key): value for key, value in flat({str(key): value for key, value in given.items()})}
        for key in settings:
            reasons = [why for place, why in forbidden.items() if key == place or key.startswith(f"{place}.")]
            self.faults += [f"{where}: '{key}' cannot be set there: {why}" for why in reasons[:1]]
        return settings

    def _seeds(self, given: Any) -> tuple[int, ...]:
        good = isinstance(given, list) and given and all(type(seed) is int and seed >= 0 for seed in given)
        if not good or len(set(given)) < len(given):
            self.faults.append(
                f"seeds: expected a list of different whole numbers from 0, e.g. [0, 1, 2]; got {given!r}"
            )
            return ()
        return tuple(given)

    def _budget(self, given: Any, rows: Mapping[str, Settings]) -> str | None:
        if given is None:
            return None
        if not isinstance(given, dict) or set(given) != {"passes"}:
            self.faults.append(f"budget: expected {{passes: ROW}}, the row whose passes all others get; got {given!r}")
            return None
        row = str(given["passes"])
        if row not in rows:
            self.faults.append(f"budget: there is no row '{row}'{_hint(row, list(rows))}")
        return row


def _hint(given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    return f" (did you mean '{nearest[0]}'?)" if nearest else f"; known: {', '.join(known)}"
