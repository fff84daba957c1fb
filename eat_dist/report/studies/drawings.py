"""The drawings of a study: every run as a point, so that the spread of the seeds is seen and not only told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eat_dist.report.drawing import INK, MUTED, PALETTE, Drawing, Look, Margins
from eat_dist.report.studies.comparison import Comparison
from eat_dist.report.studies.wording import heading, told
from eat_dist.report.wording import HEADLINE, counted, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Those that say how robust a row is.
SHOWN = tuple((figure, label) for figure, label in HEADLINE if figure.startswith("worst/"))
_ONE, _MEAN = Look(PALETTE[0], "", "o"), Look(INK, "", "|")
_LEGEND = (("a run", _ONE), ("mean of a row", _MEAN))


def drawings(comparison: Comparison) -> list[Drawing]:
    """One a figure; none where no run is finished."""
    return [_dots(comparison, figure, label) for figure, label in SHOWN] if comparison.shown else []


def _dots(comparison: Comparison, figure: str, label: str) -> Drawing:
    # What may not be quoted is never the best.
    rows = sorted(comparison.shown, key=lambda row: (row.quotable, row.value(figure).mean or 0.0), reverse=True)

    def paint(axes: Axes) -> None:
        for place, row in enumerate(rows):
            values = [100 * value for value in row.by_seed(figure).values()]
            axes.plot(values, [place] * len(values), color=_ONE.colour, marker=_ONE.marker, markersize=4, linestyle="")
            mean = row.value(figure).mean
            if mean is not None:
                axes.plot(
                    [100 * mean], [place], color=_MEAN.colour, marker=_MEAN.marker, markersize=11, markeredgewidth=1.6
                )
            # Beside the points there is no room for names of any length; above them there is.
            axes.annotate(
                heading(row),
                (0, place),
                xycoords=("axes fraction", "data"),
                xytext=(2, 5),
                textcoords="offset points",
                fontsize=8,
                color=MUTED,
            )
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.5, -0.8)
        axes.margins(x=0.08)
        axes.set_xlabel(f"{label}, %")
        axes.locator_params(axis="x", nbins=6)

    caption = f"{comparison.dataset}: {label}, {counted(len(rows), 'row')}, the best first"
    caption += ", then those with failed sanity checks (✗)" if comparison.unquotable else ""
    gist = "; ".join(f"{heading(row)} {told(row.value(figure))}" for row in rows)
    name = f"dots-{slug(comparison.dataset)}-{slug(label)}"
    size = (3.9, 0.7 + 0.36 * len(rows))
    return Drawing(name, paint, caption, f"{caption}: {gist}.", size, Margins(left=0.15), _LEGEND)
