"""What the user sees: progress bars on a terminal, plain lines elsewhere, and the closing table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from eat_dist.credentials import redacted
from eat_dist.metrics.spared import counted_figure
from eat_dist.robustness.statistics import EnsembleStatistics
from eat_dist.schedule import Schedule

# Plain output (a job's log) gets a line at least this often, in seconds, and one at every epoch's end.
_PLAIN_EVERY_S = 30.0


class Console:
    """Standard output for what a run says, standard error for warnings."""

    def __init__(self) -> None:
        self.out = RichConsole(highlight=False, soft_wrap=True)
        self.error = RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line of output."""
        self.out.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that starts with ``warning:``."""
        self.error.print(f"warning: {text}", style="yellow" if self.error.is_terminal else "", markup=False)

    def mlflow(self, uri: str | None, run_id: str | None) -> None:
        """Where MLflow's record of it is, without a password; nothing where there is none."""
        if run_id is None or uri is None:
            return
        self.say(f"MLflow run   {run_id}")
        store = redacted(uri)
        self.say(f"open MLflow  {store if uri.startswith('http') else f'mlflow ui --backend-store-uri {store}'}")

    @contextmanager
    def training(self, schedule: Schedule) -> Iterator[Callable[[EnsembleStatistics], None]]:
        """Show training: yields what is to be called after every iteration."""
        if not self.out.is_terminal:
            yield _PlainTraining(schedule, self.say)
            return
        with self._bar() as progress:
            task = progress.add_task("starting the members", total=schedule.iterations)

            def show(ensemble: EnsembleStatistics) -> None:
                text = _describe(ensemble, schedule)
                progress.update(task, completed=ensemble.iteration, description=text)

            yield show

    @contextmanager
    def preparing(self) -> Iterator[Callable[[int, int], None]]:
        """Show shards being prepared: yields ``progress(done, total)``, in images."""
        if not self.out.is_terminal:
            said = -1

            def tell(done: int, total: int) -> None:
                nonlocal said
                tenth = 10 * done // max(total, 1)
                if tenth > said:
                    said = tenth
                    self.say(f"preparing shards: {done} of {total} images")

            yield tell
            return
        with self._bar() as progress:
            task = progress.add_task("preparing shards", total=None, visible=False)
            yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)

    @contextmanager
    def working(self, verb: str) -> Iterator[Callable[[str, float, float], None]]:
        """Show long work of several parts: yields ``progress(part, done, total)``, in any unit of work."""
        if not self.out.is_terminal:
            said: set[str] = set()
            begin = time.monotonic()

            def tell(part: str, done: float, total: float) -> None:
                if part in said:
                    return
                said.add(part)
                left = (time.monotonic() - begin) * (total - done) / done if done else None
                estimate = "" if left is None else f", about {_duration(left)} left"
                self.say(f"{verb} {part} ({100 * done / max(total, 1):.0f} % done{estimate})")

            yield tell
            return
        with self._bar() as progress:
            task = progress.add_task(verb, total=None)

            def show(part: str, done: float, total: float) -> None:
                progress.update(task, completed=done, total=total, description=f"{verb} {part}")

            yield show

    def summary(self, summary: dict[str, Any]) -> None:
        """The closing table of a run, if it was evaluated."""
        if "clean" in summary:
            about = summary.get("inference")  # runs of an earlier version say nothing of it
            name = _behind(summary["defense"], about)
            self._figures(name, summary["dataset"], summary["evaluation"], summary, summary["members"])
            self._inference(about)

    def evaluation(self, results: dict[str, Any]) -> None:
        """The closing table of an evaluation, the score beside the clean R@1, and the verdict."""
        name = _behind(results["defense"] or results["target"]["name"], results["inference"])
        whole = "model" if results["target"]["kind"] == "module" else "ensemble"
        self._figures(name, results["dataset"], results, results["ensemble"], results["members"], whole=whole)
        self._inference(results["inference"])
        if results["ers"] is not None:
            score = results["ers"]
            self.say(
                f"ERS {score['corrected']['ers']:.1f} (as published: {score['compatible']['ers']:.1f}) at clean R@1 "
                f"{score['r_at_1']:.1f} % on {score['images']} images"
            )
        checks = results["sanity"]
        for check in checks:
            sign = "passed" if check["passed"] else "FAILED"
            line = f"sanity check {sign}: {check['claim']}: {check['measured']} (expected {check['threshold']})"
            self.out.print(line, markup=False, style="" if check["passed"] else "bold red")
        if checks:
            failed = sum(not check["passed"] for check in checks)
            self.say(
                f"All {len(checks)} sanity checks passed."
                if not failed
                else f"{failed} of {len(checks)} sanity checks failed: the attacked figures are not to be quoted."
            )

    def _figures(
        self,
        name: str,
        dataset: str,
        about: dict[str, Any],
        figures: dict[str, Any],
        members: list[dict[str, Any]],
        *,
        whole: str = "ensemble",
    ) -> None:
        """Clean and attacked figures of the whole and of each member."""
        table = Table(
            title=f"{name} on {dataset}: {about['images']} images of {about['classes']} "
            f"unseen classes, {about['norm']} ε = {about['epsilon']:.4g}, in %"
        )
        table.add_column("")
        table.add_column("under attack by")
        for column in ("R@1", "NMI", "F1"):
            table.add_column(column, justify="right")
        rows = [(whole, figures)] + [(f"member {i}", member) for i, member in enumerate(members)]
        for who, entry in rows:
            if any(counted_figure(attacked, "nmi").spared for attacked in entry["attacked"].values()):
                table.caption = f"†: with one image in {about['classes']} left as it is, which is lower and so counts"
            table.add_section()
            table.add_row(who, "nobody (clean)", *_cells(entry["clean"]))
            for attack, attacked in entry["attacked"].items():
                table.add_row("", attack, *_cells(attacked))
            table.add_row("", "the worst for each image / figure", *_cells(entry["worst"]))
        self.out.print(table)

    def _inference(self, about: dict[str, Any] | None) -> None:
        """Behind a defense at inference: what an attacker who knows of it leaves, beside one who does not."""
        if about is None:
            return
        draws = about["eot_draws"]
        table = Table(
            title=f"behind the defense at inference '{about['name']}', in %; adaptive: through it (BPDA, {draws} "
            f"draw{'s' if draws > 1 else ''} a step); non-adaptive: crafted without it"
        )
        table.add_column("under attack by")
        table.add_column("who is")
        for column in ("R@1", "NMI", "F1"):
            table.add_column(column, justify="right")
        for row in about["attacks"]:
            table.add_section()
            table.add_row(f"{row['attack']}/{row['objective']}", "adaptive", *_cells(row["adaptive"]))
            table.add_row("", "non-adaptive", *_cells(row["non_adaptive"]))
        self.out.print(table)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.out,
        )


class _PlainTraining:
    def __init__(self, schedule: Schedule, say: Callable[[str], None]) -> None:
        self.schedule = schedule
        self.say = say
        self.begin = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, ensemble: EnsembleStatistics) -> None:
        if self.first is None:
            self.first, self.begin = ensemble.iteration - 1, time.monotonic()
        now = time.monotonic()
        ends_epoch = ensemble.iteration % self.schedule.iterations_per_epoch == 0
        if not ends_epoch and now - self.last < _PLAIN_EVERY_S:
            return
        self.last = now
        done = ensemble.iteration - self.first
        left = (now - self.begin) / max(done, 1) * (self.schedule.iterations - ensemble.iteration)
        self.say(f"{_describe(ensemble, self.schedule)}  {left:.0f} s left")


def _describe(ensemble: EnsembleStatistics, schedule: Schedule) -> str:
    """``epoch 3/15  clean 1.20  adversarial 3.40  fooled 12 %``: means over the members."""
    parts = [f"epoch {schedule.epoch(ensemble.iteration - 1) + 1}/{schedule.epochs}"]
    for label, name in (("clean loss", "clean_loss"), ("adversarial loss", "adversarial_loss")):
        if (value := _mean(ensemble, name)) is not None:
            parts.append(f"{label} {value:.2f}")
    if (fooled := _mean(ensemble, "fooled_rate")) is not None:
        parts.append(f"fooled {100 * fooled:.0f} %")
    return "  ".join(parts)


def _mean(ensemble: EnsembleStatistics, name: str) -> float | None:
    values = [value for entry in ensemble.members if (value := getattr(entry, name)) is not None]
    return sum(values) / len(values) if values else None


def _behind(name: str, about: dict[str, Any] | None) -> str:
    return name if about is None else f"{name} behind {about['name']}"


def _cells(figures: dict[str, Any]) -> list[str]:
    """An attack on a sample has no clustering figures. †: the lower one, with one image in C spared, counts."""
    counted = [counted_figure(figures, name) for name in ("r_at_1", "nmi", "f1")]
    return ["–" if one.value is None else f"{'†' if one.spared else ''}{100 * one.value:.1f}" for one in counted]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def print_table(table: Table, console: RichConsole) -> None:
    """A table; where the output is no terminal, for which rich assumes 80 columns, as wide as it needs to be."""
    if not console.is_terminal:
        console = RichConsole(file=console.file, width=width_of(table, console))
    console.print(table, soft_wrap=False)


def width_of(table: Table, console: RichConsole) -> int:
    """The columns that a table needs."""
    return console.measure(table, options=console.options.update(width=100_000)).maximum
