"""What sections share: the legend of the entries, and the sentence on what was not measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eat_dist.report.content import Block, Key, Text
from eat_dist.report.drawing import key, look
from eat_dist.report.groups import Group, runs_of
from eat_dist.report.reading import Run
from eat_dist.report.wording import joined


def legend(groups: Sequence[Group], *, place: str, line: bool = True) -> list[Key]:
    """The look of each entry; nothing where there is one only, since it is what the page is about.

    ``place`` names the legend, uniquely on the page.
    """
    if len(groups) == 1:
        return []
    return [key(group.label, look(index), place=f"{place}-{index}", line=line) for index, group in enumerate(groups)]


def absent(groups: Sequence[Group], has: Callable[[Run], bool], what: str) -> list[Block]:
    """A sentence that names the runs which lack a part; nothing where none does."""
    lacking = [f"{run.label} (protocol {run.evaluation.protocol})" for run in runs_of(groups) if not has(run)]
    return [Text(f"{joined(lacking)}: {what}.", tone="absent")] if lacking else []
