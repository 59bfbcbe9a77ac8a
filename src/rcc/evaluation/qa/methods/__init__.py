"""What a user might do instead of compressing: one idea a file, all asked in the same way.

A method turns a text into keys and values that the decoder reads before a question (a context as any other, or
none), and says how the question is put. Everything else, such as timing and scoring, is the same for all
(:mod:`rcc.evaluation.qa.run`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ....context.context import CompressedContext
from ....model.compressor import Compressor
from ....text.prompting import Prompt
from ..questions import Question


@dataclass(frozen=True)
class Held:
    """What is kept of a text.

    Attributes:
        context: what the decoder reads before a question; None: nothing.
        positions: of the text's, without a prompt's own.
        cut: whether a part of the text had to be left out although the method keeps all of it.
    """

    context: CompressedContext | None
    positions: int
    cut: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values of these positions."""
        return 0 if self.context is None else self.context.nbytes * self.positions // len(self.context)


class Method(Protocol):
    """One way to answer questions about a text.

    Attributes:
        name: in tables.
        mode: of :mod:`rcc.text.prompting` where there is a choice; otherwise empty.
        compresses: whether what is kept follows the rate.
        by_question: whether it follows the question, so that nothing is kept for the next one.
        model: whose decoder answers.
    """

    name: str
    mode: str
    compresses: bool
    by_question: bool
    model: Compressor

    def hold(self, text: Tensor, rate: int, question: Question) -> Held:
        """Read a text.

        Args:
            text: [T] token ids.
            rate: how many tokens there are for each position that is kept.
            question: the one that will be asked first; of use where the method is `by_question`.

        Raises:
            WindowError: it does not fit the decoder's window.
        """

    def prompt(self, question: Question) -> Prompt:
        """Return the question in the form in which it is put."""

    def decoder(self) -> AbstractContextManager[None]:
        """Return a context within which the model's decoder is the one that answers."""
