"""Samples for train.py: fixed shapes, a pure function of (seed, number). NumPy only.

Files (unpack.py lays them out): text.bin, eval.bin: uint16 tokens; qa.npz, qa_eval.npz: contexts, questions, answers,
quotes as flat uint16 arrays with offsets, `row_context` the context of each question; meta.json: the marks' token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

UNANSWERABLE_SHARE, QUOTE_SHARE, PROSE_SHARE = 0.02, 0.12, 0.25


class Flat:
    """Many short token lists in one array."""

    def __init__(self, data, offsets):
        self.data, self.offsets = data, offsets

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        return self.data[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)


class Questions:
    def __init__(self, path):
        z = np.load(path)
        self.context, self.question, self.answer, self.quote = (
            Flat(z[k], z[k + "_at"]) for k in ("context", "question", "answer", "quote")
        )
        self.row_context = z["row_context"]
        order = np.argsort(self.row_context, kind="stable")
        self.by_row = order
        self.by_at = np.searchsorted(self.row_context[order], np.arange(len(self.context) + 1))
        self.weight = z["weight"].astype(np.float64)
        self.cumulative = np.cumsum(self.weight / self.weight.sum())

    def of(self, context):
        """Rows whose context this is."""
        return self.by_row[self.by_at[context] : self.by_at[context + 1]]

    def draw(self, g):
        return int(min(np.searchsorted(self.cumulative, g.random()), len(self.row_context) - 1))


class Samples:
    """One kind of batch at a time: `rec`, `cont`, `qa`, `mode`, `plain`.

    Every sample has [N] context tokens and [X + 1] decoder tokens."""

    def __init__(self, folder, split="train"):
        d = Path(folder)
        self.meta = json.loads((d / "meta.json").read_text())
        m = {k: np.array(v, dtype=np.int64) for k, v in self.meta["marks"].items()}
        self.header, self.turn, self.end, self.following, self.separator, self.cue, self.none = (
            m[k] for k in ("header", "turn", "end", "following", "separator", "cue", "unanswerable")
        )
        self.quote_before, self.eos, self.rare = m["quote_before"], self.meta["eos"], self.meta["rare"]
        self.text = np.memmap(d / ("text.bin" if split == "train" else "eval.bin"), dtype=np.uint16, mode="r")
        self.prose = np.memmap(d / "text.bin", dtype=np.uint16, mode="r")
        self.qa = Questions(d / ("qa.npz" if split == "train" else "qa_eval.npz"))

    def stretch(self, g, k, source=None):
        source = self.text if source is None else source
        s = int(g.integers(0, len(source) - k))
        return source[s : s + k].astype(np.int64)

    # ---------------------------------------------------------------- kinds
    def rec(self, g, N, X, wrong=0.02, repeated=0.3, spans=6):
        """The context's spans in random order, each after its own opening."""
        c = self.stretch(g, N)
        if g.random() < repeated:
            for _ in range(N // 64):
                k = int(g.integers(3, 13))
                s, t = g.integers(0, N - k, 2)
                c[t : t + k] = c[s : s + k].copy()
        size = min(X + 1, N)
        start = int(g.integers(0, N - size + 1))
        text = c[start : start + size]
        cuts = (
            np.sort(g.choice(np.arange(12, size - 12), int(g.integers(0, spans)), replace=False)) if size > 40 else []
        )
        parts = np.split(text, cuts)
        parts = [parts[i] for i in g.permutation(len(parts))]
        z = np.concatenate(parts)
        w = np.ones(len(z), dtype=np.float32)
        at = 0
        for k, p in enumerate(parts):
            given = 10 if k == 0 else int(g.integers(4, 11))
            w[at : at + min(given, len(p) - 1)] = 0
            at += len(p)
        read = z.copy()
        if wrong:
            hit = (w > 0) & (g.random(len(z)) < wrong)
            read[hit] = g.choice(c, int(hit.sum()))
        return c, z, w, read

    def cont(self, g, N, X):
        t = self.stretch(g, N + X + 1)
        w = np.ones(X + 1, dtype=np.float32)
        w[0] = 0
        return t[:N], t[N:], w, None

    def passages(self, g, N, first):
        """[N] tokens: the context `first` and others in random order, prose in between; which of them are whole."""
        parts, n, seen = [], 0, set()
        nxt = first
        while n < N:
            if nxt is None and g.random() < PROSE_SHARE:
                p, c = self.stretch(g, min(N, int(g.integers(40, 200))), self.prose), None
            else:
                c = nxt if nxt is not None else int(self.qa.row_context[self.qa.draw(g)])
                nxt = None
                if c in seen:
                    continue
                p = self.qa.context[c]
                seen.add(c)
            if n + len(p) > N:  # cut what no question needs: the last passage, or the first at its end
                p = p[: N - n]
                c = c if n == 0 else None
            parts.append((p, c))
            n += len(p)
            if n < N:
                n = min(N, n + len(self.separator))
        order = g.permutation(len(parts))
        flat = []
        whole = []
        for k, i in enumerate(order):
            p, c = parts[i]
            flat += [p, self.separator] if k < len(parts) - 1 else [p]
            if c is not None:
                whole.append(c)
        flat = np.concatenate(flat)[:N]
        return np.concatenate([flat, np.full(N - len(flat), self.eos, dtype=np.int64)]), whole

    def turn_of(self, g, row, whole):
        """A question and its answer: as it is, the sentence to be quoted, or one that the text does not answer."""
        q, a = self.qa.question[row], self.qa.answer[row]
        x = g.random()
        if x < QUOTE_SHARE and len(self.qa.quote[row]):
            return np.concatenate([self.quote_before, q]), self.qa.quote[row]
        if x > 1 - UNANSWERABLE_SHARE:
            other = self.qa.draw(g)
            if int(self.qa.row_context[other]) not in whole:
                return self.qa.question[other], self.none
        return q, a

    def chat(self, g, whole, X, asked=0.1, first_row=None):
        """Question after question about the passages, as many as X + 1 tokens hold."""
        rows = np.concatenate([self.qa.of(c) for c in whole]) if whole else np.array([], dtype=np.int64)
        rows = list(g.permutation(rows))
        if first_row is not None:
            rows = [first_row] + [r for r in rows if r != first_row]
        z, w, n = [self.header], [np.zeros(len(self.header), dtype=np.float32)], len(self.header)
        for row in rows:
            q, a = self.turn_of(g, row, whole)
            lead = [] if len(z) == 1 else [self.following]
            piece = [*lead, q, self.turn, a, self.end]
            size = sum(map(len, piece))
            if n + size > X + 1:
                continue
            n += size
            z += piece
            w += [np.zeros(len(p), dtype=np.float32) for p in lead] + [
                np.full(len(q), asked, dtype=np.float32),
                np.zeros(len(self.turn), dtype=np.float32),
                np.ones(len(a), dtype=np.float32),
                np.ones(len(self.end), dtype=np.float32),
            ]
        return np.concatenate(z), np.concatenate(w)

    def start(self, g, N):
        """A row whose context fits into N tokens."""
        for _ in range(50):
            row = self.qa.draw(g)
            if len(self.qa.context[int(self.qa.row_context[row])]) <= N:
                break
        return row

    def qa_(self, g, N, X, asked=0.1):
        row = self.start(g, N)
        c, whole = self.passages(g, N, int(self.qa.row_context[row]))
        z, w = self.chat(g, whole, X, asked, row)
        return c, z, w, None

    def mode(self, g, N, X):
        """The encoder reads the question: before or after the text (there as a segment of its own or not)."""
        own = self.segment == 256 < N and g.random() < 0.5
        before = not own and g.random() < 0.5
        row = self.start(g, N - 256 if own else N - 96)
        q, a = self.qa.question[row][:64], self.qa.answer[row][: X - 100]
        room = N - len(q) - len(self.separator)
        if own:
            room = N - 256  # the question is the last segment
        c, _ = self.passages(g, room, int(self.qa.row_context[row]))
        if own:
            last = np.concatenate([self.separator, q])
            c = np.concatenate([c, last, np.full(256 - len(last), self.eos, dtype=np.int64)])
        else:
            c = np.concatenate([q, self.separator, c] if before else [c, self.separator, q])
        if g.random() < 0.5:
            z = np.concatenate([self.header, q, self.turn, a, self.end])
            w = np.ones(len(z), dtype=np.float32)
            w[: len(self.header)] = 0
        else:
            z = np.concatenate([self.cue, a, self.end])
            w = np.ones(len(z), dtype=np.float32)
            w[: len(self.cue)] = 0
        return c, z, w, None

    def plain(self, g, N, X):
        """No prefix: the passages as ordinary tokens of the first turn, then as `qa`."""
        row = self.start(g, N)
        c, whole = self.passages(g, N, int(self.qa.row_context[row]))
        z, w = self.chat(g, whole, X, 0.1, row)
        h = len(self.header)
        z = np.concatenate([z[:h], c, self.separator, z[h:]])
        w = np.concatenate([w[:h], np.zeros(N + len(self.separator), dtype=np.float32), w[h:]])
        return None, z, w, None

    def exact(self, g, N, X):
        """The passages as ordinary tokens after the sink, before the header: a context at rate 1."""
        row = self.start(g, N)
        c, whole = self.passages(g, N, int(self.qa.row_context[row]))
        z, w = self.chat(g, whole, X, 0.1, row)
        return None, np.concatenate([c, z]), np.concatenate([np.zeros(N, dtype=np.float32), w]), None

    # ---------------------------------------------------------------- batches
    def batch(self, kind, count, N, X, T, g):
        """→ ids [B, S, T] or None, x [B, X], y [B, X], w [B, X]: what the decoder reads, what follows, its weight."""
        T = min(T, N)
        self.segment = T
        width = X + (N + len(self.separator) if kind == "plain" else N if kind == "exact" else 0)
        C, Z, W, R = [], [], [], []
        for _ in range(count):
            c, z, w, read = getattr(self, "qa_" if kind == "qa" else kind)(g, N, X)
            z, w = z[: width + 1], w[: width + 1]
            read = z if read is None else read[: width + 1]
            pad = width + 1 - len(z)
            w = np.where(z == self.rare, 0, w)
            C.append(c)
            Z.append(np.pad(z, (0, pad), constant_values=self.eos))
            R.append(np.pad(read, (0, pad), constant_values=self.eos))
            W.append(np.pad(w, (0, pad)))
        z, r, w = np.stack(Z), np.stack(R), np.stack(W).astype(np.float32)
        ids = (
            None
            if kind == "plain"
            else np.zeros((count, 0, T), dtype=np.int64)
            if kind == "exact"
            else np.stack(C).reshape(count, -1, T)
        )
        return ids, r[:, :-1], z[:, 1:], w[:, 1:]
