"""A question asked of a compressed context, and its answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from .context.context import CompressedContext
from .model.rcc import RCCForCausalLM
from .text.prompting import END, Prompt
from .text.tokens import token_ids

NEVER = 2**31 - 1
"""A token id that no model writes."""


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
