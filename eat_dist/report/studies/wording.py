"""What a study's tables say in words, the same in Markdown and on the page."""

from __future__ import annotations

from eat_dist.report.groups import Value
from eat_dist.report.studies.comparison import Comparison, Difference, Row
from eat_dist.report.studies.reading import Study
from eat_dist.report.wording import MISSING, NORMS, counted, joined, number, percent, radius

NEAR_ENOUGH = 0.05
"""A row whose passes miss those of the budget by more, as a share, is named."""

STATUS = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "FINISHED": "finished",
    "FAILED": "failed",
    "INTERRUPTED": "interrupted",
}


def measured_with(comparison: Comparison) -> str:
    """``protocol standard, L∞ ε = 0.1, 2120 images of 106 unseen classes``; empty before any run is finished."""
    measured = next((run.measured for row in comparison.rows for run in row.runs if run.measured), None)
    if measured is None:
        return ""
    norm, epsilon = measured.get("norm", ""), measured.get("epsilon", "")
    return (
        f"protocol {measured.get('protocol')}, {NORMS.get(norm, norm)} ε = {radius(float(epsilon or 'nan'), norm)}, "
        f"{measured.get('images')} images of {measured.get('classes')} unseen classes"
    )


def notes(study: Study, comparison: Comparison) -> list[str]:
    """How to read the tables, and what is missing in them."""
    several = any(len(row.runs) > 1 for row in comparison.rows)
    found = [
        "Attacked R@1: images that survive every attack; attacked NMI: under the attack that is worst for it.",
        "Mean ± standard deviation over the seeds. Bold: first, and ahead of the second row by more than the standard "
        "deviation of their differences with the same seed. Chance alone does that, too: of three seeds of two equal "
        "rows about every fifth time, of eight equal rows every twelfth."
        if several
        else "One seed: there is no spread, so nobody can tell who is ahead, and no best is marked.",
        "Passes: forward-backward passes over a batch, of all members, as counted while training; those of a wider "
        "network cost more. Seconds: wall clock of the training iterations, whatever else the machine did.",
    ]
    if study.budget_row is not None:
        found.append(_equal_compute(comparison, study.budget_row))
    if collapsed := [row.label for row in comparison.shown if any(run.withstands_nothing for run in row.runs)]:
        found.append(
            f"Training that withstood nothing, its own attack misplaced images to the end as often as chance would: "
            f"{joined(collapsed)}. Other settings may do these rows more justice."
        )
    if comparison.unquotable:
        rows = joined([f"{row.label} ({joined(list(row.failed_checks))})" for row in comparison.unquotable])
        found.append(
            f"✗: a run failed sanity checks; do not quote {rows}. Such a row is never first, and no other is compared "
            f"with it."
        )
    if comparison.unlike:
        found.append(
            f"Not measured alike: the runs differ in {joined(list(comparison.unlike))}. Their figures may not be "
            f"compared; no best is marked."
        )
    left_out = [row for row in comparison.shown if row.quotable and row not in comparison.compared]
    partial = [f"{row.label} ({seeds(row)})" for row in left_out]
    if partial and not comparison.unlike:
        found.append(f"Without all seeds, so others are not compared with them: {joined(partial)}.")
    if unfinished := [row.label for row in comparison.rows if not row.runs]:
        found.append(f"No finished run: {joined(unfinished)}.")
    return found


def _equal_compute(comparison: Comparison, budget_row: str) -> str:
    """Whose passes the rows have, and which have not."""
    text = f"Equal compute: the passes of '{budget_row}', as nearly as whole epochs allow"
    budget = next((row.passes.mean for row in comparison.shown if row.label == budget_row), None)
    shares = {row.label: row.passes.mean / budget for row in comparison.shown if budget and row.passes.mean}
    unequal = [f"{label} ({share:.2f} ×)" for label, share in shares.items() if abs(share - 1) > NEAR_ENOUGH]
    return f"{text}; not so: {joined(unequal)}." if unequal else f"{text}."


def unquotable(study: Study) -> list[str]:
    """The runs whose evaluation failed a sanity check."""
    return [f"{run.name} ({joined(run.failed_checks)})" for run in study.runs if run.failed_checks]


def heading(row: Row) -> str:
    """A row's name, marked where it may not be quoted, as in the report of runs."""
    return row.label if row.quotable else f"✗ {row.label}"


def seeds(row: Row) -> str:
    """``3``, or ``2 of 3``."""
    return str(row.planned) if len(row.runs) == row.planned else f"{len(row.runs)} of {row.planned}"


def grouped(value: Value) -> str:
    """A large number, rounded: ``27,405``; a range of several seeds is not written."""
    return MISSING if value.mean is None else f"{value.mean:,.0f}"


def told(value: Value) -> str:
    """A share in % with its spread: ``45.2 ± 0.4``."""
    return percent(value.mean) + ("" if value.std is None else f" ± {percent(value.std)}")


def signed(value: float | None, *, digits: int) -> str:
    """``+0.020``, ``−0.013``."""
    text = number(value, digits=digits)
    return f"+{text}" if value is not None and value >= 0 and text != MISSING else text


def against(comparison: Comparison, figure: str) -> str:
    """Whom all rows but the first are compared with in a figure."""
    first = comparison.first(figure)
    return "" if first is None else first.label


def names_its_own(comparison: Comparison, row: Row, found: Difference, figure: str) -> bool:
    """Whether a row is compared with another one than most are: the first with the second."""
    return found.other != against(comparison, figure)


def outcome(study: Study) -> str:
    """``12 runs: 11 finished, 1 failed``."""
    parts = [(len(study.with_status(status)), word) for status, word in STATUS.items()]  # type: ignore[arg-type]
    told = ", ".join(f"{count} {word}" for count, word in parts if count)
    return f"{counted(len(study.runs), 'run')}: {told}"
