"""Drawing in the page's style: a figure as files, and as SVG that follows the page's light or dark theme.

Nothing here depends on when or where it runs: ids are salted with a constant, dates and versions left out, so the same
input gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from eat_dist.report.content import Key, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK, MUTED, RULE, SURFACE = "#1c2127", "#59636e", "#d5dadf", "#fefefe"
# After Okabe & Ito 2008, "Color Universal Design"; darkened where 3 : 1 against white asks for it. On the page each is
# a custom property, so that the dark theme has its own.
PALETTE = ("#0072b2", "#d55e00", "#007f5f", "#a8478a", "#8a6d00", "#3d4650")
# From low to high, for values that are coloured: matplotlib's plasma, as far as it is 3 : 1 against white. The dark
# theme has its brighter end instead.
SCALE = ("#e16462", "#cc4778", "#b12a90", "#8f0da4", "#6a00a8", "#41049d", "#0d0887")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")
_PROPERTIES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", SURFACE: "--surface"} | {
    colour: f"--{kind}-{index}"
    for kind, colours in (("series", PALETTE), ("scale", SCALE))
    for index, colour in enumerate(colours)
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "eat_dist",
    "svg.fonttype": "none",
    # A run may be called "$x$".
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


class Look(NamedTuple):
    """Colour, dash and marker of one series: any one of the three tells it from its neighbours."""

    colour: str
    dash: Any
    marker: str


def look(index: int) -> Look:
    """The look of the series ``index``; thirty differ."""
    return Look(PALETTE[index % len(PALETTE)], DASHES[index % len(DASHES)], MARKERS[index % len(MARKERS)])


class Margins(NamedTuple):
    """Inches around the axes; equal ones keep small multiples aligned."""

    left: float = 0.55
    right: float = 0.18
    bottom: float = 0.44
    top: float = 0.1


class Drawing(NamedTuple):
    """What is to be drawn; the fields are the arguments of :func:`plot`."""

    name: str
    paint: Callable[[Axes], None]
    caption: str
    alt: str
    size: tuple[float, float] = (2.8, 2.1)
    margins: Margins = Margins()
    legend: Sequence[tuple[str, Look]] = ()


def as_plot(drawing: Drawing) -> Plot:
    """Draw for the page and the files."""
    return plot(**drawing._asdict())


def as_figure(drawing: Drawing) -> Figure:
    """Draw as a figure of its own (no pyplot state, 150 dots an inch), title and legend inside, for other viewers."""
    import matplotlib as mpl  # noqa: PLC0415  (half a second, once a report)
    from matplotlib.figure import Figure  # noqa: PLC0415

    width, height = (1.5 * length for length in drawing.size)
    title = textwrap.wrap(drawing.caption, int(13 * width))
    with mpl.rc_context(_STYLE):
        made = Figure(
            figsize=(width, height + 0.2 * len(title) + 0.17 * len(drawing.legend)), dpi=150, layout="constrained"
        )
        drawing.paint(made.add_subplot())
        made.suptitle("\n".join(title), fontsize="large", x=0.02, ha="left")
        if drawing.legend:
            handles, labels = _entries(drawing.legend)
            made.legend(handles, labels, loc="outside lower left", labelspacing=0.2, handlelength=3)
        # Ticks are made when they are first drawn, so in this style.
        made.draw_without_rendering()
    return made


def plot(
    name: str,
    paint: Callable[[Axes], None],
    *,
    caption: str,
    alt: str,
    size: tuple[float, float] = (2.8, 2.1),
    margins: Margins = Margins(),  # noqa: B008  (a tuple: it cannot change)
    legend: Sequence[tuple[str, Look]] = (),
) -> Plot:
    """Draw a figure: bare for the page, which has title and legend in HTML, and with both for the files.

    Args:
        name: Of the files, unique on the page.
        paint: Draws into the axes.
        caption: What it shows, one line.
        alt: The same with the gist of its numbers, for who cannot see it.
        size: Of the bare figure, inches.
        margins: Around the axes.
        legend: Label and look of each series.
    """
    figure = _draw(paint, size=size, margins=margins)
    bare = _saved(figure, "svg", facecolor="none")
    _dress(figure, title=caption, legend=legend)
    # What was added lies outside: the files are cut to what is drawn, so nothing is lost however long a label is.
    svg, png = (_saved(figure, form, facecolor="white", bbox_inches="tight") for form in ("svg", "png"))
    return Plot(name, caption, alt, svg, png, on_page=inline(bare, prefix=name, alt=alt))


def key(label: str, shown: Look, *, place: str, line: bool = True) -> Key:
    """A legend's entry: a piece of the line (or the marker alone) in the series' look.

    Args:
        label: What is drawn so.
        shown: How.
        place: Unique on the page.
        line: Whether it is a line, or points only.
    """

    def paint(axes: Axes) -> None:
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        if line:
            axes.plot([0.02, 0.98], [0.5, 0.5], color=shown.colour, linestyle=shown.dash, linewidth=1.6)
        axes.plot([0.5], [0.5], color=shown.colour, marker=shown.marker, markersize=5, linestyle="")

    drawn = _draw(paint, size=(0.5 if line else 0.2, 0.18), margins=Margins(0, 0, 0, 0))
    return Key(label, inline(_saved(drawn, "svg", facecolor="none"), prefix=f"key-{place}", alt=""))


def inline(svg: bytes, *, prefix: str, alt: str) -> str:
    """An SVG file as an element of a page: ids of its own, fonts and colours of the page, named by ``alt``.

    Args:
        svg: As matplotlib writes it.
        prefix: Put before every id, since ids are the page's.
        alt: Its name for screen readers; empty: it is decoration.
    """
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="', f' id="{prefix}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, name in _PROPERTIES.items():
        text = text.replace(colour, f"var({name})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    label = f'role="img" aria-label="{html.escape(alt)}"' if alt else 'aria-hidden="true"'
    return text.replace("<svg ", f"<svg {label} ", 1).strip()


def _draw(paint: Callable[[Axes], None], *, size: tuple[float, float], margins: Margins) -> Figure:
    import matplotlib as mpl  # noqa: PLC0415  (half a second, once a report)
    from matplotlib.figure import Figure  # noqa: PLC0415

    width, height = size
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size)
        axes = figure.add_axes(
            (
                margins.left / width,
                margins.bottom / height,
                (width - margins.left - margins.right) / width,
                (height - margins.bottom - margins.top) / height,
            )
        )
        axes.set_facecolor("none")
        paint(axes)
    return figure


def _dress(figure: Figure, *, title: str, legend: Sequence[tuple[str, Look]]) -> None:
    """Add a title above and a legend below."""
    import matplotlib as mpl  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        wrapped = "\n".join(textwrap.wrap(title, int(15 * figure.get_figwidth())))
        figure.text(0.02, 1.02, wrapped, va="bottom")
        if legend:
            handles, labels = _entries(legend)
            figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, 0), labelspacing=0.2, handlelength=3)


def _entries(legend: Sequence[tuple[str, Look]]) -> tuple[list[Line2D], list[str]]:
    """The handles and the labels of a legend."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D([], [], color=shown.colour, linestyle=shown.dash, marker=shown.marker, markersize=4)
        for _, shown in legend
    ]
    return handles, [label for label, _ in legend]


def _saved(figure: Figure, form: str, *, facecolor: str, bbox_inches: str | None = None) -> bytes:
    import matplotlib as mpl  # noqa: PLC0415

    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        metadata: dict[str, Any] = _METADATA if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=200, facecolor=facecolor, bbox_inches=bbox_inches, metadata=metadata)
    return buffer.getvalue()
