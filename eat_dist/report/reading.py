"""A run folder, read for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.numpy
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError

from eat_dist.errors import ConfigError, StorageError
from eat_dist.evaluation.measured import evaluation_of, measurement
from eat_dist.history import read_history
from eat_dist.report.schema import SCHEMA, Evaluation
from eat_dist.storage import Folder

PROTOCOLS = ("full", "standard", "quick")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Showcase:
    """Embeddings and images to look at. Images are float32 in [0, 1], [C, H, W] each.

    Attributes:
        attack: ``ATTACK/OBJECTIVE`` that made the attacked ones.
        classes: The name of each label value.
        names: [K] file names of the images.
        clean_embeddings: [S, D].
        attacked_embeddings: [S, D].
        labels: [S] int64.
        images: ``clean`` and ``attacked`` [K, C, H, W], ``before`` and ``after`` [K, 3, C, H, W] (nearest neighbours).
        right: ``before`` and ``after`` [K, 3] bool: whether that neighbour is of the image's class.
    """

    attack: str
    classes: list[str]
    names: list[str]
    clean_embeddings: Array
    attacked_embeddings: Array
    labels: Array
    images: dict[str, Array]
    right: dict[str, Array]


@dataclass(frozen=True)
class Run:
    """One evaluated model.

    Attributes:
        label: Name on the page: the folder's, with its parent's where two folders share one.
        evaluation: Of the strongest protocol in the folder.
        config: ``config.yaml`` as it stands; empty if it is not there.
        history: A row a member and iteration, as in :data:`eat_dist.history.SCHEMA`; empty where nothing was trained.
        showcase: None if the evaluation kept none.
    """

    label: str
    evaluation: Evaluation
    config: str
    history: pa.Table
    showcase: Showcase | None

    @property
    def measured(self) -> dict[str, str]:
        """What its figures were measured with (:func:`eat_dist.evaluation.measured.measurement`), and the dataset."""
        about = {
            name: value for name, value in evaluation_of(self.evaluation.model_dump()).items() if value is not None
        }
        seed = settings(self).get("seed") if self.evaluation.target.kind == "run" else None
        settled = measurement(about, self.evaluation.ensemble.attacked, seed=seed)
        return {"dataset": self.evaluation.dataset, **settled}


def read_runs(folders: Sequence[Folder]) -> list[Run]:
    """Read every folder, in the order given.

    Raises:
        ConfigError: No folder was given, or one twice.
        StorageError: A folder is missing, holds no evaluation, or a file in it is damaged.
    """
    if not folders:
        raise ConfigError("expected one or more run folders; got none")
    twice = [name for name, times in Counter(str(folder) for folder in folders).items() if times > 1]
    if twice:
        raise ConfigError(f"expected different run folders; got '{twice[0]}' twice")
    return [_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def settings(run: Run) -> dict[str, Any]:
    """The run's config as a mapping; empty where there is none."""
    try:
        loaded = yaml.safe_load(run.config)
    except yaml.YAMLError as error:
        raise StorageError(f"the config.yaml of '{run.label}' is not valid YAML: {_line(error)}") from error
    return loaded if isinstance(loaded, dict) else {}


def _labels(folders: Sequence[Folder]) -> list[str]:
    """The shortest endings of the paths that tell them apart: ``eat-0``, or ``omniglot/eat-0``."""
    parts = [folder.path.rstrip("/").split("/") for folder in folders]
    for depth in range(1, max(map(len, parts))):
        labels = ["/".join(path[-depth:]) for path in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _read(folder: Folder, label: str) -> Run:
    if not folder.exists():
        raise StorageError(f"cannot read '{folder}': there is no such folder")
    found = [name for name in PROTOCOLS if folder.exists(f"evaluation/{name}/summary.json")]
    if not found:
        raise StorageError(
            f"'{folder}' holds no evaluation (expected evaluation/PROTOCOL/summary.json); run 'eat-dist evaluate' first"
        )
    evaluation = folder.child(f"evaluation/{found[0]}")
    config = folder.read("config.yaml").decode(errors="replace") if folder.exists("config.yaml") else ""
    history = read_history(folder.child("statistics"))
    return Run(label, _summary(evaluation), config, history, _showcase(evaluation))


def _summary(folder: Folder) -> Evaluation:
    content = folder.read_json("summary.json")
    version = content.get("schema") if isinstance(content, dict) else None
    if version != SCHEMA:
        raise StorageError(
            f"'{folder.child('summary.json')}': expected schema {SCHEMA}; got {version}; evaluate the run again"
        )
    try:
        return Evaluation.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise StorageError(f"'{folder.child('summary.json')}' is not a summary: {where}: {first['msg']}") from error


def _showcase(folder: Folder) -> Showcase | None:
    if not (folder.exists("showcase.safetensors") and folder.exists("showcase.json")):
        return None
    about = folder.read_json("showcase.json")
    try:
        arrays = safetensors.numpy.load(folder.read("showcase.safetensors"))
        showcase = Showcase(
            attack=about["attack"],
            classes=[str(name) for name in about.get("classes", [])],
            names=[str(name) for name in about.get("names", [])],
            clean_embeddings=arrays["clean_embeddings"],
            attacked_embeddings=arrays["attacked_embeddings"],
            labels=arrays["labels"].astype(np.int64),
            images={
                "clean": _unit(arrays["clean_images"]),
                "attacked": _unit(arrays["attacked_images"]),
                "before": _unit(arrays["neighbours_before"]),
                "after": _unit(arrays["neighbours_after"]),
            },
            right={"before": arrays["right_before"].astype(bool), "after": arrays["right_after"].astype(bool)},
        )
    except (SafetensorError, KeyError, TypeError) as error:
        where = folder.child("showcase.safetensors")
        raise StorageError(f"'{where}' is damaged or lacks a part: {_line(error)}") from error
    embeddings, images = len(showcase.labels), len(showcase.names)
    sizes = {len(showcase.clean_embeddings) == embeddings, len(showcase.attacked_embeddings) == embeddings}
    sizes |= {len(stack) == images for stack in (*showcase.images.values(), *showcase.right.values())}
    if sizes != {True}:
        raise StorageError(f"'{folder.child('showcase.safetensors')}' is damaged: its parts are of different lengths")
    return showcase


def _unit(images: Array) -> Array:
    """Images in [0, 1], float32, whether they were kept so or as bytes."""
    return images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
