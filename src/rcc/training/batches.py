"""Which batch holds what: a pure function of (seed, stage, batch number), so that a run can stop and go on anywhere.

A stage's batches are of several kinds: a task, a context length and a rate. Samples of one task and length form a
stream; sample number k of a stream is drawn from the k-th item of its source with random numbers of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..data.corpus import Corpus, Row, open_questions, open_text
from ..data.streams import Interleave, QuestionStream, TextStream, split
from ..errors import InputError
from .collate import collate, collate_plain, for_exact_reading
from .recipe import Recipe
from .stage import Stage
from .tasks import TASKS
from .tasks.base import Marks, Sample, Task


@dataclass(frozen=True)
class Kind:
    """What the samples of one batch have in common."""

    task: str
    length: int
    rate: int

    def __str__(self) -> str:
        return f"{self.task}@{self.length}/{self.rate}x"


class Schedule:
    """The kinds of a stage's batches, in proportion to their shares in every block of 1,024.

    Args:
        stage: tasks with shares, lengths, rates, batch_tokens.
        seed: of the order.
    """

    def __init__(self, stage: Stage, seed: int):
        self.stage = stage
        self.rates: dict[tuple[str, int], dict[int, float]] = {}
        for (task, length, rate), share in stage.kinds().items():
            self.rates.setdefault((task, length), {})[rate] = share
        self.streams = list(self.rates)
        rates = [list(self.rates[stream].values()) for stream in self.streams]
        self._streams = Interleave([sum(shares) for shares in rates], _seed(seed, 0))
        self._rates = [Interleave(shares, _seed(seed, 1, i)) for i, shares in enumerate(rates)]

    def at(self, batch: int) -> tuple[Kind, int, int]:
        """Return a batch's kind, its stream's number, and which batch of that stream it is."""
        stream, count = self._streams.at(batch)
        task, length = self.streams[stream]
        rate = list(self.rates[task, length])[self._rates[stream].at(count)[0]]
        return Kind(task, length, rate), stream, count

    def tokens(self, batch: int) -> int:
        """Return the context tokens of a batch of one process, as they are counted: full contexts."""
        length = self.at(batch)[0].length
        return self.stage.rows(length) * length

    def steps(self, world: int) -> int:
        """Return the optimizer steps after which a budget of tokens is spent; `world` is the number of processes."""
        if self.stage.max_steps is not None:
            return self.stage.max_steps
        if self.stage.max_tokens is None:
            raise InputError("a budget in minutes has no number of steps.")
        if len(self.stage.all_lengths) == 1:
            step = self.tokens(0) * self.stage.accumulation * world
            return -(-self.stage.max_tokens // step)
        seen = step = 0
        while seen < self.stage.max_tokens:
            first = step * self.stage.accumulation
            seen += world * sum(self.tokens(first + i) for i in range(self.stage.accumulation))
            step += 1
        return step


class Corpora:
    """A recipe's sources, opened: what is trained on and what is held out."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Any = None):
        data = recipe.data
        self.weights: dict[str, list[float]] = {}
        self.sources: dict[str, list[Corpus]] = {}
        self.rows: dict[tuple[str, str], list[np.ndarray]] = {}
        for kind, open_source in (("text", open_text), ("questions", open_questions)):
            needed = any(task.reads == kind for stage in recipe.stages for task in stage.tasks.values())
            sources = getattr(data, kind)
            extra = kind == "text" and any(task.reads for stage in recipe.stages for task in stage.tasks.values())
            if not sources or not (needed or extra):
                continue
            corpora = [open_source(source, tokenizer, progress=progress) for source in sources]
            others = [open_source(s, tokenizer, progress=progress) for s in getattr(data, f"evaluation_{kind}")]
            train, held = split(corpora, 0.0 if others else data.held_out, others)
            self.weights[kind] = [source.weight for source in sources]
            self.sources[kind] = corpora
            self.rows[kind, "train"] = train
            self.rows[kind, "held_out"] = held
            if others:
                self.sources[f"evaluation_{kind}"] = others
                self.weights[f"evaluation_{kind}"] = [1.0] * len(others)
                self.rows[f"evaluation_{kind}", "held_out"] = [np.arange(len(corpus)) for corpus in others]

    def stream(self, reads: str, part: str, seed: int, window: int, minimum: int) -> TextStream | QuestionStream:
        """Return a stream over one part (`train` or `held_out`) of the text or the questions."""
        key = f"evaluation_{reads}" if part == "held_out" and f"evaluation_{reads}" in self.sources else reads
        corpora, rows = self.sources[key], self.rows[key, part]
        if reads == "text":
            return TextStream(corpora, rows, seed, window, minimum, self.weights[key])
        return QuestionStream(corpora, rows, seed, window, self.weights[key])


def used_tokens(corpora: Corpora, marks: Marks) -> np.ndarray:
    """Return the token ids, ascending, that occur in a recipe's sources, held out or not, and in what tasks add.

    Some tasks write words anew (`renamed`, `cloze`), and may need a token that nothing else does: it has no loss.
    """
    used = np.zeros(len(marks.tokenizer), dtype=bool)
    for fixed in (marks.header, marks.turn, marks.end, marks.following, marks.separator, marks.eos):
        used[fixed] = True
    for task in TASKS.values():
        for text in task.fixed_texts:
            used[marks.encode(text)] = True
    for corpus in {id(c): c for group in corpora.sources.values() for c in group}.values():
        used[corpus.token_ids()] = True
    return np.flatnonzero(used)


class _Draw:
    """What a task may draw for one sample; see :class:`rcc.training.tasks.base.Draw`."""

    def __init__(self, samples: Samples, stream: TextStream | QuestionStream | None, k: int):
        self._samples, self._stream, self._k = samples, stream, k
        self.segment = samples.segment

    def text(self) -> np.ndarray:
        assert isinstance(self._stream, TextStream)
        return self._stream.draw(self._k)

    def row(self) -> Row:
        assert isinstance(self._stream, QuestionStream)
        return self._stream.draw(self._k)

    def other(self, rng: np.random.Generator, not_hash: int) -> Row:
        assert isinstance(self._stream, QuestionStream)
        return self._stream.other(rng, not_hash)

    def same(self, rng: np.random.Generator, context_hash: int) -> Row:
        assert isinstance(self._stream, QuestionStream)
        return self._stream.same(rng, context_hash)

    def prose(self, rng: np.random.Generator) -> np.ndarray | None:
        stream = self._samples.prose
        return None if stream is None else stream.stretch(rng)


class Samples:
    """The samples of one stage.

    Args:
        part: `train` or `held_out`.
        number: the stage's, from 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        number: int,
        corpora: Corpora,
        tokenizer: PreTrainedTokenizerBase,
        part: str = "train",
    ):
        self.recipe, self.number, self.corpora, self.part = recipe, number, corpora, part
        self.stage = recipe.stages[number]
        self.segment = recipe.model.config.segment_length
        self.tokenizer, self.marks = tokenizer, Marks.of(tokenizer)
        self.schedule = Schedule(self.stage, _seed(recipe.seed, number))
        self.streams: list[TextStream | QuestionStream | None] = []
        for i, (name, length) in enumerate(self.schedule.streams):
            task = self.stage.tasks[name]
            if task.reads is None:
                self.streams.append(None)
                continue
            window = task.window(length, self.stage.target_tokens)
            minimum = min(window, 64)
            seed = _seed(recipe.seed, number, 2, i)
            self.streams.append(corpora.stream(task.reads, part, seed, window, minimum))

    @cached_property
    def prose(self) -> TextStream | None:
        """Ordinary text to put between passages."""
        if "text" not in self.corpora.sources:
            return None
        stream = self.corpora.stream("text", "train", _seed(self.recipe.seed, self.number, 3), 256, 16)
        return stream if isinstance(stream, TextStream) else None

    def sample(self, stream: int, k: int) -> Sample:
        """Return sample number k of a stream."""
        name, length = self.schedule.streams[stream]
        rng = np.random.default_rng([self.recipe.seed, self.number, stream, k, self.part == "held_out"])
        draw = _Draw(self, self.streams[stream], k)
        task: Task = self.stage.tasks[name]
        return task.sample(draw, rng, length, self.stage.target_tokens, self.marks)

    def batch(self, batch: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """Return what process `rank` of `world` reads as batch number `batch`: the arguments of the training pass."""
        kind, stream, count = self.schedule.at(batch)
        rows = self.stage.rows(kind.length)
        first = (count * world + rank) * rows
        return self.collate([self.sample(stream, first + j) for j in range(rows)], kind)

    def collate(self, samples: list[Sample], kind: Kind) -> dict[str, Any]:
        """Return the batch of samples of one kind."""
        if self.stage.plain:
            return {**collate_plain(samples, self.marks.eos), "kind": str(kind)}
        distillation = self.stage.distillation
        teacher = distillation is not None and kind.task in distillation.tasks
        samples = [self.stage.tasks[kind.task].at(kind.rate, sample) for sample in samples]
        if self.recipe.reads_exactly(kind.rate):
            samples = [for_exact_reading(sample) for sample in samples]
        return {**collate(samples, self.marks.eos, teacher), "rate": kind.rate, "kind": str(kind)}


class Batches(IterableDataset[dict[str, Any]]):
    """The batches of one process from a given one on, in order, without end."""

    def __init__(self, samples: Samples, start: int, rank: int, world: int):
        self.samples, self.start, self.rank, self.world = samples, start, rank, world

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()  # the loader takes from its workers in turn, so this keeps the order
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch = self.start + first
        while True:
            yield self.samples.batch(batch, self.rank, self.world)
            batch += step


def _seed(*numbers: int) -> int:
    """Return one seed from several."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
