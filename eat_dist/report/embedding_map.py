"""Clean and attacked embeddings in one plane: t-SNE (van der Maaten & Hinton 2008) through openTSNE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eat_dist.report.content import Plot, Plots
from eat_dist.report.drawing import MARKERS, MUTED, PALETTE, Look, Margins, key, plot
from eat_dist.report.reading import Showcase
from eat_dist.report.wording import slug, split_attack
from eat_dist.seeding import derive_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# As many as look and marker tell apart; the classes beyond are drawn as small grey dots.
NAMED_CLASSES = 6
# A point is an element of the page: more would make it heavy and the map no clearer.
MOST_IMAGES = 500
_FEWEST_IMAGES = 5
Points = npt.NDArray[np.floating[Any]]


def chosen(labels: npt.NDArray[np.int64], named: Sequence[int], *, seed: int) -> npt.NDArray[np.int64]:
    """Which images are drawn, in their order: those of the named classes first, then a seeded sample of the others.

    Args:
        labels: [S].
        named: Classes that have a look of their own.
        seed: Of the sample.

    Returns:
        At most ``MOST_IMAGES`` indices, ascending.
    """
    draw = np.random.default_rng(derive_seed(seed, "report", "map"))
    order = draw.permutation(len(labels))
    first = np.isin(labels[order], named)
    return np.sort(np.concatenate([order[first], order[~first]])[:MOST_IMAGES])


def plane(clean: Points, attacked: Points, *, seed: int) -> tuple[Points, Points]:
    """Lay clean and attacked embeddings out together, so that both are in the same frame.

    Exact neighbours, Barnes-Hut gradient, PCA start and one thread: the same input gives the same points.

    Args:
        clean: [S, D].
        attacked: [S, D], the same images.
        seed: Of the layout.

    Returns:
        Two arrays [S, 2]; the axes have no unit.
    """
    from openTSNE import TSNE  # noqa: PLC0415  (a second, once a report)

    together = np.concatenate([clean, attacked]).astype(np.float64)
    layout = TSNE(
        perplexity=min(30.0, (len(together) - 1) / 3),
        initialization="pca",
        neighbors="exact",
        negative_gradient_method="bh",
        n_jobs=1,
        random_state=derive_seed(seed, "report", "t-SNE") % 2**32,
    ).fit(together)
    points = np.asarray(layout)
    return points[: len(clean)], points[len(clean) :]


def looks(labels: Sequence[int]) -> dict[int, Look]:
    """The look of each class that has one of its own: the ``NAMED_CLASSES`` with most images, then lowest labels."""
    frequent = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))[:NAMED_CLASSES]
    ordered = sorted(label for label, _ in frequent)
    return {label: Look(PALETTE[index], "", MARKERS[index]) for index, label in enumerate(ordered)}


def embedding_map(showcase: Showcase, *, label: str, place: int, seed: int) -> Plots | None:
    """The clean and the attacked map of one run, in the same frame.

    Args:
        showcase: Embeddings and labels.
        label: The run's.
        place: Of the run on the page, from 0; tells its files from those of another run of like name.
        seed: Of the sample and the layout.

    Returns:
        None where there are too few images to lay out.
    """
    shown = looks(showcase.labels.tolist())
    rows = chosen(showcase.labels, list(shown), seed=seed)
    if len(rows) < _FEWEST_IMAGES:
        return None
    labels = showcase.labels[rows]
    clean, attacked = plane(showcase.clean_embeddings[rows], showcase.attacked_embeddings[rows], seed=seed)
    everything = np.concatenate([clean, attacked])
    margin = 0.04 * np.ptp(everything, axis=0)
    (left, low), (right, high) = everything.min(axis=0) - margin, everything.max(axis=0) + margin
    legend = [(class_name(showcase, named), entry) for named, entry in shown.items()]

    def panel(which: str, points: Points) -> Plot:
        def paint(axes: Axes) -> None:
            others = ~np.isin(labels, list(shown))
            axes.plot(*points[others].T, color=MUTED, alpha=0.45, linestyle="", marker=".", markersize=2.5)
            for named, entry in shown.items():
                x, y = points[labels == named].T
                axes.plot(x, y, color=entry.colour, alpha=0.85, linestyle="", marker=entry.marker, markersize=4)
            axes.set(xlim=(left, right), ylim=(low, high), xticks=[], yticks=[])
            axes.grid(visible=False)
            axes.spines[:].set_visible(True)

        agree = 100 * nearest_agree(points, labels)
        caption = f"{which}: {agree:.0f} % lie nearest to one of their class"
        alt = f"Map of {len(labels)} {which} embeddings of {len(set(labels.tolist()))} classes of {label}; {caption}."
        name = f"map-{place + 1}-{slug(label)}-{which}"
        frame = Margins(0.05, 0.05, 0.05, 0.05)
        return plot(name, paint, caption=caption, alt=alt, size=(3.4, 3.0), margins=frame, legend=legend)

    attack, objective, _ = split_attack(showcase.attack)
    keys = [key(named, entry, place=f"map-{place}-{index}", line=False) for index, (named, entry) in enumerate(legend)]
    return Plots(
        f"{label}: {attack} on {objective}", [panel("clean", clean), panel("attacked", attacked)], keys, wide=True
    )


def class_name(showcase: Showcase, label: int) -> str:
    """The class's own name, or its number where it has none."""
    return showcase.classes[label] if 0 <= label < len(showcase.classes) else f"class {label}"


def nearest_agree(points: Points, labels: npt.NDArray[np.int64]) -> float:
    """Share of the points whose nearest other point is of their class: what a map shows, as a number in [0, 1].

    Args:
        points: [S, 2] with S ≥ 2.
        labels: [S].
    """
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(axis=1)] == labels).mean())
