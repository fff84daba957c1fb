"""The report as one page that needs nothing else, and its figures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, PackageLoader

from eat_dist.errors import ConfigError
from eat_dist.report.content import Page, Plot, Verdict
from eat_dist.report.groups import disagreements, group_by_seed
from eat_dist.report.reading import Run, read_runs
from eat_dist.report.sections import SECTIONS
from eat_dist.report.studies.page import make_study_page
from eat_dist.report.studies.reading import is_study, read_study
from eat_dist.report.sweeps.page import OnProgress, make_sweep_page
from eat_dist.report.sweeps.reading import is_sweep, read_sweep
from eat_dist.report.wording import NORMS, joined, percent, radius
from eat_dist.storage import Folder

_HEADLINE = (("r_at_1", "R@1"), ("nmi", "NMI"))
_MOST_NAMED = 3


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        page: Path or URL of the page.
        figures: Path or URL of every figure, PNG and SVG; empty where there was nothing to draw.
    """

    page: str
    figures: tuple[str, ...]


def write_report(
    folders: Sequence[Folder], output: str, *, title: str | None = None, on_progress: OnProgress | None = None
) -> ReportFiles:
    """Write the report of one run, of several side by side, of a sweep, or of a study.

    The page ``STEM.html`` holds all it shows. Its drawings are also written to ``STEM_figures/`` as PNG and SVG. The
    same folders, output name and title give the same bytes. Everything is made before anything is written, and the page
    is written last, so a page that is there is whole and its figures are there.

    Args:
        folders: Run folders, or folders of evaluated foreign models, each with an ``evaluation/``; or one folder of a
            sweep or study.
        output: Path or URL of the page, ending in ``.html``; replaced if it is there.
        title: Heading of the page; default: from the names of the runs.
        on_progress: Called with a section's title, the sections done and all of them.

    Raises:
        ConfigError: ``output`` is not an ``.html`` file, or no folder, one twice, or a sweep or study beside
            others was given.
        StorageError: A folder, its evaluation or its trials is missing or damaged, or the report cannot be written.
    """
    folder, name = Folder.of_file(output)
    if not name.endswith(".html") or name == ".html":
        raise ConfigError(f"expected the report's file name to end in .html; got '{output}'")
    page = _page(folders, title=title, on_progress=on_progress)
    stem = name.removesuffix(".html")
    plots = page.plots()
    html = render(page, figures_folder=f"{stem}_figures" if plots else None)
    figures = _write(folder, name, html, plots)
    return ReportFiles(str(folder.child(name)), tuple(str(folder.child(figure)) for figure in figures))


def _page(folders: Sequence[Folder], *, title: str | None, on_progress: OnProgress | None) -> Page:
    whole = [("sweep", folder) for folder in folders if is_sweep(folder)]
    whole += [("study", folder) for folder in folders if is_study(folder)]
    if not whole:
        return make_page(read_runs(folders), title=title, on_progress=on_progress)
    kind, folder = whole[0]
    if len(folders) > 1:
        raise ConfigError(
            f"expected runs, or one {kind} alone; got the {kind} '{folder}' with {len(folders) - 1} other folders. "
            "Report it by itself; its runs are compared with others as runs: give their run folders"
        )
    if kind == "study":
        return make_study_page(read_study(folder), title=title, on_progress=on_progress)
    return make_sweep_page(read_sweep(folder), title=title, on_progress=on_progress)


def make_page(runs: Sequence[Run], *, title: str | None = None, on_progress: OnProgress | None = None) -> Page:
    """Put the page together; nothing is written."""
    groups = group_by_seed(runs)
    sections = []
    for position, section in enumerate(SECTIONS):
        if on_progress is not None:
            on_progress(section.__name__, position, len(SECTIONS))
        sections.append(section(groups))
    if on_progress is not None:
        on_progress("page", len(SECTIONS), len(SECTIONS))
    differing = disagreements(runs)
    warnings = []
    if differing:
        warnings.append(
            f"These runs were not measured alike: they differ in {joined(differing)}. "
            "Their figures may not be compared; no best is marked."
        )
    return Page(
        title=title or _title([group.label for group in groups]),
        subtitle=_subtitle(runs, differing),
        verdicts=[verdict(run) for run in runs],
        warnings=warnings,
        sections=[section for section in sections if section.blocks],
    )


def verdict(run: Run) -> Verdict:
    """What may be said of a run's figures, and the figures."""
    evaluation = run.evaluation
    checks, failed = len(evaluation.sanity), len(evaluation.failed)
    # Behind a defense at inference every protocol has a few; all that there are has the full one alone.
    passed: Literal["pass", "none"] = "pass" if checks and evaluation.protocol == "full" else "none"
    outcome: Literal["pass", "fail", "none"] = "fail" if failed else passed
    run_of_all = f"Only {checks} of the sanity checks were run" if checks else "No sanity checks were run"
    sentences = {
        "none": f"○ {run_of_all} (protocol {evaluation.protocol}): read the attacked figures as upper bounds on "
        "robustness.",
        "fail": f"✗ {failed} of {checks} sanity checks failed: do not quote these figures.",
        "pass": f"✓ All {checks} sanity checks passed: the figures may be quoted.",
    }
    clean, worst = evaluation.ensemble.clean, evaluation.ensemble.worst
    about = [evaluation.defense or "defense not known", evaluation.dataset, f"seed {evaluation.seed}"]
    if evaluation.inference:
        about.insert(1, f"{evaluation.inference.name} at inference")
    if evaluation.target.members:
        about.append(f"{evaluation.target.members} member{'s' * (evaluation.target.members != 1)}")
    return Verdict(
        label=run.label,
        about=" · ".join(about),
        outcome=outcome,
        sentence=sentences[outcome],
        figures=[(name, percent(clean.get(figure)), percent(worst.get(figure))) for figure, name in _HEADLINE],
        shares=[(_share(clean.get(figure)), _share(worst.get(figure))) for figure, _ in _HEADLINE],
    )


def render(page: Page, *, figures_folder: str | None) -> str:
    """The page as HTML, everything from outside escaped.

    Args:
        page: What it shows.
        figures_folder: Where its drawings lie as files; None where there are none.
    """
    environment = Environment(
        loader=PackageLoader("eat_dist.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(page=page, figures_folder=figures_folder)


def _write(folder: Folder, name: str, html: str, plots: Sequence[Plot]) -> list[str]:
    """The figures, then the page. What a failed attempt wrote is taken away, unless figures were there before."""
    beside = f"{name.removesuffix('.html')}_figures"
    files = {f"{beside}/{plot.name}.{form}": getattr(plot, form) for plot in plots for form in ("png", "svg")}
    new = not folder.exists(beside)
    try:
        for file, content in files.items():
            folder.write(file, content)
        folder.write(name, html.encode())
    except BaseException:
        if new:
            folder.delete(beside)
        raise
    return list(files)


def _title(labels: list[str]) -> str:
    return f"Robustness of {joined(labels) if len(labels) <= _MOST_NAMED else f'{len(labels)} models'}"


def _subtitle(runs: Sequence[Run], differing: list[str]) -> str:
    evaluation = runs[0].evaluation
    images = f"{evaluation.images:,} images of {evaluation.classes} unseen classes" if evaluation.images else ""
    parts = {
        "dataset": evaluation.dataset,
        "test images": images,
        "ε": f"{NORMS.get(evaluation.norm, evaluation.norm)} ε = {radius(evaluation.epsilon, evaluation.norm)}",
        "protocol": f"protocol {evaluation.protocol}",
    }
    return " · ".join(text for aspect, text in parts.items() if text and aspect not in differing)


def _share(value: float | None) -> float:
    return 0.0 if value is None else min(max(value, 0.0), 1.0)
