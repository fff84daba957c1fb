"""A study that several tests run: two rows, two seeds, a second each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from eat_dist.console import Console
from eat_dist.studies import Studied, load_study, run_study
from small_runs import small_config

# Two members, two iterations an epoch.
SETTINGS = (
    "cluster.backend=local",
    "ensemble.members=2",
    "data.batch_size=460",
    "data.images_per_class=92",
    "attack.num_steps=1",
    "evaluation.num_steps=1",
    "evaluation.members=false",
    "evaluation.kmeans_seeds=1",
    "evaluation.objectives=[displacement]",
    "train.epochs=2",
)
ROWS = {"natural": {"defense.name": "natural"}, "pgd_at": {"defense.name": "pgd_at"}}


def write(folder: Path, **changes: Any) -> Path:
    """A study file of two rows and two seeds, and its base config beside it."""
    base = small_config(*SETTINGS).model_dump(mode="json")
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {"name": "small", "base": "base.yaml", "rows": ROWS, "seeds": [0, 1], **changes}
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "study.yaml"


def go(folder: Path, *assignments: str, **changes: Any) -> Studied:
    """The same command again and again, in ``folder/study``."""
    study = load_study(write(folder, **changes), assignments)
    where = str(folder / "study")
    return run_study(study, study_dir=where, backend="local", concurrent=None, command="", console=Console())


def state(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "study" / "study.json").read_text())
    return content
