"""What every kind of evaluation has in common, so that one loop runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from .plots import Plot
from .results import Case, Results

if TYPE_CHECKING:
    from ..model.compressor import Compressor

Progress = Callable[[int], None]
"""Called with the units of work done so far."""


def ignore(done: int) -> None:
    """Show no progress."""


class Report(Protocol):
    """The figures of samples as people read them."""

    def table(self) -> str:
        """Return all figures as Markdown tables."""

    def plots(self) -> Mapping[str, Plot]:
        """Return the plots by file name."""

    def more(self) -> Mapping[str, Any]:
        """Return further figures for `results.json`, beside its cells."""


class Evaluation(Protocol):
    """One kind of measurement of one model, ready to be run."""

    @property
    def kind(self) -> str:
        """Its name in `results.json`: `reconstruction`, `passkey`, `resources` or `qa`."""

    @property
    def by(self) -> Sequence[str]:
        """The keys that tell the cells of the table apart."""

    @property
    def cluster(self) -> str | None:
        """The key that samples of one document share, over which intervals are made; None: there is none."""

    @property
    def verb(self) -> str:
        """What it does, for a line of progress: `reconstructing`."""

    @property
    def unit(self) -> str:
        """What its work is counted in, in the plural: `samples`."""

    def settings(self) -> dict[str, Any]:
        """Return all that a sample depends on beside its key, in a form that JSON holds."""

    def __len__(self) -> int:
        """Return the number of cases."""

    def cases(self) -> Iterable[Case]:
        """Return the samples to be measured, each with the function that measures it."""

    def work(self, cases: int) -> int:
        """Return how many units of work the first so many cases are."""

    def measuring(self, results: Results, progress: Progress) -> AbstractContextManager[Any]:
        """Return a context to measure in: what is held from the first case to the last.

        Args:
            results: what was measured so far; grows with every case.
            progress: to be called with the units done, while a case is measured that takes long.
        """

    def notes(self, results: Results) -> list[str]:
        """Return what a reader has to know about the figures of what was measured."""

    def report(self, results: Results) -> Report:
        """Return the figures of what was measured as people read them."""


def model_settings(model: Compressor) -> dict[str, Any]:
    """Return what every sample depends on: the model, its precision and, of a selection, how it chooses."""
    settings = {"model": model.name, "fingerprint": model.fingerprint}
    if model.compressor:
        settings["compressor"] = model.compressor
    return {**settings, "dtype": str(model.dtype).removeprefix("torch.")}


def untrained(model: Compressor, rates: Iterable[int]) -> list[int]:
    """Return those of some rates that a model was not trained at; none where it was not trained for rcc at all."""
    return [rate for rate in rates if model.trained and rate not in model.rates]


def least_tokens(model: Compressor) -> int:
    """Return the tokens of a text that is as long as those that a model was trained on: a segment."""
    return model.segment_length if model.trained else 1


def check_lengths(model: Compressor, lengths: Iterable[int]) -> None:
    """Check that texts of so many tokens are as long as those that a model was trained on.

    Raises:
        InputError: one is shorter.
    """
    shortest = min(lengths, default=0)
    if shortest < least_tokens(model):
        raise InputError(
            f"a length of {shortest:,} tokens is less than one segment: give at least {least_tokens(model):,}."
        )


def evaluate(evaluation: Evaluation, folder: Path | None = None, progress: Progress = ignore) -> Results:
    """Measure all cases that the folder does not hold yet, and note what to know about the figures.

    Args:
        evaluation: gives the cases and measures them.
        folder: where samples are kept as they are made, and an interrupted evaluation goes on. None: nowhere.
        progress: called with the units of work done so far, of `evaluation.work(len(evaluation))` in all.

    Raises:
        InputError: the folder holds another evaluation, or something else. FileError: it cannot be written.
    """
    results = Results(evaluation.kind, evaluation.settings(), folder, cluster=evaluation.cluster)
    with evaluation.measuring(results, progress):
        results.collect(evaluation.cases(), lambda cases: progress(evaluation.work(cases)))
    results.notes += evaluation.notes(results)
    if compressor := results.settings.get("compressor"):
        results.notes.append(f"{results.settings['model']} was not trained for rcc. Its contexts: {compressor}.")
    return results


def finish(evaluation: Evaluation, results: Results) -> Report:
    """Write figures, table and plots of an evaluation into its folder, if it has one, and return its report."""
    report = evaluation.report(results)
    results.finish(evaluation.by, report.table(), report.plots(), report.more())
    return report
