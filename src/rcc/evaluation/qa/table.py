"""The figures of questions and answers as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import results
from ..axes import Axis, counts_axis
from ..plots import CurvePlot, Lines, from_left
from ..results import Results
from .questions import BUCKETS, LONGEST
from .settings import BASELINES, BY, SELECTIONS, TUNED

BUCKET_NAMES = [*(name for _, name in BUCKETS), LONGEST]


class QAReport:
    """The figures of samples as tables and plots.

    Args:
        measured: with samples of :meth:`rcc.evaluation.qa.run.QAEvaluation.cases`.
    """

    def __init__(self, measured: Results):
        self.measured, self.trained = measured, measured.settings["trained_rates"]
        self.cells = measured.cells(BY)
        self.by_length = measured.cells((*BY, "bucket"))
        self.by_set = measured.cells((*BY, "set"))
        plain = {cell["key"]["method"]: cell for cell in self.cells if "skipped" not in cell}
        self.ceiling = next((name for name in (TUNED, "plain") if name in plain), None)
        self._best = plain[self.ceiling]["score"].mean if self.ceiling else 0.0

    def more(self) -> dict[str, Any]:
        """Return figures for `results.json` by length and by set, and what `retained` compares with."""
        return {"by_length": self.by_length, "by_set": self.by_set, "ceiling": self.ceiling}

    # ---------------------------------------------------------------- tables
    def table(self) -> str:
        """Return all figures, then scores by length and by set, as Markdown."""
        text = self._figures()
        for by, cells, columns in (("bucket", self.by_length, BUCKET_NAMES), ("set", self.by_set, None)):
            text += self._scores(by, cells, columns)
        return text

    def _figures(self) -> str:
        header = ["method", "rate", "questions", "score", "retained", "F1", "exact match", "ROUGE-L", "instruction"]
        header += ["positions", "held, MB", "compress, s", "first token, s"]
        rows = []
        for cell in self.cells:
            row = [*self._name(cell["key"])]
            if "skipped" in cell:
                rows.append([*row, "0", cell["skipped"], *["–"] * (len(header) - 4)])
                continue
            share = cell["score"].mean / self._best if self._best else None
            row += [str(cell["score"].n), results.show(cell["score"]), "–" if share is None else f"{share:.0%}"]
            row += [f"{cell[name].mean:.3f}" for name in ("f1", "exact_match", "rouge_l")]
            row.append(f"{cell['instruction_accuracy'].mean:.3f}" if "instruction_accuracy" in cell else "–")
            star = "*" if cell["cut"].mean else ""
            row += [f"{cell['positions'].mean:,.0f}{star}", f"{cell['bytes'].mean / 1e6:,.1f}"]
            row += [f"{cell[name].mean:.2f}" for name in ("compress_seconds", "first_token_seconds")]
            rows.append(row)
        return results.markdown(header, rows)

    def _scores(self, by: str, cells: Sequence[dict[str, Any]], order: Sequence[str] | None) -> str:
        """Return scores by one more key, a column for each of its values; nothing where there is one value only.

        Args:
            by: the key, `bucket` or `set`.
            cells: figures by method, mode, rate and that key.
            order: of the columns; None: as they appear.
        """
        names = [cell["key"][by] for cell in cells]
        columns = [name for name in order or dict.fromkeys(names) if name in names]
        if len(columns) < 2:
            return ""
        scores = {(*self._name(cell["key"]), cell["key"][by]): cell.get("score") for cell in cells}
        rows = []
        for cell in self.cells:
            name = self._name(cell["key"])
            row = [scores.get((*name, column)) for column in columns]
            rows.append([*name, *("–" if s is None else f"{s.mean:.3f} ({s.n})" for s in row)])
        title = "Score by context tokens" if by == "bucket" else "Score by set"
        return f"\n{title} (questions):\n\n" + results.markdown(["method", "rate", *columns], rows)

    def _name(self, key: dict[str, Any]) -> tuple[str, str]:
        name = f"{key['method']}, {key['mode']}" if key["mode"] else key["method"]
        untrained = key["method"] == "rcc" and key["rate"] not in self.trained
        return name, f"{key['rate']}×{' (untrained)' if untrained else ''}" if key["rate"] else "–"

    # ---------------------------------------------------------------- plots
    def plots(self) -> dict[str, CurvePlot]:
        """Return score by compression and by length, by file name."""
        rates = sorted({cell["key"]["rate"] for cell in self.cells if cell["key"]["rate"]})
        lines: Lines = {}
        for cell in self.cells:
            if "skipped" in cell:
                continue
            rate, name = cell["key"]["rate"], self._name(cell["key"])[0]
            lines.setdefault(name, []).extend((r, cell["score"]) for r in ([rate] if rate else rates))
        made = {}
        if rates and lines:
            axis = counts_axis("compression rate", (rate for points in lines.values() for rate, _ in points))
            title = f"Answers, {self.measured.settings['model']}"
            made["score-by-rate.png"] = CurvePlot(from_left(lines), axis, Axis("score"), title)
        columns = [name for name in BUCKET_NAMES if any(cell["key"]["bucket"] == name for cell in self.by_length)]
        if len(columns) > 1:
            lengths: Lines = {}
            for cell in self.by_length:
                if "skipped" not in cell:
                    name = " ".join(part for part in self._name(cell["key"]) if part != "–")
                    lengths.setdefault(name, []).append((columns.index(cell["key"]["bucket"]), cell["score"]))
            axis = Axis("context tokens: " + ", ".join(f"{i}: {name}" for i, name in enumerate(columns)))
            title = f"Answers by length, {self.measured.settings['model']}"
            made["score-by-length.png"] = CurvePlot(from_left(lengths), axis, Axis("score"), title)
        return made

    # ---------------------------------------------------------------- notes
    def notes(self) -> list[str]:
        """Return what to know about the figures."""
        settings, keys = self.measured.settings, [cell["key"] for cell in self.cells]
        methods = list(dict.fromkeys(key["method"] for key in keys))
        rates = sorted({key["rate"] for key in keys if key["method"] == "rcc"})
        untrained = [rate for rate in rates if rate not in self.trained]
        notes = [
            "Score: each set's own metric (F1 for questions with short answers), 0 to 1, with 95 % intervals (bootstrap"
            " over texts). Written greedily."
        ]
        if self.ceiling:
            notes.append(f"Retained: the score's share of {self.ceiling}'s.")
        meanings = BASELINES | SELECTIONS
        described = [f"{name}: {meanings[name]}" for name in methods if name in meanings]
        if described:
            notes.append("; ".join(described) + ".")
        if {"plain", "truncated", "bm25", *SELECTIONS} & set(methods) and settings["hint"]:
            others = " The others are not." if {"rcc", TUNED} & set(methods) else ""
            notes.append(f'The base is told behind each question: "{settings["hint"]}"{others}')
        notes.append(
            "Positions: what the decoder reads of the text; held: their keys and values. Compress: once a text; first"
            " token: a question behind what is held (BM25: with finding and reading the passages). * Without the"
            " middle of texts that do not fit the window."
        )
        if settings["pad_to"]:
            notes.append(f"Other questions' texts stand around each, {settings['pad_to']:,} tokens in all at most.")
        if untrained:
            notes.append(f"Not trained at {', '.join(f'{rate}×' for rate in untrained)}: expect little of it.")
        return notes
