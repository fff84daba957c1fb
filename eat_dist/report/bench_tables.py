"""The tables of the bench: ladder, norms, fractions, transfer, ERS, detector and sanity checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eat_dist.report.cells import cell, percentage, words
from eat_dist.report.content import Cell, Column, Row, Table
from eat_dist.report.groups import Group, Value
from eat_dist.report.reading import Run
from eat_dist.report.schema import Evaluation, Figures, FractionRow
from eat_dist.report.wording import (
    ERS_PARTS,
    MISSING,
    NORMS,
    attack_name,
    model_name,
    number,
    objective_name,
    percent,
    radius,
    split_attack,
)


def rungs_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Attack and objective of every rung of the ladder, in the order measured."""
    return list(dict.fromkeys((rung.attack, rung.objective) for run in runs for rung in run.evaluation.ladder))


def ladder(groups: Sequence[Group]) -> Table:
    """Success rate of each attack, weakest first as measured, a column an entry."""
    rungs = rungs_of([run for group in groups for run in group.runs])
    rows = [
        Row(
            attack_name(attack),
            [
                Cell(objective_name(objective), number=False),
                *(percentage(group.value(rung(attack, objective))) for group in groups),
            ],
        )
        for attack, objective in rungs
    ]
    columns = [Column("attack", number=False), Column("objective", number=False)]
    columns += [Column(group.label) for group in groups]
    return Table(caption="Success rate of each attack at the same ε, in %", columns=columns, rows=rows)


def norms(runs: Sequence[Run]) -> Table:
    """Attacks in other norms."""
    rows = [
        Row(
            run.label,
            [
                *words(NORMS.get(row.norm, row.norm), attack_name(row.attack), objective_name(row.objective)),
                Cell(MISSING if row.epsilon is None else radius(row.epsilon, row.norm)),
                Cell(percent(row.success_rate)),
                Cell(number(row.median_distance, digits=3)),
                Cell(MISSING if row.images is None else f"{row.images:,}"),
            ],
            starts=position == 0,
        )
        for run in runs
        for position, row in enumerate(run.evaluation.norms)
    ]
    columns = [Column(word, number=False) for word in ("run", "norm", "attack", "objective")]
    columns += [Column("ε"), Column("success, %"), Column("median distance"), Column("images")]
    note = "L0: ε and distance are shares of the pixel positions. The median is over all images, fooled or not."
    return Table(caption="Attacks in other norms", columns=columns, rows=rows, note=note)


def fractions(runs: Sequence[Run]) -> Table:
    """Clustering with a part of the images attacked."""
    rows = [
        Row(
            run.label,
            [
                Cell(objective_name(row.objective), number=False),
                Cell(percent(row.fraction, digits=0)),
                percentage(Value(row.nmi, row.nmi_std)),
                Cell(percent(row.ami)),
                Cell(percent(row.f1)),
                Cell(percent(row.r_at_1)),
            ],
            starts=position == 0,
        )
        for run in runs
        for position, row in enumerate(fraction_rows(run.evaluation))
    ]
    columns = [Column("run", number=False), Column("objective", number=False), Column("images attacked")]
    columns += [Column("NMI"), Column("AMI"), Column("F1"), Column("R@1")]
    note = "R@1 of all images against each other, attacked or not."
    if any(run.evaluation.fractions_table != fraction_rows(run.evaluation) for run in runs):
        note += " With few classes there is a part with one image in C left as it is, too, without R@1."
    return Table(caption="Clustering with a part of the images attacked, in %", columns=columns, rows=rows, note=note)


def fraction_rows(evaluation: Evaluation) -> list[FractionRow]:
    """Objective by objective, the attacked part rising.

    Of few classes every attack on all images was clustered with one image in C spared as well: that is a part, too, and
    the lowest point may be there.
    """
    rows = list(evaluation.fractions_table)
    for row in evaluation.fractions_table:
        figures = evaluation.ensemble.attacked.get(f"{row.attack}/{row.objective}", {})
        if row.fraction < 1 or not evaluation.classes or "nmi_spared" not in figures:
            continue
        part = 1 - 1 / evaluation.classes
        if all((other.objective, other.fraction) != (row.objective, part) for other in rows):
            spared = {name: figures.get(f"{name}_spared") for name in ("nmi", "nmi_std", "ami", "f1")}
            rows.append(FractionRow(fraction=part, objective=row.objective, attack=row.attack, **spared))
    order = list(dict.fromkeys(row.objective for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.objective), row.fraction))


def transfer(run: Run) -> Table:
    """Success of images crafted on each source (row) against each target (column), tinted by success."""
    matrix = run.evaluation.transfer
    assert matrix is not None
    rows = [
        Row(model_name(source), [Cell(percent(share, digits=0), shade=share) for share in shares])
        for source, shares in zip(matrix.sources, matrix.success_rate, strict=True)
    ]
    attack, objective, _ = split_attack(matrix.attack)
    return Table(
        caption=f"{run.label}: success of transferred images in %, {attack} on {objective}",
        columns=[
            Column("crafted on ↓ tried on →", number=False),
            *(Column(model_name(name)) for name in matrix.targets),
        ],
        rows=rows,
    )


def ers(groups: Sequence[Group]) -> Table:
    """Empirical robustness score with its ten parts, the clean R@1 beside it."""
    rows = []
    for group in groups:
        for reading in ("corrected", "compatible"):
            score = group.value(ers_part(reading, "ers"))
            if score.mean is None:
                continue
            parts = [cell(group.value(ers_part(reading, part)), digits=_digits(part)) for part in ERS_PARTS]
            shown = [cell(group.value(ers_recall)), cell(score), *parts]
            rows.append(Row(group.label, [Cell(reading, number=False), *shown], starts=reading == "corrected"))
    columns = [Column("run", number=False), Column("reading", number=False), Column("clean R@1"), Column("ERS")]
    return Table(
        caption="Empirical robustness score and the ten measurements it is made of",
        columns=columns + [Column(label) for label in ERS_PARTS.values()],
        rows=rows,
        note="A collapsed model scores well on ES:D: read ERS with the clean R@1. "
        "“compatible” repeats two indexing slips of the published code, for comparison with its tables.",
    )


def detector(groups: Sequence[Group]) -> Table:
    """Detection of attacked images, by an attacker who does not know of the detector, and by one who does."""
    picks = [(who, figure) for who in ("unaware", "aware") for figure in ("auroc", "tpr_at_5_fpr")]
    rows = [
        Row(group.label, [cell(group.value(_detected(who, figure)), digits=3) for who, figure in picks])
        for group in groups
    ]
    return Table(
        caption="Area under the ROC curve, and attacked images found (TPR) at 5 % false alarms (FPR)",
        columns=[Column("run", number=False), *(Column(word) for _ in "ab" for word in ("AUROC", "TPR at 5 % FPR"))],
        rows=rows,
        spans=[("", 1), ("attacker unaware", 2), ("attacker aware", 2)],
        note="AUROC 0.5 is guessing. The aware attacker evades the detector; that column is the one to quote.",
    )


def sanity(run: Run) -> Table:
    """Every sanity check, the failed ones first."""
    checks = sorted(run.evaluation.sanity, key=lambda check: check.passed)
    rows = [
        Row(
            check.claim or check.name,
            [
                Cell("✓ passed" if check.passed else "✗ failed", mark="pass" if check.passed else "fail", number=False),
                *words(check.measured, check.threshold),
                Cell(check.name, number=False),
            ],
        )
        for check in checks
    ]
    columns = [Column(word, number=False) for word in ("claim", "outcome", "measured", "must be", "check")]
    return Table(caption=f"{run.label}: sanity checks", columns=columns, rows=rows)


def rung(attack: str, objective: str) -> Callable[[Evaluation], Value]:
    """The success rate of one attack of the ladder."""

    def pick(evaluation: Evaluation) -> Value:
        found = [step for step in evaluation.ladder if (step.attack, step.objective) == (attack, objective)]
        return Value(found[0].success_rate if found else None)

    return pick


def ers_recall(evaluation: Evaluation) -> Value:
    """Clean R@1 on the images of the score, in %."""
    return Value(evaluation.ers.r_at_1 if evaluation.ers else None)


def ers_part(reading: str, part: str) -> Callable[[Evaluation], Value]:
    """The score (``ers``) or one of its ten measurements, ``corrected`` or ``compatible``."""

    def pick(evaluation: Evaluation) -> Value:
        figures: Figures = getattr(evaluation.ers, reading) if evaluation.ers else {}
        return Value(figures.get(part))

    return pick


def _digits(part: str) -> int:
    # A cosine and a distance; all else are percentages.
    return 3 if part in ("tma", "es_d") else 1


def _detected(who: str, figure: str) -> Callable[[Evaluation], Value]:
    def pick(evaluation: Evaluation) -> Value:
        figures: Figures = getattr(evaluation.detector, who) if evaluation.detector else {}
        return Value(figures.get(figure))

    return pick
