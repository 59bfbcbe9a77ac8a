"""Teach a passkey model's decoder to find a key among up to 2,048 vectors, from vectors that are encoded once.

    python research/scripts/passkey_decoder.py MODEL OUT \\
        [--keys 1500] [--minutes 60] [--learning-rate 3e-4] [--threads 2]
    python research/scripts/passkey_decoder.py MODEL OUT --encoder --texts 12 --keys 20000 --learning-rate 1e-4

With the encoder frozen, a segment's vector never changes, and all of a text but the segments around its key is filler.
So segments with keys are encoded once at the start, and every step puts some of them among the vectors of filler, in
texts of any length, where `rcc train` would encode each of them again. Half of the keys are drawn from two or three
different digits, and one in four (--across) crosses the edge of two segments: these are the ones that a decoder
misreads. Projections and the decoder's LoRA learn, at the model's highest rate (one vector a segment). An interrupted
run keeps what it encoded, and trains from the beginning.

With `--encoder` the encoder learns too: every step encodes the segments with its texts' keys, and now and then those of
filler again. Keys then cost nothing at the start, so use many more.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcc.runtime import allocator

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from rcc import RCCForCausalLM

    Places = tuple[list[int], list[int]]
    """Which vectors of filler stand before a key's segments, and which after."""


class Vectors:
    """The vectors of segments with keys, and of the filler around them."""

    def __init__(
        self,
        model: RCCForCausalLM,
        encode: Callable[[str], np.ndarray],
        keys: list[int],
        rng: np.random.Generator,
        kept: Path | None = None,
        across: float = 0.25,
        learning: bool = False,
    ) -> None:
        """`kept`: a file for what is encoded; what it holds of these keys and this model is not encoded again.
        `across`: share of keys, in fourths, that stand across the edge of two segments.
        `learning`: the encoder will change: the segments with keys are kept as token ids."""
        import torch

        from rcc.data import haystack

        self.model, self.rng, self.size, self.learning = model, rng, model.config.segment_length, learning
        of = [model.fingerprint, list(keys), across]
        if kept is not None and kept.exists() and (found := torch.load(kept))["of"] == of:
            vars(self).update({name: value for name, value in found.items() if name != "of"})
            return
        opening, filler = encode(haystack.OPENING), [encode(sentence) for sentence in haystack.FILLER]
        around = sum(map(len, filler))
        self.period = around // math.gcd(around, self.size)  # segments until filler is cut at the same places again
        length = (self.period + 3) * self.size
        hidden = [encode(haystack.HIDDEN.format(key=key)) for key in keys]
        if len(set(map(len, hidden))) > 1:
            raise SystemExit("keys of as many tokens each are needed: use a tokenizer that splits digits one by one")
        if (least := len(opening) + len(hidden[0])) > self.size:
            raise SystemExit(f"segments of at least {least} tokens are needed: the model's hold {self.size}")
        plain = haystack.hide(opening, [], filler, length)[0]
        # the key as the very first sentence: after it all filler is shifted
        shifted = haystack.hide(opening, [(0.0, hidden[0])], filler, length)[0]
        cut = range(0, length - self.size, self.size)
        self.filler = [[text[i : i + self.size] for i in cut] for text in (plain, shifted)]
        self.read_filler()
        self.first: list[tuple[int, int, int]] = []
        self.segments: list[np.ndarray] = []
        for i, sentence in enumerate(hidden):
            low = high = -1
            # the text's short end is never the key's
            while low < 0 or (high + 1) * self.size > length - around or (i % 4 < 4 * across and low == high):
                ids, (place,) = haystack.hide(opening, [(rng.random(), sentence)], filler, length)
                low, high = place // self.size, (place + len(sentence) - 1) // self.size
            self.first.append((low, high - low + 1, len(self.segments)))
            self.segments += [ids[at * self.size : (at + 1) * self.size].copy() for at in range(low, high + 1)]
        if learning:
            return
        self.keys = self.read(self.segments)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            names = ("period", "first", "before", "after", "keys")
            torch.save({"of": of, **{name: getattr(self, name) for name in names}}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)

    def read_filler(self) -> None:
        """Encode the segments of filler, with the encoder as it is now."""
        self.before, self.after = map(self.read, self.filler)

    def read(self, segments: Sequence[np.ndarray]) -> Tensor:
        """Segments [T] of full length → vectors [N, L, H] of the states that the projections read, 8 at a time."""
        import torch

        vectors, start = [], time.time()
        for i in range(0, len(segments), 8):
            with torch.set_grad_enabled(self.learning):  # without, autocast leaves norms that learn in two precisions
                vectors.append(self.encode(segments[i : i + 8]).detach())
            if i % 160 == 0 and i:
                print(
                    f"{i} of {len(segments)} segments, {i * self.size / (time.time() - start):,.0f} tokens/s",
                    flush=True,
                )
        return torch.cat(vectors)

    def encode(self, segments: Sequence[np.ndarray]) -> Tensor:
        """As :meth:`read`, all at once, with gradients where the encoder learns; segments may be shorter."""
        import torch

        from rcc.model.training_pass import encode_texts

        texts: list[tuple[Tensor, ...]] = [(torch.from_numpy(ids),) for ids in segments]
        states, _ = encode_texts(self.model, texts, max(self.model.config.rates))
        return torch.stack([states[k][:, 0] for k in self.model.projections.states], 1)

    def hidden(self, numbers: list[int], length: int | None = None) -> Sequence[Tensor]:
        """For each of these keys the vectors [1 or 2, L, H] of its segments, encoded now where none are kept; of two,
        `length` tokens on either side of the edge, all by default."""
        firsts = [self.first[number] for number in numbers]
        if not self.learning:
            return [self.keys[row : row + count] for _, count, row in firsts]
        length = length or self.size
        segments: list[np.ndarray] = []
        for _, count, row in firsts:
            read = self.segments[row : row + count]
            segments += read if count == 1 else [read[0][-length:], read[1][:length]]
        vectors: tuple[Tensor, ...] = self.encode(segments).split([count for _, count, _ in firsts])
        return vectors

    def place(self, number: int, n: int) -> Places | None:
        """In a text of n segments with that key at a random place, None if it has none there: which vectors of filler
        stand before it, and which after."""
        low, count, _ = self.first[number]
        starts = [0] if low == 0 else list(range((low - 1) % self.period + 1, n - count + 1, self.period))
        if not starts or starts[0] + count > n:
            return None
        place = int(self.rng.choice(starts))
        before = [0, *((p - 1) % self.period + 1 for p in range(1, place))][:place]
        after = [(p - 1) % self.period + 1 for p in range(place + count, n)]
        return before, after

    def text(self, place: Places, hidden: Tensor) -> Tensor:
        """The vectors [n, L, H] of the text that :meth:`place` and :meth:`hidden` describe."""
        import torch

        before, after = place
        return torch.cat([self.before[before], hidden, self.after[after]])


def draw_keys(count: int, rng: np.random.Generator) -> list[int]:
    """Numbers of five digits, half of them of two or three different ones."""
    keys: list[int] = []
    while len(keys) < count:
        digits = rng.choice(10, int(rng.integers(2, 4)), replace=False) if len(keys) % 2 else range(10)
        key = int("".join(map(str, rng.choice(list(digits), 5))))
        if key >= 10_000:
            keys.append(key)
    return keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--keys", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--across", type=float, default=0.25, help="share of keys across the edge of two segments")
    parser.add_argument("--encoder", action="store_true", help="the encoder learns too")
    parser.add_argument("--shortest", type=int, help="with --encoder: least tokens read beside an edge; all by default")
    parser.add_argument("--longest", type=int, default=2048, help="most vectors of a text")
    parser.add_argument("--positions", type=int, default=2048, help="of a batch, prefix and question together")
    parser.add_argument("--texts", type=int, default=64, help="of a batch, at most; with --encoder 12 take 14 GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    allocator.configure()
    import numpy as np
    import torch

    from rcc import RCCForCausalLM, load_tokenizer
    from rcc.data import haystack
    from rcc.model.freezing import freeze
    from rcc.model.training_pass import TrainingBatch, decode_states
    from rcc.runtime.precision import computing
    from rcc.training.collate import prompts_and_targets
    from rcc.training.groups import Group
    from rcc.training.tasks.base import Marks, Sample

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    dtype = computing(torch.bfloat16, "cpu")
    model = RCCForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    marks = Marks.of(load_tokenizer(arguments.model))
    keys = draw_keys(arguments.keys, rng)
    least, size = len(marks.encode(haystack.HIDDEN.format(key=keys[0]))), model.config.segment_length
    shortest = arguments.shortest or size
    if not least <= shortest <= size:
        raise SystemExit(f"--shortest {shortest}: from {least}, what a key's sentences take, to {size}, a segment")
    # encoding takes minutes for a thousand keys: not to be done twice
    kept = None if arguments.encoder else arguments.out / "vectors.pt"
    vectors = Vectors(model, marks.encode, keys, rng, kept, arguments.across, arguments.encoder)
    question = marks.encode(haystack.QUESTION)
    asked = [Sample((), question, np.append(marks.encode(f" {key}."), marks.eos), "passkey") for key in keys]
    freeze(model, [] if arguments.encoder else ["encoder"], dtype)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    how = Group(arguments.learning_rate, "cosine", warmup_steps=10, floor=0.02)
    optimizer = torch.optim.AdamW(learning, lr=how.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    most = model.window - 64

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)

    def batch() -> tuple[Tensor, int, int]:
        """Texts of one length, as many as fit → the training pass's mean loss and how many they are."""
        n = int(2 ** rng.uniform(1, math.log2(min(arguments.longest, most))))
        length = round(2 ** rng.uniform(math.log2(shortest), math.log2(size)))
        texts = max(1, min(arguments.texts * size // length, arguments.positions // (n + 32)))
        drawn = rng.integers(len(keys), size=texts).tolist()
        placed = [(number, found) for number in drawn if (found := vectors.place(number, n)) is not None]
        if not placed:
            return batch()
        with autocast():
            hidden = vectors.hidden([number for number, _ in placed], length)
            rows = [vectors.text(place, found) for (_, place), found in zip(placed, hidden, strict=True)]
            states = torch.stack(rows).to(dtype)  # kept ones may be another machine's
            prompts: dict[str, Any] = prompts_and_targets(
                [(question, asked[number]) for number, _ in placed], marks.eos
            )
            named = {k: states[:, :, i] for i, k in enumerate(model.projections.states)}
            out = decode_states(model, named, None, TrainingBatch(**prompts))
        assert out.loss is not None
        return out.loss, len(rows), n

    start, step, seen, log = time.time(), 0, 0, []
    while (done := (time.time() - start) / 60 / arguments.minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * how.factor(step, done)
        if arguments.encoder and step % 20 == 0 and step:
            with autocast():
                vectors.read_filler()
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
                f"{low}-{2 * low}": f"{np.mean(losses):.4f}"
                for low in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
                if (losses := [loss for n, loss in recent if low <= n < 2 * low])
            }
            print(f"step {step}, {seen:,} texts, {time.time() - start:.0f} s", shown, flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    if kept is not None:
        kept.unlink()
    (arguments.out / "decoder-log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))


if __name__ == "__main__":
    main()
