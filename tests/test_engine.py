"""The engine: texts in, answers out, the same as the model's own calls, from threads, in batches and from the store."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import rcc
from conftest import make_backbone, randomise
from rcc import ContextStore, Engine, InputError, RCCConfig, RCCForCausalLM, SideConfig, WindowError
from rcc.context.recognition import is_context
from rcc.model.answering import ask
from rcc.text import prompting
from rcc.text.tokens import token_ids

TOKENIZER: Any = rcc.load_tokenizer("rcc-smollm2-135m")
TEXT = "the cat sat on the mat . " * 12
QUESTION = "where is the cat ?"


@pytest.fixture(scope="module")
def engine() -> Engine:
    base = make_backbone("llama", layers=2, window=2048, vocab_size=len(TOKENIZER), eos_token_id=2)
    settings: dict[str, Any] = {"share_base": True, "encoder": SideConfig(4), "decoder": SideConfig(4), "name": "tiny"}
    model = RCCForCausalLM.from_base(base, config=RCCConfig(segment_length=16, rates=[4, 2, 8], **settings))
    return Engine(randomise(model), TOKENIZER)


def test_compress_is_the_models_own_on_the_texts_tokens(engine: Engine) -> None:
    one, two = TEXT, "and the dog sat there"
    ours = engine.compress([one, two], 4)
    theirs = engine.compressor.compress(token_ids(TOKENIZER, one), rate=4)
    theirs = engine.compressor.compress(token_ids(TOKENIZER, two), rate=4, context=theirs)
    assert ours.pieces == theirs.pieces
    for i in range(len(ours.blocks.layers)):
        for a, b in zip(ours.layer(i), theirs.layer(i), strict=True):
            assert torch.equal(a, b)


def test_auto_takes_the_lowest_rate_within_the_budget(engine: Engine) -> None:
    tokens = token_ids(TOKENIZER, TEXT).shape[1]
    assert isinstance(engine.compressor, RCCForCausalLM)
    low, high = min(engine.compressor.config.rates), max(engine.compressor.config.rates)
    assert engine.compress(TEXT).rate == low
    assert engine.compress(TEXT, budget=-(-tokens // high)).rate == high
    with pytest.raises(InputError, match="rate 'fast' is not a rate"):
        engine.compress(TEXT, "fast")
    with pytest.raises(InputError, match="source holds no text"):
        engine.compress([])


def test_an_answer_is_the_same_whole_streamed_and_by_hand(engine: Engine) -> None:
    context = engine.compress(TEXT, 4)
    for mode in prompting.MODES:
        by_hand = ask(engine.compressor, TOKENIZER, context, prompting.build(QUESTION, mode), 8, do_sample=False)
        answer = engine.ask(context, QUESTION, mode, max_new_tokens=8, do_sample=False)
        assert (answer.instruction, answer.text) == by_hand
        assert answer.usage.context_positions == len(context)
        assert 0 < answer.usage.answer_tokens <= 8
        stream = engine.stream(context, QUESTION, mode, max_new_tokens=8, do_sample=False)
        assert "".join(stream) == answer.text
        assert stream.answer == answer


def test_a_batch_of_questions_is_each_question(engine: Engine) -> None:
    context = engine.compress(TEXT, 4)
    questions = [QUESTION, "who sat on the mat , the cat or the dog ?", "why ?"]
    together = engine.ask_many(context, questions, max_new_tokens=8, do_sample=False)
    assert together == [engine.ask(context, q, max_new_tokens=8, do_sample=False) for q in questions]
    assert engine.ask_many(context, []) == []


def test_threads_share_an_engine(engine: Engine) -> None:
    contexts = [engine.compress(text, 4) for text in (TEXT, "the dog ran to the house . " * 9)]
    wanted = [engine.ask(context, QUESTION, max_new_tokens=12, do_sample=False) for context in contexts]
    answers: list[list[object]] = [[], []]

    def run(i: int) -> None:
        for _ in range(4):
            answers[i].append(engine.ask(contexts[i], QUESTION, max_new_tokens=12, do_sample=False))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[wanted[0]] * 4, [wanted[1]] * 4]


def test_a_stream_that_is_left_stops_and_errors_reach_whoever_reads_it(engine: Engine) -> None:
    context = engine.compress(TEXT, 4)
    stream = engine.stream(context, QUESTION, max_new_tokens=100, do_sample=False)
    stream.close()
    assert stream.answer is None or stream.answer.usage.answer_tokens < 100
    with pytest.raises(WindowError):
        list(engine.stream(context, QUESTION, max_new_tokens=10**6))
    with pytest.raises(InputError, match="empty"):
        list(engine.stream(context, " "))


def test_a_long_talk_forgets_its_beginning(engine: Engine) -> None:
    context = engine.compress(TEXT, 4)
    history = [(f"question {i} about the cat ?", "on the mat") for i in range(400)]
    whole = token_ids(TOKENIZER, prompting.build(QUESTION, "human", history).decoder_text, True).shape[1]
    answer = engine.ask(context, QUESTION, history=history, max_new_tokens=4, do_sample=False)
    assert answer.usage.prompt_tokens < whole
    assert answer.usage.prompt_tokens <= engine.compressor.window - len(context) - 4
    few = engine.ask(context, QUESTION, history=history[:1], max_new_tokens=4, do_sample=False)
    form = prompting.build(QUESTION, "human", history[:1])
    assert few.usage.prompt_tokens == token_ids(TOKENIZER, form.decoder_text, True).shape[1]


def test_a_text_is_compressed_once_and_found_again(engine: Engine, tmp_path: Path) -> None:
    storing = Engine(engine.compressor, TOKENIZER, ContextStore(tmp_path / "contexts"))
    said: list[str] = []
    first = storing.open(TEXT, 4, notice=said.append)
    again = storing.open(TEXT, 4, notice=said.append)
    assert [words.split()[0] for words in said] == ["kept", "read"]
    assert first.pieces == again.pieces
    assert storing.ask(TEXT, QUESTION, rate=4, do_sample=False) == engine.ask(first, QUESTION, do_sample=False)
    storing.open(TEXT, 2, notice=said.append)
    storing.open(TEXT + "more", 4, notice=said.append)
    assert [words.split()[0] for words in said[2:]] == ["kept", "kept"]
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert storing.open(file, 4, notice=said.append).pieces == first.pieces
    assert said[-1].startswith("read")
    first.save(tmp_path / "x.rcc")
    assert is_context(tmp_path / "x.rcc")
    assert not is_context(file)
    assert storing.open(tmp_path / "x.rcc").pieces == first.pieces


def test_a_store_that_cannot_be_written_is_said_and_no_more(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    context = Engine(engine.compressor, TOKENIZER, ContextStore(tmp_path / "file")).open(TEXT, 4, notice=said.append)
    assert context.source_tokens
    assert said[0].startswith("not kept for the next time")


def test_reconstruct_goes_on_from_the_texts_first_tokens(engine: Engine) -> None:
    context = engine.compress(TEXT, 4)
    pieces: list[str] = []
    written = engine.reconstruct(context, tokens=6, on_text=pieces.append)
    assert written.prompt_ids == token_ids(TOKENIZER, TEXT)[0, :10].tolist()
    assert len(written.ids) == 6
    assert "".join(pieces).strip() == TOKENIZER.decode(written.prompt_ids + written.ids).strip()
    with pytest.raises(InputError, match="prompt is empty"):
        engine.reconstruct(context, "")
