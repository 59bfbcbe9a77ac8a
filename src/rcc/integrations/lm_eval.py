"""The model `rcc` of the lm-evaluation-harness (lm-eval): its tasks, with long prompts compressed.

Importing this module registers it; `rcc eval harness` does that and then runs lm-eval's own command line. What is far
from a prompt's end is compressed, the end stays text, and a short prompt stays text as a whole.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import engine
from ..context.context import CompressedContext
from ..errors import InputError, WindowError
from ..model import answering, segments
from ..runtime.quiet import quiet_transformers
from ..text import prompting
from ..text.tokens import decode, token_ids
from .requests import Parts, Request, Until, positive

logger = logging.getLogger(__name__)

MODES = ("raw", "human")
NEW_TOKENS = 256
"""Tokens of an answer at most, where a task does not say: lm-eval's own number."""


@register_model("rcc")
class RCCLM(TemplateLM):  # type: ignore[misc]  # lm-eval says nothing of its types
    """An RCC model with lm-eval's interface.

    A prompt is cut `text_tokens` before its end, or at the last occurrence of the string `split_at`. The head is
    compressed if it has `min_context` tokens; the tail is read as text. The same head is compressed once for all
    requests that share it. Text read without a context goes to the model's decoder, LoRA included.

    Args:
        model: as for :meth:`RCCForCausalLM.from_pretrained`; None: the default model.
        rate: tokens a position, or "auto": for each head the lowest trained one that fits the window.
        device, dtype: names; None: a GPU if there is one, and as stored.
        batch_size: prompts at a time; each needs its context's keys and values.
        mode: "raw" continues a prompt; "human" asks the tail as a question, in the words of `rcc ask`.

    Raises:
        InputError: an argument that cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | Path | None = None,
        rate: int | str = "auto",
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        text_tokens: int = 256,
        min_context: int = 256,
        split_at: str | None = None,
        mode: str = "raw",
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = "model, rate, device, dtype, batch_size, text_tokens, min_context, split_at and mode"
            raise InputError(f"the model rcc has no argument {', '.join(unknown)}: it has {known}.")
        if mode not in MODES:
            raise InputError(f"mode={mode} is unknown: use one of {', '.join(MODES)}.")
        self.batch_size = positive(batch_size, "batch_size")
        self.text_tokens, self.min_context = positive(text_tokens, "text_tokens"), positive(min_context, "min_context")
        self.split_at, self.mode = None if split_at is None else str(split_at), mode
        quiet_transformers()
        loaded = engine.Engine.load(model, device, dtype)
        self.model, self.tokenizer = loaded.rcc, loaded.tokenizer
        if not self.tokenizer.is_fast:
            raise InputError(f"the tokenizer of {model} cannot say where its tokens stand in a text: use a fast one.")
        self.rate = None if rate == "auto" else self.model.config.check_rate(rate)  # type: ignore[arg-type]
        self._compressed = lru_cache(self.batch_size)(self._compress)
        self._parts = lru_cache(256)(self._cut)  # the answers of a question come one after another
        self._counts = Counter(prompts=0, compressed=0, compressed_tokens=0, positions=0)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> RCCLM:
        """Make the model as lm-eval does; a device or batch size in its own arguments is no error."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == "cuda:0" and not torch.cuda.is_available():
            del given["device"]  # lm-eval's command line says so where nobody named a device
        return cls(**{**given, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> RCCLM:
        """Make the model of `name=value,name=value`, see :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---------------------------------------------------------------- what the harness wants to know
    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def max_length(self) -> int:
        """Positions of the decoder's window: prefix, text and answer together."""
        return self.model.window

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise InputError("the tokenizer has neither a first nor an end token: a text cannot be scored from its start.")

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps prompts by, once they are in the chat template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Put a conversation into the tokenizer's own template.

        Raises:
            InputError: `mode` has a form of its own, or there is no template.
        """
        if self.mode == "human":
            raise InputError("mode=human puts prompts into a chat's form itself: leave out apply_chat_template.")
        if self.tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template: leave out apply_chat_template, or use mode=human.")
        chat = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast("str", chat)  # untokenised

    def get_model_info(self) -> dict[str, Any]:
        """Return what results.json says of the model, and how much was compressed."""
        names = ("rate", "text_tokens", "min_context", "split_at", "mode")
        settings = {name: getattr(self, name) for name in names}
        return {
            "rcc": {
                "model": self.model.config.name,
                "fingerprint": self.model.fingerprint,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                **settings,
                "rate": self.rate or "auto",
                **self._counts,
            }
        }

    # ---------------------------------------------------------------- text → what is compressed, and tokens
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids without special tokens put around them."""
        return token_ids(self.tokenizer, string, allow_special=True)[0].tolist()

    def _cut(self, prompt: str) -> Parts:
        if self.split_at is not None:
            cut = prompt.rfind(self.split_at)
            if cut < 0:
                raise InputError(f"a prompt does not hold split_at={self.split_at!r}: {prompt[-80:]!r} is its end.")
        else:
            tokens = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            starts = [start for start, _ in tokens["offset_mapping"]]
            cut = starts[-self.text_tokens] if len(starts) > self.text_tokens else 0
        head = len(self.tok_encode(prompt[:cut]))
        return Parts(prompt[:cut], head, prompt[cut:]) if head >= self.min_context else Parts("", 0, prompt)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens that stay text before an answer, and the answer's."""
        tail = self._parts(context).tail
        if self.mode == "human":
            before = self.tok_encode(prompting.build(tail, "human").decoder_text)
            return before, self.tok_encode(continuation.lstrip())
        before, answer = super()._encode_pair(tail, continuation)
        return before or [self.prefix_token_id], answer  # of a tail of spaces, which go with the answer

    def _request(
        self, number: int, parts: Parts, ids: list[int], answer: list[int], new: int = 0, settings: str = ""
    ) -> Request:
        """Make a request, with `new` tokens to be written.

        Raises:
            WindowError: it does not fit the decoder's window.
        """
        model, rest = self.model, len(ids) + len(answer) + new
        rate, positions = None, 0
        if parts.head:
            rate = self.rate or model.fitting_rate([parts.tokens], reserve=rest)
            positions = segments.positions(parts.tokens, rate, model.config)
            self._counts.update(compressed=1, compressed_tokens=parts.tokens, positions=positions)
        if positions + rest > model.window:
            raise WindowError(
                f"a prompt of the task takes {positions:,} positions for what is compressed and {rest:,} for text and"
                f" answer, more than the decoder's window of {model.window:,}: use a higher rate or fewer text_tokens."
            )
        self._counts.update(prompts=1)
        return Request(number, parts, rate, ids, answer, settings)

    def _compress(self, head: str, rate: int) -> CompressedContext:
        return self.model.compress(token_ids(self.tokenizer, head, allow_special=True), rate=rate)

    def _batches(
        self, requests: Sequence[Request], title: str, quiet: bool
    ) -> Iterator[tuple[list[Request], CompressedContext | None]]:
        """Yield requests in batches with their contexts, those of one context one after another.

        Longest first, so that a memory that is too small shows at once.
        """
        if requests and all(request.rate is None for request in requests):
            logger.warning(
                "none of the %d prompts was compressed: they have fewer than %d tokens before what stays text.",
                len(requests),
                self.min_context,
            )

        def kind(request: Request) -> tuple[str, bool]:
            return request.settings, request.rate is None

        ordered = sorted(requests, key=lambda r: (*kind(r), -r.parts.tokens, r.parts.head, r.rate or 0, -len(r.ids)))
        with tqdm(total=len(requests), desc=title, disable=quiet) as bar:
            for _, group in itertools.groupby(ordered, kind):
                while batch := list(itertools.islice(group, self.batch_size)):
                    yield batch, self._context(batch)
                    bar.update(len(batch))

    def _context(self, batch: list[Request]) -> CompressedContext | None:
        contexts = [self._compressed(r.parts.head, r.rate) for r in batch if r.rate is not None]
        if not contexts:
            return None
        if all(context is contexts[0] for context in contexts):
            return contexts[0] if len(batch) == 1 else contexts[0].expand(len(batch))
        return CompressedContext.stack(contexts)

    # ---------------------------------------------------------------- log-likelihoods
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return an answer's log-probability in nats, and whether each of its tokens is the likeliest.

        Args:
            requests: strings, tokens of the prompt that stay text, and tokens of the answer.
            disable_tqdm: show no progress bar.
            **kwargs: what else lm-eval may pass, not used.
        """
        asked = [
            self._request(i, self._parts(prompt), ids, answer) for i, ((prompt, _), ids, answer) in enumerate(requests)
        ]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for batch, context in self._batches(asked, "rcc: log-likelihoods", disable_tqdm):
            for request, score in zip(batch, self._score(batch, context), strict=True):
                scores[request.number] = score
                self.cache_hook.add_partial("loglikelihood", requests[request.number][0], score)
        return scores

    @torch.no_grad()
    def _score(self, batch: list[Request], context: CompressedContext | None) -> Iterable[tuple[float, bool]]:
        rows = [torch.tensor([*request.ids, *request.answer[:-1]]) for request in batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        first = min(len(request.ids) for request in batch) - 1
        scored = torch.arange(first, ids.shape[1], device=self.device)
        logits = self.model(ids, mask, context=context, logits_to_keep=scored).logits
        for request, row in zip(batch, logits, strict=True):  # one by one, as float32 logits are large
            start = len(request.ids) - 1 - first
            scores = row[start : start + len(request.answer)].float().log_softmax(-1)
            answer = torch.tensor(request.answer, dtype=torch.long, device=self.device)
            yield float(scores.gather(1, answer[:, None]).sum()), bool((scores.argmax(-1) == answer).all())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in nats.

        Each token is scored once, in blocks of `text_tokens`: after the compressed context of all that comes before
        the block, the token before it, and the block's own tokens. Where no more of the context fits the window, it
        begins anew.
        """
        scores = []
        for (text,) in tqdm([request.args for request in requests], desc="rcc: whole texts", disable=disable_tqdm):
            scores.append(self._roll(self.tok_encode(text)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), scores[-1])
        return scores

    def _roll(self, ids: list[int]) -> float:
        model, segment = self.model, self.model.config.segment_length
        size = min(self.text_tokens, model.window // 2)
        rate = self.rate
        if rate is None:
            try:
                rate = model.fitting_rate([len(ids)], reserve=size)
            except WindowError:
                rate = max(model.config.rates)
        # whole: the context of ids[origin:done], which are full segments
        total, origin, done, whole = 0.0, 0, 0, None
        for start in range(0, len(ids), size):
            full = origin + (start - origin) // segment * segment
            held = sum(segments.positions(n, rate, model.config) for n in (full - origin, start - full))
            if held + size > model.window:
                origin = done = full = start
                whole = None
            if done < full:
                whole = model.compress(torch.tensor([ids[done:full]]), rate=rate, context=whole)
                done = full
            context = whole
            if full < start:  # a segment that is not full yet: read for this block only
                context = model.compress(torch.tensor([ids[full:start]]), rate=rate, context=whole)
            before = ids[start - 1] if start else self.prefix_token_id
            block = Request(0, Parts("", 0, ""), rate, [before], ids[start : start + size])
            total += sum(score for score, _ in self._score([block], context))
        self._counts.update(texts=1, text_tokens_scored=len(ids))
        return total

    # ---------------------------------------------------------------- answers
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Write an answer to each prompt, up to the first of its stop strings; greedily unless told otherwise."""
        asked, arguments = [], [request.args for request in requests]
        for number, (prompt, settings) in enumerate(arguments):
            parts = self._parts(prompt)
            text = prompting.build(parts.tail, "human").decoder_text if self.mode == "human" else parts.tail
            ids = self.tok_encode(text) or [self.prefix_token_id]
            new = normalize_gen_kwargs(settings, NEW_TOKENS)["max_gen_toks"]
            asked.append(self._request(number, parts, ids, [], new, json.dumps(settings, sort_keys=True)))
        answers = [""] * len(requests)
        for batch, context in self._batches(asked, "rcc: answers", disable_tqdm):
            for request, answer in zip(batch, self._write(batch, context), strict=True):
                answers[request.number] = answer
                self.cache_hook.add_partial("generate_until", arguments[request.number], answer)
        return answers

    def _write(self, batch: list[Request], context: CompressedContext | None) -> Iterator[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(json.loads(batch[0].settings), NEW_TOKENS))
        new, until = settings.pop("max_gen_toks"), handle_stop_sequences(settings.pop("until"), eos=None)
        if self.mode == "human":
            until = [*until, prompting.END]
        if not settings["do_sample"]:
            settings.pop("temperature", None)
        ends = self._ends()
        width = max(len(request.ids) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
            mask[row, width - len(request.ids) :] = 1
        # a base's own settings may forbid what a text repeats; a task's settings come last
        settings = {"num_beams": 1, "repetition_penalty": 1.0, **settings}
        out = self.model.generate(
            ids,
            mask,
            context=context,
            max_new_tokens=new,
            stopping_criteria=[Until(self.tokenizer, until, width)],
            eos_token_id=ends or answering.NEVER,
            pad_token_id=ends[0] if ends else 0,
            **settings,
        )
        for row in out[:, width:].tolist():
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            written = decode(self.tokenizer, row[:length], skip_special=True)
            yield postprocess_generated_text(written, until, None)

    def _ends(self) -> list[int]:
        """Return the tokens that end an answer: the tokenizer's, and those of the decoder's own settings."""
        own = self.model.decoder.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
        return list(dict.fromkeys(token for token in ends if token is not None))
