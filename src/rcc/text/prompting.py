"""The three ways to ask a compressed context (section 3.3 of the paper): reconstruct, human, compress.

| mode          | the instruction goes to      | the decoder's prompt            | the output                   |
|---------------|------------------------------|---------------------------------|------------------------------|
| `reconstruct` | the encoder, with the text   | the chat header up to "user"    | the instruction, the answer  |
| `human`       | the decoder, as plain tokens | the chat header and instruction | the answer                   |
| `compress`    | the encoder, with the text   | a short cue ("Answer:")         | the answer                   |

Behind a stored context the instruction that goes to the encoder is a segment of its own. The published checkpoint has
not learned to read it so: of a text that is at hand, its encoder reads `text + encoder_text` as one (:func:`joins`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from ..config import RCCConfig
from ..context.context import CompressedContext
from ..errors import InputError
from ..model.rcc import RCCForCausalLM

MODES = ("human", "reconstruct", "compress")
SYSTEM = "You are a helpful assistant."
HEADER = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
FOLLOWING = "\n<|im_start|>user\n"  # between an answer's end and the next question
CUE = "Answer:"
SEPARATOR = "\n\n"
NEVER = 2**31 - 1  # a token id that no model writes
PIECE, OVERLAP = 200_000, 8_000
"""Characters of a long text that the tokenizer is given at once, and how many of them it was given before."""


@dataclass(frozen=True)
class Prompt:
    """A question in the form that its mode wants.

    Attributes:
        encoder_text: what the encoder reads behind the context; empty if nothing.
        decoder_text: what the decoder reads as plain tokens.
        ends: how many end marks the answer is over after.
    """

    mode: str
    encoder_text: str
    decoder_text: str
    ends: int = 1

    def parse(self, written: str) -> tuple[str | None, str]:
        """What the model wrote → the instruction it reconstructed (None in other modes), and the answer."""
        if self.mode != "reconstruct":
            return None, written.split(END)[0].strip()
        instruction, found, answer = written.partition(TURN)
        return instruction.split(END)[0].strip(), answer.split(END)[0].strip() if found else ""


def build(question: str, mode: str, history: Sequence[tuple[str, str]] = ()) -> Prompt:
    """The prompt for a question; `history` holds earlier questions and answers of a chat (`human` mode).

    Raises:
        InputError: an unknown mode or an empty question.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}.")
    if not question.strip():
        raise InputError("the question is empty: ask something.")
    question = question.strip()
    if mode == "human":
        turns = "".join(f"{q}{TURN}{a}{END}{FOLLOWING}" for q, a in history)
        return Prompt(mode, "", f"{HEADER}{turns}{question}{TURN}")
    if mode == "reconstruct":
        return Prompt(mode, SEPARATOR + question, HEADER, ends=2)
    return Prompt(mode, SEPARATOR + question, CUE)


def joins(config: RCCConfig, prompt: Prompt) -> bool:
    """Whether the encoder should read a text that is at hand and the instruction behind it as one text.

    The published checkpoint was trained on that alone, and its padding would fill a segment with the instruction,
    again and again. Other models are trained to read it both ways, and a text compressed by itself serves every
    question.
    """
    return bool(prompt.encoder_text) and config.segment_padding == "repeat"


class _Ends(StoppingCriteria):
    """Stops a row once it has written as many end marks as its prompt asks for."""

    def __init__(self, mark: list[int], start: int, ends: int):
        self.mark, self.start, self.ends = torch.tensor(mark), start, ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written = input_ids[:, self.start :]
        size = len(self.mark)
        if written.shape[1] < size:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        found = (written.unfold(1, size, 1) == self.mark.to(written.device)).all(-1)
        return found.sum(1) >= self.ends


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Text → [1, T] token ids, without the special tokens that some tokenizers add.

    Raises:
        InputError: the text holds what is not Unicode, such as an argument in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the question or prompt is not UTF-8 text: give it in UTF-8.") from None
    pieces = _in_pieces(tokenizer, text) if len(text) > PIECE and tokenizer.is_fast else None
    if pieces is None:
        pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return torch.cat([torch.as_tensor(piece, dtype=torch.long) for piece in pieces])[None]


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[np.ndarray] | None:
    """The token ids [T] of a long text's pieces, which together are those of the whole; None where they would not be.

    A tokenizer holds more than half a kilobyte for every token while it works. So it is given overlapping pieces, and
    each two are joined where, far from where they were cut, their tokens are the same: they depend on what is near.
    """

    def read(start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        found = tokenizer(text[start:end], add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return np.array(found["input_ids"]), start + np.array(found["offset_mapping"])[:, 0]

    done, end = [], PIECE
    ids, places = read(0, end)
    while end < len(text):
        start, middle, last = end - OVERLAP, end - OVERLAP // 2, end - OVERLAP // 4
        end = start + PIECE
        more, those = read(start, end)
        ours = np.flatnonzero((places >= middle) & (places < last))
        theirs = np.flatnonzero((those >= middle) & (those < last))
        if not len(ours) or not np.array_equal(places[ours], those[theirs]) or (ids[ours] != more[theirs]).any():
            return None
        done.append(ids[: ours[0]])
        ids, places = more[theirs[0] :], those[theirs[0] :]
    return [*done, ids]


def ask(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    context: CompressedContext | None,
    prompt: Prompt,
    max_new_tokens: int = 128,
    **kwargs: Any,
) -> tuple[str | None, str]:
    """Ask a context (or, with None, the decoder alone) → the reconstructed instruction, if any, and the answer.

    Args:
        context: of one text.
        kwargs: go to :meth:`RCCForCausalLM.generate` (`do_sample`, `streamer`, …).

    Raises:
        WindowError: the prompt and the answer do not fit behind the context.
    """
    if prompt.encoder_text:
        rate = context.pieces[0][-1].rate if context is not None else None
        context = model.compress(token_ids(tokenizer, prompt.encoder_text), rate=rate, context=context)
    ids = token_ids(tokenizer, prompt.decoder_text)
    # stopping is counted here: in `reconstruct` mode the first end mark closes the instruction, not the answer
    criteria = [_Ends(token_ids(tokenizer, END)[0].tolist(), ids.shape[1], prompt.ends)]
    out = model.generate(
        ids,
        context=context,
        max_new_tokens=max_new_tokens,
        stopping_criteria=criteria,
        eos_token_id=NEVER,
        pad_token_id=0,
        **kwargs,
    )
    return prompt.parse(tokenizer.decode(out[0, ids.shape[1] :]))
