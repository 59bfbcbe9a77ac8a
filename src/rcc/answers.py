"""What an engine answers: whole, or piece by piece."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .model.answering import Stopped


@dataclass(frozen=True)
class Usage:
    """What a question took, in positions and tokens."""

    context_positions: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: the answer.
        instruction: the question as the model read it out of the context (`reconstruct` mode), else None.
        usage: what it took.
    """

    text: str
    instruction: str | None
    usage: Usage


@dataclass(frozen=True)
class WrittenText:
    """What a context gave back.

    Attributes:
        prompt_ids, ids: the token ids that it went on from, and those written.
        prompt, text: the same as strings.
    """

    prompt_ids: list[int]
    ids: list[int]
    prompt: str
    text: str


class AnswerStream:
    """The pieces of an answer as they are written; `answer` is the whole one once they have been taken.

    Args:
        ask: :meth:`Engine.ask`, with everything but `on_text` and `stopping_criteria`.
    """

    def __init__(self, ask: Callable[..., Answer]):
        self.answer: Answer | None = None
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True)
        self._thread.start()

    def _run(self, ask: Callable[..., Answer]) -> None:
        try:
            self.answer = ask(on_text=self._pieces.put, stopping_criteria=[Stopped(self._stop)])
            self._pieces.put(None)
        except BaseException as error:  # whoever takes the pieces is to have it
            self._pieces.put(error)

    def __iter__(self) -> Iterator[str]:
        try:
            while (piece := self._pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.close()

    def close(self) -> None:
        """End the answer after the token at hand, and wait for that."""
        self._stop.set()
        self._thread.join()
