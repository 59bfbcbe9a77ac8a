"""RCC over Qwen2.5-0.5B for one lent GPU: frozen base, LoRA on both sides, projections. Plain torch, no transformers.

The prefix is `direct`: at a prefix position, what enters decoder block i is P_i · h_i, the encoder's state before
its block i. Only keys and values are made of it: nothing of the decoder runs at prefix positions, and no position
depends on another segment. The first position is a learnt one, the sink, which starts as what the base makes of its
first token alone; the encoder, too, reads that token before each segment. So at 1x, untrained, a one-segment context is
exactly the base's own KV cache.

Laid out for speed (test_gpu.py compares it with transformers): q, k, v and gate, up fused; LoRA inside one matrix
product (the input is widened by xAᵀ, the weight by B); no attention mask anywhere, since sequences are padded on the
right and attention is causal; the loss never holds all logits.

Shapes: B texts of N tokens in segments of T, n = N / rate prefix positions, X decoder tokens, H hidden size, L blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    head: int = 64
    inner: int = 4864
    theta: float = 1e6
    eps: float = 1e-6

    @property
    def qkv(self) -> tuple[int, int, int]:
        return self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head


# ---------------------------------------------------------------- elementwise, compiled where that works
def _rms(h, w, eps):
    x = h.float()
    r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * r).to(h.dtype) * w, r


def _rms_back(dy, h, w, r):
    x, g = h.float(), (dy * w).float()
    return (r * (g - x * (r * r) * (g * x).mean(-1, keepdim=True))).to(h.dtype)


def _swiglu(gu):
    g, u = gu.chunk(2, -1)
    return (F.silu(g.float()) * u.float()).to(gu.dtype)


def _swiglu_back(dy, gu):
    g, u = (t.float() for t in gu.chunk(2, -1))
    d, s = dy.float(), torch.sigmoid(g)
    return torch.cat([d * u * s * (1 + g * (1 - s)), d * g * s], -1).to(gu.dtype)


def _rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    c, s = cos.float(), sin.float()
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


OPS = {f.__name__: f for f in (_rms, _rms_back, _swiglu, _swiglu_back, _rotate)}


def compile_ops(device, shape) -> str:
    """Compile the elementwise functions for the model's widths and any number of rows, or leave all as they are if one
    fails; one that fails later falls back by itself. → what was chosen."""
    try:
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.recompile_limit = 64
        made = {k: torch.compile(f) for k, f in OPS.items()}
        new = lambda *size: torch.randn(*size, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            for m in (48, 96, 160):  # the second size makes rows dynamic, widths stay fixed
                w, h, gu = new(shape.hidden), new(m, shape.hidden), new(m, 2 * shape.inner)
                y, r = made["_rms"](h, w, shape.eps)
                made["_rms_back"](y, h, w, r)
                y = made["_swiglu"](gu)
                made["_swiglu_back"](y, gu)
                for heads in (shape.heads, shape.kv_heads):
                    angle = torch.randn(m, 1, shape.head // 2, device=device).to(torch.bfloat16)
                    made["_rotate"](new(m // 16, m, heads, shape.head), angle, angle)
        if device.type == "cuda":
            torch.cuda.synchronize()
        OPS.update(made)
        return "compiled"
    except Exception as error:  # a missing compiler, a driver: eager is slower and right
        return f"eager ({type(error).__name__}: {str(error)[:120]})"


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, eps):
        flat = h.detach().reshape(-1, h.shape[-1])
        y, r = OPS["_rms"](flat, w, eps)
        ctx.save_for_backward(flat, w, r)
        return y.view(h.shape)

    @staticmethod
    def backward(ctx, dy):
        h, w, r = ctx.saved_tensors
        return OPS["_rms_back"](dy.reshape(h.shape), h, w, r).view(dy.shape), None, None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gu):
        flat = gu.detach().reshape(-1, gu.shape[-1])
        ctx.save_for_backward(flat)
        return OPS["_swiglu"](flat).view(*gu.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        (gu,) = ctx.saved_tensors
        return OPS["_swiglu_back"](dy.reshape(len(gu), -1), gu).view(*dy.shape[:-1], -1)


class Rotate(torch.autograd.Function):
    """Rotary positions on [B, T, heads, head]; cos, sin [T, 1, head / 2]."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return OPS["_rotate"](x.detach(), cos, sin)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return OPS["_rotate"](dy, cos, -sin), None, None


# ---------------------------------------------------------------- LoRA in one product
class _Wide(torch.autograd.Function):
    """y = x Wᵀ + (x Aᵀ) Bᵀ + b; gradients of x, A and B. W and b are frozen.

    Where the output is wider than the input, as one product of the widened input [x, xAᵀ] and weight [W | B]; else the
    second term is added in place, which spares a copy of the input.
    """

    @staticmethod
    def forward(ctx, x, A, B, lora):
        flat = x.detach().reshape(-1, x.shape[-1])
        small = flat @ lora.a.t()
        ctx.lora, ctx.shape = lora, x.shape
        if lora.narrow:
            y = flat @ lora.w.t()
            y.addmm_(small, lora.b.t())
            ctx.save_for_backward(flat, small)
        else:
            wide = torch.cat([flat, small], 1)
            y = wide @ lora.wide.t() if lora.bias is None else torch.addmm(lora.bias, wide, lora.wide.t())
            ctx.save_for_backward(wide)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        lora = ctx.lora
        i = lora.a.shape[1]
        dy = dy.reshape(-1, dy.shape[-1])
        if lora.narrow:
            x, small = ctx.saved_tensors
            dx, da = dy @ lora.w, dy @ lora.b
            dx.addmm_(da, lora.a)
        else:
            (wide,) = ctx.saved_tensors
            x, small = wide[:, :i], wide[:, i:]
            d = dy @ lora.wide
            da = d[:, i:]
            dx = torch.addmm(d[:, :i], da, lora.a)
        return dx.view(ctx.shape), (da.t() @ x).float(), lora.diagonal(dy.t() @ small).float(), None


class WideLinear(nn.Module):
    """Linear layers that read the same input, fused, each with a rank-r adapter of its own.

    Args:
        weight: [sum(outs), in], frozen, the layers' weights below one another.
        outs: each layer's outputs.
    """

    def __init__(self, weight, bias, outs, rank):
        super().__init__()
        self.outs, self.rank = outs, rank
        total, into = weight.shape
        self.A = nn.Parameter(torch.randn(rank * len(outs), into) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(total, rank))
        self.register_buffer(
            "wide", torch.cat([weight, weight.new_zeros(total, rank * len(outs))], 1), persistent=False
        )
        self.register_buffer("a", torch.zeros_like(self.A, dtype=weight.dtype), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def narrow(self):
        return self.bias is None and self.wide.shape[0] <= self.a.shape[1]

    @property
    def w(self):
        return self.wide[:, : self.a.shape[1]]

    @property
    def b(self):
        return self.wide[:, self.a.shape[1] :]

    @torch.no_grad()
    def refresh(self):
        """Take the adapter's present values into the weights that are computed with."""
        into = self.a.shape[1]
        self.a.copy_(self.A)
        for k, (lo, hi) in enumerate(self.rows()):
            self.wide[lo:hi, into + k * self.rank : into + (k + 1) * self.rank] = self.B[lo:hi]

    def rows(self):
        at = 0
        for out in self.outs:
            yield at, at + out
            at += out

    def diagonal(self, dB):
        """Of [total, layers · r] the blocks that are not fixed at zero, [total, r]."""
        return torch.cat([dB[lo:hi, k * self.rank : (k + 1) * self.rank] for k, (lo, hi) in enumerate(self.rows())])

    def forward(self, x):
        return _Wide.apply(x, self.A, self.B, self)


class Block(nn.Module):
    def __init__(self, w: dict, shape: Shape, rank: int):
        super().__init__()
        self.shape = shape
        self.register_buffer("norm1", w["input_layernorm.weight"], persistent=False)
        self.register_buffer("norm2", w["post_attention_layernorm.weight"], persistent=False)
        bias = torch.cat([w[f"self_attn.{x}_proj.bias"] for x in "qkv"]) if "self_attn.q_proj.bias" in w else None
        self.qkv = WideLinear(torch.cat([w[f"self_attn.{x}_proj.weight"] for x in "qkv"]), bias, shape.qkv, rank)
        self.o = WideLinear(w["self_attn.o_proj.weight"], None, (shape.hidden,), rank)
        self.gu = WideLinear(
            torch.cat([w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]]), None, (shape.inner, shape.inner), rank
        )
        self.down = WideLinear(w["mlp.down_proj.weight"], None, (shape.hidden,), rank)

    def forward(self, h, cos, sin, before=None):
        """h [B, X, H]; before [B, n, H]: states at the positions before, of which only keys and values are made."""
        s, n = self.shape, 0 if before is None else before.shape[1]
        x = RMSNorm.apply(h if before is None else torch.cat([before, h], 1), self.norm1, s.eps)
        q, k, v = (t.view(len(x), x.shape[1], -1, s.head) for t in self.qkv(x).split(s.qkv, -1))
        q, k = Rotate.apply(q, cos, sin).transpose(1, 2), Rotate.apply(k, cos, sin).transpose(1, 2)
        # queries of `before` come out of the same product; they are computed and left, which spares a mask
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)[:, :, n:]
        h = h + self.o(y.transpose(1, 2).flatten(2))
        return h + self.down(SwiGLU.apply(self.gu(RMSNorm.apply(h, self.norm2, s.eps))))


# ---------------------------------------------------------------- the loss
class _Loss(torch.autograd.Function):
    """Weighted mean cross-entropy of h [M, H] against a frozen head [V, H], chunk by chunk, with its gradient.

    teacher: None, or hidden states [M, H] whose distribution is what is wanted, at the weight `share`; y at the rest.
    """

    @staticmethod
    def forward(ctx, h, head, y, w, chunk, teacher=None, share=0.0):
        total, hits, seen = (
            h.new_zeros((), dtype=torch.float32),
            h.new_zeros((), dtype=torch.float32),
            w.sum().clamp(min=1e-6),
        )
        grad = torch.empty_like(h)
        for i in range(0, len(h), chunk):
            hc, yc, wc = h[i : i + chunk], y[i : i + chunk], w[i : i + chunk]
            logits = (hc @ head.t()).float()
            top = logits.argmax(-1)
            p = torch.softmax(logits, -1)
            at = torch.gather(p, 1, yc[:, None])[:, 0]
            total += (-(at.clamp(min=1e-30).log()) * wc).sum()  # of the labels alone: comparable with any share
            hits += ((top == yc) * wc).sum()
            if teacher is not None:
                p -= share * torch.softmax((teacher[i : i + chunk] @ head.t()).float(), -1)
            p.scatter_add_(1, yc[:, None], torch.full_like(at, share - 1)[:, None])
            grad[i : i + chunk] = ((p * (wc / seen)[:, None]).to(h.dtype)) @ head
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(hits)
        return total / seen, hits / seen

    @staticmethod
    def backward(ctx, d, _):
        (grad,) = ctx.saved_tensors
        return grad * d.to(grad.dtype), None, None, None, None, None, None


# ---------------------------------------------------------------- the model
class RCC(nn.Module):
    """
    Args:
        base: the frozen weights by Hugging Face's names (`model.layers.N.…`), the embedding possibly cut to fewer rows.
        sink: id of the token that stands before each segment; the prompt's first.
    """

    def __init__(self, base: dict, shape: Shape, rates: list[int], sink: int, rank: int = 16):
        super().__init__()
        self.shape, self.rates, self.first = shape, rates, sink
        block = lambda i: {
            k[len(f"model.layers.{i}.") :]: v for k, v in base.items() if k.startswith(f"model.layers.{i}.")
        }
        self.encoder = nn.ModuleList(
            Block(block(i), shape, rank) for i in range(shape.layers - 1)
        )  # the last one feeds nothing
        self.decoder = nn.ModuleList(Block(block(i), shape, rank) for i in range(shape.layers))
        self.register_buffer("embed", base["model.embed_tokens.weight"], persistent=False)
        self.register_buffer("norm", base["model.norm.weight"], persistent=False)
        self.P = nn.ParameterList(nn.Parameter(torch.eye(shape.hidden)) for _ in range(shape.layers))
        self.rate_embeddings = nn.Parameter(torch.zeros(len(rates), shape.hidden))
        self.angles = {}
        self.refresh()
        with torch.no_grad():  # what the base makes of its first token alone: attention rests there
            h = self.embed[self.first][None, None]
            cos, sin = self.rotary(1)
            states = [h]
            for block in self.encoder:
                h = block(h, cos, sin)
                states.append(h)
            self.sink = nn.Parameter(torch.stack([t[0, 0].float() for t in states]))

    @property
    def dtype(self):
        return self.embed.dtype

    def refresh(self):
        for m in self.modules():
            if isinstance(m, WideLinear):
                m.refresh()

    def rotary(self, T):
        if T not in self.angles:
            half = self.shape.head // 2
            freq = 1 / self.shape.theta ** (torch.arange(half, device=self.embed.device, dtype=torch.float64) / half)
            t = torch.arange(T, device=self.embed.device, dtype=torch.float64)[:, None] * freq
            # rounded as transformers rounds them: computed in float32, kept in the model's precision
            self.angles[T] = tuple(f(t.float()).to(self.dtype)[:, None] for f in (torch.cos, torch.sin))
        return self.angles[T]

    def encode(self, ids, rate):
        """[B, S, T] → L tensors [B, 1 + n, H]: the sink's and the prefix positions' states before each decoder block.

        rate: one for all segments, or a list of S.
        """
        B, S, T = ids.shape
        if not S:
            return [
                p.to(self.dtype).expand(B, 1, -1) for p in self.sink[:, None]
            ]  # the text is among what the decoder reads
        each = rate if isinstance(rate, list) else [rate] * S
        at = torch.cat([s * (T + 1) + torch.arange(r, T + 1, r) for s, r in enumerate(each)]).to(ids.device)
        h = self.embed[ids] + self.rate_embeddings[[self.rates.index(r) for r in each]].to(self.dtype)[:, None]
        h = torch.cat([self.embed[self.first].expand(B, S, 1, -1), h], 2).flatten(0, 1)
        cos, sin = self.rotary(T + 1)
        out = []
        for i, p in enumerate(self.P):
            kept = (
                h[:, rate::rate].reshape(B, -1, h.shape[-1])
                if rate is not each
                else h.view(B, -1, h.shape[-1]).index_select(1, at)
            )
            out.append(torch.cat([self.sink[i].to(h.dtype).expand(B, 1, -1), F.linear(kept, p.to(h.dtype))], 1))
            if i < len(self.encoder):
                h = self.encoder[i](h, cos, sin)
        return out

    def decode(self, prefix, x):
        """prefix of :meth:`encode`, or None (plain); x [B, X] → hidden states [B, X, H] after the final norm."""
        h = self.embed[x]
        cos, sin = self.rotary(h.shape[1] + (0 if prefix is None else prefix[0].shape[1]))
        for i, block in enumerate(self.decoder):
            h = block(h, cos, sin, None if prefix is None else prefix[i])
        return RMSNorm.apply(h, self.norm, self.shape.eps)

    def exact(self, ids, x, at):
        """What the decoder makes of x after reading the text itself (rate 1), without gradients → [M, H]."""
        with torch.no_grad():
            h = self.decode(self.encode(ids[:, :0], 1), torch.cat([ids.flatten(1), x], 1))[:, -x.shape[1] :]
            return h.reshape(-1, h.shape[-1]).index_select(0, at)

    def forward(self, ids, rate, x, at, y, w, chunk=None, share=0.0):
        """ids [B, S, T] (None: plain), x [B, X], at [M] the places in [B · X] with a target, y, w [M] the token that
        follows and its weight; share: of what is wanted, how much is the decoder's own distribution after reading the
        text itself → loss, accuracy, both of y."""
        h = self.decode(None if ids is None else self.encode(ids, rate), x)
        return _Loss.apply(
            h.reshape(-1, h.shape[-1]).index_select(0, at),
            self.embed,
            y,
            w,
            chunk or (4096 if x.is_cuda else 512),
            self.exact(ids, x, at) if share else None,
            share,
        )

    # ------------------------------------------------------------ as the project names them
    NAMES: ClassVar = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gu": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }

    def tensors(self):
        """Every learnt tensor by a name of its own, as views of the parameters."""
        yield from ((f"projections.{i}", p) for i, p in enumerate(self.P))
        yield "rate_embeddings", self.rate_embeddings
        yield "sink", self.sink
        for side, blocks in (("encoder", self.encoder), ("decoder", self.decoder)):
            for i, block in enumerate(blocks):
                for part, names in self.NAMES.items():
                    m = getattr(block, part)
                    for k, (name, (lo, hi)) in enumerate(zip(names, m.rows(), strict=True)):
                        yield f"{side}.layers.{i}.{name}.lora_A", m.A[k * m.rank : (k + 1) * m.rank]
                        yield f"{side}.layers.{i}.{name}.lora_B", m.B[lo:hi]

    @torch.no_grad()
    def state(self, dtype=torch.bfloat16):
        return {k: v.detach().to(dtype).cpu().contiguous().clone() for k, v in self.tensors()}

    @torch.no_grad()
    def load(self, state):
        mine = dict(self.tensors())
        assert set(mine) == set(state), sorted(set(mine) ^ set(state))[:4]
        for k, v in mine.items():
            v.copy_(state[k].to(v.device))
        self.refresh()

    def flops(self, context, n, targets, decoder):
        """Matrix products of one training sample, forward and backward (no gradients of the base): context tokens,
        prefix positions (0: plain reading), targets with a loss, decoder tokens."""
        s = self.shape
        body = 2 * (sum(s.qkv) * s.hidden + s.hidden * s.hidden + 3 * s.inner * s.hidden)
        enc = context * (s.layers - 1) if n else 0
        return (
            2 * body * (enc + decoder * s.layers)
            + 2 * 2 * sum(s.qkv) * s.hidden * n * s.layers
            + 3 * 2 * s.hidden**2 * n * s.layers
            + 2 * 2 * targets * self.embed.shape[0] * s.hidden
        )
