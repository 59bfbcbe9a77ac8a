"""The chat form of a model that nobody trained for rcc: what stands before a text, a question and an answer.

It is read out of the tokenizer's chat template, by rendering it with placeholders. A tokenizer without one has the form
of the shipped models (ChatML) if it knows its marks, else a plain one, `Question: …` and `Answer: …`. A template is
data of a model's folder: transformers renders it in Jinja's sandbox, without access to files or code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import InputError, ModelError, brief
from .parts import PromptPart
from .prompting import END, FOLLOWING, HEADER, SEPARATOR, SYSTEM, TURN, Prompt

_TEXT, _ANSWER, _NEXT = (f"[[{word} goes here]]" for word in ("text", "answer", "question"))
_OPTIONS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
"""What some templates ask for: an answer without a train of thought, and a date that is the same every day."""


@dataclass(frozen=True)
class ChatForm:
    """The parts of a chat around a text, questions and answers.

    Attributes:
        header: before the text; never empty, since attention rests on its first token.
        turn: between a question and its answer.
        following: between an answer and the next question.
        ends: the marks that an answer ends with.
    """

    header: str
    turn: str
    following: str
    ends: tuple[str, ...]

    def prompt(self, question: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
        """Return the prompt for a question about a text that stands after the header.

        Args:
            question: what to ask.
            history: earlier questions and answers.

        Raises:
            InputError: an empty question.
        """
        if not question.strip():
            raise InputError("the question is empty: ask something.")
        parts = [PromptPart(SEPARATOR)]
        for earlier, answer in history:
            parts += [PromptPart(earlier, True), PromptPart(self.turn), PromptPart(answer, True)]
            parts.append(PromptPart(self.following))
        parts += [PromptPart(question.strip(), True), PromptPart(self.turn)]
        return Prompt("human", "", tuple(parts), marks=self.ends)

    def first(self, question: str) -> Prompt:
        """Return the prompt for a question that a chat begins with."""
        parts = (PromptPart(self.header), PromptPart(question.strip(), True), PromptPart(self.turn))
        return Prompt("human", "", parts, marks=self.ends)


CHATML = ChatForm(HEADER, TURN, END + FOLLOWING, (END,))


def chat_form(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    """Return the chat form of a tokenizer.

    Raises:
        ModelError: its template cannot be rendered, or leaves out what is said.
    """
    if tokenizer.chat_template:
        form = _rendered(tokenizer)
    elif END in tokenizer.get_vocab():
        form = CHATML
    else:
        first = tokenizer.bos_token or ""
        form = ChatForm(f"{first}Text:\n", "\nAnswer:", "\nQuestion: ", ("\n",))
    eos = tokenizer.eos_token
    if isinstance(eos, str) and eos and eos not in form.ends:
        form = ChatForm(form.header, form.turn, form.following, (*form.ends, eos))
    return form


def _rendered(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    system = [{"role": "system", "content": SYSTEM}]
    talk = [
        {"role": "user", "content": _TEXT},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    try:
        whole = _render(tokenizer, system + talk)
    except Exception:  # a template's own way to say that it has no system message
        try:
            whole = _render(tokenizer, talk)
        except Exception as error:
            raise ModelError(f"the tokenizer's chat template cannot be rendered ({brief(error)}).") from error
    header, text, rest = whole.partition(_TEXT)
    _, answer, rest = rest.partition(_ANSWER)
    following, question, turn = rest.partition(_NEXT)
    if not (text and answer and question and header):
        raise ModelError("the tokenizer's chat template does not show a text, an answer and a question in order.")
    return ChatForm(header, turn, following, (_end_mark(tokenizer, following),))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **_OPTIONS}
    return str(tokenizer.apply_chat_template(messages, **options))


def _end_mark(tokenizer: PreTrainedTokenizerBase, following: str) -> str:
    """Return the mark that an answer ends with.

    That is the first special token after it, or else the first line there.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if marks := [mark for mark in special if mark in following]:
        return min(marks, key=following.index)
    return following.strip().split("\n")[0] or following or "\n"
