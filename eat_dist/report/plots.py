"""The drawings: curves against ε and over training, and the strength ladder. Each is a panel of small multiples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from eat_dist.report.content import Plot
from eat_dist.report.drawing import Look, Margins, plot
from eat_dist.report.groups import Value
from eat_dist.report.wording import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Series(NamedTuple):
    """One line. ``low`` and ``high`` bound the band around it; equal to ``y`` where there is none."""

    label: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Axis(NamedTuple):
    """What is drawn along an axis, and its range; None: as the numbers fall."""

    label: str
    low: float | None = None
    high: float | None = None


def series(label: str, shown: Look, points: Sequence[tuple[float, Value]]) -> Series | None:
    """A line through the points that were measured, their spread around it; None if none was."""
    known = [(x, value.mean, value.std or 0.0) for x, value in points if value.mean is not None]
    if not known:
        return None
    x, y, spread = zip(*known, strict=True)
    low = [mean - std for mean, std in zip(y, spread, strict=True)]
    high = [mean + std for mean, std in zip(y, spread, strict=True)]
    return Series(label, shown, x, y, low, high)


def line_plot(
    name: str, lines: Sequence[Series], *, caption: str, x: Axis, y: Axis, markers: bool = True, shown: str = "{:.1f}"
) -> Plot:
    """Lines with bands.

    Args:
        name: Of the files.
        lines: At least one.
        caption: What is drawn.
        x: The horizontal axis.
        y: The vertical axis.
        markers: Whether the points are marked (few points) or not (a curve over training).
        shown: How the alt text writes a y value.
    """

    def paint(axes: Axes) -> None:
        for line in lines:
            axes.fill_between(line.x, line.low, line.high, color=line.look.colour, alpha=0.16, linewidth=0)
            axes.plot(
                line.x,
                line.y,
                color=line.look.colour,
                linestyle=line.look.dash,
                linewidth=1.6,
                marker=line.look.marker if markers else "",
                markersize=4,
                # Points on the frame are shown whole.
                clip_on=False,
            )
        axes.set_xlabel(x.label)
        axes.set_ylabel(y.label)
        axes.set_xlim(x.low, x.high)
        axes.set_ylim(y.low, y.high)
        axes.locator_params(nbins=5)

    gist = "; ".join(
        f"{line.label}: {shown.format(line.y[0])} at {line.x[0]:g}, {shown.format(line.y[-1])} at {line.x[-1]:g}"
        for line in lines
    )
    legend = [(line.label, line.look) for line in lines]
    return plot(name, paint, caption=caption, alt=f"{y.label} against {x.label}, {caption}. {gist}.", legend=legend)


def ladder_plot(
    name: str,
    rungs: Sequence[str],
    values: Sequence[tuple[str, Look, Sequence[float | None]]],
    *,
    caption: str,
) -> Plot:
    """Success rate of each attack as a point, the weakest attack on top.

    Args:
        name: Of the files.
        rungs: Names of the attacks.
        values: For each entry its label, look and success rates in [0, 1] in the order of ``rungs``.
        caption: What is drawn.
    """

    def paint(axes: Axes) -> None:
        for index, (_, shown, rates) in enumerate(values):
            # Entries of one rung lie a little apart, or equal ones would hide each other.
            apart = 0.5 * ((index + 0.5) / len(values) - 0.5)
            heights = [position + apart for position in range(len(rungs))]
            x = [math.nan if rate is None else 100 * rate for rate in rates]
            axes.hlines(heights, 0, x, color=shown.colour, linewidth=1, alpha=0.5)
            axes.plot(x, heights, color=shown.colour, linestyle="", marker=shown.marker, markersize=5, clip_on=False)
        axes.set_yticks(range(len(rungs)), rungs)
        axes.set_ylim(len(rungs) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("success, %")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)

    def told(rates: Sequence[float | None]) -> str:
        return ", ".join(f"{rung} {percent(rate)}" for rung, rate in zip(rungs, rates, strict=True))

    gist = "; ".join(f"{label}: {told(rates)}" for label, _, rates in values)
    return plot(
        name,
        paint,
        caption=caption,
        alt=f"{caption}: share of the images each attack fools, in %. {gist}.",
        size=(2.8, 0.75 + 0.3 * len(rungs) + 0.06 * len(rungs) * (len(values) - 1)),
        margins=Margins(left=0.95),
        legend=[(label, shown._replace(dash="")) for label, shown, _ in values],
    )
