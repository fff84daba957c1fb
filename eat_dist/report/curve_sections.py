"""The sections of curves: figures against ε, and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eat_dist.report import bench_tables, tables
from eat_dist.report.cells import scaled
from eat_dist.report.content import Block, Fold, Plots, Section
from eat_dist.report.drawing import look
from eat_dist.report.groups import Group, Value, clean, runs_of
from eat_dist.report.parts import absent, legend
from eat_dist.report.plots import Axis, Series, line_plot, series
from eat_dist.report.schema import CurvePoint, Evaluation
from eat_dist.report.training import course
from eat_dist.report.wording import NORMS, attack_name, joined, objective_name, slug

# Column → what it is called, and what it is multiplied with.
_STATISTICS = {
    "clean_loss": ("clean loss", 1),
    "adversarial_loss": ("adversarial loss", 1),
    "fooled_rate": ("fooled rate, %", 100),
    "shared_vulnerability": ("shared vulnerability, %", 100),
}


def curves(groups: Sequence[Group]) -> Section:
    """R@1 and NMI against ε, a panel an objective."""
    having = [run for run in runs_of(groups) if run.evaluation.curves]
    points = [point for run in having for point in run.evaluation.curves]
    norms = {NORMS.get(run.evaluation.norm, run.evaluation.norm) for run in having}
    x = Axis(f"ε ({' or '.join(sorted(norms))})", 0, max((point.epsilon for point in points), default=1))
    blocks: list[Block] = []
    for figure, title in (("r_at_1", "R@1"), ("nmi", "NMI")):
        plots = []
        for objective in dict.fromkeys(point.objective for point in points):
            at = [point for point in points if point.objective == objective]
            if lines := _lines(groups, at, figure):
                # At ε = 0 there is no attack to name.
                attacks = dict.fromkeys(attack_name(point.attack) for point in at if point.epsilon > 0)
                caption = f"{objective_name(objective)} ({joined(list(attacks))})"
                name = f"curve-{slug(figure)}-{slug(objective)}"
                plots.append(line_plot(name, lines, caption=caption, x=x, y=Axis(f"{title}, %", 0, 100)))
        if plots:
            blocks.append(Plots(f"{title} against ε", plots, legend(groups, place=f"curve-{slug(figure)}")))
    blocks += [Fold(f"{run.label}: the numbers", [tables.curves(run)]) for run in having]
    blocks += absent(groups, lambda run: bool(run.evaluation.curves), "no curve against ε was measured")
    lead = (
        "A sound attack grows stronger with ε and breaks any model in the end: distrust a curve that stays up. "
        "Bands are one standard deviation."
    )
    if any(tables.point_value(point, "nmi").spared for point in points):
        lead += " Of few classes NMI is the lower one of every image attacked and of one image in C left as it is."
    return Section("curves", "Accuracy against ε", lead, blocks)


def fraction_plots(groups: Sequence[Group]) -> Plots:
    """NMI against the share of the images that are attacked, a panel an objective; at 0 the clean NMI."""
    rows = [row for run in runs_of(groups) for row in bench_tables.fraction_rows(run.evaluation)]
    fractions = sorted({row.fraction for row in rows})
    plots = []
    for objective in dict.fromkeys(row.objective for row in rows):
        lines = []
        for index, group in enumerate(groups):
            measured = [(100 * part, group.value(_fraction(objective, part))) for part in fractions]
            if any(value.mean is not None for _, value in measured):
                points = [(0.0, group.value(clean("nmi"))), *measured]
                line = series(group.label, look(index), [(x, scaled(value, 100)) for x, value in points])
                lines += [line] if line else []
        if lines:
            x, y = Axis("images attacked, %", 0, 100), Axis("NMI, %", 0, 100)
            name = f"fractions-{slug(objective)}"
            plots.append(line_plot(name, lines, caption=objective_name(objective), x=x, y=y))
    return Plots("NMI against the share of images attacked", plots, legend(groups, place="fractions"))


def training(groups: Sequence[Group]) -> Section:
    """Losses, fooled rate and shared vulnerability over training."""
    plots = []
    for column, (title, scale) in _STATISTICS.items():
        lines = []
        for index, group in enumerate(groups):
            went = course([run.history for run in group.runs], column)
            if went is not None:
                parts = [(scale * part).tolist() for part in (went.mean, went.low, went.high)]
                lines.append(Series(group.label, look(index), went.x.tolist(), *parts))
        if lines:
            x, y = Axis("iteration", 0), Axis(title, 0, 100 if scale == 100 else None)
            caption = title.removesuffix(", %")
            plots.append(line_plot(f"training-{slug(column)}", lines, caption=caption, x=x, y=y, markers=False))
    blocks: list[Block] = [Plots("", plots, legend(groups, place="training"))] if plots else []
    blocks += absent(groups, lambda run: run.history.num_rows > 0, "there are no training statistics")
    lead = (
        "Means over stretches of iterations and over members; the band spans the members. There are adversarial "
        "figures only where the defense made adversarial images."
    )
    return Section("training", "Training", lead, blocks)


def _lines(groups: Sequence[Group], points: Sequence[CurvePoint], figure: str) -> list[Series]:
    """A line for each entry that has one of the points (all of one objective), in the look of its place among all."""
    epsilons = sorted({point.epsilon for point in points})
    lines = []
    for index, group in enumerate(groups):
        values = [(epsilon, group.value(_point(points[0].objective, epsilon, figure))) for epsilon in epsilons]
        line = series(group.label, look(index), [(epsilon, scaled(value, 100)) for epsilon, value in values])
        lines += [line] if line else []
    return lines


def _fraction(objective: str, fraction: float) -> Callable[[Evaluation], Value]:
    def pick(evaluation: Evaluation) -> Value:
        for row in bench_tables.fraction_rows(evaluation):
            if (row.objective, row.fraction) == (objective, fraction):
                return Value(row.nmi, row.nmi_std)
        return Value(None)

    return pick


def _point(objective: str, epsilon: float, figure: str) -> Callable[[Evaluation], Value]:
    def pick(evaluation: Evaluation) -> Value:
        for point in evaluation.curves:
            if (point.objective, point.epsilon) == (objective, epsilon):
                return tables.point_value(point, figure)
        return Value(None)

    return pick
