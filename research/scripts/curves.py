"""Draw runs' training losses over each other, and compare them batch by batch.

    python research/scripts/curves.py RUN RUN … [-o curves.svg] [--kinds reconstruction/4x,instruction/4x]

Runs with the same seed, tasks and sizes read the same samples at the same step, whatever else differs: where step and
kind of batch agree with the first run's, the mean difference in loss is printed with its standard error.
With --kinds, each run goes on where those named before it with a comma end (A,D and C,E: two lines of two runs each),
and there is a panel a kind, of all context lengths together: the loss of its batches, fitted to the steps around by
least squares, as a step mixes kinds. -o needs matplotlib (`pip install .[eval]`).
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

SMOOTH = 25
"""Steps that a point of a curve is the mean of."""
AROUND = 110
"""Steps that the losses of all kinds are fitted to."""


def steps(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def fitted(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The loss of each kind (task/rate) of batches around every step: NaN where it has too few of them."""
    import numpy as np

    parts = [[re.sub("@[0-9]+", "", kind) for kind in row["kind"].split()] for row in rows]
    kinds = sorted({kind for step in parts for kind in step})
    shares = np.array([[step.count(kind) / len(step) for kind in kinds] for step in parts])
    losses = np.array([row["loss"] for row in rows])
    curves = np.full((len(kinds), len(rows)), np.nan)
    for i in range(len(rows)):
        window = slice(max(0, i - AROUND // 2), i + AROUND // 2)
        solution = np.linalg.lstsq(shares[window], losses[window], rcond=None)[0]
        enough = (shares[window] > 0).sum(axis=0) >= 8
        curves[enough, i] = solution[enough]
    return dict(zip(kinds, curves.tolist(), strict=True))


def draw_kinds(chains: list[list[str]], runs: dict[str, list[dict[str, Any]]], kinds: list[str], output: Path) -> None:
    """A panel a kind; a line a chain of runs, by their names."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.6), squeeze=False)
    for number, chain in enumerate(chains):
        before = 0.0
        for name in chain:
            curves = fitted(runs[name])
            millions = [before + row["tokens"] / 1e6 for row in runs[name]]
            before = millions[-1]
            for panel, kind in zip(panels[0], kinds, strict=True):
                if kind in curves:
                    panel.plot(millions, curves[kind], "--" if number % 2 else "-", label=name)
    for panel, kind in zip(panels[0], kinds, strict=True):
        panel.set_title(kind, fontsize=9)
        panel.set_xlabel("context tokens, millions")
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("loss, nats a token")
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--kinds")
    arguments = parser.parse_args()
    chains = [[Path(run) for run in chain.split(",")] for chain in arguments.runs]
    runs = {run.name: steps(run) for chain in chains for run in chain}
    first, base = next(iter(runs.items()))
    print("| run | steps | context tokens | batches as in", first, "| loss less that of", first, "|")
    print("|---|---:|---:|---:|---:|")
    known = {(row["stage"], row["step"], row["kind"]): row["loss"] for row in base}
    for name, rows in runs.items():
        pairs = [(row, known.get((row["stage"], row["step"], row["kind"]))) for row in rows]
        gaps = [row["loss"] - other for row, other in pairs if other is not None]
        cell = "–"
        if name != first and len(gaps) > 1:
            mean = sum(gaps) / len(gaps)
            error = (sum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1) / len(gaps)) ** 0.5
            cell = f"{mean:+.3f} ± {error:.3f}"
        print(f"| {name} | {len(rows)} | {rows[-1]['tokens']:,} | {len(gaps)} | {cell} |")
    if arguments.output is None:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rcc"  # the same runs draw the same file
    if arguments.kinds:
        names = [[run.name for run in chain] for chain in chains]
        draw_kinds(names, runs, arguments.kinds.split(","), arguments.output)
        return
    from matplotlib import pyplot

    # kinds of batches differ more than runs do: each loss is shown against the mean of its kind over all runs
    kinds: dict[str, list[float]] = {}
    for rows in runs.values():
        for row in rows:
            kinds.setdefault(row["kind"], []).append(row["loss"])
    means = {kind: sum(losses) / len(losses) for kind, losses in kinds.items()}
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name, rows in runs.items():
        excess = [row["loss"] - means[row["kind"]] for row in rows]
        smooth = [sum(excess[i - SMOOTH : i]) / SMOOTH for i in range(SMOOTH, len(excess) + 1)]
        axes.plot([row["tokens"] / 1e6 for row in rows[SMOOTH - 1 :]], smooth, label=name)
    axes.set_xlabel("context tokens, millions")
    axes.set_ylabel(f"loss less the mean of its kind\n(mean of {SMOOTH} steps)")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
