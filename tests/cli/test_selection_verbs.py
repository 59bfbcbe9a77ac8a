"""The verbs about contexts, with a language model that nobody trained for rcc, and with an RCC model's base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Call, make_backbone
from rcc import CompressedContext, ContextError, ContextStore, Engine, InputError, ModelError, RCCConfig, RCCForCausalLM
from rcc.model.selection.selection import Selection
from word_tokens import word_tokenizer, words

TEMPLATE = (
    "{% for m in messages %}w90 {{ m['role'] }} w91 {{ m['content'] }} w92 {% endfor %}"
    "{% if add_generation_prompt %}w90 w5 w91 {% endif %}"
)


def save(family: str, folder: Path) -> Path:
    """A tiny random language model as transformers writes it, with a tokenizer and a chat template."""
    make_backbone(family, window=256, eos_token_id=96).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    paths = []
    for k, count in enumerate((40, 21)):
        path = tmp_path / f"{k}.txt"
        path.write_text(words((7 * i + 3 * k) % 80 for i in range(1, count + 1)))
        paths.append(path)
    return paths


def inspected(call: Call, path: Path) -> dict[str, Any]:
    return json.loads(call("inspect", path, "--json").ok().out)


def test_compress_ask_append_join_chat(call: Call, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    one, two, both, joined = (tmp_path / f"{name}.rcc" for name in ("one", "two", "both", "joined"))
    said = call("compress", texts[0], "-o", one, "--model", folder, "--rate", 2).ok().err
    assert "40 tokens at 2× in 20 positions" in said
    info = inspected(call, one)
    assert (info["model"], info["compressor"], info["rate"]) == ("tiny", "selection, rule repeat", 2)
    assert "selection, rule repeat" in call("inspect", one).ok().out
    call("compress", texts[1], "-o", two, "--model", folder, "--rate", 4).ok()
    call("compress", texts[1], "--context", one, "-o", both, "--model", folder, "--rate", 4).ok()
    call("join", one, two, "-o", joined).ok()
    a, b = CompressedContext.load(both), CompressedContext.load(joined)
    assert a.pieces == b.pieces
    for i in range(3):
        assert all(torch.equal(x, y) for x, y in zip(a.layer(i), b.layer(i), strict=True))
    asked = call("ask", joined, "w7 w8", "w9", "--model", folder, "--max-new-tokens", 4, "--json").ok()
    answers = json.loads(asked.out)["answers"]
    engine = Engine.load(folder)
    for answer in answers:
        assert (
            answer["answer"]
            == engine.ask(b.to(dtype=engine.compressor.dtype), answer["question"], max_new_tokens=4).text
        )
    talk = call("chat", joined, "--model", folder, "--max-new-tokens", 4, stdin=b"w7\nw9\n\n").ok()
    assert len(talk.out.splitlines()) >= 2


def test_a_text_is_compressed_once_and_kept(folder: Path, texts: list[Path], tmp_path: Path) -> None:
    store = ContextStore(tmp_path / "store")
    engine = Engine.load(folder, store=store)
    said: list[str] = []
    first = engine.open(texts[0], 2, notice=said.append)
    again = engine.open(texts[0], 2, notice=said.append)
    assert [line.split()[0] for line in said] == ["kept", "read"]
    assert first.fingerprint == again.fingerprint == engine.fingerprint
    assert engine.ask(first, "w7", max_new_tokens=4).text == engine.ask(again, "w7", max_new_tokens=4).text
    assert engine.open(texts[0]).rate == 1  # auto: it fits the budget whole
    other = Engine.load(folder, store=store, compressor="selection-stride")
    other.open(texts[0], 2)
    assert {stored.model for stored in store.list()} == {"tiny"}
    assert len(store.list()) == 3


def test_answers_in_a_batch_and_streamed(folder: Path, texts: list[Path]) -> None:
    engine = Engine.load(folder)
    context = engine.compress(texts[0].read_text(), 4)
    questions = ["w7 w8", "w9"]
    alone = [engine.ask(context, question, max_new_tokens=4).text for question in questions]
    assert [answer.text for answer in engine.ask_many(context, questions, max_new_tokens=4)] == alone
    assert "".join(engine.stream(context, "w9", max_new_tokens=4)) == alone[1]
    history = [(f"w{i} " * 10, "w1 w2") for i in range(30)]
    assert engine.ask(context, "w9", history=history, max_new_tokens=4).usage.prompt_tokens < 256


def test_a_file_tells_the_rule_that_made_it(call: Call, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "one.rcc"
    options = ("--model", folder, "--rate", 4)
    call("compress", texts[0], "-o", out, *options, "--compressor", "selection-expected").ok()
    assert inspected(call, out)["compressor"] == "selection, rule expected"
    call("ask", out, "w7", "--model", folder, "--max-new-tokens", 2).ok()
    call("ask", out, "w7", "--model", folder, "--compressor", "selection").refused("was made by another model")
    call("ask", out, "w7").refused("name that model's folder")
    changed = tmp_path / "tiny"
    shutil.copytree(folder, changed)
    make_backbone("llama", window=256, seed=5).save_pretrained(changed)
    call("ask", out, "w7", "--model", changed).refused("was made by another model (tiny")


def test_heads_that_share_a_budget(call: Call, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    """Compressed, appended to, joined and asked as any other; `inspect` tells how many pairs each head has."""
    one, both = tmp_path / "one.rcc", tmp_path / "both.rcc"
    options = ("--model", folder, "--rate", 4)
    call("compress", texts[0], "-o", one, *options, "--compressor", "selection-shared").ok()
    info = inspected(call, one)
    assert (info["compressor"], info["positions"]) == ("selection, rule shared", 10)
    assert [sum(layer) for layer in info["pieces"][0]["heads"]] == [20] * 3
    call("compress", texts[1], "--context", one, "-o", both, *options).ok()
    said = call("ask", both, "w7", "--model", folder, "--max-new-tokens", 3).ok().out
    call("join", both, "-o", tmp_path / "joined.rcc").ok()
    assert call("ask", tmp_path / "joined.rcc", "w7", "--model", folder, "--max-new-tokens", 3).ok().out == said
    engine = Engine.load(folder, compressor="selection-shared")
    history = [(f"w{i} " * 10, "w1 w2") for i in range(30)]
    assert engine.ask(CompressedContext.load(both), "w9", history=history, max_new_tokens=4).usage.prompt_tokens < 256


def test_what_is_refused(call: Call, folder: Path, texts: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "no.rcc"
    made = ("compress", texts[0], "-o", out, "--model", folder)
    call(*made, "--compressor", "best").refused("compressor 'best' is unknown", "selection-expected")
    call(*made, "--compressor", "rcc").refused("was not trained for rcc")
    call(*made, "--rate", 4000).refused("rate=4000 cannot be used")
    call(*made).ok()
    call("ask", out, "w7", "--model", folder, "--mode", "compress").refused('mode "compress"', '"human"')
    call("eval", "passkey", "--model", folder, "--compressor", "rcc").refused("was not trained for rcc")
    with pytest.raises(ModelError, match="was not trained for rcc"):
        _ = Engine.load(folder).rcc
    with pytest.raises(InputError, match="compressor"):
        Engine.load(folder, compressor="none")


def test_an_rcc_models_base(call: Call, texts: list[Path], tmp_path: Path) -> None:
    """`--compressor selection` takes the base of an RCC model, and its file is then read so."""
    base = save("llama", tmp_path / "base")
    RCCForCausalLM.from_base(base, config=RCCConfig(segment_length=16, rates=[4], name="ours")).save_pretrained(
        tmp_path / "ours"
    )
    out = tmp_path / "one.rcc"
    call("compress", texts[0], "-o", out, "--model", tmp_path / "ours", "--rate", 4, "--compressor", "selection").ok()
    assert inspected(call, out)["model"] == "base"
    first = call("ask", out, "w7", "--model", tmp_path / "ours", "--max-new-tokens", 3).ok().out
    assert call("ask", out, "w7", "--model", base, "--max-new-tokens", 3).ok().out == first
    engine = Engine.load(tmp_path / "ours", made=out)
    assert isinstance(engine.compressor, Selection)
    assert isinstance(Engine.load(tmp_path / "ours").compressor, RCCForCausalLM)
    with pytest.raises(ContextError, match="another model"):
        Engine.load(tmp_path / "ours").open(out)
