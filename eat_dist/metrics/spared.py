"""Which figure of clustering counts where a set of few classes was clustered twice (docs/evaluation.md, Figures)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Counted(NamedTuple):
    """A figure and its standard deviation over k-means runs; None: not measured.

    ``spared``: it is the one with one image in C left as it is, since that is the lower one.
    """

    value: float | None
    std: float | None
    spared: bool


def counted_figure(figures: Mapping[str, float | None], name: str) -> Counted:
    """The figure that counts of a model under one attack.

    Args:
        figures: By name, as in ``summary.json``: beside ``nmi`` may be ``nmi_std``, ``nmi_spared``, ``nmi_std_spared``.
        name: Without an ending: ``nmi``, or any other figure, of which there is one only.

    Returns:
        The lower of the figure with every image attacked and the one with a few spared.
    """
    whole, spared = figures.get(name), figures.get(f"{name}_spared")
    if spared is not None and (whole is None or spared < whole):
        return Counted(spared, figures.get(f"{name}_std_spared"), spared=True)
    return Counted(whole, figures.get(f"{name}_std"), spared=False)
