"""Training trains: tiny models from scratch, by the public way, learn what nothing but the compressed vectors can tell.

Random strings have no statistics to guess by, and a pass key stands nowhere but in the text; each is also asked of
vectors that cannot know, and then gets no better than chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor

from learning import LENGTH, PART, SEED, make_base, stage, train
from rcc import RCCForCausalLM, checkpoints
from rcc.context.context import CompressedContext
from rcc.data import haystack
from rcc.evaluation.reconstruction.teacher_forcing import teacher_forced
from rcc.model import answering
from rcc.text.tokens import token_ids

SYMBOLS = 96
SEGMENT, LONG = 24, 48  # tokens of a text in the first stage, of which all is written back, and in the second
CUE = 2  # tokens of a span that are given
TEXTS = 40  # measured


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(tmp_path_factory.mktemp("home")))
        yield


# ---------------------------------------------------------------- random strings, in two stages
def strings(count: int, length: int, seed: int) -> np.ndarray:
    """Random symbols [count, length]; none stands twice in a string, so that one tells what follows it."""
    rng = np.random.default_rng([SEED, seed])
    return np.stack([rng.permutation(SYMBOLS)[:length] for _ in range(count)])


def fresh(length: int) -> Tensor:
    """Token ids [TEXTS, length] of strings that were not trained on."""
    return torch.from_numpy(strings(TEXTS, length, 1)) + 2


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: strings of one segment, then, with the encoder frozen, strings of two."""
    folder = tmp_path_factory.mktemp("strings")
    base = make_base(folder / "base", [f"s{i}" for i in range(SYMBOLS)], pre_tokenizers.WhitespaceSplit())
    texts = ({"text": " ".join(f"s{i}" for i in row)} for row in strings(8000, LONG, 0))
    (folder / "strings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    task = {"tasks": {"reconstruction": {"prompt_tokens": CUE}}, "target_tokens": SEGMENT}
    short = stage("short", 550, 6e-3, 100, lengths=[SEGMENT], batch_tokens=40 * SEGMENT, **task)
    long = stage("long", 160, 4e-3, 10, lengths=[LONG], batch_tokens=28 * LONG, frozen=["encoder"], **task)
    return train(folder, base, SEGMENT, 2, [short, long], text=[{"path": str(folder / "strings.jsonl")}], held_out=0.02)


def teacher_forced_accuracy(model: RCCForCausalLM, contexts: Sequence[CompressedContext], texts: Tensor) -> float:
    pairs = zip(contexts, texts, strict=True)
    return float(np.mean([teacher_forced(model, context, text, span=SEGMENT).accuracy for context, text in pairs]))


def free_accuracy(model: RCCForCausalLM, context: CompressedContext, texts: Tensor) -> float:
    """Of what greedy generation writes after the first tokens of each text."""
    out = model.generate(texts[:, :CUE], context=context, max_new_tokens=SEGMENT - CUE, eos_token_id=answering.NEVER)
    return float((out == texts[:, :SEGMENT])[:, CUE:].float().mean())


@pytest.mark.parametrize(
    ("part", "length", "forced", "free"), [("stages/1-short", SEGMENT, 0.95, 0.8), ("", LONG, 0.9, 0.4)]
)
def test_random_strings_come_back_from_their_vectors(
    copier: Path, part: str, length: int, forced: float, free: float
) -> None:
    model = RCCForCausalLM.from_pretrained(copier / part)
    texts, chance = fresh(length), 1 / (SYMBOLS - SEGMENT)  # at most: symbols of the span itself can be ruled out
    own = [model.compress(text[None]) for text in texts]
    assert teacher_forced_accuracy(model, own, texts) >= forced
    assert free_accuracy(model, model.compress(texts), texts) >= free

    # the same questions to another text's vectors, and to vectors of which each is another text's
    other = own[1:] + own[:1]
    assert teacher_forced_accuracy(model, other, texts) <= 4 * chance
    vectors = model.encode(texts)
    rows, positions = torch.arange(TEXTS)[:, None], torch.arange(length // 2)[None]
    mixed = vectors.states[(rows + 1 + positions % (TEXTS - 1)) % TEXTS, positions]
    assert free_accuracy(model, model.prefix(replace(vectors, states=mixed)), texts) <= 4 * chance


def test_a_frozen_encoder_stays_while_the_rest_learns(copier: Path) -> None:
    before, after = copier / "stages/1-short", copier / "stages/2-long"
    changed = {}
    for name in ("encoder/model.safetensors", "decoder/model.safetensors", "model.safetensors"):
        old, new = load_file(before / name), load_file(after / name)
        changed[name.partition("/")[0]] = [key for key in old if not torch.equal(old[key], new[key])]
        assert set(old) == set(new)
    assert not changed["encoder"]
    assert len(changed["decoder"]) > 20
    assert len(changed["model.safetensors"]) == 2  # P_0, P_1
    start = load_file(copier.parent / "base/model.safetensors")
    learnt = load_file(before / "encoder/model.safetensors")
    assert not torch.equal(start["gpt_neox.embed_in.weight"], learnt["embed_in.weight"])  # in the first stage it learnt

    log = [json.loads(line) for line in (copier / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in log if row["stage"] == "long" and "loss" in row]
    assert len(losses) == 160
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    first, *_, last = (
        row["held_out"][f"reconstruction@{LONG}/2x"] for row in log if row["stage"] == "long" and "held_out" in row
    )
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"] > first["accuracy"]


# ---------------------------------------------------------------- the pass key
def test_a_pass_key_is_found_where_it_is(passkey_model: tuple[Path, set[int]]) -> None:
    folder, seen = passkey_model
    model, tokenizer = RCCForCausalLM.from_pretrained(folder), checkpoints.load_tokenizer(folder)

    def encode(text: str) -> np.ndarray:
        return token_ids(tokenizer, text)[0].numpy()

    rng = np.random.default_rng(SEED)
    assert len(seen) > 5000
    keys = rng.choice(sorted(set(range(10_000, 100_000)) - seen), 200, replace=False)
    texts = np.stack([haystack.passkey_ids(int(key), rng.random(), LENGTH, encode) for key in keys])
    digit = np.isin(texts, encode("0123456789"))
    number = np.arange(texts.shape[1]) // PART  # of a token's segment
    hides = np.stack([np.isin(number, number[row]) for row in digit])  # its segment holds digits
    filler = np.resize(encode("".join(haystack.FILLER)), texts.shape[1])
    answers = np.stack([encode(str(key)) for key in keys])

    def right(texts: np.ndarray) -> float:
        prompts = torch.from_numpy(encode(haystack.QUESTION)).expand(len(texts), -1)
        out = model.generate(prompts, context=model.compress(torch.from_numpy(texts)), max_new_tokens=5)
        return float((out[:, -5:].numpy() == answers).all(1).mean())

    assert right(texts) >= 0.95
    assert right(np.where(hides, filler, texts)) <= 0.01
