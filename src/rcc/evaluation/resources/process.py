"""Measure one thing in a process of its own: a text compressed, a context asked, or a text read plain.

Memory that a process once had is seldom given back: a peak is that of one measurement only in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import logging as quiet

from ... import checkpoints
from ...config import RCCConfig, SideConfig
from ...context.cache import BlockLayer, block_layers
from ...context.context import CompressedContext
from ...errors import RCCError
from ...model import backbones
from ...model.compressor import Compressor
from ...model.opening import language_model, open_compressor
from ...model.rcc import RCCForCausalLM
from ...planning import blueprint as planning
from ...runtime import allocator, memory
from ..results import Skipped
from .subject import weights

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        task: a name in :data:`TASKS`.
        model: a model's name or folder, or the blueprint to make an RCC model of with random weights.
        text: an .npy file of token ids, of which the first `length` are read and the first `question` asked.
        context: the file to save the context to, or to load it from.
        rate: that a text is compressed at.
        device: where to measure.
        dtype: of a model that is loaded.
        batch_tokens: that are read at once; None: what `compress` decides.
        compressor: see :func:`rcc.model.opening.open_compressor`.
    """

    task: str
    model: str | planning.Blueprint
    text: Path
    context: Path
    length: int
    rate: int
    question: int
    device: str
    dtype: torch.dtype | None
    batch_tokens: int | None
    compressor: str | None = None

    def ids(self, count: int) -> Tensor:
        """Return the first tokens of the text, [1, count]."""
        ids = np.load(self.text, mmap_mode="r")[:count].astype(np.int64)
        return torch.from_numpy(ids)[None].to(self.device)

    def load(self) -> Compressor:
        """Return the model, its weights read from the disk."""
        if isinstance(self.model, planning.Blueprint):
            model = self.model.build(self.device)
            # hashing all the weights would take long, and the seed is the same in every process
            model.record_fingerprint("random")
        elif language_model(self.model, self.compressor) is None:  # needs no tokenizer
            model = RCCForCausalLM.from_pretrained(self.model, device=self.device, dtype=self.dtype)
        else:
            selection, _ = open_compressor(self.model, self.device, self.dtype, compressor=self.compressor)
            _read_in(selection.decoder)
            return selection
        return _read_in(model)

    def load_base(self) -> PreTrainedModel:
        """Return the decoder's base alone, its weights read from the disk."""
        if isinstance(self.model, str):
            selected = language_model(self.model, self.compressor)
            if selected is not None:
                base = selected[1]
            else:
                folder = checkpoints.resolve_model(self.model)
                base = checkpoints.resolve_base(RCCConfig.load(folder).base["decoder"].source, relative_to=folder)
            backbone = checkpoints.load_backbone(base, head=True, dtype=self.dtype or "auto")
            backbone.to(self.device)  # type: ignore[arg-type]  # transformers' wrapper hides its types
        else:
            with torch.device(self.device):
                backbone = self.model.build_base()
            backbone.eval()
        return _read_in(backbone)


# ---------------------------------------------------------------- what is measured
def compress(job: Job) -> dict[str, Any]:
    """Compress a text and save its context."""
    memory_used = _Memory(job)
    model, ids = job.load(), job.ids(job.length)
    seconds, context = _timed(job, lambda: model.compress(ids, rate=job.rate, batch_tokens=job.batch_tokens))
    peak = memory_used.peak()
    saving, _ = _timed(job, lambda: context.save(job.context))
    return {
        "positions": len(context),
        "weights_bytes": planning.stored_bytes(weights(model)),
        "kv_bytes": context.nbytes,
        "file_bytes": job.context.stat().st_size,
        **{f"compress_{name}": value for name, value in peak.items()},
        "libraries_bytes": memory_used.before,
        "compress_seconds": seconds,
        "save_seconds": saving,
    }


def ask(job: Job) -> dict[str, Any]:
    """Load a context, mapped, and write the first token after a question; then load it with every byte checked."""
    memory_used = _Memory(job)
    model, question = job.load(), job.ids(job.question)
    load = partial(CompressedContext.load, job.context, model)
    loading, context = _timed(job, partial(load, verify="header"))
    answer = partial(model.generate, max_new_tokens=1, do_sample=False, pad_token_id=0)
    asking, tokens = _timed(job, partial(answer, question, context=context))
    peak = memory_used.peak()
    del context
    checking, _ = _timed(job, partial(load, verify="full"))
    return {
        **{f"ask_{name}": value for name, value in peak.items()},
        "load_seconds": loading,
        "load_full_seconds": checking,
        "first_token_seconds": loading + asking,
        "token": str(int(tokens[0, -1])),
    }


@torch.no_grad()
def plain(job: Job) -> dict[str, Any]:
    """Read the text and the question as they are, batch by batch, up to the first token."""
    memory_used = _Memory(job)
    base = job.load_base()
    ids = torch.cat([job.ids(job.length), job.ids(job.question)], 1)

    def read() -> Cache:
        cache = Cache(layers=[BlockLayer(ids.shape[1]) for _ in backbones.blocks(backbones.body(base))])
        for batch in ids.split(job.batch_tokens or ids.shape[1], 1):
            past = cache.get_seq_length()
            order = torch.arange(past, past + batch.shape[1], device=ids.device)[None]
            base(
                input_ids=batch, position_ids=order, **{backbones.CACHE: cache}, use_cache=True, logits_to_keep=1
            ).logits.argmax()
        return cache

    seconds, cache = _timed(job, read)
    held = sum(tensor.nbytes for layer in block_layers(cache) for tensor in layer.block)
    return {
        "weights_bytes": planning.stored_bytes(base),
        "kv_bytes": held // ids.shape[1] * job.length,
        **{f"plain_{name}": value for name, value in memory_used.peak().items()},
        "plain_first_token_seconds": seconds,
    }


TASKS: dict[str, Callable[[Job], dict[str, Any]]] = {"compress": compress, "ask": ask, "plain": plain}


# ---------------------------------------------------------------- memory and time
class _Memory:
    """What is held from here on: on a CPU by the process, less what libraries take; on a GPU by tensors."""

    def __init__(self, job: Job) -> None:
        self.device = torch.device(job.device)
        _load_libraries(job.device)
        allocator.trim()
        cuda = self.device.type == "cuda"
        self.before = torch.cuda.memory_allocated(self.device) if cuda else memory.resident()
        torch.manual_seed(0)  # of random weights
        memory.reset_peak(self.device)

    def peak(self) -> dict[str, int]:
        """Return bytes held at most since this was made, where the system says so."""
        peak = memory.peak_mb(self.device)
        sizes = {} if peak is None else {"peak_bytes": round(peak * 1e6) - self.before}
        if self.device.type == "cuda":  # by torch's own allocator
            sizes["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        return sizes


def _load_libraries(device: str) -> None:
    """Do with a toy what is done with a model: much of torch, transformers and peft is loaded when it is first used."""
    shape = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = RCCConfig(segment_length=16, rates=[4], share_base=True, encoder=SideConfig(1), decoder=SideConfig(1))
    ids = torch.ones(1, 16, dtype=torch.long, device=device)
    with tempfile.TemporaryDirectory() as folder:
        planning.Blueprint(config, shape).build("cpu").save_pretrained(folder)
        model = RCCForCausalLM.from_pretrained(Path(folder), device=device)
        model.compress(ids).save(Path(folder) / "context.rcc")
        context = CompressedContext.load(Path(folder) / "context.rcc", model, verify="header")
        model.generate(ids, context=context, max_new_tokens=1, do_sample=False, pad_token_id=0)


def _timed(job: Job, run: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that a call took, and what it returned."""
    cuda = torch.device(job.device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    returned = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, returned


def _read_in(model: Module) -> Module:
    """Read the weights, which are mapped files: what is timed should not be how they come from the disk."""
    for weight in model.parameters():
        weight.sum()
    return model


# ---------------------------------------------------------------- the process
def measure(job: Job) -> dict[str, Any]:
    """Return the figures of a job, measured in a process of its own.

    Raises:
        Skipped: the process ran out of memory, or ended without figures. RCCError: the job's own.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job, sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        why = "was killed: out of memory, most likely" if code == -9 else f"ended with code {code}"
        raise Skipped(f"the process that measured it {why}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return cast("dict[str, Any]", answer)


def _run(job: Job, sender: Connection) -> None:
    allocator.configure()  # as the command line does, before torch allocates
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        sender.send(TASKS[job.task](job))
    except (RCCError, Skipped) as error:
        sender.send(error)
    except Exception as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        sender.send(Skipped("out of memory"))
