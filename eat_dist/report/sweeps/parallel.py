"""Parallel coordinates, lying: an axis a setting from top to bottom, so that it fits a phone and keys are readable."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from eat_dist.report.drawing import INK, MUTED, SURFACE, Drawing, Margins
from eat_dist.report.sweeps.looks import legend, strokes
from eat_dist.report.sweeps.ranking import best, front, score
from eat_dist.report.sweeps.reading import Objective, Sweep, Trial
from eat_dist.report.sweeps.space import Parameter, round_values, spaced
from eat_dist.report.sweeps.wording import axis_label, in_percent, objective_name, settings_text
from eat_dist.report.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where a line passes an axis that does not apply to its trial.
_ASIDE = -0.13
# Characters that fit below an axis in one row.
_ROOM = 36


class _Rail(NamedTuple):
    """One axis: its name, its ticks, and where each trial crosses it (None: not at all)."""

    label: str
    ticks: list[tuple[float, str]]
    crossings: dict[str, float | None]


def parallel(sweep: Sweep) -> Drawing:
    """A line a trial through its settings to its score; what is stopped is thin, what is best on top."""
    shown = strokes(sweep)
    trials = [t for t in sweep.trials if all(score(t, objective) is not None for objective in sweep.objectives)]
    rails = [_of_setting(p, trials) for p in sweep.parameters] + [_of_score(o, sweep, trials) for o in sweep.objectives]
    aside = any(crossing is None for rail in rails for crossing in rail.crossings.values())

    def paint(axes: Axes) -> None:
        for trial in trials:
            stroke = shown[trial.id]
            crossings = [rail.crossings[trial.id] for rail in rails]
            axes.plot(
                [_ASIDE if crossing is None else crossing for crossing in crossings],
                range(len(rails)),
                color=stroke.look.colour,
                linestyle=stroke.look.dash,
                linewidth=stroke.width,
                alpha=stroke.alpha,
                zorder=2 + 0.1 * stroke.rank,
                marker=stroke.look.marker if stroke.rank >= 20 else "",
                markersize=8 if stroke.look.marker == "*" else 5,
                clip_on=False,
            )
        for row, rail in enumerate(rails):
            _rail(axes, rail, row, aside=any(crossing is None for crossing in rail.crossings.values()))
        axes.set_xlim(_ASIDE - 0.03 if aside else -0.03, 1.03)
        axes.set_ylim(len(rails) - 0.45, -0.45)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)

    names = " and ".join(objective_name(objective) for objective in sweep.objectives)
    caption = f"{counted(len(trials), 'trial')}: settings, and below them {names}"
    alt = f"Parallel coordinates of {caption}."
    if (winner := best(sweep)) is not None:
        alt += f" The best, trial {winner.number}: {settings_text(winner, sweep)}."
    elif chosen := front(sweep):
        alt += f" On the front: {', '.join(f'trial {t.number} ({settings_text(t, sweep)})' for t in chosen)}."
    size = (3.5, 0.3 + 0.62 * len(rails))
    return Drawing("parallel", paint, caption, alt, size, Margins(0.14, 0.14, 0.05, 0.05), legend(sweep))


def _rail(axes: Axes, rail: _Rail, row: int, *, aside: bool) -> None:
    # Lines cross what is written: it stands on a patch of the page's own colour.
    patch = {"facecolor": SURFACE, "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    axes.plot([0, 1], [row, row], color=INK, linewidth=1, zorder=5, clip_on=False)
    axes.text(0, row - 0.1, rail.label, ha="left", va="bottom", fontsize=8.5, fontweight="bold", zorder=7, bbox=patch)
    labels = [label for _, label in rail.ticks]
    rows = 1 if sum(len(label) + 2 for label in labels) <= _ROOM else 2
    most = max(rows * _ROOM // max(len(labels), 1) - 1, 3)
    for index, (place, label) in enumerate(rail.ticks):
        axes.plot([place, place], [row - 0.05, row + 0.05], color=INK, linewidth=1, zorder=5, clip_on=False)
        text = label if len(label) <= most else f"{label[: most - 1]}…"
        side = "left" if place < 0.02 else "right" if place > 0.98 else "center"
        down = 0.09 + 0.17 * (index % rows)
        axes.text(place, row + down, text, ha=side, va="top", fontsize=7.5, zorder=7, bbox=patch)
    if aside:
        axes.text(_ASIDE, row + 0.09, "not used", ha="left", va="top", fontsize=7, color=MUTED, zorder=7, bbox=patch)


def _of_setting(parameter: Parameter, trials: list[Trial]) -> _Rail:
    crossings = {
        trial.id: parameter.position(trial.settings[parameter.key]) if parameter.key in trial.settings else None
        for trial in trials
    }
    log = " (log)" if parameter.scale == "log" else ""
    return _Rail(f"{parameter.key}{log}", parameter.ticks(), crossings)


def _of_score(objective: Objective, sweep: Sweep, trials: list[Trial]) -> _Rail:
    scale = 100 if in_percent(sweep) else 1
    values = {trial.id: scale * (score(trial, objective) or 0.0) for trial in trials}
    low, high = min(values.values()), max(values.values())
    if low == high:
        return _Rail(axis_label(objective, sweep), [(0.5, f"{low:.4g}")], dict.fromkeys(values, 0.5))
    ticks = [low, high, *round_values(low, high)]
    axis = Parameter(objective.name, "linear", low, high)
    return _Rail(
        axis_label(objective, sweep),
        spaced([(axis.position(value), f"{value:.3g}") for value in ticks]),
        {trial: axis.position(value) for trial, value in values.items()},
    )
