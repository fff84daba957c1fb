"""Trials on Ray Tune: it runs them side by side, stops the hopeless ones, and starts again those whose process died.

The runs of a study are trials that nobody stops. What a sweep or study has seen is its own (:class:`Book`), as plain
JSON in its folder: nothing of Tune's state is kept, so nothing of it is ever unpickled. A trial trains and measures
between two reports and waits at a report for the verdict; so it is only ever stopped while nothing of it runs on the
cluster.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from eat_dist.cluster.signals import own_handlers_after
from eat_dist.errors import ClusterError, EatError, MembersFailedError, in_one_line

Report = Callable[[Mapping[str, Any]], None]

# What the driver of a trial asks for: a byte, which every node has, for Tune wants a request and a CPU would be the
# members'. It only starts Ray Train's workers and waits for them.
_DRIVER = {"memory": 1}
_DIED = "its process died more often than cluster.max_restarts allows"


class Book(Protocol):
    """The other side: which trials there are, and what became of them. All calls come from the driver's thread."""

    def begin(self) -> Mapping[str, Any] | None:
        """What the next trial is called with, with its ``id``; None where there is none left."""
        ...

    def learn(self, trial: str, result: Mapping[str, Any]) -> None:
        """A trial has reported."""
        ...

    def end(self, trial: str, *, error: str | None) -> None:
        """A trial has ended, by itself or stopped, or ``error`` says why it cannot go on."""
        ...

    def suspend(self, trial: str, *, reason: str) -> None:
        """The cluster could not go on with a trial, for no fault of the trial: it is unfinished."""
        ...


@dataclass(frozen=True)
class Halving:
    """Asynchronous successive halving (Li et al. 2020, ASHA): at each rung the best 1/η of those seen there go on.

    Attributes:
        objective: Name of the reported number, higher is better.
        grace_period: Epochs until the first rung.
        reduction_factor: η: a rung is η times as far as the one before.
        epochs: Of a whole trial.
        earlier: (trial, epoch, objective) of the trials before a resumption, in the order of their reports.
    """

    objective: str
    grace_period: int
    reduction_factor: int
    epochs: int
    earlier: Sequence[tuple[str, int, float]] = ()

    def scheduler(self) -> AsyncHyperBandScheduler:
        """Tune's, which has seen what was seen before."""
        scheduler = AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=self.objective,
            mode="max",
            max_t=self.epochs,
            grace_period=self.grace_period,
            reduction_factor=self.reduction_factor,
        )
        for trial in dict.fromkeys(trial for trial, _, _ in self.earlier):
            scheduler.on_trial_add(None, SimpleNamespace(trial_id=trial))
        for trial, epoch, value in self.earlier:
            scheduler.on_trial_result(None, SimpleNamespace(trial_id=trial), {"epoch": epoch, self.objective: value})
        return scheduler


def run_trials(
    work: Callable[[Mapping[str, Any], Report], None],
    book: Book,
    *,
    trials: int,
    concurrent: int,
    halving: Halving | None,
    max_failures: int,
    resources: Mapping[str, float] | None = None,
) -> None:
    """Run trials until there are none left.

    Ctrl-C ends it early: trials that the book has not seen the end of are unfinished then. So does a cluster that
    cannot go on with a trial (nodes are gone): those that run are brought to their end, no other begins.

    Args:
        work: One trial, called in a process of its own on the cluster, which is joined; importable there. It is given
            what ``begin`` returned, and a function to report ``epoch`` and figures with, which does not return where
            the trial is stopped. An exception is the end of that trial alone.
        book: What is done, and what is to be done.
        trials: How many ``begin`` will hand out, at most.
        concurrent: Trials at once; :func:`eat_dist.cluster.capacity.capacity` says how many fit.
        halving: When a trial is stopped early; None: never.
        max_failures: Times a trial is started again after its process died.
        resources: In Ray's words, what a trial's own process computes with; None: others compute for it.

    Raises:
        ClusterError: What the cluster lacked for a trial.
        EatError: What the book raised.
        KeyboardInterrupt: Ctrl-C, also where it came after the end of the last trial.
    """
    # Tune's own records of a sweep are not kept, and standard output is the command line's.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A failed trial reports its error, and no objective.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    scribe = _Scribe(book)
    scheduler: TrialScheduler = FIFOScheduler() if halving is None else halving.scheduler()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with own_handlers_after():  # Tune ends early on Ctrl-C, by returning
                tune.run(
                    tune.with_resources(
                        _trainable(work, computes="GPU" in (resources or {})),
                        tune.PlacementGroupFactory([_DRIVER | dict(resources or {})]),
                    ),
                    name="sweep",
                    num_samples=trials,
                    search_alg=_Questions(scribe),
                    scheduler=scheduler,
                    max_concurrent_trials=concurrent,
                    callbacks=[_Answers(scribe)],
                    max_failures=max_failures,
                    raise_on_failed_trial=False,
                    storage_path=scratch,
                    trial_dirname_creator=lambda trial: str(trial.trial_id),
                    verbose=0,
                )
        except Exception:
            if scribe.failure is not None:  # Tune has wrapped it in its own
                raise scribe.failure from None
            raise
    if scribe.lack is not None:
        raise ClusterError(scribe.lack)


def _trainable(
    work: Callable[[Mapping[str, Any], Report], None], *, computes: bool
) -> Callable[[dict[str, Any]], None]:
    """``computes``: whether it has asked for a GPU."""

    def trial(task: dict[str, Any]) -> None:
        if not computes:
            # Ray hides no GPU from a process that has asked for none: its evaluation would take one that others have.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # What this process does is done on a cluster, whatever it was told: an evaluation asks for a GPU there.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        try:
            work(task, lambda result: tune.report(dict(result)))
        except Exception as error:  # a fault of this trial, which the others do not share
            # Nodes that are gone are none: any other trial would fail, too, and this one may go on when they are back.
            lacks = isinstance(error, ClusterError) and not isinstance(error, MembersFailedError)
            tune.report({"epoch": 0, "lack" if lacks else "error": in_one_line(error)})

    return trial


class _Scribe:
    """Carries events to the book, and remembers what the book raised."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.failure: EatError | None = None
        self.lack: str | None = None
        self.errors: dict[str, str] = {}
        self._lacks: dict[str, str] = {}

    def ask(self) -> Mapping[str, Any] | None:
        if self.lack is not None:
            return None
        task: Mapping[str, Any] | None = self._guarded(self.book.begin)
        return task

    def tell(self, trial: Any, result: Mapping[str, Any]) -> None:
        name = trial.config["id"]
        if "error" in result:
            self.errors[name] = result["error"]
        elif "lack" in result:
            self._lacks[name] = result["lack"]
            self.lack = self.lack or result["lack"]
        elif "epoch" in result:
            self._guarded(lambda: self.book.learn(name, result))

    def ended(self, trial: Any, *, error: str | None) -> None:
        name = trial.config["id"]
        if error is None and name in self._lacks:
            self._guarded(lambda: self.book.suspend(name, reason=self._lacks[name]))
            return
        self._guarded(lambda: self.book.end(name, error=error or self.errors.get(name)))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except EatError as error:
            self.failure = error
            raise


class _Questions(Searcher):  # type: ignore[misc]  # ray is untyped
    """Tune asks the book for the next trial."""

    def __init__(self, scribe: _Scribe) -> None:
        super().__init__()
        self._scribe = scribe

    def suggest(self, trial_id: str) -> Any:
        task = self._scribe.ask()
        return Searcher.FINISHED if task is None else dict(task)

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The callback tells the book."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the book is saved."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep is resumed from its book."""


class _Answers(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Tune tells the book."""

    def __init__(self, scribe: _Scribe) -> None:
        self._scribe = scribe

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        self._scribe.tell(trial, result)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._scribe.ended(trial, error=None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._scribe.ended(trial, error=_DIED)
