"""On the GPU machine: join the parts, check them, lay out the files, dequantize the base. NumPy and torch only."""

import hashlib
import json
import lzma
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


# ------------------------------------------------------------ llama.cpp's quantized types, a row of blocks → float32
def _f16(b):
    return b.view(np.float16).astype(np.float32)


def q8_0(b):
    b = b.reshape(-1, 34)
    return _f16(b[:, :2].copy()) * b[:, 2:].view(np.int8).astype(np.float32)


def q5_0(b):
    b = b.reshape(-1, 22)
    d, high, q = _f16(b[:, :2].copy()), b[:, 2:6].copy().view(np.uint32), b[:, 6:]
    fifth = ((high >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8)
    low = np.concatenate([q & 15, q >> 4], 1)
    return d * ((low | (fifth << 4)).astype(np.int8) - 16).astype(np.float32)


def q6_k(b):
    b = b.reshape(-1, 210)
    ql, qh, sc, d = b[:, :128], b[:, 128:192], b[:, 192:208].view(np.int8).astype(np.float32), _f16(b[:, 208:].copy())
    ql = ql.reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    qh = qh.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    q = ((ql & 15).reshape(-1, 8, 32) | ((qh & 3).reshape(-1, 8, 32) << 4)).astype(np.int8) - 32
    return ((d * sc)[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def q4_k(b):
    b = b.reshape(-1, 144)
    d, dmin, s, q = _f16(b[:, :2].copy()), _f16(b[:, 2:4].copy()), b[:, 4:16], b[:, 16:]
    s = s.reshape(-1, 3, 4)
    lo, mid, hi = s[:, 0], s[:, 1], s[:, 2]
    scale = np.concatenate([lo & 63, (hi & 15) | ((lo >> 2) & 48)], 1).astype(np.float32)
    least = np.concatenate([mid & 63, (hi >> 4) | ((mid >> 2) & 48)], 1).astype(np.float32)
    q = (q.reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)) & 15
    return ((d * scale)[:, :, None] * q.reshape(-1, 8, 32).astype(np.float32) - (dmin * least)[:, :, None]).reshape(
        -1, 256
    )


KINDS = {"Q8_0": q8_0, "Q5_0": q5_0, "Q6_K": q6_k, "Q4_K": q4_k, "F32": lambda b: b.view(np.float32)}
NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
for x in "qkv":
    NAMES |= {f"attn_{x}.weight": f"self_attn.{x}_proj.weight", f"attn_{x}.bias": f"self_attn.{x}_proj.bias"}


def base(blob, index):
    """The base by Hugging Face's names, bfloat16; the embedding is the tied `output.weight`."""
    import torch

    def one(item):
        name, (kind, shape, at, size) = item
        raw = np.frombuffer(blob, np.uint8, size, at).reshape(shape if kind != "F32" else -1)
        x = KINDS[kind](np.ascontiguousarray(raw))
        x = x.reshape(shape[0], -1) if len(shape) > 1 else x.reshape(-1)
        part = name.split(".")
        hf = {"output.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}.get(
            name
        ) or f"model.layers.{part[1]}.{NAMES['.'.join(part[2:])]}"
        return hf, torch.from_numpy(x.copy()).to(torch.bfloat16)

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, index.items()))


def main():
    import torch

    t0 = time.time()
    here = Path(sys.argv[1])
    count, digest = (here / "parts").read_text().split()
    parts = [here / f"part.{i:02d}" for i in range(int(count))]
    if missing := [p.name for p in parts if not p.exists()]:
        sys.exit(f"missing: {', '.join(missing)}: repeat that call")
    whole = b"".join(p.read_bytes() for p in parts)
    if hashlib.sha256(whole).hexdigest() != digest:
        sys.exit("the parts are not what was prepared: repeat the calls")
    head, _, rest = whole.partition(b"\n")
    at = 0
    files = {}
    for name, (size, _) in json.loads(head).items():
        files[name] = memoryview(rest)[at : at + size]
        at += size
    (here / "data").mkdir(exist_ok=True)

    def lay(item):
        name, raw = item
        if name.endswith(".xz"):
            (here / "data" / name[:-3]).write_bytes(lzma.decompress(raw))
        elif name.endswith((".py", ".sh", ".safetensors")):
            (here / name).write_bytes(raw)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lay, files.items()))
    torch.save(base(files["base.bin"], json.loads(bytes(files["base.json"]))), here / "base.pt")
    for p in parts:
        p.unlink()
    if (here / "data" / "start.safetensors").exists():
        import subprocess

        subprocess.run(
            [
                sys.executable,
                str(here / "pack.py"),
                "join",
                str(here / "data" / "start.safetensors"),
                str(here / "start.safetensors"),
            ],
            check=True,
        )
    print(f"unpacked in {time.time() - t0:.0f} s", flush=True)


if __name__ == "__main__":
    main()
