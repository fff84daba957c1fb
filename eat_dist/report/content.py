"""What a page is made of: sections of text, tables and figures, before any of it is HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Mark = Literal["best", "strongest", "pass", "fail"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What it says.
        spread: Standard deviation, written after ±; empty where there is none.
        mark: ``best``/``strongest`` of its column (bold, and the word for screen readers), or a check's outcome.
        shade: In [0, 1]: how strongly the cell is tinted, None not at all.
        number: Whether it is right aligned in tabular figures.
    """

    text: str
    spread: str = ""
    mark: Mark | None = None
    shade: float | None = None
    number: bool = True


@dataclass(frozen=True)
class Column:
    """A column's heading."""

    label: str
    number: bool = True


@dataclass(frozen=True)
class Row:
    """A row: its heading and its cells. ``starts`` draws a line above, for a new group of rows."""

    heading: str
    cells: list[Cell]
    starts: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows, in which unit.
        columns: The first heads the row headings.
        rows: In order.
        note: How to read it.
        spans: Headings over columns, (text, how many columns).
        compact: Whether words stay on one line: many rows of short words.
    """

    caption: str
    columns: list[Column]
    rows: list[Row]
    note: str = ""
    spans: list[tuple[str, int]] = field(default_factory=list)
    compact: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Plot:
    """A drawing: for the page, and as files.

    Attributes:
        name: File name without its ending; unique on the page.
        caption: The line below it.
        alt: What it shows, with the gist of its numbers.
        svg: The file's content.
        png: The file's content.
        on_page: The element of the page.
    """

    name: str
    caption: str
    alt: str
    svg: bytes
    png: bytes
    on_page: str


@dataclass(frozen=True)
class Key:
    """An entry of a legend: what is drawn so."""

    label: str
    svg: str


@dataclass(frozen=True)
class Plots:
    """Small multiples under one heading and one legend; ``wide`` ones are drawn larger."""

    heading: str
    plots: list[Plot]
    legend: list[Key] = field(default_factory=list)
    wide: bool = False
    kind: str = "plots"


@dataclass(frozen=True)
class Picture:
    """An image of the strip: a data URI, what it is, and for a neighbour whether it is of the right class.

    ``coarse``: so few pixels that they are shown as squares.
    """

    uri: str
    caption: str
    alt: str
    right: bool | None = None
    coarse: bool = False


@dataclass(frozen=True)
class Strip:
    """One attacked image: itself three times, and its neighbours before and after."""

    heading: str
    itself: list[Picture]
    before: list[Picture]
    after: list[Picture]
    kind: str = "strip"


@dataclass(frozen=True)
class Text:
    """A paragraph; ``tone`` says whether it is a warning."""

    text: str
    tone: Literal["plain", "absent", "warning"] = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Listing:
    """Text as it stands: a command or a config."""

    caption: str
    text: str
    kind: str = "listing"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    summary: str
    blocks: list[Block]
    open: bool = False
    kind: str = "fold"


@dataclass(frozen=True)
class Heading:
    """A heading below the section's own."""

    text: str
    kind: str = "heading"


Block = Table | Plots | Strip | Text | Listing | Fold | Heading


@dataclass(frozen=True)
class Section:
    """A part of the page. ``lead``: how to read it."""

    name: str
    title: str
    lead: str
    blocks: list[Block]

    @property
    def empty(self) -> bool:
        """Whether it only says what is not there."""
        return all(isinstance(block, Text) and block.tone == "absent" for block in self.blocks)


@dataclass(frozen=True)
class Verdict:
    """What may be said of one run, or of a sweep.

    Attributes:
        label: The run.
        about: What it is: defense, dataset, members, seed.
        outcome: ``pass``, ``fail``, or ``none`` where no sanity check was run.
        sentence: The outcome in words.
        figures: (name, clean, worst) in %, as written.
        shares: (clean, worst) in [0, 1] of the same figures, for bars; NaN is 0.
        notes: Paragraphs below the figures.
    """

    label: str
    about: str
    outcome: Literal["pass", "fail", "none"]
    sentence: str
    figures: list[tuple[str, str, str]]
    shares: list[tuple[float, float]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    verdicts: list[Verdict]
    warnings: list[str]
    sections: list[Section]

    def plots(self) -> list[Plot]:
        """Every drawing on the page, in order."""
        found: list[Plot] = []
        blocks: list[Block] = [block for section in self.sections for block in section.blocks]
        while blocks:
            block = blocks.pop(0)
            if isinstance(block, Plots):
                found += block.plots
            elif isinstance(block, Fold):
                blocks = block.blocks + blocks
        return found
