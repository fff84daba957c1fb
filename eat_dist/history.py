"""The run's own record of every iteration, as Parquet in the run folder. MLflow is a view of it, never the source."""

from __future__ import annotations

import io
import statistics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eat_dist.errors import StorageError
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.storage import Folder

SCHEMA = pa.schema(
    [
        ("iteration", pa.int64()),
        ("epoch", pa.int32()),
        ("member", pa.int32()),
        ("learning_rate", pa.float32()),
        ("clean_loss", pa.float32()),
        ("adversarial_loss", pa.float32()),
        ("fooled_rate", pa.float32()),
        ("displacement", pa.float32()),
        ("gradient_norm", pa.float32()),
        ("received_from", pa.list_(pa.int32())),
        ("received_loss", pa.list_(pa.float32())),
        ("received_fooled_rate", pa.list_(pa.float32())),
        ("shared_vulnerability", pa.float32()),
        ("coordinator_wait_ms", pa.float32()),
        ("exchange_wait_ms", pa.float32()),
        ("data_wait_ms", pa.float32()),
        ("iteration_ms", pa.float32()),
    ]
)


def rows(ensemble: EnsembleStatistics, *, epoch: int, learning_rate: float) -> list[dict[str, Any]]:
    """One row a member of the iteration that was just merged. ``gradient_norm`` and times are of the one before."""
    return [
        {
            "iteration": entry.iteration,
            "epoch": epoch,
            "member": entry.member,
            "learning_rate": learning_rate,
            "clean_loss": entry.clean_loss,
            "adversarial_loss": entry.adversarial_loss,
            "fooled_rate": entry.fooled_rate,
            "displacement": entry.displacement,
            "gradient_norm": entry.gradient_norm,
            "received_from": [peer.sender for peer in entry.received],
            "received_loss": [peer.loss for peer in entry.received],
            "received_fooled_rate": [peer.fooled_rate for peer in entry.received],
            "shared_vulnerability": ensemble.shared_vulnerability,
            "coordinator_wait_ms": entry.coordinator_wait * 1000,
            "exchange_wait_ms": entry.exchange_wait * 1000,
            "data_wait_ms": entry.data_wait * 1000,
            "iteration_ms": entry.iteration_time * 1000,
        }
        for entry in ensemble.members
    ]


class HistoryWriter:
    """Buffers rows and writes them as one Parquet file whenever a checkpoint is due.

    A file is named after its first iteration and written just before the checkpoint that covers it, so that a run
    which falls back to a checkpoint has exactly the history up to it: later files are deleted when it starts.

    Args:
        folder: The run's ``statistics`` folder.
        iteration: Iterations already done; files from there on are those of an abandoned attempt.
    """

    def __init__(self, folder: Folder, iteration: int) -> None:
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        for name in folder.names():
            first = name.removesuffix(".parquet")
            if first.isdigit() and int(first) >= iteration:
                folder.delete(name)

    def add(self, new: list[dict[str, Any]]) -> None:
        """Buffer an iteration's rows."""
        self._rows += new

    def flush(self) -> None:
        """Write what is buffered."""
        if not self._rows:
            return
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA), buffer)
        self.folder.write(f"{self._rows[0]['iteration']:08d}.parquet", buffer.getvalue())
        self._rows = []


def read_history(folder: Folder) -> pa.Table:
    """All iterations on record, in order; an empty table where there are none.

    Raises:
        StorageError: A file is damaged or of another form.
    """
    files = [name for name in folder.names() if name.endswith(".parquet")]
    try:
        tables = [pq.read_table(pa.BufferReader(folder.read(name))) for name in files]
        return pa.concat_tables([SCHEMA.empty_table(), *tables])
    except pa.ArrowInvalid as error:
        raise StorageError(f"cannot read '{folder}': {' '.join(str(error).split())}") from error


def last_fooled_rate(history: pa.Table) -> float | None:
    """Share in [0, 1] of the images that the training attack misplaced, in the last epoch; None where not measured.

    Mean over members and iterations.
    """
    columns = (history[name].to_pylist() for name in ("epoch", "fooled_rate"))
    measured = [(epoch, rate) for epoch, rate in zip(*columns, strict=True) if rate is not None]
    last = max((epoch for epoch, _ in measured), default=None)
    rates = [rate for epoch, rate in measured if epoch == last]
    return statistics.fmean(rates) if rates else None


def waiting_shares(history: pa.Table, members: int) -> list[float]:
    """For each member the share of its time, in [0, 1], that it stood still for the others.

    The member that waits least is the one the others wait for.
    """
    waits, times = [0.0] * members, [0.0] * members
    names = ("member", "coordinator_wait_ms", "exchange_wait_ms", "iteration_ms")
    columns = (history[name].to_pylist() for name in names)
    for member, coordinator, exchange, iteration in zip(*columns, strict=True):
        waits[member] += coordinator + exchange
        times[member] += iteration
    return [wait / time if time else 0.0 for wait, time in zip(waits, times, strict=True)]
