"""From a prompt to what the decoder writes after it, up to the end marks, as text piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from ..context.context import CompressedContext
from ..text.prompting import END, Prompt, allows_special
from ..text.tokens import decode, prompt_ids, token_ids
from .rcc import RCCForCausalLM

NEVER = 2**31 - 1
"""A token id that no model writes."""


class Stopped(StoppingCriteria):
    """Stops all rows once an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return for each row whether it is done, bool [B]."""
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class _Ends(StoppingCriteria):
    """Stops a row once it has written as many end marks as its prompt asks for."""

    def __init__(self, mark: list[int], start: int, ends: int):
        self.mark, self.start, self.ends = torch.tensor(mark), start, ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written = input_ids[:, self.start :]
        if written.shape[1] < len(self.mark):
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return self._marks(written).sum(1) >= self.ends

    def length(self, written: Tensor) -> int:
        """Count the tokens of a row [tokens] up to the end of its last mark: what follows is padding."""
        if len(written) < len(self.mark):
            return len(written)
        ends = self._marks(written[None])[0].nonzero()[:, 0] + len(self.mark)
        return int(ends[self.ends - 1]) if len(ends) >= self.ends else len(written)

    def _marks(self, written: Tensor) -> Tensor:
        """Return where the end mark begins, bool [B, tokens - size of the mark + 1]."""
        return (written.unfold(1, len(self.mark), 1) == self.mark.to(written.device)).all(-1)


class Pieces(TextStreamer):
    """Hands on what is written, piece by piece, as much of it as is to be shown.

    Args:
        shown: everything written → the part to be shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        shown: Callable[[str], str],
        on_text: Callable[[str], None],
        skip_prompt: bool = True,
    ):
        super().__init__(tokenizer, skip_prompt=skip_prompt)
        self.shown, self.on_text = shown, on_text
        self.written = self.given = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take the next words from transformers, and hand on what they add to what is to be shown."""
        self.written += text
        answer = self.shown(self.written)
        if not stream_end:
            answer = answer.removesuffix("<")  # may turn out to begin the end mark
        if piece := answer[len(self.given) :]:
            self.on_text(piece)
        self.given = answer


def ask(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    context: CompressedContext | None,
    prompt: Prompt,
    max_new_tokens: int = 128,
    allow_special: bool = False,
    **generation: Any,
) -> tuple[str | None, str]:
    """Ask a context one question.

    Args:
        model: that made the context.
        tokenizer: the model's.
        context: of one text; None: the decoder is asked alone.
        prompt: the question in the form of its mode.
        max_new_tokens: of the answer, and in `reconstruct` mode of the instruction before it.
        allow_special: whether chat marks in the question are special tokens.
        **generation: goes to :meth:`RCCForCausalLM.generate` (`do_sample`, `streamer`, …).

    Returns:
        The instruction that was reconstructed (None in other modes), and the answer.

    Raises:
        WindowError: the prompt and the answer do not fit after the context.
    """
    written, _ = write(model, tokenizer, context, prompt, max_new_tokens, allow_special, **generation)
    return prompt.parse(decode(tokenizer, written))


def write(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    context: CompressedContext | None,
    prompt: Prompt,
    max_new_tokens: int,
    allow_special: bool = False,
    **generation: Any,
) -> tuple[Tensor, int]:
    """Return what the decoder writes after a prompt, [tokens], and how many tokens were read for it."""
    asked, allow_special = 0, allows_special(model.config, allow_special)
    if prompt.encoder_text:
        instruction = token_ids(tokenizer, prompt.encoder_text, allow_special)
        rate = context.pieces[0][-1].rate if context is not None else None
        context, asked = model.compress(instruction, rate=rate, context=context), instruction.shape[1]
    ids = prompt_ids(tokenizer, prompt.decoder_parts, allow_special)
    written = generate(model, tokenizer, ids, context, prompt.ends, max_new_tokens, **generation)[0]
    return written, asked + ids.shape[1]


def generate(
    model: RCCForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    context: CompressedContext | None,
    ends: int,
    max_new_tokens: int,
    stopping_criteria: Sequence[StoppingCriteria] = (),
    **generation: Any,
) -> list[Tensor]:
    """Return what is written after prompts, up to each one's last end mark.

    Args:
        model: that made the context.
        tokenizer: the model's.
        ids: [B, Q] prompts, padded on the left.
        context: of B texts; None: the prompts alone.
        ends: how many end marks an answer is over after.
        max_new_tokens: of each answer.
        stopping_criteria: end it sooner.
        **generation: goes to :meth:`RCCForCausalLM.generate`.

    Returns:
        B rows of token ids [tokens].
    """
    # stopping is counted here: in `reconstruct` mode the first end mark closes the instruction, not the answer
    stop = _Ends(token_ids(tokenizer, END, allow_special=True)[0].tolist(), ids.shape[1], ends)
    out = model.generate(
        ids,
        context=context,
        max_new_tokens=max_new_tokens,
        stopping_criteria=[stop, *stopping_criteria],
        eos_token_id=NEVER,
        pad_token_id=0,
        **generation,
    )
    return [row[: stop.length(row)] for row in out[:, ids.shape[1] :]]
