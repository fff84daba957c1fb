"""What is sent to MLflow, and how. Each function uses the client it is given, and may raise."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from eat_dist import __version__

# MLflow's limits; values of more than 500 characters are refused by its older servers.
METRICS_PER_REQUEST, PARAMS_PER_REQUEST, PARAM_LENGTH = 1000, 100, 500

MetricValue = tuple[str, float, int, int]
"""Key, value, milliseconds since 1970, step."""


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
        client.set_tag(run_id, "changed_on_resume", shortened("; ".join(changed), 5000))


def send_file(client: Any, run_id: str, content: bytes, path: PurePosixPath) -> None:
    """Store a file among the run's artifacts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        file.write_bytes(content)
        parent = str(path.parent)
        client.log_artifact(run_id, str(file), None if parent == "." else parent)


def send_model(client: Any, run_id: str, folder: str, input_shape: tuple[int, int, int]) -> None:
    """What ``mlflow.pyfunc.log_model`` does, without the global tracking URI that it needs."""
    import mlflow.pyfunc  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from mlflow.entities import LoggedModelOutput  # noqa: PLC0415
    from mlflow.models import Model, ModelSignature  # noqa: PLC0415
    from mlflow.types import Schema, TensorSpec  # noqa: PLC0415

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
    model = client.create_logged_model(experiment, name="ensemble", source_run_id=run_id, model_type="pyfunc")
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


def flattened(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(``section.key``, value) of a nested mapping."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shortened(text: str, length: int) -> str:
    """At most ``length`` characters, the last an ellipsis where something was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
