"""Tiny models that learn within seconds, by the public way; the trained ones are shared through conftest.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from rcc.data import haystack
from rcc.training.recipe import Recipe
from rcc.training.run import Run
from rcc.training.settings import build

SEED = 0
DIGITS = pre_tokenizers.Digits(individual_digits=True)
SPLIT = pre_tokenizers.Sequence([DIGITS, pre_tokenizers.Whitespace()])  # words, marks, single digits
LENGTH, PART = 72, 32  # tokens of a text with a pass key, and of a segment: two and the beginning of a third


def make_base(folder: Path, words: Sequence[str], split: Any, window: int = 256) -> str:
    """A folder with a small untrained language model and a tokenizer of one token a word: word i is token i + 2."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1} | {w: i + 2 for i, w in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = split
    inner.decoder = decoders.Fuse()  # no spaces between digits
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    shape: Any = GPTNeoXConfig  # its keywords are more than its fields
    config = shape(
        vocab_size=len(words) + 2,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        rotary_pct=0.25,  # most of a head compares what tokens are, not where: copying is learnt sooner
        rotary_emb_base=1000,
        max_position_embeddings=window,
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


def train(folder: Path, base: str, segment: int, rate: int, stages: list[dict[str, Any]], **data: Any) -> Path:
    """Run a recipe that trains all weights of both sides → the run's folder."""
    own = {"share_base": False, "encoder_lora_rank": 0, "decoder_lora_rank": 0}
    model = {"encoder": base, "decoder": base, "segment_length": segment, "rates": [rate], **own}
    run = {"device": "cpu", "dtype": "float32", "save_minutes": 0, "evaluation_samples": 64}
    run["threads"] = torch.get_num_threads()
    recipe = build(Recipe, {"model": model, "stages": stages, "run": run, "seed": SEED, "data": data}, "")
    Run(recipe, folder / "run", quiet=True).go()
    return folder / "run"


def passkey_words() -> list[str]:
    """All words of the pass key's text and question, and all digits."""
    every = (haystack.OPENING, *haystack.FILLER, haystack.QUESTION, haystack.passkey_text(1234567890, 0, 0))
    return sorted({word for text in every for word, _ in SPLIT.pre_tokenize_str(text)})


def train_passkey(folder: Path) -> tuple[Path, set[int]]:
    """A model that finds pass keys in texts of LENGTH tokens, and the keys that it was trained on."""
    base = make_base(folder / "base", passkey_words(), SPLIT)
    sizes = {"lengths": [LENGTH], "batch_tokens": 24 * LENGTH, "target_tokens": 32}
    one = stage("key", 450, 4e-3, 60, tasks={"passkey": {}}, **sizes)
    seen, write = set(), haystack.key_sentence
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCC_HOME", str(folder / "home"))
        patch.setattr(haystack, "key_sentence", lambda key: seen.add(key) or write(key))
        return train(folder, base, PART, 4, [one]), seen
