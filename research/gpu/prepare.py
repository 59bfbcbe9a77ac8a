#!/usr/bin/env python3
"""Lay out everything that the GPU machine needs in OUT/1 … OUT/N, a folder a call, each at most --mb MB.

    prepare.py GGUF_OR_WHEELS BASE_FOLDER DATA_FOLDER OUT [--start STATE] [--text-mtok 24]

GGUF: Qwen2.5-Coder-0.5B-Instruct Q4_K_M. BASE_FOLDER: what base.py made of it (tokenizer, and the weights to check
against).
Needs numpy, gguf, transformers, tokenizers: run it where the project runs, not on the GPU machine.
"""

import argparse
import collections
import hashlib
import json
import lzma
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
LIMIT = 65535
HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TURN, END, FOLLOWING, CUE = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n<|im_start|>user\n", "Answer:"
QUOTE, UNANSWERABLE = "Quote the sentence that answers this: ", "The text does not say."
QUALITY = {  # how often a question of a set is drawn, relative to the others; 0.3 for the rest
    "squad_train": 3,
    "squad_multi": 3,
    "squadshifts_wiki": 3,
    "clara_wiki": 2,
    "hotpotqa": 2,
    "musique": 2,
    "2wiki_train": 1.5,
    "hybridqa": 1.5,
    "ottqa": 1.5,
    "timeqa": 1.5,
    "multispanqa": 1.5,
    "fairytaleqa_train": 1,
    "covidqa": 1,
    "qamr": 1,
    "qamr_multi": 1,
    "ropes": 0.7,
    "tatqa": 1,
    "wikitables": 0.6,
    "qadiscourse": 0.5,
    "fewrel": 0.4,
    "redocred": 0.4,
}


def lines(path):
    with lzma.open(path, "rt", encoding="utf-8") if str(path).endswith("xz") else open(path, encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)


def text(paths, tok, budget):
    out, n = [], 0
    eos = tok.eos_token_id
    per = [[] for _ in paths]
    for k, p in enumerate(paths):
        per[k] = [d["text"] for d in lines(p)]
    share = [sum(map(len, d)) for d in per]
    total = sum(share)
    for k, d in enumerate(per):  # of every file its part of the budget
        room = budget * share[k] / total
        for i in range(0, len(d), 32):
            for ids in tok(d[i : i + 32], add_special_tokens=False)["input_ids"]:
                ids = np.array([*ids[: int(max(0, room))], eos], dtype=np.int32)
                out.append(ids)
                room -= len(ids)
                n += len(ids)
            if room <= 0:
                break
        print(paths[k], f"{n / 1e6:.1f}M tokens", flush=True)
    g = np.random.default_rng(0)
    return np.concatenate([out[i] for i in g.permutation(len(out))])


def sentence(context, answer):
    """The one sentence of the context that holds the answer, or ''."""
    hits = [s.strip() for s in re.split(r"(?<=[.!?])\s+", context) if answer.lower() in s.lower()]
    return hits[0] if len(hits) == 1 and 4 <= len(hits[0].split()) <= 50 else ""


def questions(files, tok, limit, split=None):
    contexts, rows = {}, []
    for path, weight in files:
        for r in lines(path):
            kind = r["id"].split("/")[0]
            if kind.startswith("multirc") or not r["answers"] or (split and not kind.startswith(split)):
                continue
            answer = str(r["answers"][0]).strip()
            stands = answer.lower() in r["context"].lower()
            w = weight(kind, stands and len(answer.split()) <= 8)
            if not w or not answer or len(r["context"]) > 6 * limit:
                continue
            c = contexts.setdefault(r["context"], len(contexts))
            rows.append((c, r["question"].strip(), answer, sentence(r["context"], answer) if stands else "", w))
    texts = list(contexts)

    def flat(strings):
        got = []
        for i in range(0, len(strings), 1000):
            got += [
                np.array(x, dtype=np.int32) for x in tok(strings[i : i + 1000], add_special_tokens=False)["input_ids"]
            ]
        return got

    C = flat(texts)
    ok = np.array([len(c) <= limit for c in C])
    rows = [r for r in rows if ok[r[0]]]
    Q, A, S = (flat([r[k] for r in rows]) for k in (1, 2, 3))
    keep = [i for i in range(len(rows)) if len(Q[i]) <= 64 and 0 < len(A[i]) <= 64 and len(S[i]) <= 80]
    S = [S[i] if len(S[i]) else np.zeros(0, np.int32) for i in range(len(rows))]
    return C, rows, Q, A, S, keep


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("gguf")
    p.add_argument("base")
    p.add_argument("data")
    p.add_argument("out")
    p.add_argument("--start", default="")
    p.add_argument("--text-mtok", type=float, default=24)
    p.add_argument("--mb", type=float, default=60)
    p.add_argument("--context", type=int, default=960, help="longest context of a question, tokens")
    p.add_argument("--blocks", type=int, default=0, help="for trials: only so many blocks of the base")
    a = p.parse_args()
    t0 = time.time()
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(a.base)
    data, out = Path(a.data), Path(a.out)
    tok.backend_tokenizer.no_truncation()
    train = text(sorted(data.glob("text_train_[bd]*.xz")), tok, a.text_mtok * 1e6)
    evaluation = text([data / "text_eval.jsonl"], tok, 0.4e6)
    files = [*sorted(data.glob("qa_train_open_*.xz")), *sorted(data.glob("qa_train_extractive_*.xz"))]
    qa = questions([(f, lambda k, short: QUALITY.get(k, 0.3) * (1 if short else 0.3)) for f in files], tok, a.context)
    qa_eval = questions(
        [(data / "qa_eval.jsonl", lambda k, s: 1)], tok, a.context, ("squad", "adversarialqa", "quoref")
    )
    enc = lambda s: np.array(tok(s, add_special_tokens=False)["input_ids"], dtype=np.int32)
    letter, both = enc("x"), enc("x\n\nx")
    marks = {
        "header": enc(HEADER),
        "turn": enc(TURN),
        "end": enc(END),
        "following": enc(FOLLOWING),
        "cue": enc(CUE),
        "separator": both[len(letter) : len(both) - len(letter)],
        "quote_before": enc(QUOTE + "x")[:-1],
        "unanswerable": enc(UNANSWERABLE),
    }
    # the vocabulary: what occurs, most frequent first
    size = len(tok)
    count = np.zeros(size + 64, dtype=np.int64)
    everything = [train, evaluation] + [x for s in (qa, qa_eval) for part in (s[0], s[2], s[3], s[4]) for x in part]
    for x in everything:
        count += np.bincount(x, minlength=len(count))
    forced = np.unique(np.concatenate([*marks.values(), [tok.eos_token_id], np.arange(256)]))
    count[forced] += 1 << 40
    used = np.argsort(-count, kind="stable")[: min(LIMIT, int((count > 0).sum()))]
    used.sort()
    rare = len(used)
    new = np.full(len(count), rare, dtype=np.int32)
    new[used] = np.arange(len(used))
    tokens = sum(map(len, everything))
    lost = sum(int((new[x] == rare).sum()) for x in everything)
    print(
        f"{tokens / 1e6:.1f}M tokens, {len(used):,} of the vocabulary, {lost:,} rare tokens; "
        f"{len(qa[5]):,} questions on {len(qa[0]):,} contexts; {time.time() - t0:.0f} s",
        flush=True,
    )
    u16 = lambda x: new[x].astype(np.uint16)

    def pack(s):
        C, rows, Q, A, S, keep = s
        there = sorted({rows[i][0] for i in keep})
        at = {c: k for k, c in enumerate(there)}
        z = {
            "row_context": np.array([at[rows[i][0]] for i in keep], dtype=np.int32),
            "weight": np.array([rows[i][4] for i in keep], dtype=np.float32),
        }
        # a context's weight is shared by its questions, up to four of them
        per = collections.Counter(z["row_context"].tolist())
        z["weight"] *= np.array([min(4, per[c]) / per[c] for c in z["row_context"]], dtype=np.float32)
        for k, part in (
            ("context", [C[c] for c in there]),
            ("question", [Q[i] for i in keep]),
            ("answer", [A[i] for i in keep]),
            ("quote", [S[i] for i in keep]),
        ):
            z[k] = u16(np.concatenate(part))
            z[k + "_at"] = np.cumsum([0] + [len(x) for x in part]).astype(np.int64)
        return z

    out.mkdir(parents=True, exist_ok=True)
    stage = out / "stage"
    stage.mkdir(exist_ok=True)
    for f in stage.iterdir():
        f.unlink()

    def put(name, raw):
        (stage / (name + ".xz")).write_bytes(lzma.compress(raw, preset=6))

    put("text.bin", u16(train).tobytes())
    put("eval.bin", u16(evaluation).tobytes())
    import io

    for name, s in (("qa.npz", qa), ("qa_eval.npz", qa_eval)):
        b = io.BytesIO()
        np.savez(b, **pack(s))
        put(name, b.getvalue())
    meta = {
        "marks": {k: new[v].tolist() for k, v in marks.items()},
        "eos": int(new[tok.eos_token_id]),
        "rare": rare,
        "vocabulary": used.tolist(),
    }
    put("meta.json", json.dumps(meta).encode())
    # the base: its tensors' quantized bytes, the embedding's rows that are used
    index = {}
    with (stage / "base.bin").open("wb") as blob:
        for t in GGUFReader(a.gguf).tensors:
            if t.name == "token_embd.weight" or (
                a.blocks and re.match(r"blk\.(\d+)\.", t.name) and int(t.name.split(".")[1]) >= a.blocks
            ):
                continue
            raw = np.ascontiguousarray(t.data)
            if t.name == "output.weight":
                raw = np.concatenate([raw[used], np.zeros_like(raw[:1])])
            index[t.name] = [t.tensor_type.name, list(raw.shape), blob.tell(), raw.nbytes]
            blob.write(raw.tobytes())
    (stage / "base.json").write_text(json.dumps(index))
    if a.start:
        put("start.safetensors", Path(a.start).read_bytes())
    here = Path(__file__).parent
    for f in ("model.py", "data.py", "train.py", "unpack.py", "pack.py"):
        (stage / f).write_bytes((here / f).read_bytes())
    # cut into calls
    for d in out.glob("[0-9]*"):
        for f in d.iterdir():
            f.unlink()
        d.rmdir()
    stream = [(f.name, f.read_bytes()) for f in sorted(stage.iterdir())]
    manifest = {n: [len(b), hashlib.sha256(b).hexdigest()] for n, b in stream}
    whole = json.dumps(manifest).encode() + b"\n" + b"".join(b for _, b in stream)
    part = int(a.mb * 1e6)
    count = -(-len(whole) // part)
    part = -(-len(whole) // count)
    for i in range(count):
        d = out / str(i + 1)
        d.mkdir()
        (d / f"part.{i:02d}").write_bytes(whole[i * part : (i + 1) * part])
    (out / str(count) / "unpack.py").write_bytes((here / "unpack.py").read_bytes())
    (out / str(count) / "parts").write_text(f"{count} {hashlib.sha256(whole).hexdigest()}\n")
    for f in stage.iterdir():
        f.unlink()
    stage.rmdir()
    name = out.name
    print(f"{len(whole) / 1e6:.0f} MB in {count} calls of {part / 1e6:.0f} MB ({time.time() - t0:.0f} s)")
    for i in range(1, count):
        print(f'call {i}: carry ["{name}/{i}"], timeout_s 60: mkdir -p /tmp/w && cp {name}/{i}/* /tmp/w/')
    print(
        f'call {count}: carry ["{name}/{count}"], timeout_s 600: mkdir -p /tmp/w && cp {name}/{count}/* /tmp/w/ && '
        "python3 /tmp/w/unpack.py /tmp/w && bash /tmp/w/go.sh $((560 - SECONDS))"
    )
    print(f"call {count + 1}, at once: carry [], timeout_s 60: bash /tmp/w/go.sh fetch")


main()
