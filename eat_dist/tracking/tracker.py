"""MLflow as a view of a run: written from the driver by one background thread, and never needed.

A store that hangs, dies or was never there costs one warning; the metrics are in the run folder anyway.
MLflow's global URI and active run are not touched: the client has its own URI, each call names the run.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from eat_dist.config import RunConfig
from eat_dist.credentials import redacted
from eat_dist.tracking.delivery import Delivery, Send
from eat_dist.tracking.lifecycle import PARENT_TAG, Status
from eat_dist.tracking.sending import (
    PARAM_LENGTH,
    TAG_LENGTH,
    DatasetRecord,
    MetricValue,
    flattened,
    register_model,
    send_datasets,
    send_file,
    send_model,
    send_params,
    send_tags,
)
from eat_dist.tracking.store import prepare_environment, shortened, store_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Tracker:
    """One MLflow run, made with :meth:`start`.

    No method raises because of MLflow; only :meth:`start` and :meth:`close` wait for it, for a limited time.
    How records get there, or do not: :class:`~eat_dist.tracking.delivery.Delivery`. Where tracking is disabled, all
    methods do nothing.

    Attributes:
        registered: ``models:/NAME/VERSION``; None until :meth:`register` has been answered.
    """

    def __init__(self, delivery: Delivery | None) -> None:
        self.registered: str | None = None
        self._delivery = delivery

    @classmethod
    def start(
        cls,
        config: RunConfig,
        *,
        run_name: str,
        tags: Mapping[str, str],
        resume_run_id: str | None,
        parent_run_id: str | None = None,
        wait: float = 15.0,
    ) -> Tracker:
        """Create a run, or go on with an earlier one.

        The store is ``config.tracking.uri``, else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the working
        folder. Artifacts of a sqlite store lie in ``mlartifacts`` beside it. What
        :data:`eat_dist.tracking.store.ENVIRONMENT` lists (HTTP retries and timeout, telemetry, log lines) is set for
        the process where it is not set yet.

        Args:
            config: Its section ``tracking``.
            run_name: Shown by MLflow.
            tags: Of the run, e.g. :func:`git_state`.
            resume_run_id: Continue this run; one the store does not have costs a warning and a new run.
            parent_run_id: The run of the sweep or study that this one is a trial of: MLflow shows it beneath.
            wait: Seconds to wait for the store's first answer, which gives ``run_id``.
        """
        tracking = config.tracking
        if not tracking.enabled:
            return cls(None)
        if parent_run_id is not None:
            tags = {**tags, PARENT_TAG: parent_run_id}
        prepare_environment()
        delivery = Delivery(
            store_uri(tracking.uri), experiment=tracking.experiment, run_name=run_name, tags=tags, run_id=resume_run_id
        )
        delivery.wait(wait)
        return cls(delivery)

    @property
    def uri(self) -> str | None:
        """The store, None where tracking is disabled."""
        return self._delivery.uri if self._delivery else None

    @property
    def run_id(self) -> str | None:
        """None until the store has answered, so read it again whenever you save it."""
        return self._delivery.run_id if self._delivery else None

    @property
    def missing(self) -> int:
        """Records handed over that the store does not have."""
        return self._delivery.missing if self._delivery else 0

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers at a step; NaN and infinities are left out (MLflow's stores treat them differently)."""
        now = time.time_ns() // 1_000_000
        values = ((name, float(value), now, step) for name, value in metrics.items())
        if finite := tuple(value for value in values if math.isfinite(value[1])):
            self._add("metrics", metrics=finite)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; sections become ``section.key``, values text of at most 500 characters, without passwords.

        MLflow's params cannot change: a resumed run keeps the first values, and the tag ``changed_on_resume``
        lists the others.
        """
        flat = {name: shortened(redacted(str(value)), PARAM_LENGTH) for name, value in flattened(params)}
        self._add("params", lambda client, run_id: send_params(client, run_id, flat))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of at most 5000 characters, over those that the run has."""
        short = {name: shortened(value, TAG_LENGTH) for name, value in tags.items()}
        self._add("tags", lambda client, run_id: send_tags(client, run_id, short))

    def log_text(self, text: str, artifact_path: str) -> None:
        """Store a text as a file, e.g. the resolved config under ``config.yaml``."""
        self.log_artifact_bytes(text.encode(), artifact_path)

    def log_figure(self, figure: Figure, artifact_path: str) -> None:
        """Store a matplotlib figure as PNG; it is drawn before the call returns."""
        if self._delivery is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            self.log_artifact_bytes(buffer.getvalue(), artifact_path)

    def log_artifact_bytes(self, content: bytes, path: str) -> None:
        """Store a file in the run's artifacts under ``path`` (relative, with ``/``)."""
        self._add(path, lambda client, run_id: send_file(client, run_id, content, PurePosixPath(path)))

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Log which images were used, in words and sums; a second time changes nothing."""
        self._add("the datasets", lambda client, run_id: send_datasets(client, run_id, datasets))

    def log_ensemble(self, model_folder: str, input_shape: tuple[int, int, int], *, digest: str | None = None) -> None:
        """Log the ensemble as the model ``ensemble`` (``runs:/RUN_ID/ensemble``).

        Args:
            model_folder: Local folder that :func:`eat_dist.models.save_ensemble` wrote. It is read in the
                background and must stay until :meth:`close` has returned.
            input_shape: (C, H, W) of an image.
            digest: Of the weights: a model that the run has already is not sent again.
        """
        self._add(
            "the model", lambda client, run_id: send_model(client, run_id, model_folder, input_shape, digest=digest)
        )

    def register(self, name: str, tags: Mapping[str, str]) -> None:
        """Make the ensemble that was logged a version of the registered model ``name``.

        The same weights of one run are one version, however often they are registered.

        Args:
            name: Of the registered model; made where it is not there yet.
            tags: Of the version.
        """

        def send(client: Any, run_id: str) -> None:
            self.registered = register_model(client, run_id, name, tags)

        self._add(f"the registration as '{name}'", send)

    def close(self, status: Status, timeout: float = 30.0) -> bool:
        """Send what is left and end the run.

        Args:
            status: What MLflow shows.
            timeout: Longest wait in seconds; it is much shorter where the store refuses connections.

        Returns:
            Whether all that was ever logged arrived; if not, a warning has said so, and :attr:`missing` how much.
        """
        if self._delivery is None:
            return True
        self._add("the status", lambda client, run_id: client.set_terminated(run_id, status))
        return self._delivery.close(timeout)

    def _add(self, what: str, send: Send | None = None, *, metrics: tuple[MetricValue, ...] = ()) -> None:
        if self._delivery is not None:
            self._delivery.add(what, send, metrics=metrics)
