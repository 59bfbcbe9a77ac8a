"""Memory and time as tables and a plot, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...model import backbones
from ...text.counts import show_count
from ..axes import Axis, counts_axis
from ..plots import CurvePlot, Lines, from_left
from ..results import Interval, Results, markdown
from .settings import BY, PAPER, PAPER_RATE, compressor_label

Cell = Mapping[str, Any]


class ResourcesReport:
    """The figures of cells as tables and a plot.

    Args:
        measured: with cells of :meth:`rcc.evaluation.resources.run.ResourcesEvaluation.cases`.
    """

    def __init__(self, measured: Results):
        self.results, self.settings = measured, measured.settings
        self.cells = {(c["key"]["reader"], c["key"]["length"], c["key"].get("rate")): c for c in measured.cells(BY)}
        self.source = {(r["key"]["reader"], r["key"]["length"]): r.get("source") for r in measured.rows}

    def more(self) -> dict[str, Any]:
        """Return no further figures."""
        return {}

    # ---------------------------------------------------------------- tables
    def table(self) -> str:
        """Return memory by length and rate and, where it was measured, time, as Markdown."""
        text = self._memory()
        if self.settings["measured"]:
            text += self._time()
        return text + self._extrapolated_from()

    def _memory(self) -> str:
        paper, measured = self.settings["paper"], self.settings["measured"]
        how = "" if measured else " (computed)"
        header = ["tokens", "rate", "positions", f"weights + KV, MB{how}"]
        header += [f"{compressor_label(self.settings)}, peak MB{how}", "beyond, MB", "ratio"]
        header += ["asking, peak MB", "ratio"] if measured else []
        header += [f"file, MB{how}", f"plain, peak MB{how}", *(["paper, RCC", "paper, plain"] if paper else [])]
        rows = []
        if not measured:  # with nothing read yet
            weights = {
                reader: _value(c, "weights_bytes") for (reader, _, _), c in self.cells.items() if "skipped" not in c
            }
            own = _mb(weights.get("rcc"))
            row = ["none", "–", "0", own, own, "0", "1.00", "–", _mb(weights.get("plain"))]
            rows.append([*row, *self._published(0, PAPER_RATE)])
        for (reader, length, rate), cell in self.cells.items():
            if reader != "rcc":
                continue
            row = [show_count(length), f"{rate}×"]
            if "skipped" in cell:
                rows.append([*row, cell["skipped"], *[""] * (len(header) - 3)])
            else:
                rows.append([*row, *self._memory_of(length, cell), *self._published(length, rate)])
        return markdown(header, rows)

    def _memory_of(self, length: int, cell: Cell) -> list[str]:
        base = self.cells.get(("plain", length, None), {})
        measured = self.settings["measured"]
        star = "*" if not measured and _value(base, "beyond_window") else ""
        plain = f"{self._about(length)}{_mb(_value(base, 'plain_peak_bytes'))}{star}"
        floor = _value(cell, "weights_bytes") + _value(cell, "kv_bytes")
        peak = _value(cell, "compress_peak_bytes")
        star = "*" if _value(cell, "beyond_window") else ""
        row = [f"{_value(cell, 'positions'):,.0f}{star}", _mb(floor), _mb(peak)]
        row += ["–" if peak is None else _mb(peak - floor), _number(_value(cell, "ratio"))]
        if measured:
            row += [_mb(_value(cell, "ask_peak_bytes")), _number(_value(cell, "ask_ratio"))]
        return [*row, _mb(_value(cell, "file_bytes")), plain]

    def _time(self) -> str:
        rows = []
        for (reader, length, rate), cell in self.cells.items():
            if reader != "rcc" or "skipped" in cell:
                continue
            base, about = self.cells.get(("plain", length, None), {}), self._about(length)
            row = [_number(_value(cell, f"{what}_seconds"), 2) for what in ("compress", "save")]
            row.append(_number(_value(cell, "load_seconds"), 1, 1000))
            row.append(_number(_value(cell, "load_full_seconds"), 2))
            row.append(_number(_value(cell, "first_token_seconds"), 3))
            row.append(about + _number(_value(base, "plain_first_token_seconds"), 2))
            ratio = _value(cell, "first_token_ratio")
            row.append("–" if ratio is None else f"{about}{ratio:,.0f}×")
            rows.append([show_count(length), f"{rate}×", *row])
        if not rows:
            return ""
        header = ["tokens", "rate", "compress, s", "save, s", "load (mapped), ms", "load (checked), s"]
        return "\n" + markdown([*header, "first token, s", "plain, first token, s", "plain / stored"], rows)

    def _extrapolated_from(self) -> str:
        """Return the table of the lengths that were read only for the longer ones' sake."""
        rows = [
            [show_count(length), _mb(_value(c, "plain_peak_bytes")), _number(_value(c, "plain_first_token_seconds"), 2)]
            for (reader, length, _), c in self.cells.items()
            if reader == "plain" and length not in self.settings["lengths"] and "skipped" not in c
        ]
        if not rows:
            return ""
        return "\nplain, extrapolated from:\n\n" + markdown(["tokens", "peak MB", "first token, s"], rows)

    def _about(self, length: int) -> str:
        return "≈ " if self.source.get(("plain", length)) == "extrapolated" else ""

    def _published(self, length: int, rate: int) -> list[str]:
        """Return the paper's figures of a length, where they are of this model."""
        if not self.settings["paper"]:
            return []
        values = [PAPER["rcc"].get(length) if rate == PAPER_RATE else None, PAPER["plain"].get(length)]
        return ["–" if value is None else f"{value:,}" for value in values]

    # ---------------------------------------------------------------- plot
    def plots(self) -> dict[str, CurvePlot]:
        """Return peak memory by length, by file name."""
        lines: Lines = {}
        for (reader, length, rate), cell in self.cells.items():
            plain = reader == "plain"
            peak = _value(cell, "plain_peak_bytes" if plain else "compress_peak_bytes")
            if peak is not None:
                lines.setdefault("plain" if plain else f"{compressor_label(self.settings)} {rate}×", []).append(
                    (length, _point(peak / 1e6))
                )
        if self.settings["paper"]:
            for reader, name in (("rcc", "paper, RCC 32×"), ("plain", "paper, plain")):
                lines[name] = [(length, _point(mb)) for length, mb in PAPER[reader].items() if length]
        if not lines:
            return {}
        title = f"{self.settings['model']}: {'measured' if self.settings['measured'] else 'computed'}"
        tokens = counts_axis("tokens", (length for points in lines.values() for length, _ in points))
        return {"memory.png": CurvePlot(from_left(lines), tokens, Axis("peak, MB", log=True), title)}

    # ---------------------------------------------------------------- notes
    def notes(self, sides: str, encoder_type: str) -> list[str]:
        """Return what to know about the figures.

        Args:
            sides: what the model is made of.
            encoder_type: the encoder's model type, as transformers has it.
        """
        s, rows = self.settings, self.results.rows
        facts = f"{s['dtype']}, {sides}, segments of {s['segment_length']:,} tokens, {s['batch_tokens']:,} read at once"
        notes = self._measured(facts) if s["measured"] else self._computed(facts, encoder_type)
        if any(row.get("source") == "extrapolated" for row in rows):
            notes.append(
                f"≈ beyond the base's window of {s['window']:,}: time extrapolated by a·n + b·n² from the shorter"
                " texts, memory computed."
            )
        if any(row.get("beyond_window") and row["source"] != "extrapolated" for row in rows):
            notes.append(f"* more positions than the window of {s['window']:,} that the base was trained with.")
        if s["paper"]:
            notes.append("Paper: its own figures, of Pythia-1.4B on an A800, batch 1, at 32×.")
        return notes

    def _measured(self, facts: str) -> list[str]:
        s = self.settings
        random = "" if s["fingerprint"] else " with random weights, its window widened as needed"
        what = (
            "GPU memory that tensors take"
            if s["device"] == "cuda"
            else "memory of the process at most, less what it held once all libraries were loaded"
        )
        text = s["text"] if s["text"].startswith("random") else "the given text, repeated with its segments shifted"
        return [
            f"{s['model']}{random} ({facts}), measured, each figure in a process of its own. Peak: {what}.",
            f"The text: {text}. First token: the context file loaded (mapped) and a question of"
            f" {s['question_tokens']} tokens read; plain: the text and the question read.",
        ]

    def _computed(self, facts: str, encoder_type: str) -> list[str]:
        notes = [
            f"{self.settings['model']} ({facts}), computed without weights: the sizes of all tensors that the passes"
            " make. File: without its header of some kB."
        ]
        if encoder_type in backbones.STATE_SPACE:
            notes.append(
                "Of the encoder's blocks, what they hold while they read is estimated (34 bytes · width a token)."
            )
        return notes


def _value(cell: Cell, name: str) -> Any:
    """Return a figure's mean; None where there is none."""
    value = cell.get(name)
    return value.mean if isinstance(value, Interval) else None


def _mb(size: float | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.0f}"


def _number(value: float | None, digits: int = 2, factor: float = 1) -> str:
    return "–" if value is None else f"{value * factor:,.{digits}f}"


def _point(value: float) -> Interval:
    return Interval(value, value, value, 1)
