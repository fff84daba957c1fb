"""The page of a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from eat_dist.report.content import Block, Fold, Listing, Page, Plots, Section, Text, Verdict
from eat_dist.report.drawing import as_plot, key
from eat_dist.report.studies import tables
from eat_dist.report.studies.comparison import Comparison, Row, compare
from eat_dist.report.studies.drawings import SHOWN, drawings
from eat_dist.report.studies.reading import Study
from eat_dist.report.studies.wording import measured_with, outcome, unquotable
from eat_dist.report.wording import as_yaml, counted, duration, joined, percent, plain, slug

OnProgress = Callable[[str, int, int], None]
_HEADLINE = (("r_at_1", "R@1"), ("nmi", "NMI"))


def make_study_page(study: Study, *, title: str | None = None, on_progress: OnProgress | None = None) -> Page:
    """Put the page together; nothing is written."""
    comparisons = compare(study)
    sections = []
    for position, comparison in enumerate(comparisons):
        if on_progress is not None:
            on_progress(comparison.dataset, position, len(comparisons))
        sections.append(_section(study, comparison))
    ended = Section("runs", "Runs", f"{outcome(study)}.", [tables.runs(study)])
    return Page(
        title=title or f"Study {study.name}",
        subtitle=" · ".join(
            [
                counted(len(study.rows), "row"),
                joined(list(study.datasets)),
                counted(len(study.seeds), "seed"),
                *([f"passes of {study.budget_row}"] if study.budget_row is not None else []),
            ]
        ),
        verdicts=[verdict(comparison) for comparison in comparisons],
        warnings=warnings(study),
        sections=[*sections, ended, _origin(study)],
    )


def verdict(comparison: Comparison) -> Verdict:
    """Which row is ahead under attack on a dataset, if one is."""
    firsts = {label: comparison.first(figure) for figure, label in SHOWN}
    top = comparison.first(SHOWN[0][0])
    about, doubtful = measured_with(comparison), [row.label for row in comparison.unquotable]
    outcome: Literal["fail", "none"] = "fail" if doubtful or top is None else "none"
    what = "that row" if len(doubtful) == 1 else "those rows"
    doubt = f"✗ Sanity checks failed in {joined(doubtful)}: do not quote {what}. " if doubtful else ""
    if top is None:
        why = "Not compared." if comparison.shown else "No row is finished: there is nothing to compare."
        return Verdict(comparison.dataset, about, outcome, f"{doubt or '✗ '}{why}", [], [])
    ahead = [label for figure, label in SHOWN if (best := comparison.best(figure)) and best.label == top.label]
    others = [f"{row.label} in {name}" for name, row in firsts.items() if row is not None and row.label != top.label]
    if ahead:
        sentence = f"{top.label} is ahead in {joined(ahead)}, by more than seeds differ."
    else:
        sentence = f"{top.label} has the highest {SHOWN[0][1]}; no row is ahead in it by more than seeds differ."
    sign = "★" if ahead else "○"
    return Verdict(
        label=comparison.dataset,
        about=about,
        outcome=outcome,
        sentence=f"{doubt}Of the others {sentence}" if doubt else f"{sign} {sentence}",
        figures=[(name, *_clean_and_worst(top, figure)) for figure, name in _HEADLINE],
        shares=[_shares(top, figure) for figure, _ in _HEADLINE],
        notes=[f"Figures of {top.label}.", *([f"First elsewhere: {joined(others)}."] if others else [])],
    )


def warnings(study: Study) -> list[str]:
    """What keeps the page from being the last word on the study."""
    found = []
    under_way = study.with_status("WAITING", "RUNNING", "INTERRUPTED")
    if under_way:
        found.append(
            f"The study is not finished: {counted(len(under_way), 'run')} of {len(study.runs)} to come. This page "
            f"shows what was there when it was made."
        )
    if failed := study.with_status("FAILED"):
        found.append(f"{counted(len(failed), 'run')} failed: {joined([run.name for run in failed])}.")
    if doubtful := unquotable(study):
        found.append(f"Sanity checks failed, so these figures are not to be quoted: {joined(doubtful)}.")
    return found


def _section(study: Study, comparison: Comparison) -> Section:
    name = f"on-{slug(comparison.dataset)}"
    if not comparison.shown:
        return Section(name, comparison.dataset, "", [Text("No run is finished yet.", tone="absent")])
    made = drawings(comparison)
    keys = [key(label, look, place=f"{name}-{index}", line=False) for index, (label, look) in enumerate(made[0].legend)]
    blocks: list[Block] = [
        tables.figures(study, comparison),
        tables.differences(comparison),
        Plots("", [as_plot(one) for one in made], keys, wide=True),
    ]
    return Section(name, comparison.dataset, f"{measured_with(comparison)}.", blocks)


def _origin(study: Study) -> Section:
    facts = {
        "started": study.started,
        "took": None if study.seconds is None else duration(study.seconds),
        "seeds": ", ".join(map(str, study.seeds)),
        "git": plain(study.git),
    }
    line = "; ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    blocks: list[Block] = [Text(f"{line}."), Listing("Rows: settings over the dataset's config", as_yaml(study.rows))]
    command = plain(study.command)
    blocks += [Listing("Command", command)] if command else []
    blocks += [
        Fold(f"Config of {dataset}, with its first row's settings", [Listing("config.yaml", as_yaml(config))])
        for dataset, config in study.datasets.items()
    ]
    return Section("origin", "What made this study", "", blocks)


def _clean_and_worst(row: Row, name: str) -> tuple[str, str]:
    clean, worst = (percent(row.value(f"{which}/{name}").mean) for which in ("clean", "worst"))
    return clean, worst


def _shares(row: Row, name: str) -> tuple[float, float]:
    clean, worst = (row.value(f"{which}/{name}").mean or 0.0 for which in ("clean", "worst"))
    return min(max(clean, 0.0), 1.0), min(max(worst, 0.0), 1.0)
