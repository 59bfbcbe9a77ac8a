"""Training trains: tiny models from scratch, by the public way, learn what nothing but the compressed vectors can tell.

Random strings have no statistics to guess by, and a pass key stands nowhere but in the text; each is also asked of
vectors that cannot know, and then gets no better than chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from rcc import RCCForCausalLM, prompting
from rcc.context import CompressedContext
from rcc.evaluation.reconstruction import teacher_forced
from rcc.training import tasks
from rcc.training.recipe import Recipe, build
from rcc.training.trainer import Run

SEED = 0
SYMBOLS = 96
SEGMENT, LONG = 24, 48  # tokens of a text in the first stage, of which all is written back, and in the second
CUE = 2  # tokens of a span that are given
TEXTS = 40  # measured
DIGITS = pre_tokenizers.Digits(individual_digits=True)
SPLIT = pre_tokenizers.Sequence([DIGITS, pre_tokenizers.Whitespace()])  # words, marks, single digits


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def make_base(folder: Path, words: Sequence[str], split: Any) -> str:
    """A folder with a small untrained language model and a tokenizer of one token a word: word i is token i + 2."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1} | {w: i + 2 for i, w in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = split
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(words) + 2,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        rotary_pct=0.25,  # most of a head compares what tokens are, not where: copying is learnt sooner
        rotary_emb_base=1000,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    return str(folder)


def stage(name: str, steps: int, learning_rate: float, warmup: int, **more: Any) -> dict[str, Any]:
    group = {"learning_rate": learning_rate, "schedule": "linear", "warmup_steps": warmup, "floor": 0.05}
    return {"name": name, "max_steps": steps, "betas": [0.9, 0.99], "groups": {"all": group}, **more}


def train(folder: Path, base: str, segment: int, rate: int, stages: list[dict], **data: Any) -> Path:
    """Run a recipe that trains all weights of both sides → the run's folder."""
    own = {"share_base": False, "encoder_lora_rank": 0, "decoder_lora_rank": 0}
    model = {"encoder": base, "decoder": base, "segment_length": segment, "rates": [rate], **own}
    run = {"device": "cpu", "dtype": "float32", "threads": 2, "save_minutes": 0, "evaluation_samples": 64}
    recipe = build(Recipe, {"model": model, "stages": stages, "run": run, "seed": SEED, "data": data}, "")
    Run(recipe, folder / "run", quiet=True).go()
    return folder / "run"


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
    """Of what greedy generation writes behind the first tokens of each text."""
    out = model.generate(texts[:, :CUE], context=context, max_new_tokens=SEGMENT - CUE, eos_token_id=prompting.NEVER)
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
LENGTH, PART = 72, 32  # tokens of a text and of a segment: two and the beginning of a third


def test_a_pass_key_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = (tasks.OPENING, *tasks.FILLER, tasks.QUESTION, tasks.passkey_text(1234567890, 0, 0))
    words = sorted({word for text in every for word, _ in SPLIT.pre_tokenize_str(text)})
    base = make_base(tmp_path / "base", words, SPLIT)
    seen, write = set(), tasks._passkey
    monkeypatch.setattr(tasks, "_passkey", lambda key: seen.add(key) or write(key))
    sizes = {"lengths": [LENGTH], "batch_tokens": 24 * LENGTH, "target_tokens": 32}
    one = stage("key", 450, 4e-3, 60, tasks={"passkey": {}}, **sizes)
    model = RCCForCausalLM.from_pretrained(train(tmp_path, base, PART, 4, [one]))
    monkeypatch.undo()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)

    def encode(text: str) -> np.ndarray:
        return prompting.token_ids(tokenizer, text)[0].numpy()

    rng = np.random.default_rng(SEED)
    assert len(seen) > 5000
    keys = rng.choice(sorted(set(range(10_000, 100_000)) - seen), 200, replace=False)
    texts = np.stack([tasks.passkey_ids(int(key), rng.random(), LENGTH, encode) for key in keys])
    digit = np.isin(texts, encode("0123456789"))
    number = np.arange(texts.shape[1]) // PART  # of a token's segment
    hides = np.stack([np.isin(number, number[row]) for row in digit])  # its segment holds digits
    filler = np.resize(encode("".join(tasks.FILLER)), texts.shape[1])
    answers = np.stack([encode(str(key)) for key in keys])

    def right(texts: np.ndarray) -> float:
        prompts = torch.from_numpy(encode(tasks.QUESTION)).expand(len(texts), -1)
        out = model.generate(prompts, context=model.compress(torch.from_numpy(texts)), max_new_tokens=5)
        return float((out[:, -5:].numpy() == answers).all(1).mean())

    assert right(texts) >= 0.95
    assert right(np.where(hides, filler, texts)) <= 0.01
