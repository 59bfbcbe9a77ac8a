"""On the GPU machine, while parts still arrive: compile the whole model at random and time a few steps of each shape.

The compiled kernels stay in the cache."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import model as M

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
t0 = time.time()
small = len(sys.argv) > 1
say = lambda *a: print(f"[{time.time() - t0:.0f} s]", *a, flush=True)
torch.set_float32_matmul_precision("high")
if device.type == "cuda":
    torch.backends.cuda.enable_cudnn_sdp(False)
    say(torch.cuda.get_device_name(), torch.__version__, torch.cuda.mem_get_info())
s = M.Shape(layers=2 if small else 24)
V = 2000 if small else 65536
new = lambda *z: torch.randn(*z, device=device, dtype=torch.bfloat16) * 0.02
base = {"model.embed_tokens.weight": new(V, s.hidden), "model.norm.weight": new(s.hidden) + 1}
for i in range(s.layers):
    p = f"model.layers.{i}."
    base |= {
        p + "input_layernorm.weight": new(s.hidden) + 1,
        p + "post_attention_layernorm.weight": new(s.hidden) + 1,
        p + "self_attn.o_proj.weight": new(s.hidden, s.hidden),
        p + "mlp.gate_proj.weight": new(s.inner, s.hidden),
        p + "mlp.up_proj.weight": new(s.inner, s.hidden),
        p + "mlp.down_proj.weight": new(s.hidden, s.inner),
    }
    for x, n in zip("qkv", s.qkv, strict=True):
        base |= {p + f"self_attn.{x}_proj.weight": new(n, s.hidden), p + f"self_attn.{x}_proj.bias": new(n)}
rates = [1, 2, 4, 8, 16, 32]
net = M.RCC(base, s, rates, 0).to(device)
params = [q for q in net.parameters() if q.requires_grad]
opt = torch.optim.AdamW(params, lr=1e-4, fused=True)
say("made")


def step(S, T, X, rate, plain=False, tokens=16384):
    B = max(1, tokens // (S * T))
    ids = None if plain else torch.randint(0, V, (B, S, T), device=device)
    if plain:
        X = X + S * T
        B = max(1, B // 2)
    x = torch.randint(0, V, (B, X), device=device)
    at = torch.arange(B * X, device=device)[:: 2 if not plain else 16]
    y = x.flatten()[at]
    w = torch.ones(len(at), device=device)
    loss, _ = net(ids, rate, x, at, y, w)
    loss.backward()
    g = torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
    opt.step()
    net.refresh()
    opt.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.isfinite(g), g
    return B * S * T


def time_all(name, again):
    shapes = [
        (1, 512, 512, 4),
        (1, 1024, 512, 4),
        (2, 1024, 1024, 8),
        (4, 1024, 1024, 8),
        (1, 1024, 512, 1),
        (2, 1024, 1024, [2, 8]),
    ]
    for S, T, X, r in shapes:
        t = time.time()
        step(S, T, X, r)
        first = time.time() - t
        t = time.time()
        k = sum(step(S, T, X, r) for _ in range(again))
        d = time.time() - t
        say(name, S, T, X, r, f"first {first:.1f} s, then {k / max(d, 1e-9):,.0f} tokens/s")
    t = time.time()
    step(1, 1024, 512, 1, plain=True)
    say(
        name,
        "plain",
        f"{time.time() - t:.1f} s",
        f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if device.type == "cuda" else "",
    )


if not small:
    time_all("eager", 2)
say(M.compile_ops(device, s))
time_all("compiled", 1 if small else 4)
