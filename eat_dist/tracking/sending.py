"""What is sent to MLflow, and how. Each function uses the client it is given, and may raise."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np

from eat_dist import __version__
from eat_dist.tracking.store import shortened

# MLflow's limits; values of more than 500 characters are refused by its older servers.
METRICS_PER_REQUEST, PARAMS_PER_REQUEST, PARAM_LENGTH, TAG_LENGTH = 1000, 100, 500, 5000

DIGEST_LENGTH = 36  # MLflow's limit for a dataset's digest
MODEL = "ensemble"  # what the model is called in its run

MetricValue = tuple[str, float, int, int]
"""Key, value, milliseconds since 1970, step."""

_DIGEST_TAG = "weights_sha256"


@dataclass(frozen=True)
class DatasetRecord:
    """A set of images that a run used, in words; no image is ever sent.

    Attributes:
        name: The dataset's, e.g. ``cub200``.
        context: What the run did with it.
        sha256: Of images, labels and roles; MLflow's digest is its first 36 characters, a tag has all of it.
        source: Path or URL of the files; None for a dataset that comes with a library.
        images: N.
        classes: C.
        image_shape: (C, H, W) as the model sees them.
    """

    name: str
    context: Literal["training", "validation", "testing"]
    sha256: str
    source: str | None
    images: int
    classes: int
    image_shape: tuple[int, int, int]


def send_metrics(client: Any, run_id: str, records: Sequence[Sequence[MetricValue]]) -> None:
    """Send the metrics of several records in as few requests as they fit into."""
    from mlflow.entities import Metric  # noqa: PLC0415

    metrics = [Metric(*metric) for values in records for metric in values]
    for start in range(0, len(metrics), METRICS_PER_REQUEST):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST], synchronous=True)


def send_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Send params that the run does not have yet; a tag lists those that differ from what it has."""
    from mlflow.entities import Param  # noqa: PLC0415

    known = client.get_run(run_id).data.params
    new = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(new), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=new[start : start + PARAMS_PER_REQUEST], synchronous=True)
    changed = [f"{name}: {known[name]} → {value}" for name, value in params.items() if known.get(name, value) != value]
    if changed:
        client.set_tag(run_id, "changed_on_resume", shortened("; ".join(changed), TAG_LENGTH))


def send_tags(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags, over those that the run has."""
    from mlflow.entities import RunTag  # noqa: PLC0415

    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()], synchronous=True)


def send_datasets(client: Any, run_id: str, datasets: Sequence[DatasetRecord]) -> None:
    """Record what the run used; a second time changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag  # noqa: PLC0415

    inputs = []
    for dataset in datasets:
        kind, source = _source(dataset)
        spec = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, *dataset.image_shape]}}]
        about = {"num_rows": dataset.images, "num_classes": dataset.classes, "image_shape": dataset.image_shape}
        tags = {"mlflow.data.context": dataset.context, "sha256": dataset.sha256}
        tags |= {"images": str(dataset.images), "classes": str(dataset.classes)}
        entity = Dataset(
            name=dataset.name,
            digest=dataset.sha256[:DIGEST_LENGTH],
            source_type=kind,
            source=json.dumps(source),
            schema=json.dumps({"mlflow_tensorspec": {"features": json.dumps(spec), "targets": None}}),
            profile=json.dumps(about),
        )
        inputs.append(DatasetInput(entity, [InputTag(name, value) for name, value in tags.items()]))
    client.log_inputs(run_id, datasets=inputs)


def send_file(client: Any, run_id: str, content: bytes, path: PurePosixPath) -> None:
    """Store a file among the run's artifacts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        file.write_bytes(content)
        parent = str(path.parent)
        client.log_artifact(run_id, str(file), None if parent == "." else parent)


def send_model(
    client: Any, run_id: str, folder: str, input_shape: tuple[int, int, int], *, digest: str | None = None
) -> None:
    """What ``mlflow.pyfunc.log_model`` does, without the global tracking URI that it needs.

    With a ``digest`` of the weights, a model that the run has already is not sent again.
    """
    import mlflow.pyfunc  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from mlflow.entities import LoggedModelOutput  # noqa: PLC0415
    from mlflow.models import Model, ModelSignature  # noqa: PLC0415
    from mlflow.types import Schema, TensorSpec  # noqa: PLC0415

    known = newest_model(client, run_id)
    if known is not None and digest is not None and known.tags.get(_DIGEST_TAG) == digest:
        return
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *input_shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
    )
    # Named here because MLflow would find them out by loading the model in a new process.
    requirements = [
        f"eat_dist=={__version__}",
        f"mlflow=={mlflow.__version__}",
        f"torch=={torch.__version__.partition('+')[0]}",
    ]
    experiment = client.get_run(run_id).info.experiment_id
    tags = None if digest is None else {_DIGEST_TAG: digest}
    model = client.create_logged_model(experiment, name=MODEL, source_run_id=run_id, tags=tags, model_type="pyfunc")
    try:
        with tempfile.TemporaryDirectory() as parent:
            target = os.path.join(parent, "model")
            mlflow.pyfunc.save_model(
                target,
                loader_module="eat_dist.pyfunc_model",
                data_path=folder,
                mlflow_model=Model(
                    artifact_path=model.artifact_location,
                    run_id=run_id,
                    model_uuid=model.model_id,
                    model_id=model.model_id,
                ),
                signature=signature,
                pip_requirements=requirements,
            )
            client.log_model_artifacts(model.model_id, target)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    except Exception:
        client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")


def register_model(client: Any, run_id: str, name: str, tags: Mapping[str, str]) -> str:
    """Make the run's newest model a version of a registered one; the same weights of one run are one version.

    Returns:
        ``models:/NAME/VERSION``.

    Raises:
        LookupError: The run has no model.
    """
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    model = newest_model(client, run_id)
    if model is None:
        raise LookupError(f"the run {run_id} has no model '{MODEL}'")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if digest := model.tags.get(_DIGEST_TAG):
        for version in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
            if version.tags.get(_DIGEST_TAG) == digest:
                return f"models:/{name}/{version.version}"
        tags = {**tags, _DIGEST_TAG: digest}
    version = client.create_model_version(
        name, source=f"models:/{model.model_id}", run_id=run_id, tags=dict(tags), model_id=model.model_id
    )
    return f"models:/{name}/{version.version}"


def newest_model(client: Any, run_id: str, name: str = MODEL) -> Any | None:
    """The run's newest model of that name that arrived whole; None where it has none.

    A run has several that was resumed after its end, with other weights.
    """
    logged = client.get_run(run_id).outputs.model_outputs
    models = [client.get_logged_model(output.model_id) for output in logged]
    named = [model for model in models if model.name == name and model.status == "READY"]
    return max(named, key=lambda model: model.creation_timestamp, default=None)


def flattened(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(``section.key``, value) of a nested mapping."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _source(dataset: DatasetRecord) -> tuple[str, dict[str, Any]]:
    """MLflow's type of a source, and what it keeps of one of that type."""
    if dataset.source is None:
        return "code", {"tags": {"dataset": dataset.name, "eat_dist": __version__}}
    return (urlsplit(dataset.source).scheme if "://" in dataset.source else "local"), {"uri": dataset.source}
