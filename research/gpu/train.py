#!/usr/bin/env python3
"""Train on the lent GPU until the time is over; state.safetensors and resume.pt are written every minute.

    train.py FOLDER --seconds S [--lengths 512] [--rates 4:4,8:4,16:2] [--mix rec:45,cont:5,qa:38,mode:8,plain:4] …

Goes on from resume.pt (weights, optimiser, number of the next step), else from start.safetensors, else from nothing.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import model as M
from data import Samples

PEAK = 989e12
SAMPLES = {}


def shares(text):
    return {k: float(v) for k, v in (x.split(":") for x in text.split(","))}


def draw(folder, number, plan):
    """Batch `number`: everything about it follows from its number. Runs in a worker."""
    torch.set_num_threads(1)
    if folder not in SAMPLES:
        SAMPLES[folder] = Samples(folder)
    g = np.random.default_rng([plan["seed"], number])
    # processes wait for one another at each step: their batches are of one kind, rate and length
    shape = np.random.default_rng([plan["seed"], number // plan["world"], 1])
    pick = lambda s: list(s)[int(shape.choice(len(s), p=np.array(list(s.values())) / sum(s.values())))]
    kind, rate, N = pick(plan["mix"]), int(pick(plan["rates"])), int(pick(plan["lengths"]))
    X = 128 if kind == "mode" else min(int(N * plan["decoder"]), 512 if N < 2048 else 1024)
    count = max(1, plan["tokens"] // N)
    if kind in ("plain", "exact"):
        count = max(1, count // 2)
    ids, x, y, w = SAMPLES[folder].batch(kind, count, N, X, plan["segment"], g)
    if ids is not None and ids.shape[1] > 1 and g.random() < plan["mixed"]:
        rate = [int(pick(plan["rates"])) for _ in range(ids.shape[1])]
    if plan["trim"]:
        last = -(-(1 + int(np.flatnonzero((w > 0).any(0))[-1])) // 32) * 32
        x, y, w = x[:, :last], y[:, :last], w[:, :last]
    return kind, rate, N, X, ids, x, y, w


def inputs(device, ids, x, y, w, rows=slice(None)):
    """Arrays of a batch, some of its rows → what RCC.forward takes; the places of the targets are found on the CPU."""
    at = np.flatnonzero(w[rows] > 0)
    put = lambda v, t: None if v is None else torch.as_tensor(np.ascontiguousarray(v)).to(device, t, non_blocking=True)
    return (
        put(None if ids is None else ids[rows], torch.long),
        put(x[rows], torch.long),
        put(at, torch.long),
        put(y[rows].reshape(-1)[at], torch.long),
        put(w[rows].reshape(-1)[at], torch.float32),
    )


@torch.no_grad()
def held_out(net, folder, rates, device, a, length=0, samples=0):
    """Loss and accuracy of reconstruction by rate, and of answers to held-out questions; the same samples each time."""
    S, out = Samples(folder, "eval"), {}
    for kind, N, count in ((k, length or a.eval_length, samples or a.eval_samples) for k in ("rec", "qa")):
        for rate in rates:
            g = np.random.default_rng(11)
            got = []
            for i in range(0, count, 16):
                ids, x, y, w = S.batch(kind, min(16, count - i), N, min(N, 1024), a.segment, g)
                ids, *rest = inputs(device, ids, x, y, np.where(w >= 1, w, 0))
                loss, acc = net(ids, rate, *rest)
                got.append((loss.item(), acc.item()))
            out[f"{kind}@{rate}"] = tuple(round(float(np.mean([r[k] for r in got])), 3) for k in (0, 1))
    return out


def save(net, folder):
    from safetensors.torch import save_file

    save_file(net.state(torch.float32), str(folder / "state.tmp"))
    os.replace(folder / "state.tmp", folder / "state.safetensors")


def save_resume(net, opt, step, spent, folder):
    torch.save(
        {"own": net.state(torch.float32), "opt": opt.state_dict(), "step": step, "spent": spent}, folder / "resume.tmp"
    )
    os.replace(folder / "resume.tmp", folder / "resume.pt")


def predicted(net, ids, rate, x, at):
    """What the decoder reads in place of the text: at most places with a loss its own prediction (one pass)."""
    with torch.no_grad():
        h = net.decode(net.encode(ids, rate), x)
        own = torch.cat([(c @ net.embed.t()).argmax(-1) for c in h.flatten(0, 1).split(8192)]).view_as(x)
        use = torch.zeros_like(x, dtype=torch.bool).view(-1)
        use[at] = True
        use = use.view_as(x)
        read = x.clone()
        read[:, 1:] = torch.where(
            use[:, :-1] & (torch.rand(x[:, 1:].shape, device=x.device) < 0.9), own[:, :-1], x[:, 1:]
        )
        return read


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder")
    p.add_argument("--seconds", type=float, required=True)
    p.add_argument(
        "--minutes-in-all",
        type=float,
        default=0,
        help="minutes of training that the schedule spans, over several calls; 0: this call's",
    )
    p.add_argument("--lengths", type=shares, default=shares("512:1"))
    p.add_argument("--rates", type=shares, default=shares("4:4,8:4,16:2"))
    p.add_argument("--mix", type=shares, default=shares("rec:45,cont:5,qa:38,mode:8,plain:4"))
    p.add_argument("--segment", type=int, default=256)
    p.add_argument("--tokens", type=int, default=16384, help="context tokens of a batch")
    p.add_argument("--accumulation", type=int, default=2)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--projection-lr", type=float, default=5e-4)
    p.add_argument("--floor", type=float, default=0.02)
    p.add_argument("--warmup", type=int, default=80)
    p.add_argument("--own", type=float, default=0.0, help="how often `rec` reads its own predictions")
    p.add_argument(
        "--distil",
        type=float,
        default=0.0,
        help="share of the decoder's own distribution after reading the text itself in what `qa` is to say",
    )
    p.add_argument(
        "--decoder", type=float, default=1.0, help="decoder tokens of a sample, of its context tokens; at most 512"
    )
    p.add_argument("--mixed", type=float, default=0.0, help="how often each segment of a context has a rate of its own")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--workers", type=int, default=10)
    p.add_argument("--save-every", type=float, default=60)
    p.add_argument("--eval-length", type=int, default=512)
    p.add_argument("--eval-samples", type=int, default=48)
    p.add_argument("--float32", action="store_true")
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--reserve", type=float, default=25, help="seconds left for the end")
    p.add_argument("--no-resume", action="store_true")
    p.add_argument("--skip-first", action="store_true")
    a = p.parse_args()
    start = time.time()
    folder = Path(a.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first_rank = rank == 0
    if world > 1:
        torch.distributed.init_process_group("gloo")

    def tell(*words):
        if first_rank:
            print(*words, flush=True)

    def measure():
        return held_out(net, str(folder / "data"), rates, device, a) if first_rank else None

    plan = {
        "seed": a.seed,
        "world": world,
        "mix": a.mix,
        "rates": a.rates,
        "lengths": a.lengths,
        "tokens": a.tokens,
        "segment": a.segment,
        "decoder": a.decoder,
        "mixed": a.mixed,
        "trim": device.type == "cpu",
    }
    pool = ProcessPoolExecutor(a.workers, mp_context=__import__("multiprocessing").get_context("spawn"))
    resume = torch.load(folder / "resume.pt", map_location="cpu") if (folder / "resume.pt").exists() else None
    step, done = (resume["step"], resume["spent"]) if resume else (0, 0.0)
    ahead, nxt = [], step * a.accumulation

    def want():
        nonlocal nxt
        while len(ahead) < 3 * a.workers:
            ahead.append(pool.submit(draw, str(folder / "data"), nxt * world + rank, plan))
            nxt += 1

    want()
    weights = torch.load(folder / "base.pt", map_location="cpu")
    if a.float32:
        weights = {k: v.float() for k, v in weights.items()}
    layers = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("model.layers."))
    head = 64
    hidden = weights["model.norm.weight"].numel()
    shape = M.Shape(
        hidden=hidden,
        layers=layers,
        heads=weights["model.layers.0.self_attn.q_proj.weight"].shape[0] // head,
        kv_heads=weights["model.layers.0.self_attn.k_proj.weight"].shape[0] // head,
        inner=weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
    )
    meta = json.loads((folder / "data" / "meta.json").read_text())
    rates = sorted(map(int, a.rates))
    net = M.RCC({k: v.to(device) for k, v in weights.items()}, shape, rates, meta["marks"]["header"][0], a.rank).to(
        device
    )
    if resume:
        net.load(resume["own"])
    else:
        for name in ("state.safetensors", "start.safetensors"):
            if (folder / name).exists():
                from safetensors.torch import load_file

                net.load(load_file(str(folder / name)))
                tell("from", name)
                break
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape
    tell(
        "elementwise:",
        "eager" if a.no_compile else M.compile_ops(device, shape),
        "| device",
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {world} processes",
    )
    params = [q for q in net.parameters() if q.requires_grad]
    maps = set(map(id, net.P))
    groups = [([q for q in params if id(q) in maps], a.projection_lr), ([q for q in params if id(q) not in maps], a.lr)]
    opt = torch.optim.AdamW(
        [{"params": g, "lr": lr} for g, lr in groups], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    if resume:
        opt.load_state_dict(resume["opt"])
    tell(
        f"{sum(q.numel() for q in params) / 1e6:.1f}M learnt, vocabulary {len(net.embed):,}, step {step}, "
        f"set up in {time.time() - start:.0f} s; held out {None if a.skip_first else measure()}"
    )
    begun = time.time()
    left = a.seconds - (begun - start) - a.reserve
    total = 60 * a.minutes_in_all or left
    saved = told = begun
    first = step
    tokens = flops = 0
    log = {}
    small = 1
    waited = 0.0
    half = False
    failed = lost = 0
    part, over = min(1.0, done / total), False
    clock = 0.0
    tick = begun  # a process that is stopped for a while does not spend its time
    while not over and failed < 20 and lost < 20:
        f = float(min(1, (step - first + 1) / a.warmup) * (a.floor + (1 - a.floor) * 0.5 * (1 + np.cos(np.pi * part))))
        for g, (_, lr) in zip(opt.param_groups, groups, strict=True):
            g["lr"] = lr * f
        for _ in range(a.accumulation):
            t = time.time()
            batch = None
            while batch is None and failed < 20:
                try:
                    batch = ahead.pop(0).result()
                except Exception as error:
                    failed += 1
                    print(f"a batch could not be made ({type(error).__name__}: {error})"[:200], flush=True)
                try:
                    want()
                except Exception as error:
                    failed = 20
                    print(f"no more batches ({error})"[:200], flush=True)
            waited += time.time() - t
            if batch is None:
                break
            kind, rate, N, _, ids, x, y, w = batch
            rows = -(-len(x) // small)
            oom = False
            own = a.own and kind == "rec" and isinstance(rate, int) and rate <= 8 and np.random.random() < a.own
            for i in range(0, len(x), rows):
                loss = acc = None
                try:
                    c, r, at, yy, ww = inputs(device, ids, x, y, w, slice(i, i + rows))
                    if own:
                        r = predicted(net, c, rate, r, at)
                    loss, acc = net(c, rate, r, at, yy, ww, share=a.distil if kind == "qa" else 0.0)
                    (loss * len(r) / len(x) / a.accumulation).backward()
                except torch.OutOfMemoryError:
                    oom = True
                if oom:
                    loss = acc = c = r = None
                    opt.zero_grad(set_to_none=True)
                    torch.cuda.empty_cache()
                    small *= 2
                    print(f"out of memory: batches in {small} parts from now on", flush=True)
                    break
                log.setdefault(
                    kind
                    if ids is None
                    else kind
                    if not ids.size
                    else f"{kind}@{rate}"
                    if isinstance(rate, int)
                    else f"{kind}@mixed",
                    [],
                ).append((loss.detach(), acc.detach()))
            tokens += 0 if ids is None else ids.size
            flops += len(x) * net.flops(
                N,
                0
                if ids is None or not ids.size
                else N // rate
                if isinstance(rate, int)
                else sum(min(a.segment, N) // r for r in rate),
                float((w > 0).sum()) / len(x),
                x.shape[1],
            )
        clock += min(60.0, time.time() - tick)
        tick = time.time()
        part, over = min(1.0, (done + clock) / total), clock > left
        if world > 1:  # the mean of all processes' gradients, and the first one's clock
            flat = torch.cat(
                [
                    *(torch.zeros_like(q).flatten() if q.grad is None else q.grad.flatten() for q in params),
                    torch.tensor([part, float(over)]) * first_rank,
                ]
            )
            torch.distributed.all_reduce(flat)
            part, over = flat[-2].item(), flat[-1].item() > 0
            at = 0
            for q in params:
                q.grad = flat[at : at + q.numel()].view_as(q) / world
                at += q.numel()
        learnt = [q for q in params if q.grad is not None]
        if learnt:
            if torch.isfinite(torch.nn.utils.clip_grad_norm_(learnt, 1.0)):
                opt.step()
                net.refresh()
            else:
                lost += 1
                print("the gradient is not finite: step left out", flush=True)
            opt.zero_grad(set_to_none=True)
        step += 1
        now = time.time()
        if now - told > 20 and first_rank:
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent = clock
            means = {
                k: (
                    round(torch.stack([loss for loss, _ in v]).mean().item(), 3),
                    round(torch.stack([c for _, c in v]).mean().item(), 3),
                )
                for k, v in sorted(log.items())
            }
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB" if device.type == "cuda" else ""
            print(
                f"{spent:.0f} s step {step} {tokens * world / 1e6:.3f}M tokens, {tokens * world / spent:,.0f}/s, "
                f"{flops * world / spent / 1e12:.1f} TFLOP/s ({flops * world / spent / PEAK:.0%}){memory}, "
                f"waited {waited:.0f} s; {means}",
                flush=True,
            )
            log = {}
            told = time.time()
        if not half and part > (done + left / 2) / total:
            half = True
            tell("held out", measure())
        if now - saved > a.save_every and first_rank:
            save(net, folder)
            saved = time.time()
    if first_rank:
        save(net, folder)
    tell(f"end: step {step}, {tokens * world / 1e6:.3f}M context tokens in {clock:.0f} s")
    for q in list(pool._processes.values()):
        q.terminate()  # else they keep the pipe of the log open, and who reads it waits
    if first_rank and not a.no_resume:
        save_resume(net, opt, step, done + clock, folder)
    tell("held out", measure())
    if first_rank:
        (folder / "ended").touch()
    if device.type == "cuda":
        tell("held out, 2,048 tokens", held_out(net, str(folder / "data"), rates, device, a, 2048, 32))
    os._exit(0)


if __name__ == "__main__":
    main()
