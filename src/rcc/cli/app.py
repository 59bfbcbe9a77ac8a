"""`rcc`: one thin function a verb. Errors are one sentence and exit code 2; progress goes to standard error."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import ExistsError, FileError, InputError, RCCError
from ..runtime import allocator, atomic
from .console import (
    BUDGET,
    Budget,
    Device,
    Dtype,
    Json,
    Model,
    err,
    load_model,
    out,
    print_json,
    progress,
    read_text,
    shown,
    status,
)
from .evaluation import app as evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..checkpoints.convert import Fate
    from ..context.context import CompressedContext
    from ..model.rcc import RCCForCausalLM

app = typer.Typer(
    name="rcc",
    help="Compress a long text once, keep it in a file, ask it anything.",
    epilog='For instance: rcc compress book.txt -o book.rcc, then rcc ask book.rcc "Who is the heroine?"',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the command line: run the app, turn errors into a sentence and an exit code."""
    allocator.configure()  # before torch allocates anything
    logging.basicConfig(format="rcc: %(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Shown("rcc: %(message)s"))
    logging.getLogger("rcc").setLevel(logging.INFO if os.environ.get("RCC_VERBOSE") else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # a killed process cleans up as an interrupted one does; so does one whose terminal is closed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup asks for that
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    _prepare_streams()
    code: Any = 0
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()  # what cannot be written shows here, not when Python ends
        if code == 130:  # typer's answer to Ctrl-C
            _say_interrupted()
    except RCCError as error:
        code = _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _say_interrupted()
        code = 130
    except SystemExit as stop:  # 1 is typer's and rich's for a reader that went away: `rcc … | head`
        code = 141 if stop.code == 1 else stop.code
    except BrokenPipeError:
        code = 141
    except OSError as error:
        code = _refuse(re.sub(r"^\[Errno \d+\] ", "", str(error)).partition("\n")[0].rstrip(".") + ".")
    except Exception as error:
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "allocate memory" in str(error)
        ):
            code = _refuse("out of memory: use a higher --rate, or a shorter text.")
        elif hasattr(error, "format_message"):  # typer's own, of wrong usage
            code = _usage(error)
        else:
            raise
    if code not in (0, None):
        _drop_output()
    sys.exit(code or 0)


class _Shown(logging.Formatter):
    """What is logged holds names that somebody else gave."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=True)


def _say_interrupted() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again while Python ends, it would be another exit status
    err.print("rcc: interrupted.")


def _refuse(message: str) -> int:
    err.print(f"rcc: {shown(message)}", markup=False)
    return 2


def _usage(error: Any) -> int:
    message = error.format_message()
    if "\n" in message:  # no command: this is the help
        error.show()
        return error.exit_code
    return _refuse(f"{message.rstrip('.')} (see {error.ctx.command_path if error.ctx else 'rcc'} --help).")


def _prepare_streams() -> None:
    """Streams that are closed, or that cannot show or hold every character, are no reason to fail."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if name == "stdin" else "replace")


def _drop_output() -> None:
    """Forget what could not be written: Python would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"rcc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.add_typer(evaluation, name="eval")


# ---------------------------------------------------------------- verbs
@app.command()
def compress(
    sources: Annotated[list[str], typer.Argument(help="Text files in UTF-8, one after another; - is standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The context file to write.")],
    model: Model = None,
    rate: Annotated[
        str, typer.Option(help="Tokens a position, or auto: the lowest trained rate that stays within the budget.")
    ] = "auto",
    budget: Budget = BUDGET,
    context: Annotated[Path | None, typer.Option(help="A context file to append to (it stays as it is).")] = None,
    device: Device = None,
    dtype: Dtype = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Compress texts into a context file."""
    target = _check_output(output, force, [*(s for s in sources if s != "-"), *([context] if context else [])])
    texts = [read_text(source) for source in sources]
    number = _parse_rate(rate)
    before = _context_info(context) if context is not None else None
    rcc, tokenizer = load_model(model, device, dtype, before)
    grown = _load_context(context, rcc) if context is not None else None
    result = _compress(rcc, tokenizer, texts, number, grown, budget)
    with _creating(output):
        result.save(target, replace=force)
    err.print(f"{output}: {_describe(result)}", markup=False)


@app.command()
def join(
    contexts: Annotated[list[Path], typer.Argument(help="Context files of one model with a direct prefix, in order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The context file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Put contexts together, one after another, without reading any text again."""
    target = _check_output(output, force, contexts, "contexts to join")
    with status("joining"):
        from ..context.context import CompressedContext

        result = CompressedContext.join([CompressedContext.load(context) for context in contexts])
        with _creating(output):
            result.save(target, replace=force)
    err.print(f"{output}: {_describe(result)}", markup=False)


@app.command()
def ask(
    context: Annotated[str, typer.Argument(help="A context file, or a text file (compressed once and kept).")],
    questions: Annotated[list[str], typer.Argument(help="One question or several.")],
    mode: Annotated[str, typer.Option(help="human, reconstruct or compress.")] = "human",
    model: Model = None,
    rate: Annotated[str | None, typer.Option(help="For a text file: as in `rcc compress`.")] = None,
    budget: Budget = BUDGET,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 128,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Ask a context, or a text, one or several questions."""
    from .. import engine
    from ..text import prompting

    prompts = [prompting.build(question, mode) for question in questions]
    rcc, tokenizer, source = _open(context, model, rate, device, dtype)
    joined = isinstance(source, str) and prompting.joins(rcc.config, prompts[0])
    value = None if joined else _context(rcc, tokenizer, source, rate, budget)
    rows = []
    for question, prompt in zip(questions, prompts, strict=True):
        if len(questions) > 1 and not as_json:
            out.print(shown(question), style="bold", markup=False)
        if joined:  # of use for this question only, so not kept
            value = _compress(rcc, tokenizer, [f"{source}{prompt.encoder_text}"], _parse_rate(rate), None, budget)
            prompt = replace(prompt, encoder_text="")
        streamer = None if as_json else _streamer(tokenizer, prompt)
        instruction, answer = engine.ask(rcc, tokenizer, value, prompt, max_new_tokens, streamer=streamer)
        row = {"question": question, "answer": answer, "mode": mode}
        rows.append(row if instruction is None else {**row, "reconstructed_question": instruction})
    if as_json:
        print_json({"model": rcc.config.name, "fingerprint": rcc.fingerprint, "answers": rows})


@app.command()
def chat(
    context: Annotated[str, typer.Argument(help="A context file, or a text file.")],
    model: Model = None,
    rate: Annotated[str | None, typer.Option(help="For a text file: as in `rcc compress`.")] = None,
    budget: Budget = BUDGET,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask question after question; an empty line or the end of input ends it."""
    from .. import engine
    from ..text import prompting
    from ..text.tokens import token_ids

    if context == "-":
        raise InputError("a chat reads its questions from standard input: name a file for the text.")
    rcc, tokenizer, source = _open(context, model, rate, device, dtype)
    value = _context(rcc, tokenizer, source, rate, budget)
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
        room = rcc.window - len(value) - max_new_tokens
        try:
            while True:  # a long talk forgets its beginning
                prompt = prompting.build(question, "human", history)
                if not history or token_ids(tokenizer, prompt.decoder_text).shape[1] <= room:
                    break
                history.pop(0)
            streamer = _streamer(tokenizer, prompt)
            _, answer = engine.ask(rcc, tokenizer, value, prompt, max_new_tokens, streamer=streamer)
        except InputError as error:
            if not typed:
                raise
            _refuse(str(error))  # one question too long is not the end of a talk
        else:
            history.append((question, answer))


@app.command()
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

    from .. import engine
    from ..text.tokens import token_ids

    source = None if against is None else read_text(against)
    rcc, tokenizer = load_model(model, device, dtype, _context_info(context))
    value = _load_context(context, rcc)
    if prompt is not None:
        ids = token_ids(tokenizer, prompt)
    else:
        import torch

        ids = torch.tensor([value.pieces[0][0].opening])
    if ids.shape[1] == 0:
        raise InputError("the prompt is empty: give some words to go on from.")
    streamer = None if as_json or source is not None else _plain_streamer(tokenizer)
    with status("writing") if streamer is None else contextlib.nullcontext():
        written = rcc.generate(
            ids,
            context=value,
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.0,  # a base's own settings may forbid what a text repeats
            eos_token_id=engine.NEVER,
            pad_token_id=0,
            streamer=streamer,
        )[0]
    result = {"prompt": tokenizer.decode(ids[0]), "text": tokenizer.decode(written[ids.shape[1] :])}
    if source is not None:
        result |= _compare(rcc, tokenizer, value, source, written.tolist(), ids.shape[1], not as_json)
    if as_json:
        print_json(result)


@app.command()
def inspect(
    context: Annotated[Path, typer.Argument(help="A context file.")],
    as_json: Json = False,
) -> None:
    """Say what a context file holds, after checking every byte of it."""
    info = {"file": str(context), **_load_context(context, None).info()}
    if as_json:
        print_json(info)
        return
    for key, value in info.items():
        if key == "pieces":
            value = ", ".join(f"{p['tokens']:,} tokens at {p['rate']}×" for p in value)
        elif key == "versions":
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        out.print(f"{key.replace('_', ' '):20}{f'{value:,}' if isinstance(value, int) else shown(value)}", markup=False)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML: see recipes/ and docs/training.md.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting: stages.0.max_tokens=1e6. May be repeated.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="A trained model to start from: a shipped one, a folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and a sample of every task only.")] = False,
) -> None:
    """Train a model by a recipe; under torchrun, in several processes."""
    first = os.environ.get("RANK", "0") == "0"
    err.quiet = not first  # the others would say the same
    with status("loading torch and transformers"):
        from transformers.utils import logging as quiet

        from ..training.recipe import Recipe

        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
    settings = Recipe.load(recipe, overrides)
    if dry_run:
        from ..training.plan import plan

        plan(settings, init or settings.init, out)
        return
    if output is None:
        raise InputError("--output is missing: name a folder for the run, or use --dry-run.")
    from ..training.trainer import Interrupted, Run

    try:
        Run(settings, output, resume, init).go()
    except Interrupted as stop:
        again = shlex.join(["rcc", "train", str(output / "recipe.yaml"), "--output", str(output), "--resume"])
        err.print(f"rcc: interrupted; {again} goes on.", markup=False)
        sys.exit(128 + stop.number)


@app.command()
def models(
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="BACKBONE", help="What it would cost: a config.json, a folder, a hub id or pythia-1.4b, …"
        ),
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="With --plan: another backbone that reads.")] = None,
    rates: Annotated[str | None, typer.Option(help="With --plan: compression rates (default: 8,32).")] = None,
    segment_length: Annotated[
        int | None, typer.Option(min=1, help="With --plan: tokens read at once (default: 2048).")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="With --plan: LoRA's (default: 16).")] = None,
    full: Annotated[bool, typer.Option("--full", help="With --plan: no LoRA, both sides' own weights learn.")] = False,
    dtype: Annotated[str | None, typer.Option(help="With --plan: precision (default: bfloat16).")] = None,
    as_json: Json = False,
) -> None:
    """List the models that come with rcc, or plan one on a backbone whose weights need not be here."""
    if plan is not None:
        _plan(plan, encoder, rates, segment_length, lora_rank, full, dtype, as_json)
        return
    given = {"encoder": encoder, "rates": rates, "segment-length": segment_length, "lora-rank": lora_rank}
    for name, value in {**given, "full": full or None, "dtype": dtype}.items():
        if value is not None:
            raise InputError(f"--{name} is for a plan: name a backbone with --plan.")
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


def _plan(
    backbone: str,
    encoder: str | None,
    rates: str | None,
    segment_length: int | None,
    lora_rank: int | None,
    full: bool,
    dtype: str | None,
    as_json: bool,
) -> None:
    if full and lora_rank is not None:
        raise InputError("--full trains all weights, without LoRA: leave out --lora-rank.")
    numbers = []
    for word in ("8,32" if rates is None else rates).split(","):
        if not re.fullmatch(" *[1-9][0-9]{0,8} *", word):
            raise InputError(f"--rates {rates} are not rates: give whole numbers with commas between, such as 8,32.")
        numbers.append(int(word))
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise InputError(f"--dtype {dtype} is unknown: use bfloat16, float16 or float32.")
    with status("loading torch and transformers"):
        import torch
        from transformers.utils import logging as quiet

        from ..planning import blueprint as planning

        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
    with status("planning"):
        precision = getattr(torch, dtype or "bfloat16")
        data = planning.plan(
            backbone, encoder, list(dict.fromkeys(numbers)), segment_length or 2048, lora_rank, full, precision
        )
    if as_json:
        print_json(data)
        return
    for line in planning.lines(data):
        out.print(line, markup=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `rcc eval` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")],
    samples: Annotated[int, typer.Option(min=0, help="Samples behind each figure, at most; 0: none.")] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if it exists.")] = False,
) -> None:
    """Make one HTML page of evaluations: charts, tables, and the samples behind every figure."""
    from ..evaluation.html import page as reporting

    target = _check_output(output, force, [file for folder in folders if folder.is_dir() for file in folder.iterdir()])
    with _creating(output):
        reporting.write(target, reporting.page(folders, samples), replace=force)
    some = f"{len(folders)} evaluation{'s' * (len(folders) > 1)}"
    err.print(f"{output}: {some}, {target.stat().st_size / 1e6:.1f} MB", markup=False)


@app.command()
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
    with status("loading torch and transformers"):
        from transformers.utils import logging as quiet

        from ..checkpoints.convert import IncompleteError, convert_checkpoint

        quiet.set_verbosity_error()
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


# ---------------------------------------------------------------- input
def _parse_rate(rate: str | None) -> int | None:
    """`auto`, the default, is None."""
    if rate in (None, "auto"):
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", rate):
        raise InputError(f"--rate {rate} is not a rate: use a whole number such as 8, or auto.")
    return int(rate)


@contextlib.contextmanager
def _creating(output: Path) -> Iterator[None]:
    """What appeared since :func:`_check_output` looked is refused in the same words."""
    try:
        yield
    except ExistsError:
        raise FileError(f"{output} exists: use --force to replace it.") from None


def _check_output(output: Path, force: bool, inputs: Iterable[str | Path] = (), called: str = "inputs") -> Path:
    """Refuse before the work is done, not after → the file to write, behind any symbolic links.

    Args:
        inputs: files that are read, which the output may not be.
        called: what a message calls them.
    """
    target = Path(os.path.realpath(output))
    if taken := next((source for source in inputs if _is_same(source, target)), None):
        raise FileError(f"{output} is one of the {called}, {taken}: name another file for the output.")
    if os.path.isdir(target):
        raise FileError(f"{output} is a folder: name a file in it.")
    if os.path.exists(target) and not os.path.isfile(target):
        raise FileError(f"{output} is not a regular file: name one to write.")  # a device must not be replaced
    if os.path.exists(target) and not force:
        raise FileError(f"{output} exists: use --force to replace it.")
    if not os.path.isdir(target.parent):
        what = "is not a folder" if os.path.exists(target.parent) else "does not exist"
        raise FileError(f"{output} cannot be written: {output.parent} {what}.")
    try:  # permissions do not tell everything
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)  # a name that is too long
        with tempfile.NamedTemporaryFile(prefix=".rcc-", suffix=".tmp", dir=target.parent):
            pass
    except OSError as error:
        raise FileError(f"{output} cannot be written: {error.strerror or error}.") from None
    return target


def _is_same(source: str | Path, target: Path) -> bool:
    try:
        return os.path.samefile(source, target)
    except OSError:  # reading it will say what is wrong
        return False


def _is_context(path: str) -> bool:
    from ..context import file as fileformat

    # a damaged context should be called that, not a strange text
    return path.endswith(".rcc") or (path != "-" and fileformat.is_ours(Path(path), "context"))


def _context_info(path: Path) -> dict[str, Any]:
    """Who made a context: a damaged one is refused here, before a model is loaded for it."""
    from ..context import file as fileformat

    return fileformat.read(path, "context", "full")[0]


# ---------------------------------------------------------------- models and contexts
def _load_context(path: Path, rcc: RCCForCausalLM | None) -> CompressedContext:
    from ..context.context import CompressedContext

    return CompressedContext.load(path, model=rcc)


def _open(
    path: str, model: str | None, rate: str | None, device: str | None, dtype: str | None
) -> tuple[RCCForCausalLM, PreTrainedTokenizerBase, CompressedContext | str]:
    """The model, its tokenizer, and the context in a file, or else the text."""
    if _is_context(path):
        if rate is not None:
            raise InputError(f"--rate is for a text, and {path} is compressed already: leave it out.")
        rcc, tokenizer = load_model(model, device, dtype, _context_info(Path(path)))
        return rcc, tokenizer, _load_context(Path(path), rcc)
    text = read_text(path)
    _parse_rate(rate)  # a bad one is refused before a model is loaded
    return *load_model(model, device, dtype), text


def _context(
    rcc: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    source: CompressedContext | str,
    rate: str | None,
    budget: int,
) -> CompressedContext:
    """What :func:`_open` found, as a context: that of a text from the cache, if it was asked before."""
    if not isinstance(source, str):
        return source
    from .. import checkpoints

    chosen = rate or f"auto {budget}"
    key = hashlib.sha256(f"{rcc.fingerprint} {chosen} {rcc.dtype}\n{source}".encode()).hexdigest()
    kept = checkpoints.home() / "contexts" / f"{key[:32]}.rcc"
    if os.path.exists(kept):  # unlike Path.exists, never raises: the folder may be somebody else's
        with contextlib.suppress(RCCError):  # a damaged one is made again
            context = _load_context(kept, rcc)
            err.print(f"read {kept}: {_describe(context)}", markup=False)
            return context
    context = _compress(rcc, tokenizer, [source], _parse_rate(rate), None, budget)
    try:
        atomic.private_folder(kept.parent)  # a context is as readable as its text
        context.save(kept, private=True)
        err.print(f"kept as {kept}: {_describe(context)}", markup=False)
    except OSError as error:  # the answer does not need the file
        err.print(f"not kept for the next time: {error}", markup=False)
    return context


def _compress(
    rcc: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    rate: int | None,
    context: CompressedContext | None,
    budget: int,
) -> CompressedContext:
    """Compress texts one after another, each from a segment of its own, at one rate that fits them all."""

    from ..text.tokens import token_ids

    with status("reading the text"):
        rows = [token_ids(tokenizer, text) for text in texts]
    lengths = [row.shape[1] for row in rows]
    if rate is None:
        rate = rcc.fitting_rate(lengths, context, budget=budget)
    done, total = 0, sum(lengths)
    with progress("compressing", total) as advance:
        for ids in rows:
            context = rcc.compress(ids, rate=rate, context=context, progress=partial(_add, advance, done))
            done += ids.shape[1]
    assert context is not None
    return context.to(dtype=rcc.decoder.config.dtype)  # as the model is stored, whatever it is computed in


def _add(advance: Callable[..., None], before: int, done: int, total: int) -> None:
    advance(before + done)


def _compare(
    rcc: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    context: CompressedContext,
    source: str,
    written: list[int],
    start: int,
    show: bool,
) -> dict[str, Any]:
    """What was written, beside the text; and how much of the whole text the context gives back."""
    from ..evaluation.reconstruction.teacher_forcing import PROMPT, teacher_forced
    from ..model.encoder import piece_of
    from ..text.tokens import token_ids

    ids = token_ids(tokenizer, source)[0]
    piece = context.pieces[0][0]
    digest = piece_of(ids, piece.rate, rcc.config).sha256
    same = any(digest == p.sha256 for p in context.pieces[0])
    if not same:
        err.print("this is not the text that was compressed: the figures compare two different texts.", style="yellow")
    truth = _following(ids.tolist(), written[:start], len(written) - start)
    found: dict[str, Any] = {"same_text": same}
    if truth:
        guess = written[start : start + len(truth)]
        found["written_tokens"] = len(guess)
        found["written_recovered"] = sum(a == b for a, b in zip(guess, truth, strict=False)) / len(truth)
        if show:
            _show_differences(tokenizer.decode(written[:start]), tokenizer.decode(guess), tokenizer.decode(truth))
    elif show:
        out.print(tokenizer.decode(written), markup=False)
        err.print("the prompt does not occur in the text: nothing to compare what was written with.", style="yellow")
    with progress("measuring the whole text", 1, "spans") as advance:
        whole = teacher_forced(rcc, context, ids, progress=advance)
    found |= {"source_tokens": len(ids), "tokens_measured": whole.tokens, "tokens_recovered": whole.accuracy}
    found["loss"] = whole.loss
    if show:
        if truth:
            out.print(
                f"written freely: {found['written_recovered']:.1%} of {len(truth)} tokens as in the text", markup=False
            )
        out.print(
            f"whole text: {whole.accuracy:.1%} of {whole.tokens:,} tokens recovered, loss {whole.loss:.3f}"
            f" (each predicted from the context, {PROMPT} tokens of prompt and the true tokens since, in spans of 256;"
            f" rate {piece.rate}×)",
            markup=False,
        )
    return found


def _following(text: list[int], prompt: list[int], count: int) -> list[int]:
    """The tokens of `text` that follow the first occurrence of `prompt`."""
    for i in range(len(text) - len(prompt)):
        if text[i : i + len(prompt)] == prompt:
            return text[i + len(prompt) : i + len(prompt) + count]
    return []


def _show_differences(prompt: str, guess: str, truth: str) -> None:
    """Print what was written: words that the text has otherwise struck out, followed by the text's."""
    import difflib

    from rich.text import Text

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


# ---------------------------------------------------------------- output
def _describe(context: CompressedContext) -> str:
    rate = context.rate if isinstance(context.rate, int) else "/".join(map(str, context.rate))
    return f"{context.source_tokens:,} tokens at {rate}× in {len(context):,} positions, {context.nbytes / 1e6:.1f} MB"


def _plain_streamer(tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import TextStreamer

    class Plain(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(shown(text, lines=True), stream_end)

    return Plain(tokenizer)


def _streamer(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> Any:
    """Prints the answer as it is written: without the instruction and the chat form's marks around it."""
    from transformers import TextStreamer

    class Answer(TextStreamer):
        written = shown = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.written += text
            answer = prompt.parse(self.written)[1]
            if not stream_end:
                answer = answer.removesuffix("<")  # may turn out to be the end mark
            sys.stdout.write(shown(answer[len(self.shown) :], lines=True) + ("\n" if stream_end else ""))
            sys.stdout.flush()
            self.shown = answer

    return Answer(tokenizer, skip_prompt=True)


if __name__ == "__main__":
    main()
