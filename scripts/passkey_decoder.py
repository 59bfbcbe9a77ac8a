"""Teaches a passkey model's decoder to find a key among up to 2,048 vectors, from vectors that are encoded once.

    python scripts/passkey_decoder.py MODEL OUT [--keys 1500] [--minutes 60] [--learning-rate 3e-4] [--threads 2]

With the encoder frozen, a segment's vector never changes, and of a text only the segments around its key are not
filler. So segments with keys are encoded once, in the beginning, and every step puts some of them among the vectors of
filler, in texts of any length, where `rcc train` would encode each anew. Half of the keys are drawn from two or three
different digits, and one in four (--across) stands across the edge of two segments: these are what a decoder mistakes.
Projections and the decoder's LoRA learn, at the model's highest rate (one vector a segment). A run that is interrupted
keeps what it encoded, and trains from the beginning.
"""

import argparse
import json
import math
import time
from pathlib import Path

from rcc import allocator


class Vectors:
    """The vectors of segments with keys, and of the filler around them."""

    def __init__(self, model, encode, keys, rng, across=0.25, kept=None):
        """`across`: share of keys, in fourths, that stand across the edge of two segments.
        `kept`: a file for what is encoded; what it holds of these keys and this model is not encoded again."""
        import torch

        from rcc.training import tasks

        self.model, self.rng, self.size = model, rng, model.config.segment_length
        of = [model.fingerprint, list(keys), across]
        if kept is not None and kept.exists() and (found := torch.load(kept))["of"] == of:
            vars(self).update({name: value for name, value in found.items() if name != "of"})
            return
        opening, filler = encode(tasks.OPENING), [encode(sentence) for sentence in tasks.FILLER]
        around = sum(map(len, filler))
        self.period = around // math.gcd(around, self.size)  # segments until filler is cut at the same places again
        length = (self.period + 3) * self.size
        hidden = [encode(tasks.HIDDEN.format(key=key)) for key in keys]
        if len(set(map(len, hidden))) > 1:
            raise SystemExit("keys of as many tokens each are needed: use a tokenizer that splits digits one by one")
        if (least := len(opening) + len(hidden[0])) > self.size:
            raise SystemExit(f"segments of at least {least} tokens are needed: the model's hold {self.size}")
        plain = tasks.hide(opening, [], filler, length)[0]
        self.before = self.read([plain[i : i + self.size] for i in range(0, length - self.size, self.size)])
        # the key as the very first sentence: behind it all filler is shifted
        shifted = tasks.hide(opening, [(0.0, hidden[0])], filler, length)[0]
        self.after = self.read([shifted[i : i + self.size] for i in range(0, length - self.size, self.size)])
        self.first, segments = [], []
        for i, sentence in enumerate(hidden):
            low = high = -1
            # the text's short end is never the key's
            while low < 0 or (high + 1) * self.size > length - around or (i % 4 < 4 * across and low == high):
                ids, (place,) = tasks.hide(opening, [(rng.random(), sentence)], filler, length)
                low, high = place // self.size, (place + len(sentence) - 1) // self.size
            self.first.append((low, high - low + 1, len(segments)))
            segments += [ids[at * self.size : (at + 1) * self.size] for at in range(low, high + 1)]
        self.keys = self.read(segments)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            names = ("period", "first", "before", "after", "keys")
            torch.save({"of": of, **{name: getattr(self, name) for name in names}}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)

    def read(self, segments):
        """Segments [T] of full length → vectors [N, L, H], 8 at a time."""
        import numpy as np
        import torch

        rate, found, start = max(self.model.config.rates), [], time.time()
        for i in range(0, len(segments), 8):
            ids = torch.from_numpy(np.stack(segments[i : i + 8]))
            found.append(self.model.encode(ids, rate=rate).states[:, 0])
            if i % 160 == 0 and i:
                print(
                    f"{i} of {len(segments)} segments, {i * self.size / (time.time() - start):,.0f} tokens/s",
                    flush=True,
                )
        return torch.cat(found)

    def text(self, number, n):
        """The vectors [n, L, H] of a text of n segments with that key at a random place, None if it has none there."""
        import torch

        low, count, row = self.first[number]
        places = [0] if low == 0 else list(range((low - 1) % self.period + 1, n - count + 1, self.period))
        if not places or places[0] + count > n:
            return None
        place = int(self.rng.choice(places))
        before = [0, *((p - 1) % self.period + 1 for p in range(1, place))][:place]
        after = [(p - 1) % self.period + 1 for p in range(place + count, n)]
        return torch.cat([self.before[before], self.keys[row : row + count], self.after[after]])


def draw_keys(count, rng):
    """Numbers of five digits, half of them of two or three different ones."""
    found = []
    while len(found) < count:
        digits = rng.choice(10, int(rng.integers(2, 4)), replace=False) if len(found) % 2 else range(10)
        key = int("".join(map(str, rng.choice(list(digits), 5))))
        if key >= 10_000:
            found.append(key)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--keys", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--across", type=float, default=0.25, help="share of keys across the edge of two segments")
    parser.add_argument("--positions", type=int, default=2048, help="of a batch, prefix and question together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    allocator.configure()
    import numpy as np
    import torch

    from rcc import RCCForCausalLM, load_tokenizer
    from rcc.precision import computing
    from rcc.training import tasks
    from rcc.training.groups import freeze
    from rcc.training.recipe import Group

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    dtype = computing(torch.bfloat16, "cpu")
    model = RCCForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    marks = tasks.Marks.of(load_tokenizer(arguments.model))
    keys = draw_keys(arguments.keys, rng)
    kept = arguments.out / "vectors.pt"  # encoding takes ten minutes for a thousand keys: not to be done twice
    vectors = Vectors(model, marks.encode, keys, rng, arguments.across, kept)
    question = marks.encode(tasks.QUESTION)
    asked = [tasks.Sample((), question, np.append(marks.encode(f" {key}."), marks.eos), "passkey") for key in keys]
    freeze(model, ["encoder"], dtype)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    how = Group(arguments.learning_rate, "cosine", warmup_steps=10, floor=0.02)
    optimizer = torch.optim.AdamW(learning, lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    most = model.window - 64

    def batch():
        """Texts of one length, as many as fit → the training pass's mean loss and how many they are."""
        n = int(2 ** rng.uniform(1, math.log2(min(2048, most))))
        rows, written = [], []
        for _ in range(max(1, arguments.positions // (n + 32))):
            number = int(rng.integers(len(keys)))
            if (found := vectors.text(number, n)) is not None:
                rows.append(found)
                written.append((question, asked[number]))
        if not rows:
            return batch()
        states = torch.stack(rows).to(dtype)  # kept ones may be another machine's
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model._decode_to_train(
                {k: states[:, :, k] for k in model.projections.states},
                None,
                attention_mask=None,
                **tasks._written(written, marks.eos),
            )
        return out.loss, len(rows), n

    start, step, seen, log = time.time(), 0, 0, []
    while (done := (time.time() - start) / 60 / arguments.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * how.factor(step, done)
        parts = []
        for _ in range(3):  # of different lengths; each text counts the same
            loss, texts, n = batch()
            (loss * texts).backward()
            parts.append((loss.item(), texts, n))
        total = sum(texts for _, texts, _ in parts)
        for parameter in learning:
            if parameter.grad is not None:
                parameter.grad /= total
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + total
        log += [{"step": step, "texts": seen, "positions": n, "loss": loss} for loss, _, n in parts]
        if step % 20 == 0:
            recent = [(entry["positions"], entry["loss"]) for entry in log[-60:]]
            shown = {
                f"{low}-{2 * low}": f"{np.mean(some):.4f}"
                for low in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
                if (some := [loss for n, loss in recent if low <= n < 2 * low])
            }
            print(f"step {step}, {seen:,} texts, {time.time() - start:.0f} s", shown, flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    kept.unlink()
    (arguments.out / "decoder-log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


if __name__ == "__main__":
    main()
