#!/usr/bin/env python3
"""The model of model.py with transformers' own modules and an ordinary cache: for tests, and to measure answers.

Prints token F1 beside the base's:

    reference.py BASE_FOLDER STATE QUESTIONS.jsonl[,MORE] [--limit 40] [--rates 2,4,8] [--longest 1500]
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import string
import time
from pathlib import Path

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.qwen2.modeling_qwen2 import rotate_half


class Reference:
    """
    Args:
        base: a Qwen2ForCausalLM, frozen.
        state: the learnt tensors by the trainer's names.
        rates: the trained rates in order, the rows of `rate_embeddings`.
        sink: id of the token that stands before each segment.
        segment: tokens of a segment.
    """

    def __init__(self, base, state, rates, sink, segment=1024):
        self.base, self.s, self.rates, self.sink, self.T = base, state, rates, sink, segment
        self.encoder, self.decoder = (dict(self.merged(side)) for side in ("encoder", "decoder"))

    def merged(self, side):
        for k, w in self.base.named_parameters():
            a = k.replace("model.layers.", side + ".layers.").replace(".weight", ".lora_A")
            yield k, w + (self.s[a[:-1] + "B"].float() @ self.s[a].float()).to(w.dtype) if a in self.s else w

    def states(self, piece, rate):
        """piece [t] → the kept positions' states before each decoder block, L × [1, n, H]."""
        embed = self.base.model.embed_tokens
        h = embed(torch.tensor([piece])) + self.s["rate_embeddings"][self.rates.index(rate)].to(embed.weight.dtype)
        h = torch.cat([embed(torch.tensor([[self.sink]])), h], 1)
        inner = {k[len("model.") :]: v for k, v in self.encoder.items() if k.startswith("model.")}
        hs = functional_call(
            self.base.model, inner, (), {"inputs_embeds": h, "output_hidden_states": True, "use_cache": False}
        ).hidden_states[:-1]
        at = list(range(rate, len(piece) + 1, rate))
        if not at or at[-1] != len(piece):
            at.append(len(piece))  # the last token always has a position
        return [x[:, at] @ self.s[f"projections.{i}"].to(x.dtype).t() for i, x in enumerate(hs)]

    def compress(self, ids, rate):
        """ids, a list of N tokens → a cache of 1 + ceil(N / rate) positions.

        A segment that is not full keeps its last token.
        rate: one for all segments, or a list of a rate each.
        """
        each = rate if isinstance(rate, list) else [rate] * -(-len(ids) // self.T)
        parts = [self.states(ids[s * self.T : (s + 1) * self.T], r) for s, r in enumerate(each)]
        cache, model = DynamicCache(), self.base.model
        for i, layer in enumerate(model.layers):
            x = torch.cat([self.s["sink"][i][None, None].to(parts[0][i].dtype), *(p[i] for p in parts)], 1)
            n, at = x.shape[1], layer.self_attn
            x = layer.input_layernorm(x)
            w = lambda name, i=i: self.decoder[f"model.layers.{i}.self_attn.{name}"]
            k, v = (
                torch.nn.functional.linear(x, w(f"{p}_proj.weight"), w(f"{p}_proj.bias"))
                .view(1, n, -1, at.head_dim)
                .transpose(1, 2)
                for p in "kv"
            )
            cos, sin = model.rotary_emb(x, torch.arange(n)[None])
            cache.update(k * cos[:, None] + rotate_half(k) * sin[:, None], v, i)
        return cache

    def sink_cache(self):
        """The sink alone: what a text that is read exactly (rate 1) comes after."""
        cache, model = DynamicCache(), self.base.model
        for i, layer in enumerate(model.layers):
            x = layer.input_layernorm(self.s["sink"][i][None, None].to(model.embed_tokens.weight.dtype))
            at = layer.self_attn
            k, v = (
                torch.nn.functional.linear(
                    x,
                    self.decoder[f"model.layers.{i}.self_attn.{p}_proj.weight"],
                    self.decoder[f"model.layers.{i}.self_attn.{p}_proj.bias"],
                )
                .view(1, 1, -1, at.head_dim)
                .transpose(1, 2)
                for p in "kv"
            )
            cache.update(k, v, i)
        return cache

    def logits(self, weights, x, cache, last=0):
        p = cache.get_seq_length() if cache is not None else 0
        return functional_call(
            self.base,
            weights,
            (torch.tensor([x]),),
            {
                "past_key_values": cache,
                "position_ids": torch.arange(p, p + len(x))[None],
                "use_cache": cache is not None,
                "logits_to_keep": last,
            },
        ).logits[0]

    @torch.no_grad()
    def write(self, weights, cache, x, end, most=24):
        """Greedy tokens after x; the cache is left as it was."""
        kept, out = cache.get_seq_length(), []
        while len(out) < most:
            k = int(self.logits(weights, x, cache, 1)[-1].argmax())
            if k == end:
                break
            out.append(k)
            x = [k]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        return out


def words(s):
    s = "".join(c for c in s.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", s).split()


def f1(answer, golds):
    best, x = 0.0, words(answer)
    for gold in golds:
        y = words(gold)
        same = sum((collections.Counter(x) & collections.Counter(y)).values())
        if same:
            best = max(best, 2 * same / (len(x) + len(y)))
    return best


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("base")
    p.add_argument("state")
    p.add_argument("questions")
    p.add_argument("--limit", type=int, default=40)
    p.add_argument("--rates", default="2,4,8")
    p.add_argument("--longest", type=int, default=1500)
    p.add_argument("--segment", type=int, default=1024)
    p.add_argument("--sets", default="", help="only rows whose id begins so, with commas")
    a = p.parse_args()
    from safetensors.torch import load_file

    tok = AutoTokenizer.from_pretrained(a.base)
    enc = lambda s: tok(s, add_special_tokens=False)["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(a.base, dtype=torch.bfloat16).eval().requires_grad_(False)
    head, turn, end = (
        enc("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"),
        enc("<|im_end|>\n<|im_start|>assistant\n"),
        enc("<|im_end|>")[0],
    )
    m = Reference(base, load_file(a.state), [1, 2, 4, 8, 16, 32], head[0], a.segment)
    untouched = dict(base.named_parameters())
    rows = [json.loads(line) for f in a.questions.split(",") for line in Path(f).read_bytes().splitlines()]
    random.Random(3).shuffle(rows)
    got, n, t = collections.defaultdict(list), 0, time.time()
    for r in rows:
        c, q = enc(r["context"]), r["question"]
        if (
            not 100 <= len(c) <= a.longest
            or not r["answers"]
            or len(r["answers"][0]) > 120
            or (a.sets and not r["id"].startswith(tuple(a.sets.split(","))))
        ):
            continue
        asked = {
            "base, plain": (
                untouched,
                DynamicCache(),
                head + c + enc("\n\n" + q + " Answer in as few words as possible.") + turn,
            ),
            "no text": (m.decoder, DynamicCache(), head + enc(q) + turn),
            "tuned, plain": (m.decoder, DynamicCache(), head + c + enc("\n\n" + q) + turn),
            "exact": (m.decoder, m.sink_cache(), c + head + enc(q) + turn),
            **{f"{k}x": (m.decoder, None, k) for k in map(int, a.rates.split(","))},
        }
        with torch.no_grad():
            for name, (weights, cache, x) in asked.items():
                if cache is None:
                    cache, x = m.compress(c, x), head + enc(q) + turn
                text = tok.decode(m.write(weights, cache, x, end))
                got[name].append(f1(text, r["answers"]))
                if n < 5:
                    print(f"{q[:70]} | {r['answers'][0][:40]} | {name}: {text[:60]}", flush=True)
        n += 1
        if n % 10 == 0 or n == a.limit:
            print(
                n,
                f"questions, {time.time() - t:.0f} s",
                {k: round(sum(v) / len(v), 3) for k, v in got.items()},
                flush=True,
            )
        if n == a.limit:
            break


if __name__ == "__main__":
    main()
