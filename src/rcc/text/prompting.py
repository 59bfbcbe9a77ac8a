"""The three ways to ask a compressed context (section 3.3 of the paper): reconstruct, human, compress.

| mode          | the instruction goes to      | the decoder's prompt            | the output                   |
|---------------|------------------------------|---------------------------------|------------------------------|
| `reconstruct` | the encoder, with the text   | the chat header up to "user"    | the instruction, the answer  |
| `human`       | the decoder, as plain tokens | the chat header and instruction | the answer                   |
| `compress`    | the encoder, with the text   | a short cue ("Answer:")         | the answer                   |

After a stored context the instruction that goes to the encoder is a segment of its own. The published checkpoint has
not learned to read it so: of a text that is at hand, its encoder reads `text + encoder_text` as one (:func:`joins`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import RCCConfig
from ..errors import InputError
from .parts import PromptPart

MODES = ("human", "reconstruct", "compress")
SYSTEM = "You are a helpful assistant."
HEADER = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
FOLLOWING = "\n<|im_start|>user\n"  # between an answer's end and the next question
CUE = "Answer:"
SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """A question in the form that its mode wants.

    Attributes:
        encoder_text: what the encoder reads after the context; empty if nothing.
        decoder_parts: what the decoder reads as plain tokens.
        ends: how many end marks the answer is over after.
        marks: what an answer ends with, any of them.
    """

    mode: str
    encoder_text: str
    decoder_parts: tuple[PromptPart, ...]
    ends: int = 1
    marks: tuple[str, ...] = (END,)

    @property
    def decoder_text(self) -> str:
        """What the decoder reads, as one text."""
        return "".join(part.text for part in self.decoder_parts)

    def parse(self, written: str) -> tuple[str | None, str]:
        """Split what the model wrote into the instruction it reconstructed (None in other modes) and the answer."""
        if self.mode != "reconstruct":
            for mark in self.marks:
                written = written.lstrip().split(mark)[0]
            return None, written.strip()
        instruction, turn, answer = written.partition(TURN)
        return instruction.split(END)[0].strip(), answer.split(END)[0].strip() if turn else ""


def with_hint(question: str, hint: str) -> str:
    """Return a question with a hint on how to answer it after it, if there is one."""
    return " ".join(part for part in (question.strip(), hint) if part)


def build(question: str, mode: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
    """Make the prompt for a question; `history` holds earlier questions and answers of a chat (`human` mode).

    Raises:
        InputError: an unknown mode or an empty question.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}.")
    if not question.strip():
        raise InputError("the question is empty: ask something.")
    question = question.strip()
    if mode == "human":
        parts = [PromptPart(HEADER)]
        for earlier, answer in history:
            parts += [
                PromptPart(earlier, True),
                PromptPart(TURN),
                PromptPart(answer, True),
                PromptPart(END + FOLLOWING),
            ]
        return Prompt(mode, "", (*parts, PromptPart(question, True), PromptPart(TURN)))
    if mode == "reconstruct":
        return Prompt(mode, SEPARATOR + question, (PromptPart(HEADER),), ends=2)
    return Prompt(mode, SEPARATOR + question, (PromptPart(CUE),))


def joins(config: RCCConfig, prompt: Prompt) -> bool:
    """Return whether the encoder should read a text that is at hand and the instruction after it as one text.

    The published checkpoint was trained on that alone, and its padding would fill a segment with the instruction,
    again and again. Other models are trained to read it both ways, and a text compressed by itself serves every
    question.
    """
    return bool(prompt.encoder_text) and config.segment_padding == "repeat"


def allows_special(config: RCCConfig, asked: bool = False) -> bool:
    """Return whether chat marks in a document or a question are the special tokens that they name.

    Only where that is asked for; and always for the published checkpoint, whose authors read texts so.
    """
    return asked or config.segment_padding == "repeat"
