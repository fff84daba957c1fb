"""Figures, as matplotlib objects without pyplot's global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def transfer_matrix_figure(matrix: npt.NDArray[np.floating[Any]]) -> Figure:
    """Draw the transfer matrix R.

    Args:
        matrix: [M, M]; r_ij in [0, 1] is the share of j's adversarial images that fool i, NaN: not measured.

    Returns:
        A figure of its own (no pyplot state), 150 dots an inch.

    Raises:
        ValueError: The matrix is not square.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  (half a second, once a run)

    members = len(matrix)
    if matrix.shape != (members, members):
        raise ValueError(f"a transfer matrix is square; got shape {matrix.shape}")
    figure = Figure(figsize=(3.4 + 0.6 * members, 2.4 + 0.6 * members), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.88")
    image = axes.imshow(100 * np.ma.masked_invalid(matrix), vmin=0, vmax=100, cmap="Oranges")
    for (row, column), value in np.ndenumerate(matrix):
        text = f"{100 * value:.0f}" if np.isfinite(value) else "–"
        axes.text(column, row, text, ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(members))
    axes.set_yticks(range(members))
    axes.set_xlabel("attacks made on member j")
    axes.set_ylabel("attacked member i")
    peers = matrix[~np.eye(members, dtype=bool)]
    mean = f"\nmean off the diagonal {100 * np.nanmean(peers):.1f} %" if np.isfinite(peers).any() else ""
    axes.set_title(f"Transfer matrix: fooled rate in %{mean}", fontsize="medium")
    figure.colorbar(image, ax=axes, label="% of the adversarial images")
    return figure


def figure_png(figure: Figure) -> bytes:
    """A figure drawn as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
