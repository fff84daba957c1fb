"""The drawings of a sweep. What can be seen in one is also said in its alt text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from eat_dist.metrics.pareto import not_dominated
from eat_dist.report.drawing import INK, PALETTE, RULE, Drawing, Look, Margins
from eat_dist.report.sweeps.importance import Analysis
from eat_dist.report.sweeps.looks import BEST, FRONT, OTHER, legend, strokes
from eat_dist.report.sweeps.parallel import parallel
from eat_dist.report.sweeps.ranking import best, figure, finished, score
from eat_dist.report.sweeps.reading import Objective, Sweep, Trial
from eat_dist.report.sweeps.space import Parameter
from eat_dist.report.sweeps.wording import axis_label, in_percent, objective_name, scored
from eat_dist.report.wording import counted, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = (3.9, 2.7)
_CHANCE = Look(PALETTE[1], "", "|")
# More numbers than this beside the front's points would hide them.
_MOST_NAMED = 12
_Value = Callable[[Trial], float | None]


def drawings(sweep: Sweep, found: Sequence[Analysis]) -> dict[str, list[Drawing]]:
    """Everything there is to draw, by section; a section without enough results has none."""
    return {
        "parallel": [parallel(sweep)] if any(_measured(sweep)) else [],
        "front": [pareto(sweep)] if _has_front(sweep) else [],
        "course": [course(sweep, objective) for objective in sweep.objectives] if any(_measured(sweep)) else [],
        "importance": [importance(sweep, analysis) for analysis in found if analysis.found],
        "slices": [
            slice_of(sweep, parameter, objective)
            for objective in sweep.objectives
            for parameter in sweep.parameters
            if any(parameter.key in trial.settings for trial in _measured(sweep))
        ],
    }


def course(sweep: Sweep, objective: Objective) -> Drawing:
    """The score of every trial against the epoch: who was stopped where."""
    shown = strokes(sweep)
    scale = 100 if in_percent(sweep) else 1
    lines = {
        trial.id: [
            (one.epoch, scale * value)
            for one in trial.results
            if (value := one.objectives.get(objective.name)) is not None
        ]
        for trial in _measured(sweep)
    }

    def paint(axes: Axes) -> None:
        for trial in _measured(sweep):
            points = sorted(lines[trial.id])
            if not points:
                continue
            stroke = shown[trial.id]
            look = stroke.look
            x, y = zip(*points, strict=True)
            axes.plot(
                x,
                y,
                color=look.colour,
                linestyle=look.dash,
                linewidth=stroke.width,
                alpha=stroke.alpha,
                zorder=2 + 0.1 * stroke.rank,
            )
            size = 9 if look.marker == "*" else 4
            axes.plot(
                x[-1:],
                y[-1:],
                color=look.colour,
                marker=look.marker,
                markersize=size,
                linestyle="",
                alpha=stroke.alpha,
                zorder=3 + 0.1 * stroke.rank,
                clip_on=False,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(axis_label(objective, sweep))
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.locator_params(axis="y", nbins=5)

    stopped = [
        f"trial {trial.number} {trial.status.lower()} after epoch {trial.results[-1].epoch}"
        for trial in _measured(sweep)
        if trial.status != "FINISHED"
    ]
    gist = f"{counted(len(finished(sweep)), 'trial')} to the end; {'; '.join(stopped) or 'none was stopped'}"
    name = f"course-{slug(objective.name)}"
    caption = f"{objective_name(objective)} of every trial after each epoch"
    return Drawing(name, paint, caption, f"{caption}: {gist}.", WIDE, legend=legend(sweep))


def pareto(sweep: Sweep) -> Drawing:
    """Clean R@1 against attacked NMI, or the two objectives: the finished trials and their front."""
    (x_name, x, x_way), (y_name, y, y_way) = pareto_axes(sweep)
    # A pruned trial was measured earlier: it does not compete, and would press the others into a corner.
    ended = [trial for trial in finished(sweep) if x(trial) is not None and y(trial) is not None]
    points = {trial.id: (x(trial) or 0.0, y(trial) or 0.0) for trial in ended}
    on_front = [ended[index] for index in not_dominated([points[trial.id] for trial in ended], [x_way, y_way])]
    on_front.sort(key=lambda trial: points[trial.id])
    winner = best(sweep)

    def paint(axes: Axes) -> None:
        for trials, look, size in (
            ([trial for trial in ended if trial not in on_front], OTHER, 4.5),
            (on_front, FRONT, 6),
            ([trial for trial in ended if winner is not None and trial.id == winner.id], BEST, 11),
        ):
            at = [points[trial.id] for trial in trials]
            axes.plot(
                [one for one, _ in at],
                [other for _, other in at],
                color=look.colour,
                linestyle="",
                marker=look.marker,
                markersize=size,
                clip_on=False,
            )
        # The border of what is beaten: between two trials of the front nothing better is known.
        steps = "steps-pre" if x_way == "max" else "steps-post"
        line = [points[trial.id] for trial in on_front]
        x_line, y_line = [one for one, _ in line], [other for _, other in line]
        axes.plot(x_line, y_line, color=FRONT.colour, linewidth=1.2, drawstyle=steps)
        for trial in on_front[:_MOST_NAMED]:
            axes.annotate(
                str(trial.number),
                points[trial.id],
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7.5,
                color=INK,
                annotation_clip=False,
            )
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        axes.margins(0.08)
        axes.locator_params(nbins=5)

    told = ", ".join(f"trial {t.number} ({points[t.id][0]:.3g}, {points[t.id][1]:.3g})" for t in on_front)
    caption = f"{y_name} against {x_name}: {counted(len(on_front), 'trial')} of {len(ended)} on the front"
    entries = [("on the front", FRONT)]
    entries += [(f"best: trial {winner.number}", BEST)] if winner is not None else []
    entries += [("finished", OTHER)] if len(on_front) < len(ended) else []
    return Drawing("front", paint, caption, f"{caption}: {told}.", WIDE, legend=entries)


def pareto_axes(sweep: Sweep) -> list[tuple[str, _Value, str]]:
    """Label, value and better direction of the two axes."""
    if len(sweep.objectives) > 1:
        scale = 100 if in_percent(sweep) else 1
        return [(axis_label(o, sweep), _of_objective(o, scale), o.direction) for o in sweep.objectives]
    return [
        ("clean R@1, %", _of_figure("clean/r_at_1"), "max"),
        ("attacked NMI, %", _of_figure("worst/nmi"), "max"),
    ]


def importance(sweep: Sweep, analysis: Analysis) -> Drawing:
    """A bar a setting, and up to where chance would bring it."""
    found = analysis.found
    when = "at the end" if analysis.epoch is None else f"after epoch {analysis.epoch}"
    which = "finished trials" if analysis.epoch is None else "finished and pruned trials"

    def paint(axes: Axes) -> None:
        for row, entry in enumerate(found):
            filled = PALETTE[0] if entry.matters else "none"
            axes.barh(row, 100 * entry.share, height=0.34, color=filled, edgecolor=PALETTE[0], linewidth=1)
            axes.plot([100 * entry.chance] * 2, [row - 0.24, row + 0.24], color=PALETTE[1], linewidth=2)
            among = f" ({entry.trials} trials)" if entry.trials < analysis.trials else ""
            axes.text(0, row - 0.27, f"{entry.parameter.key}{among}", va="bottom", ha="left", fontsize=8)
        axes.set_ylim(len(found) - 0.5, -0.75)
        axes.set_xlim(0, 100)
        axes.set_yticks([])
        axes.spines["left"].set_color(RULE)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"% of the variance of {objective_name(analysis.objective)}")

    told = "; ".join(
        f"{entry.parameter.key} {100 * entry.share:.0f} %, by chance up to {100 * entry.chance:.0f} %"
        for entry in found
    )
    caption = f"{objective_name(analysis.objective)} {when}, {analysis.trials} {which}"
    name = f"importance-{slug(analysis.objective.name)}-{slug(when)}"
    entries = [("more than by chance", OTHER._replace(dash="", marker="s")), ("chance alone, up to here", _CHANCE)]
    size = (3.9, 0.7 + 0.42 * len(found))
    return Drawing(name, paint, caption, f"{caption}: {told}.", size, Margins(left=0.12), entries)


def slice_of(sweep: Sweep, parameter: Parameter, objective: Objective) -> Drawing:
    """The score of every trial against one setting."""
    shown = strokes(sweep)
    scale = 100 if in_percent(sweep) else 1
    points = [
        (parameter.position(trial.settings[parameter.key]), scale * value, shown[trial.id])
        for trial in _measured(sweep)
        if parameter.key in trial.settings and (value := score(trial, objective)) is not None
    ]

    def paint(axes: Axes) -> None:
        for x, y, stroke in points:
            look = stroke.look
            size = {"*": 10, "x": 4}.get(look.marker, 5)
            axes.plot(
                [x],
                [y],
                color=look.colour,
                marker=look.marker,
                markersize=size,
                linestyle="",
                alpha=stroke.alpha,
                zorder=2 + 0.1 * stroke.rank,
                clip_on=False,
            )
        ticks = parameter.ticks()
        axes.set_xticks([place for place, _ in ticks], shortened([label for _, label in ticks], room=30))
        axes.set_xlim(-0.06, 1.06)
        axes.set_ylabel(axis_label(objective, sweep))
        axes.locator_params(axis="y", nbins=5)

    kind = {"log": ", on a logarithmic axis", "category": ""}.get(parameter.scale, "")
    told = ""
    if finished(sweep) and (winner := best(sweep)) is not None and parameter.key in winner.settings:
        told = f" The best trial has {scored(score(winner, objective), sweep)}."
    name = f"slice-{slug(objective.name)}-{slug(parameter.key)}"
    alt = f"{objective_name(objective)} against {parameter.key}{kind}, {counted(len(points), 'trial')}.{told}"
    return Drawing(name, paint, parameter.key, alt, legend=legend(sweep))


def shortened(labels: Sequence[str], *, room: int) -> list[str]:
    """Labels cut so that together they take at most ``room`` characters, when they do not fit as they are."""
    if sum(len(label) + 1 for label in labels) <= room:
        return list(labels)
    most = max(room // len(labels) - 1, 2)
    return [label if len(label) <= most else f"{label[: most - 1]}…" for label in labels]


def _measured(sweep: Sweep) -> list[Trial]:
    """The trials with a value of an objective, in the order they are drawn."""
    return [trial for trial in sweep.trials if any(score(trial, one) is not None for one in sweep.objectives)]


def _has_front(sweep: Sweep) -> bool:
    axes = pareto_axes(sweep)
    return any(all(value(trial) is not None for _, value, _ in axes) for trial in finished(sweep))


def _of_objective(objective: Objective, scale: float) -> _Value:
    def value(trial: Trial) -> float | None:
        found = score(trial, objective)
        return None if found is None else scale * found

    return value


def _of_figure(name: str) -> _Value:
    def value(trial: Trial) -> float | None:
        found = figure(trial, name)
        return None if found is None else 100 * found

    return value
