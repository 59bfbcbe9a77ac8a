"""Draw runs' training losses over each other, and compare them batch by batch.

    python scripts/curves.py RUN RUN … [-o curves.svg]          (needs matplotlib for -o)

Runs with the same seed, tasks and sizes read the same samples at the same step, whatever else differs: where step and
kind of batch agree with the first run's, the mean difference in loss is printed with its standard error.
"""

import argparse
import json
from pathlib import Path

SMOOTH = 25
"""Steps that a point of a curve is the mean of."""


def steps(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    runs = {run.name: steps(run) for run in arguments.runs}
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
