"""The verbs about contexts: made, joined, asked, written back, inspected, kept."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..context.information import in_one_line, of_file
from ..context.recognition import is_context
from ..context.store import default_store
from ..defaults import BUDGET
from ..documents.plain import read_text
from ..errors import InputError
from ..runtime.terminal import shown
from ..text import prompting
from ..text.counts import parse_bytes, parse_rate
from .console import (
    AllowSpecial,
    Budget,
    CompressorName,
    Device,
    Dtype,
    Json,
    Kept,
    Model,
    check_kept,
    err,
    load_engine,
    out,
    print_json,
    progress,
    status,
    write,
)
from .files import check_output, creating
from .process import refuse

if TYPE_CHECKING:
    from ..context.context import CompressedContext
    from ..engine import Engine
    from ..evaluation.reconstruction.written import WrittenBack


def compress(
    sources: Annotated[list[str], typer.Argument(help="Text files in UTF-8, one after another; - is standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The context file to write.")],
    model: Model = None,
    compressor: CompressorName = None,
    rate: Annotated[
        str, typer.Option(help="Tokens a position, or auto: the lowest trained rate that stays within the budget.")
    ] = "auto",
    budget: Budget = BUDGET,
    context: Annotated[Path | None, typer.Option(help="A context file to append to (it stays as it is).")] = None,
    kv: Kept = None,
    device: Device = None,
    dtype: Dtype = None,
    allow_special: AllowSpecial = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Compress texts into a context file."""
    check_kept(kv)
    target = check_output(output, force, [*(s for s in sources if s != "-"), *([context] if context else [])])
    texts = [read_text(source) for source in sources]
    number = parse_rate(rate)
    engine = load_engine(model, device, dtype, allow_special, context, compressor)
    before = None if context is None else engine.open(context)
    with progress("compressing", 1) as advance:
        result = engine.compress(texts, number, before, budget=budget, progress=advance)
    if kv is not None:
        result = result.to(dtype=kv)
    with creating(output):
        result.save(target, replace=force)
    _say_made(output, result)


def join(
    contexts: Annotated[list[Path], typer.Argument(help="Context files of one model with a direct prefix, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The context file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Put contexts together, one after another, without reading any text again."""
    target = check_output(output, force, contexts, "contexts to join")
    with status("joining"):
        from ..context.context import CompressedContext

        result = CompressedContext.join([CompressedContext.load(context) for context in contexts])
        with creating(output):
            result.save(target, replace=force)
    _say_made(output, result)


def ask(
    context: Annotated[str, typer.Argument(help="A context file, or a text file (compressed once and kept).")],
    questions: Annotated[list[str], typer.Argument(help="One question or several.")],
    mode: Annotated[str, typer.Option(help="human, reconstruct or compress.")] = "human",
    model: Model = None,
    compressor: CompressorName = None,
    rate: Annotated[str | None, typer.Option(help="For a text file: as in `rcc compress`.")] = None,
    budget: Budget = BUDGET,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    device: Device = None,
    dtype: Dtype = None,
    allow_special: AllowSpecial = False,
    as_json: Json = False,
) -> None:
    """Ask a context, or a text, one or several questions."""
    for question in questions:
        prompting.build(question, mode)  # a bad one is refused before a model is loaded
    engine, source = _open(context, model, compressor, rate, budget, device, dtype, allow_special, mode)
    rows = []
    for question in questions:
        if len(questions) > 1 and not as_json:
            out.print(shown(question), style="bold", markup=False)
        answer = engine.ask(
            source,
            question,
            mode,
            rate=parse_rate(rate),
            budget=budget,
            max_new_tokens=max_new_tokens,
            on_text=None if as_json else write,
        )
        if not as_json:
            write("\n")
        row = {"question": question, "answer": answer.text, "mode": mode}
        rows.append(row if answer.instruction is None else {**row, "reconstructed_question": answer.instruction})
    if as_json:
        print_json({"model": engine.name, "fingerprint": engine.fingerprint, "answers": rows})


def chat(
    context: Annotated[str, typer.Argument(help="A context file, or a text file.")],
    model: Model = None,
    compressor: CompressorName = None,
    rate: Annotated[str | None, typer.Option(help="For a text file: as in `rcc compress`.")] = None,
    budget: Budget = BUDGET,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    device: Device = None,
    dtype: Dtype = None,
    allow_special: AllowSpecial = False,
) -> None:
    """Ask question after question; an empty line or the end of input ends it."""
    if context == "-":
        raise InputError("a chat reads its questions from standard input: name a file for the text.")
    engine, source = _open(context, model, compressor, rate, budget, device, dtype, allow_special)
    typed = sys.stdin.isatty()
    if typed:
        with contextlib.suppress(ImportError):  # input() then edits lines and remembers them
            import readline  # noqa: F401
    history: list[tuple[str, str]] = []
    while True:
        try:
            question = input("> " if typed else "").strip()
        except EOFError:
            question = ""
        if not question:
            return
        try:
            answer = engine.ask(source, question, history=history, max_new_tokens=max_new_tokens, on_text=write)
        except InputError as error:
            if not typed:
                raise
            refuse(str(error))  # one question too long is not the end of a talk
        else:
            write("\n")
            history.append((question, answer.text))


def reconstruct(
    context: Annotated[Path, typer.Argument(help="A context file.")],
    prompt: Annotated[
        str | None, typer.Option(help="Words to go on from (default: the first ten tokens of the text).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 200,
    against: Annotated[
        str | None, typer.Option(help="The text that was compressed: show the differences and how much is recovered.")
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Write back what a context holds."""
    source = None if against is None else read_text(against)
    engine = load_engine(model, device, dtype, made=context)
    opened = engine.open(context)
    streams = source is None and not as_json
    with contextlib.nullcontext() if streams else status("writing"):
        written = engine.reconstruct(opened, prompt, tokens, on_text=write if streams else None)
    if streams:
        write("\n")
    result: dict[str, Any] = {"prompt": written.prompt, "text": written.text}
    if source is not None:
        from ..evaluation.reconstruction.written import compare

        with progress("measuring the whole text", 1, "spans") as advance:
            beside = compare(engine, opened, source, written, advance)
        if not beside.same_text:
            err.print(
                "this is not the text that was compressed: the figures compare two different texts.", style="yellow"
            )
        result |= _figures(beside)
        if not as_json:
            _show(written.prompt, written.text, beside)
    if as_json:
        print_json(result)


def inspect(
    context: Annotated[Path, typer.Argument(help="A context file.")],
    as_json: Json = False,
) -> None:
    """Say what a context file holds, after checking every byte of it."""
    info = {"file": str(context), **of_file(context)}
    if as_json:
        print_json(info)
        return
    for key, value in info.items():
        if key == "pieces":
            value = ", ".join(
                f"{p['tokens']:,} tokens at {p['rate']}×{' with chat marks' * p.get('special_tokens', False)}"
                for p in value
            )
        elif key == "versions":
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        out.print(f"{key.replace('_', ' '):20}{f'{value:,}' if isinstance(value, int) else shown(value)}", markup=False)


def contexts(
    remove: Annotated[
        list[str] | None, typer.Option(help="Remove the context of this address, or its beginning.")
    ] = None,
    prune: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove the least recently used beyond so many bytes: 2GB, 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the contexts that are kept of texts that were asked directly, or remove some."""
    limit = None if prune is None else parse_bytes(prune)
    store = default_store()
    removed = [store.remove(address).path for address in remove or []]
    if limit is not None:
        removed += store.prune(limit)
    stored = store.list()
    if as_json:
        rows = [
            {**vars(c), "path": str(c.path), "last_used": c.last_used.isoformat(timespec="seconds")} for c in stored
        ]
        print_json({"folder": str(store.folder), "removed": [str(path) for path in removed], "contexts": rows})
        return
    for path in removed:
        out.print(f"removed {path}", markup=False)
    for c in stored:
        out.print(
            f"{c.address[:12]}  {c.last_used.astimezone():%Y-%m-%d %H:%M}  {c.bytes / 1e6:7.1f} MB"
            f"  {c.tokens:9,} tokens in {c.positions:6,} positions  {shown(c.model or 'damaged')}",
            markup=False,
        )
    total = sum(c.bytes for c in stored)
    out.print(f"{len(stored)} contexts, {total / 1e6:,.1f} MB in {store.folder}", markup=False)


# ---------------------------------------------------------------- what the verbs share
def _open(
    path: str,
    model: str | None,
    compressor: str | None,
    rate: str | None,
    budget: int,
    device: str | None,
    dtype: str | None,
    allow_special: bool,
    mode: str = "human",
) -> tuple[Engine, CompressedContext | str]:
    """Load the engine, and the context in a file or of a text; the text itself where it is read with each question."""
    if is_context(path):
        if rate is not None:
            raise InputError(f"--rate is for a text, and {path} is compressed already: leave it out.")
        engine = load_engine(model, device, dtype, allow_special, path, compressor)
        return engine, engine.open(Path(path))
    text, number = read_text(path), parse_rate(rate)  # refused before a model is loaded
    engine = load_engine(model, device, dtype, allow_special, compressor=compressor)
    if engine.reads_with_question(mode):
        return engine, text
    with progress("compressing", 1) as advance:
        context = engine.open(text, number, budget=budget, progress=advance, notice=_say)
    return engine, context


def _say(message: str) -> None:
    err.print(message, markup=False)


def _say_made(output: Path, context: CompressedContext) -> None:
    err.print(f"{output}: {in_one_line(context)}", markup=False)


def _figures(beside: WrittenBack) -> dict[str, Any]:
    figures: dict[str, Any] = {"same_text": beside.same_text}
    if beside.truth:
        figures |= {"written_tokens": len(beside.guess), "written_recovered": beside.recovered}
    whole = beside.whole
    figures |= {"source_tokens": beside.source_tokens, "tokens_measured": whole.tokens}
    return figures | {"tokens_recovered": whole.accuracy, "loss": whole.loss}


def _show(prompt: str, text: str, beside: WrittenBack) -> None:
    """Print what was written beside the text, and how much of it is recovered."""
    whole = beside.whole
    if beside.truth:
        _show_differences(prompt, beside.guess_text, beside.truth_text)
        out.print(f"written freely: {beside.recovered:.1%} of {len(beside.truth)} tokens as in the text", markup=False)
    else:
        out.print(f"{prompt}{text}", markup=False)
        err.print("the prompt does not occur in the text: nothing to compare what was written with.", style="yellow")
    out.print(
        f"whole text: {whole.accuracy:.1%} of {whole.tokens:,} tokens recovered, loss {whole.loss:.3f}"
        f" (each predicted from the context, {beside.prompt_tokens} tokens of prompt and the true tokens since, in"
        f" spans of 256; rate {beside.rate}×)",
        markup=False,
    )


def _show_differences(prompt: str, guess: str, truth: str) -> None:
    """Print what was written: words that the text has otherwise struck out, followed by the text's."""
    prompt, guess, truth = (shown(text, lines=True) for text in (prompt, guess, truth))
    a, b = (re.findall(r"\s*\S+|\s+$", text) for text in (guess, truth))
    plain = not out.is_terminal
    line = Text(prompt, style="dim")
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        old, new = "".join(a[i:j]), "".join(b[k:m])
        if kind == "equal":
            line.append(old)
        elif plain:  # wdiff's marks, where there are no colours
            line.append((f" [-{old.strip()}-]" if old else "") + (f" {{+{new.strip()}+}}" if new else ""))
        else:
            line.append(old, style="red strike")
            line.append(new, style="green")
    out.print(line)
