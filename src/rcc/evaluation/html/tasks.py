"""What a report shows of each task: its charts and heat maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...text.counts import show_count
from .charts import WIDTH, Axis, Chart, Look, Point, curves
from .tables import (
    Cell,
    Run,
    Samples,
    Table,
    Value,
    describe,
    digits,
    heat_map,
    interval,
    joined,
    label,
    name_of,
    text_of,
)

WIDE = 900, 400
"""Width and height of a chart that comes first; phones get one as high and as narrow as the others."""


@dataclass
class Group:
    """What stands under one heading; `main` is the same chart for wide screens and for narrow ones."""

    title: str
    note: str = ""
    main: tuple[Chart, Chart] | None = None
    charts: list[Chart | None] = field(default_factory=list)
    heat: list[Table] = field(default_factory=list)


def point(name: str, where: str, x: float, value: Value, samples: int | None, factor: float = 1) -> Point:
    """A figure in a chart, with what the pointer is told."""
    ends = {end: None if value[end] is None else value[end] * factor for end in ("mean", "low", "high")}
    places = digits([float(ends["mean"] or 0)])
    around = interval(value, places, factor)
    text = f"{name}, {where}: {ends['mean']:,.{places}f}{f' [{around}]' if around else ''}, n {value['n']:,}"
    return Point(x, {**ends, "n": value["n"]}, text, samples)


def numbered(names: Iterable[Any]) -> dict[Any, int]:
    """Each its number, in order of appearance."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def both(title: str, points: list[tuple[Look, Point]], x: Axis, y: Axis) -> tuple[Chart, Chart] | None:
    """A chart for wide screens and for narrow ones."""
    wide, narrow = curves(title, points, x, y, *WIDE), curves(title, points, x, y, WIDTH, WIDE[1])
    return None if wide is None or narrow is None else (wide, narrow)


def rates_axis(rates: Iterable[float], name: str = "compression rate") -> Axis:
    return Axis(name, log=True, ticks={rate: f"{rate:g}×" for rate in sorted(rates)})


def lengths_axis(lengths: Iterable[int]) -> Axis:
    return Axis("tokens of text", log=True, ticks={length: show_count(length) for length in sorted(lengths)})


def size(mb: float) -> str:
    """Megabytes as an axis shows them."""
    unit, factor = next((u, f) for u, f in (("TB", 1e6), ("GB", 1e3), ("MB", 1), ("kB", 1e-3)) if mb >= f or f < 1)
    return f"{mb / factor:g} {unit}"


SHARE, PART = Axis(), Axis(top=1)
"""Axes of figures: as high as they need, or at least up to 1."""
FIRST = {"accuracy": "Accuracy", "bleu": "BLEU-4"}
"""Of reconstruction, the figures that are shown in every way."""


# ---------------------------------------------------------------- question answering
def qa(runs: list[Run], samples: Samples) -> Iterator[Group]:
    """Quality against compression, for every method; its cost; by length and by set."""
    cells = [cell for run in runs for cell in run.cells]
    methods = numbered(["rcc", *(cell["key"]["method"] for cell in cells if cell["key"]["rate"])])
    modes = numbered(cell["key"]["mode"] for cell in cells)
    ways = {(cell["key"]["method"], cell["key"]["mode"]) for cell in cells}
    several = {method for method, _ in ways if sum(other == method for other, _ in ways) > 1}
    rates = sorted({cell["key"]["rate"] for cell in cells if "skipped" not in cell} - {0})

    def look(run: Run, key: Mapping[str, Any], level: bool = True) -> Look:
        """A colour for each method, a marker for each way to ask it, a dash for each folder."""
        name = joined(key["method"], key["mode"] if key["method"] in several else "", run.letter)
        if not key["rate"]:
            return Look(name, None, run.number % 4, modes[key["mode"]] % 4, soft=True, level=level)
        return Look(name, methods[key["method"]] % 8, run.number % 4, modes[key["mode"]] % 4)

    def points(figure: str) -> Iterator[tuple[Look, Point]]:
        for run in runs:
            for key, cell, link in samples.cells(run):
                if figure in cell:
                    of, x = look(run, key), held(cell)
                    where = f"{x:.1f} tokens a position" if key["rate"] else "at any rate"
                    yield of, point(of.name, where, x, cell[figure], link, label(figure)[1])

    axis = rates_axis(rates, "tokens of text for each position held")
    yield Group(
        "Quality against compression",
        "Each set’s own score, 0 to 1. Dashed across: what does not compress, but reads the whole text or none of it.",
        main=both("score", list(points("score")), axis, SHARE),
    )
    costs = {
        "bytes": ("Memory of a text that is held", Axis(log=True, show=size)),
        "compress_seconds": ("Seconds to compress it", Axis(log=True)),
        "first_token_seconds": ("Seconds to an answer’s first token", Axis(log=True)),
    }
    yield Group("Cost", charts=[curves(title, points(f), axis, y) for f, (title, y) in costs.items()])

    lengths: dict[str, float] = {}
    for run in runs:
        for cell in run.groupings.get("by_length", []):
            lengths.setdefault(cell["key"]["bucket"], cell.get("context_tokens", {}).get("mean", 0))
    buckets = numbered(sorted(lengths, key=lambda name: lengths[name]))

    def by_length(rate: int) -> Iterator[tuple[Look, Point]]:
        for run in runs:
            for key, cell, link in samples.cells(run, "by_length"):
                if key["rate"] in (0, rate) and "score" in cell:
                    of, bucket = look(run, key, level=False), key["bucket"]
                    yield of, point(of.name, bucket, buckets[bucket], cell["score"], link)

    axis = Axis("tokens of text", ticks={place: name for name, place in buckets.items()})
    yield Group(
        "Score by length of the text",
        "Each rate, beside what does not compress.",
        charts=[curves(f"{rate}×", by_length(rate), axis, SHARE) for rate in rates],
    )
    yield Group("Score by set", heat=[by_set(run, samples) for run in runs if "by_set" in run.groupings])


def held(cell: Mapping[str, Any]) -> float:
    """Tokens of text for each position held: measured, or the rate."""
    if "context_tokens" in cell and "positions" in cell and cell["positions"]["mean"] > 0:
        return cell["context_tokens"]["mean"] / cell["positions"]["mean"]
    return float(cell["key"]["rate"])


def by_set(run: Run, samples: Samples) -> Table:
    """Scores by method and set; the highest one has the deepest colour."""
    cells = run.groupings["by_set"]
    most = max((cell["score"]["mean"] for cell in cells if "score" in cell), default=0) or 1
    rows: dict[tuple[str, ...], dict[tuple[str, str], Cell | str]] = {}
    for key, cell, link in samples.cells(run, "by_set"):
        name = describe({k: v for k, v in key.items() if k != "set"})
        rows.setdefault((name,), {})["", key["set"]] = shade(cell, "score", link, most)
    return heat_map(run.name, ["method"], {"": list(dict.fromkeys(cell["key"]["set"] for cell in cells))}, rows)


def shade(cell: Mapping[str, Any], figure: str, link: int | None, most: float = 1, percent: bool = False) -> Cell | str:
    """A share as a heat map shows it, its colour deepest at `most`; or why there is none."""
    if figure not in cell:
        return cell.get("skipped", "")
    value, places, factor = cell[figure], 0 if percent else 3, 100 if percent else 1
    small = joined(interval(value, max(0, places - 1), factor), f"n\u00a0{value['n']:,}")
    return Cell(f"{value['mean'] * factor:.{places}f}{'%' if percent else ''}", small, link, value["mean"] / most)


# ---------------------------------------------------------------- reconstruction
def reconstruction(runs: list[Run], samples: Samples) -> Iterator[Group]:
    """Figures by rate, by length, by where the prompt begins, and by the token's place."""
    cells = [cell for run in runs for cell in run.cells]
    lengths = sorted({cell["key"]["length"] for cell in cells})
    rates = numbered(sorted({c["key"]["rate"] for c in cells if "rate" in c["key"] and "skipped" not in c}))
    contexts = numbered(cell["key"]["context"] for cell in cells)

    def own(run: Run, rate: int) -> Look:
        return Look(joined(f"{rate}×", run.letter), rates[rate] % 8, run.number % 4, run.number % 4)

    def by_rate(length: int, figure: str) -> Iterator[tuple[Look, Point]]:
        for run in runs:
            for key, cell, link in samples.cells(run):
                if key["length"] != length or figure not in cell:
                    continue
                name = joined(key["context"], run.letter)
                of = Look(name, run.number % 8, run.number % 4)
                if key["context"] != "real":
                    colour = run.number % 8 if run.letter else None
                    of = Look(name, colour, run.number % 4, contexts[key["context"]] % 4, True, "rate" not in key)
                where = text_of(key, "rate") or "at any rate"
                yield of, point(name, where, key.get("rate", 1), cell[figure], link)

    def real(figure: str, grouping: str, x: str, length: int | None = None) -> Iterator[tuple[Look, Point]]:
        """The real context's figures, a line for each rate."""
        for run in runs:
            for key, cell, link in samples.cells(run, grouping):
                if key["context"] == "real" and figure in cell and length in (None, key["length"]):
                    of = own(run, key["rate"])
                    yield of, point(of.name, f"{x} {key[x]}", key[x], cell[figure], link)

    def by_place(part: str, length: int) -> Iterator[tuple[Look, Point]]:
        for run in runs:
            for found in run.data.get("by_place", []):
                key, values = {"length": length, "rate": found["rate"], "context": "real"}, found[part]
                link = samples.behind(run, key, list(key))
                for i, value in enumerate(values if found["length"] == length else []):
                    if value is not None:
                        of, x = own(run, found["rate"]), i + 1 if part == "group" else (i + 0.5) / len(values)
                        yield of, point(of.name, f"part {i + 1} of {len(values)}", x, value, link)

    named = {
        "accuracy": ("Accuracy, teacher forced", PART),
        "bleu": ("BLEU-4", SHARE),
        "rouge_l": ("ROUGE-L", SHARE),
        "exact": ("Exact: tokens at their place", SHARE),
        "run": ("Run: tokens before the first error", SHARE),
        "loss": ("Loss, nats a token (less is better)", SHARE),
    }
    for length in lengths:
        of = f"texts of {length:,} tokens"
        made = [cell["key"] for cell in cells if cell["key"]["length"] == length and "skipped" not in cell]
        axis = rates_axis({key["rate"] for key in made if "rate" in key})
        yield Group(
            f"By rate, {of}",
            "The context of the text itself (real) beside controls, which are thin: what the same prompts give with"
            " another context.",
            charts=[curves(title, by_rate(length, f), axis, y) for f, (title, y) in named.items()],
        )
        start = Axis("token at which the prompt begins")
        place = Axis("place in the segment, 0 to 1", ticks={i / 4: f"{i / 4:g}" for i in range(5)})
        group = Axis("place in the group; of the last, states are kept")
        charts = [
            curves(f"{title} by start of the prompt", real(f, "by_start", "start", length), start, named[f][1])
            for f, title in FIRST.items()
        ]
        charts.append(curves("Accuracy by place in the segment", by_place("segment", length), place, PART))
        charts.append(curves("Accuracy by place in the group of a rate", by_place("group", length), group, PART))
        yield Group(f"By position, {of}", "The context of the text itself. By place, n counts tokens.", charts=charts)
    if len(lengths) > 1:
        axis = lengths_axis(lengths)
        charts = [curves(title, real(f, "cells", "length"), axis, named[f][1]) for f, title in FIRST.items()]
        yield Group("By length", "The context of the text itself.", charts=charts)


# ---------------------------------------------------------------- passkey
def passkey(runs: list[Run], samples: Samples) -> Iterator[Group]:
    """Accuracy by length and position, beside the control's, for each variant."""
    for variant in dict.fromkeys(cell["key"]["variant"] for run in runs for cell in run.cells):
        heat = [by_position(run, variant, samples) for run in runs]
        yield Group(f"Variant {variant}", heat=[found for found in heat if found.rows])


def by_position(run: Run, variant: str, samples: Samples) -> Table:
    """The share found by length, rate and place of the key, and the control's."""
    names = {"whole": "found in the text", "replaced": "control: key replaced"}
    rows: dict[tuple[int, int], dict[tuple[str, str], Cell | str]] = {}
    for key, cell, link in samples.cells(run):
        if key["variant"] == variant:
            row = rows.setdefault((key["length"], key["rate"]), {})
            row[names[key["context"]], key["position"]] = shade(cell, "right", link, percent=True)
    columns: dict[str, list[str]] = {}
    for heading in names.values():
        if found := dict.fromkeys(position for row in rows.values() for at, position in row if at == heading):
            columns[heading] = list(found)
    shown: dict[tuple[str, ...], Any] = {(show_count(n), f"{rate}×"): rows[n, rate] for n, rate in sorted(rows)}
    return heat_map(run.name, ["tokens", "rate"], columns, shown)


# ---------------------------------------------------------------- resources
def resources(runs: list[Run], samples: Samples) -> Iterator[Group]:
    """Memory and time by length, for each folder: they are of different shapes and machines."""
    figures = {  # → the chart that it is in
        "compress_peak_bytes": "peak",
        "plain_peak_bytes": "peak",
        "first_token_seconds": "first",
        "plain_first_token_seconds": "first",
        "compress_seconds": "compress",
        "ask_peak_bytes": "ask",
    }
    for run in runs:
        axis = lengths_axis({cell["key"]["length"] for cell in run.cells if "rate" in cell["key"]})
        rates = numbered(sorted({cell["key"]["rate"] for cell in run.cells if "rate" in cell["key"]}))
        sources = {name_of(row["key"]): row.get("source", "") for row in run.rows}
        found: dict[str, list[tuple[Look, Point]]] = {"peak": [], "first": [], "compress": [], "ask": []}
        for key, cell, link in samples.cells(run):
            source = sources.get(name_of(key), "")
            where = joined(f"{show_count(key['length'])} tokens", source, between=", ")
            of = Look("plain", None, 0, 1)
            if "rate" in key:
                of = Look(f"RCC {key['rate']}×", rates[key["rate"]] % 8)
                if "kv_bytes" in cell and "weights_bytes" in cell:
                    floor = Look(f"floor {key['rate']}×", of.colour, 2, 3, soft=True)
                    least = {**cell["kv_bytes"], "mean": cell["kv_bytes"]["mean"] + cell["weights_bytes"]["mean"]}
                    found["peak"].append((floor, point(floor.name, where, key["length"], least, link, 1e-6)))
            elif source == "extrapolated":
                of = Look("plain, extrapolated", None, 2, 1, soft=True)
            for figure, chart in figures.items():
                if figure in cell:
                    factor = 1e-6 if figure.endswith("bytes") else 1
                    found[chart].append((of, point(of.name, where, key["length"], cell[figure], link, factor)))
        if run.data["settings"].get("paper"):
            found["peak"] += paper()
        seconds, memory = Axis(log=True), Axis(log=True, show=size)
        how = "Measured" if run.data["settings"].get("measured") else "Computed"
        charts = [
            curves("Seconds to the first token", found["first"], axis, seconds),
            curves("Seconds to compress", found["compress"], axis, seconds),
            curves("Peak memory of asking", found["ask"], axis, memory),
        ]
        yield Group(
            f"Peak memory{f': {run.name}' if run.letter else ''}",
            f"{how}, by length of the text. Floor: weights and KV cache alone. Plain: the same base reading the text as"
            " it is.",
            both("peak memory", found["peak"], axis, memory),
            charts,
        )


def paper() -> Iterator[tuple[Look, Point]]:
    """The paper's own figures."""
    from ..resources.table import PAPER, PAPER_RATE  # which needs torch, as nothing else here does

    for reader, name in (("rcc", f"paper, RCC {PAPER_RATE}×"), ("plain", "paper, plain")):
        for length, mb in PAPER[reader].items():
            if length:
                value = {"mean": mb, "low": None, "high": None, "n": 1}
                where = f"{show_count(length)} tokens"
                yield Look(name, None, 3, 2, soft=True), point(name, where, length, value, None)


# ---------------------------------------------------------------- all of them
class Task(NamedTuple):
    title: str
    lead: str
    groups: Callable[[list[Run], Samples], Iterator[Group]]


TASKS = {
    "qa": Task("Answers", "Questions about texts, answered from what each method keeps of them.", qa),
    "reconstruction": Task(
        "Reconstruction", "How much of a text its compressed context gives back: ten tokens in, what follows.",
        reconstruction,
    ),
    "passkey": Task("Passkey", "Is a number found that is hidden in a long text?", passkey),
    "resources": Task("Memory and time", "What reading a text and asking its context take, by its length.", resources),
}  # fmt: skip
"""In the order of the page; any other task has its tables alone."""
