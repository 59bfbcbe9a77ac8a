"""Texts that hide a key: the paper's (section 4.2), and harder forms of it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..config import RCCConfig
from ..model import segments
from ..training.tasks import FILLER, HIDDEN, OPENING, QUESTION, hide

POSITIONS = {"start": (0.0, 0.1), "middle": (0.45, 0.55), "end": (0.9, 1.0)}
"""How many of the filler's sentences stand before the key: drawn from the first, the middle and the last tenth."""
OTHERS = 3
"""Further keys in a text of several, so that there are four, as in RULER's first multi-key task."""
NAMES = ("Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karin", "Louis")
THINGS = ("door code", "order number", "ticket number", "account number", "phone number", "house number")
WORDS = ("harbor", "violin", "meadow", "lantern", "copper", "saddle", "orchard", "marble", "anchor", "thimble")


@dataclass(frozen=True)
class Variant:
    """A form of the task; the fields left out are the paper's.

    Attributes:
        opening: the text's first words.
        hidden: what hides a key, with places for `{name}` and `{key}`.
        question: asks for the key of `{name}`.
        names: what the key that is asked for may be called.
        others: what further keys may be called; nothing: there are none.
        digits: of a key; 0: keys are UUIDs.
        prose: the filler is real prose.
    """

    opening: str = OPENING
    hidden: str = HIDDEN
    question: str = QUESTION
    names: tuple[str, ...] = ("pass key",)
    others: tuple[str, ...] = ()
    digits: int = 5
    prose: bool = False

    def keys(self, rng: np.random.Generator, count: int) -> list[str]:
        """Different keys."""
        if not self.digits:
            return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
        low = 10 ** (self.digits - 1)
        return [str(low + n) for n in rng.choice(9 * low, count, replace=False)]


_RULER = Variant(  # its wording for one number, https://github.com/NVIDIA/RULER
    opening="A special magic number is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the number afterwards.",
    hidden=" One of the special magic numbers for {name} is: {key}.",
    question="What is the special magic number for {name} mentioned in the provided text?"
    " The special magic number for {name} mentioned in the provided text is",
    names=WORDS,
    digits=7,
)
VARIANTS = {
    "plain": Variant(),
    "several": Variant(
        hidden=" The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.",
        question="What is the pass key of {name}? The pass key of {name} is",
        names=NAMES,
        others=NAMES,
    ),
    "similar": Variant(hidden=" The {name} is {key}. Remember it. {key} is the {name}.", others=THINGS),
    "uuid": Variant(digits=0),
    "niah-single": _RULER,
    "niah-multikey": replace(_RULER, others=WORDS),
    "prose": Variant(prose=True),
}


@dataclass(frozen=True)
class Text:
    """A text that hides a key.

    Attributes:
        ids: [T] token ids, less than a sentence of filler fewer than was asked for.
        place: its tokens [start, end) that tell the key.
        without: at least T token ids: the same text with filler in their place.
        question, key: what is asked, and the answer.
    """

    ids: np.ndarray
    place: tuple[int, int]
    without: np.ndarray
    question: str
    key: str

    def replaced(self, config: RCCConfig) -> np.ndarray:
        """The control [T]: every segment that holds a token of the key gives way to what stands there without it."""
        ids, (start, end) = self.ids.copy(), self.place
        for segment in segments.split(torch.arange(len(ids)), config):
            if bool(((segment >= start) & (segment < end)).any()):
                ids[segment.numpy()] = self.without[segment.numpy()]
        return ids


def make_text(
    variant: str,
    position: str,
    length: int,
    sample: int,
    encode: Callable[[str], np.ndarray],
    seed: int = 0,
    prose: Sequence[np.ndarray] = (),
) -> Text:
    """The text of a sample, the same whenever it is made.

    Args:
        variant, position: of :data:`VARIANTS` and :data:`POSITIONS`.
        length: tokens.
        sample: its number.
        encode: text → token ids [T].
        prose: sentences of the filler for a variant of prose, token ids [T] each, begun anywhere.

    Raises:
        InputError: `length` leaves no room for the opening line and the keys.
    """
    form = VARIANTS[variant]
    rng = np.random.default_rng([seed, length, sample, *f"{variant} {position}".encode()])
    where = rng.uniform(*POSITIONS[position])
    name = str(rng.choice(form.names))
    names, places = [name], [where]
    if form.others:
        names += rng.choice([other for other in form.others if other != name], OTHERS, replace=False).tolist()
        places += rng.random(OTHERS).tolist()
    keys = form.keys(rng, len(names))
    hidden = [encode(form.hidden.format(name=n, key=k)) for n, k in zip(names, keys, strict=True)]
    filler = [encode(sentence) for sentence in FILLER]
    if form.prose:
        first = int(rng.integers(len(prose)))
        filler = [*prose[first:], *prose[:first]]
    opening, told = encode(form.opening), list(zip(places, hidden, strict=True))
    ids, starts = hide(opening, told, filler, length)
    without, _ = hide(opening, told[1:], filler, length + max(map(len, filler)))
    place = starts[0], starts[0] + len(hidden[0])
    return Text(ids, place, without, form.question.format(name=name), keys[0])


def prose_sentences(text: str) -> Iterator[str]:
    """Running text as sentences, each with a space before it; of at most 40 words, lest one fill a whole context."""
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if word.rstrip("\"')]”’").endswith((".", "!", "?")) or len(words) == 40:
            yield " " + " ".join(words)
            words = []
    if words:
        yield " " + " ".join(words)


def is_right(written: str, key: str) -> bool:
    """Whether the key is the first thing written, and nothing longer."""
    return re.match(rf"\W*{re.escape(key)}(?![\w-])", written) is not None
