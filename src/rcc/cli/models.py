"""The verbs about models: which there are, what one would cost, the published checkpoint converted."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..text.counts import parse_counts
from .console import Json, loading, out, print_json, progress, status

if TYPE_CHECKING:
    from ..checkpoints.published import Fate


def models(as_json: Json = False) -> None:
    """List the models that come with rcc."""
    from .. import checkpoints
    from ..config import RCCConfig

    rows: list[dict[str, Any]] = []
    for name, folder in checkpoints.shipped_models().items():
        config = RCCConfig.load(folder)
        base = config.base["decoder"].source
        made = checkpoints.home() / "bases" / base
        rows.append(
            {
                "name": name,
                "megabytes": round(sum(f.stat().st_size for f in folder.iterdir()) / 1e6, 1),
                "rates": config.rates,
                "segment_length": config.segment_length,
                "folder": str(folder),
                "base": base,
                "base_folder": str(made),
                "base_ready": made.is_dir(),
            }
        )
    if as_json:
        print_json(rows)
        return
    for row in rows:
        out.print(row["name"], style="bold")
        lines = {
            "size": f"{row['megabytes']} MB, without its base",
            "trained rates": ", ".join(f"{rate}×" for rate in row["rates"]),
            "segment": f"{row['segment_length']} tokens",
            "files": row["folder"],
            "base": f"{row['base']}, {row['base_folder'] if row['base_ready'] else 'fetched at first use'}",
        }
        for key, value in lines.items():
            out.print(f"  {key:16}{value}", markup=False)


def plan(
    backbone: Annotated[str, typer.Argument(help="A config.json, its folder, a hub id, or pythia-1.4b, llama-3-8b, …")],
    encoder: Annotated[str | None, typer.Option(help="Another backbone that reads (default: the same).")] = None,
    prefix: Annotated[str, typer.Option(help="residual, the paper's, or direct.")] = "residual",
    rates: Annotated[str, typer.Option(help="Compression rates.")] = "8,32",
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens read at once.")] = 2048,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="LoRA's (default: 16).")] = None,
    full: Annotated[bool, typer.Option("--full", help="No LoRA: both sides' own weights learn.")] = False,
    dtype: Annotated[str, typer.Option(help="Precision of the weights and of the KV cache.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Say what a model on a backbone would cost, whose weights need not be here."""
    if full and lora_rank is not None:
        raise InputError("--full trains all weights, without LoRA: leave out --lora-rank.")
    numbers = parse_counts(rates, "--rates")
    with loading():
        from ..planning import plan as planning
        from ..planning import table
        from ..runtime.precision import parse_dtype
    with status("planning"):
        precision = parse_dtype(dtype)
        assert precision is not None
        data = planning.plan(backbone, encoder, numbers, segment_length, lora_rank, full, precision, prefix)
    if as_json:
        print_json(data)
        return
    for line in table.lines(data):
        out.print(line, markup=False)


def convert_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder with the authors' files.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to make.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with the model's tokenizer (default: SOURCE, if it has one).")
    ] = None,
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens a segment that it was trained with.")] = 2048,
    rate: Annotated[int, typer.Option(min=1, help="The rate that it was trained at.")] = 32,
    as_json: Json = False,
) -> None:
    """Turn the RCC authors' published checkpoint into a model folder."""
    with loading():
        from ..checkpoints.convert import convert_checkpoint
        from ..checkpoints.published import IncompleteError
    try:
        with progress("converting", 1, "MB") as advance:
            done = convert_checkpoint(
                source,
                output,
                tokenizer,
                segment_length=segment_length,
                rate=rate,
                progress=lambda bytes_done, total: advance(bytes_done // 10**6, total // 10**6),
            )
    except IncompleteError as error:
        if not as_json:
            _print_tensors(error.tensors)
        raise
    ask_it = shlex.join(["rcc", "ask", "--model", str(output), "TEXTFILE", "QUESTION", "--mode", "reconstruct"])
    if as_json:
        tensors = [asdict(tensor) for tensor in done.tensors]
        words = None if done.tokenizer is None else str(done.tokenizer)
        print_json({"folder": str(output), "tokenizer": words, "ask": ask_it, "tensors": tensors})
        return
    _print_tensors(done.tensors)
    if done.tokenizer is None:
        out.print(f"no tokenizer: copy one into {output / 'decoder'}, or convert again with --tokenizer.", markup=False)
    out.print(f"{output}: {done.summary()}; ask it with {ask_it}", markup=False)


def _print_tensors(tensors: list[Fate]) -> None:
    for tensor in tensors:
        out.print(f"{tensor.fate:10}{tensor.name} {'→' if tensor.fate == 'used' else '–'} {tensor.note}", markup=False)
