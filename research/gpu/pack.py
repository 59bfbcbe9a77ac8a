"""pack.py small|exact: what a call hands over; pack.py join SMALL [EXACT] OUT: one state of them (there)."""

import sys

import torch
from safetensors.torch import load_file, save_file

what = sys.argv[1]
if what in ("small", "exact"):
    s = load_file("state.safetensors")
    out = {}
    for k, v in s.items():
        if not k.startswith("projections."):
            if what == "small":
                out[k] = v.to(torch.bfloat16)
        elif what == "exact":
            out[k] = v
        else:
            v = v.float() - torch.eye(
                len(v)
            )  # most of a projection is the identity, which 8 bits would drown the rest in
            scale = (v.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
            out[k + ".int8"] = (v.float() / scale).round().to(torch.int8)
            out[k + ".scale"] = scale
    save_file(out, f"{what}.safetensors")
else:
    *sources, to = sys.argv[2:]
    s = {}
    for f in sources:
        s |= load_file(f)
    for k in [k for k in s if k.endswith(".int8")]:
        q, scale = s.pop(k), s.pop(k[:-5] + ".scale")
        s.setdefault(k[:-5], q.float() * scale + torch.eye(len(q)))
    s = {
        k: v.to(torch.float32 if k.startswith("projections.") else torch.bfloat16) for k, v in s.items()
    }  # bfloat16 would round the identity's ones with what is added
    save_file(s, to)
    print(to, len(s), "tensors")
