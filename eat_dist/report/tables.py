"""The tables of clean and attacked figures. Every attacked figure stands beside the clean one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from eat_dist.report.bench_tables import ers_part, ers_recall
from eat_dist.report.cells import Extreme, marked, percentage, scaled, spared_note, words
from eat_dist.report.content import Cell, Column, Row, Table
from eat_dist.report.groups import Group, Value, clean, of, worst
from eat_dist.report.reading import Run
from eat_dist.report.schema import CurvePoint, Evaluation
from eat_dist.report.wording import FIGURES, objective_name, percent, radius, split_attack

_HEADLINE = ("r_at_1", "nmi", "ami", "f1")


def headline(groups: Sequence[Group], *, comparable: bool) -> Table:
    """Clean and worst attacked figures of every entry, the best of a column marked.

    The best is of what is printed, so equals are marked alike. Entries with a failed sanity check are never the best,
    and nothing is marked if there is one entry only, or if they were not measured alike.
    """
    picks = [(FIGURES[name], word, 100.0, pick) for name in _HEADLINE for word, pick in _clean_and_worst(name)]
    if any(run.evaluation.ers for group in groups for run in group.runs):
        # On a scale of 100 already; its own clean R@1 beside it, since a collapsed model scores well.
        picks += [("ERS", "clean R@1", 1.0, ers_recall), ("ERS", "score", 1.0, ers_part("corrected", "ers"))]
    values = [[scaled(group.value(pick), scale) for _, _, scale, pick in picks] for group in groups]
    quotable = [group.quotable for group in groups]
    cells = marked(values, eligible=[comparable and may for may in quotable], mark="best", extremes=[max] * len(picks))
    rows = [
        Row(group.label if may else f"✗ {group.label}", row)
        for group, may, row in zip(groups, quotable, cells, strict=True)
    ]
    return Table(
        caption="Clean figures, and those under the worst attack of each, in %",
        columns=[Column("run", number=False), *(Column(word) for _, word, _, _ in picks)],
        rows=rows,
        spans=[("", 1), *((title, 2) for title, _, _, _ in picks[::2])],
        note=("Bold: best. " if len(groups) > 1 and comparable else "")
        + _spread_note(groups)
        + ("" if all(quotable) else " ✗: a sanity check failed; do not quote that row."),
    )


def attacks(run: Run) -> Table:
    """The ensemble's figures under each attack, the lowest of a column marked as the strongest attack."""
    measured = run.evaluation.ensemble
    present = [measured.clean, *measured.attacked.values()]
    names = [name for name in FIGURES if any(figures.get(name) is not None for figures in present)]
    # Success is the attacker's figure: there the highest is the strongest.
    extremes: list[Extreme] = [max if name == "success_rate" else min for name in names]
    # A sample's figures are beside those of all images, not among them.
    whole = [figures.get("nmi") is not None for figures in measured.attacked.values()]
    values = [[scaled(of(figures, name), 100) for name in names] for figures in measured.attacked.values()]
    cells = marked(values, eligible=whole, mark="strongest", extremes=extremes)
    plain = [[percentage(of(figures, name)) for name in names] for figures in (measured.clean, measured.worst)]
    rows = [Row("nobody (clean)", [*words("", ""), *plain[0]])]
    for position, (key, row) in enumerate(zip(measured.attacked, cells, strict=True)):
        attack, objective, surface = split_attack(key)
        rows.append(
            Row(
                attack if whole[position] else f"{attack} (sample)",
                [*words(objective, surface), *row],
                starts=position == 0,
            )
        )
    rows.append(Row("the worst of all", [*words("", ""), *plain[1]], starts=True))
    return Table(
        caption=f"{run.label}: the ensemble under each attack, in %",
        columns=[
            Column("attack", number=False),
            Column("objective", number=False),
            Column("crafted on", number=False),
            *(Column(FIGURES[name]) for name in names),
        ],
        rows=rows,
        compact=True,
        note="Bold: the strongest attack on a figure. The worst R@1 counts a query only if it survives every attack."
        + spared_note(itertools.chain(*values), classes=run.evaluation.classes),
    )


def inference(run: Run) -> Table:
    """Behind a defense at inference: each attack through it beside the same one crafted without it."""
    about = run.evaluation.inference
    assert about is not None
    figures = (*_HEADLINE, "success_rate")
    values = [
        [of(found, name) for name in figures for found in (row.adaptive, row.non_adaptive)] for row in about.attacks
    ]
    rows = [
        Row(
            split_attack(row.attack).attack,
            [Cell(objective_name(row.objective), number=False), *map(percentage, shown)],
        )
        for row, shown in zip(about.attacks, values, strict=True)
    ]
    options = ", ".join(f"{name} {value}" for name, value in about.options.items())
    return Table(
        caption=f"{run.label}: the ensemble behind the defense at inference “{about.name}” ({options}), in %",
        columns=[
            Column("attack", number=False),
            Column("objective", number=False),
            *(Column(word) for _ in figures for word in ("adaptive", "non-adaptive")),
        ],
        rows=rows,
        spans=[("", 2), *((FIGURES[name], 2) for name in figures)],
        note=f"Adaptive: through the defense (BPDA where it has no gradient; a step averages {about.eot_draws} of its "
        "draws). Non-adaptive: crafted on the undefended network, which tells what the defense hides, not what it "
        "withstands." + spared_note(itertools.chain(*values), classes=run.evaluation.classes),
    )


def members(run: Run) -> Table:
    """The ensemble and each member alone, clean and worst attacked."""
    parts = [("ensemble", run.evaluation.ensemble)]
    parts += [(f"member {rank}", measured) for rank, measured in enumerate(run.evaluation.members)]
    rows = [
        Row(
            name,
            [
                percentage(Value(figures.get(figure)))
                for figure in _HEADLINE
                for figures in (measured.clean, measured.worst)
            ],
            starts=position == 1,
        )
        for position, (name, measured) in enumerate(parts)
    ]
    return Table(
        caption=f"{run.label}: each member attacked alone, in %",
        columns=[Column("model", number=False), *(Column(word) for _ in _HEADLINE for word in ("clean", "attacked"))],
        rows=rows,
        spans=[("", 1), *((FIGURES[name], 2) for name in _HEADLINE)],
    )


def curves(run: Run) -> Table:
    """The numbers behind the curves."""
    norm = run.evaluation.norm
    nmi = [point_value(point, "nmi") for point in run.evaluation.curves]
    rows = [
        Row(
            objective_name(point.objective),
            [
                Cell(radius(point.epsilon, norm)),
                percentage(Value(point.r_at_1)),
                percentage(nmi[position]),
                Cell(percent(point.success_rate)),
            ],
            starts=position > 0 and point.objective != run.evaluation.curves[position - 1].objective,
        )
        for position, point in enumerate(run.evaluation.curves)
    ]
    columns = [Column("objective", number=False), Column("ε"), Column("R@1"), Column("NMI"), Column("success")]
    note = spared_note(nmi, classes=run.evaluation.classes).strip()
    return Table(caption=f"{run.label}: figures against ε, in %", columns=columns, rows=rows, note=note)


def point_value(point: CurvePoint, figure: str) -> Value:
    """One figure of a point of a curve."""
    return of(point.model_dump(), figure)


def _clean_and_worst(name: str) -> list[tuple[str, Callable[[Evaluation], Value]]]:
    return [("clean", clean(name)), ("attacked", worst(name))]


def _spread_note(groups: Sequence[Group]) -> str:
    if any(len(group.runs) > 1 for group in groups):
        return "±: standard deviation over training seeds; for a single run, of NMI, AMI and F1 over k-means seeds."
    return "±: standard deviation over k-means seeds, not over training seeds."
