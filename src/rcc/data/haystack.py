"""Texts that hide a key: the paper's (section 4.2), and harder forms of it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

OPENING = (
    "One important fact is hidden in this long and tedious text. Find it and keep it in mind: it will be asked for."
)
FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
HIDDEN = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
POSITIONS = {"start": (0.0, 0.1), "middle": (0.45, 0.55), "end": (0.9, 1.0)}
"""How many of the filler's sentences stand before the key: drawn from the first, the middle and the last tenth."""
OTHERS = 3
"""Further keys in a text of several, so that there are four, as in RULER's first multi-key task."""
NAMES = ("Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karin", "Louis")
THINGS = ("door code", "order number", "ticket number", "account number", "phone number", "house number")
WORDS = ("harbor", "violin", "meadow", "lantern", "copper", "saddle", "orchard", "marble", "anchor", "thimble")


def passkey_text(key: int, position: int, sentences: int) -> str:
    """Return the plain text that hides a number: so many sentences of filler, `position` of them before it."""
    filler = [FILLER[i % len(FILLER)] for i in range(sentences)]
    return "".join([OPENING, *filler[:position], key_sentence(key), *filler[position:]])


def passkey_ids(key: int, share_before: float, length: int, encode: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the token ids of :func:`passkey_text` with as much filler as `length` tokens hold; fast at any length.

    Args:
        key: the number.
        share_before: how much of the filler stands before the number, 0 to 1; cut at a whole sentence.
        length: tokens of the text at most.
        encode: text → token ids [T].

    Raises:
        InputError: `length` leaves no room for the number and the opening line.
    """
    filler = [encode(sentence) for sentence in FILLER]
    return hide(encode(OPENING), [(share_before, encode(key_sentence(key)))], filler, length)[0]


def hide(
    opening: np.ndarray, hidden: Sequence[tuple[float, np.ndarray]], filler: Sequence[np.ndarray], length: int
) -> tuple[np.ndarray, list[int]]:
    """Hide sentences in an opening and as many sentences of filler, again and again, as `length` tokens hold.

    Args:
        opening: [T] token ids.
        hidden: for each sentence to hide, the share of the filler before it, 0 to 1, cut at a whole sentence; and its
            token ids [T].
        filler: the token ids [T] of each sentence.
        length: tokens of the text at most.

    Returns:
        Token ids [T], less than a sentence of filler fewer than `length`; and the position of each hidden sentence.

    Raises:
        InputError: `length` leaves no room for the opening and what is to be hidden.
    """
    room = length - len(opening) - sum(len(sentence) for _, sentence in hidden)
    if room < 0:
        raise InputError(f"{length} tokens have no room for the passkey's text: give at least {length - room}.")
    ends = np.cumsum([0, *map(len, filler)])  # starts of the sentences of one round, and its size
    rounds, rest = divmod(room, int(ends[-1]))
    sentences = len(filler) * rounds + int(np.searchsorted(ends, rest, "right")) - 1

    def size(sentences: int) -> int:
        return int(sentences // len(filler) * ends[-1] + ends[sentences % len(filler)])

    tokens = np.resize(np.concatenate(filler), size(sentences))
    parts, starts, done, written = [opening], [0] * len(hidden), 0, len(opening)
    for i in sorted(range(len(hidden)), key=lambda i: hidden[i][0]):
        share_before, sentence = hidden[i]
        before = size(min(int(share_before * (sentences + 1)), sentences))
        parts += [tokens[done:before], sentence]
        starts[i] = written + before - done
        written, done = starts[i] + len(sentence), before
    return np.concatenate([*parts, tokens[done:]]), starts


def key_sentence(key: int) -> str:
    """Return the sentences that tell a key in the plain text."""
    return HIDDEN.format(key=key)


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
        """Return `count` different keys."""
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
        key_at: its tokens [start, end) that tell the key.
        without: at least T token ids: the same text with filler in their place.
        question, key: what is asked, and the answer.
    """

    ids: np.ndarray
    key_at: tuple[int, int]
    without: np.ndarray
    question: str
    key: str

    def replaced(self, segments: Iterable[Tensor]) -> np.ndarray:
        """Return the control [T]: every segment that holds a token of the key is replaced by the text without it.

        Args:
            segments: how a model cuts the text: the positions of each segment's tokens.
        """
        ids, (start, end) = self.ids.copy(), self.key_at
        for segment in segments:
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
    """Return the text of a sample, the same whenever it is made.

    Args:
        variant: the form of the task, of :data:`VARIANTS`.
        position: where the key stands, of :data:`POSITIONS`.
        length: tokens of the text at most.
        sample: its number.
        encode: text → token ids [T].
        seed: another one gives other keys, positions and names for the same numbers.
        prose: sentences of the filler for a variant of prose, token ids [T] each, begun anywhere.

    Raises:
        InputError: `length` leaves no room for the opening line and the keys.
    """
    form = VARIANTS[variant]
    rng = np.random.default_rng([seed, length, sample, *f"{variant} {position}".encode()])
    share_before = rng.uniform(*POSITIONS[position])
    name = str(rng.choice(form.names))
    names, shares = [name], [share_before]
    if form.others:
        names += rng.choice([other for other in form.others if other != name], OTHERS, replace=False).tolist()
        shares += rng.random(OTHERS).tolist()
    keys = form.keys(rng, len(names))
    hidden = [encode(form.hidden.format(name=n, key=k)) for n, k in zip(names, keys, strict=True)]
    filler = [encode(sentence) for sentence in FILLER]
    if form.prose:
        first = int(rng.integers(len(prose)))
        filler = [*prose[first:], *prose[:first]]
    opening, told = encode(form.opening), list(zip(shares, hidden, strict=True))
    ids, starts = hide(opening, told, filler, length)
    without, _ = hide(opening, told[1:], filler, length + max(map(len, filler)))
    key_at = starts[0], starts[0] + len(hidden[0])
    return Text(ids, key_at, without, form.question.format(name=name), keys[0])


def prose_sentences(text: str) -> Iterator[str]:
    """Yield running text as sentences, each after a space; of at most 40 words, lest one fill a whole context."""
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if word.rstrip("\"')]”’").endswith((".", "!", "?")) or len(words) == 40:
            yield " " + " ".join(words)
            words = []
    if words:
        yield " " + " ".join(words)


def is_right(written: str, key: str) -> bool:
    """Return whether the key is the first thing written, and nothing longer."""
    return re.match(rf"\W*{re.escape(key)}(?![\w-])", written) is not None
