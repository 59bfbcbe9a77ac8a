"""The model `rcc` of lm-eval: its figures are those of the model asked directly, and its command runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import rcc
from conftest import MakeExpected, make_backbone, randomise
from rcc import InputError, RCCConfig, RCCForCausalLM, SideConfig, WindowError
from rcc.evaluation.uncompressed import base_decoder
from rcc.model import answering
from rcc.text import prompting
from rcc.text.tokens import token_ids

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'rcc-context[harness]'")
from rcc.integrations.lm_eval import RCCLM
from rcc.integrations.requests import Parts

ROOT = Path(__file__).resolve().parents[2]
MODEL = "rcc-smollm2-135m"
TOKENIZER: Any = rcc.load_tokenizer(MODEL)
WORDS = (ROOT / "examples/simple-susan.txt").read_text(encoding="utf-8").split()[100:]
SEGMENT, RATE, TEXT, LEAST = 16, 4, 12, 8
OPTIONS: dict[str, Any] = {"rate": RATE, "text_tokens": TEXT, "min_context": LEAST, "device": "cpu"}
SHORT, LONG = " ".join(WORDS[:6]), " ".join(WORDS[20:70])


def backbone(seed: int, window: int = 8192) -> PreTrainedModel:
    return make_backbone("llama", layers=2, seed=seed, window=window, vocab_size=len(TOKENIZER), eos_token_id=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with LoRA on a base, and the default model's tokenizer."""
    settings: dict[str, Any] = {"share_base": True, "encoder": SideConfig(4), "decoder": SideConfig(4), "name": "tiny"}
    config = RCCConfig(segment_length=SEGMENT, rates=[RATE, 8], **settings)
    return save(RCCForCausalLM.from_base(backbone(1), config=config), tmp_path_factory.mktemp("harness"))


def save(model: RCCForCausalLM, path: Path) -> Path:
    randomise(model).save_pretrained(path, full=True)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> RCCForCausalLM:
    return RCCForCausalLM.from_pretrained(folder)


@pytest.fixture
def lm(folder: Path) -> Callable[..., RCCLM]:
    return lambda **options: RCCLM(folder, **{**OPTIONS, **options})


def ids(text: str) -> list[int]:
    return token_ids(TOKENIZER, text)[0].tolist()


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    """What the harness hands over."""
    return [SimpleNamespace(args=values) for values in arguments]


def plain(decoder: PreTrainedModel, before: list[int], answer: list[int]) -> float:
    """The log-probability by one full pass without a cache."""
    with torch.no_grad():
        logits = decoder(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
    return sum(logits.double().log_softmax(-1)[i, token].item() for i, token in enumerate(answer))


def compressed_score(
    model: RCCForCausalLM, head: list[int], before: list[int], answer: list[int], rate: int = RATE
) -> float:
    """The log-probability after a compressed text."""
    context = model.compress(torch.tensor([head]), rate=rate)
    logits = model(torch.tensor([before + answer[:-1]]), context=context).logits[0, len(before) - 1 :]
    return sum(logits.double().log_softmax(-1)[i, token].item() for i, token in enumerate(answer))


# ---------------------------------------------------------------- what is compressed
def test_a_prompt_is_cut_before_its_last_tokens(lm: Callable[..., RCCLM]) -> None:
    """Head and tail are the prompt; the tail has as many tokens as asked for; short heads stay text."""
    tokens = ids(LONG)
    assert len(tokens) > 60
    for text_tokens in (1, 12, len(tokens) - LEAST):
        head, count, tail = lm(text_tokens=text_tokens)._cut(LONG)
        assert head + tail == LONG
        assert (ids(head), ids(tail)) == (tokens[:-text_tokens], tokens[-text_tokens:])
        assert count == len(tokens) - text_tokens
    for text_tokens in (len(tokens) - LEAST + 1, len(tokens), 10_000):
        assert lm(text_tokens=text_tokens)._cut(LONG) == Parts("", 0, LONG)
    assert lm()._cut("") == Parts("", 0, "")


def test_a_prompt_is_cut_at_a_mark(lm: Callable[..., RCCLM]) -> None:
    """At the last one, which stays text; a prompt without it is refused."""
    prompt = f"{LONG} Question: one {LONG} Question: two?"
    head, count, tail = lm(split_at="Question:")._cut(prompt)
    assert head + tail == prompt
    assert tail == "Question: two?"
    assert count == len(ids(head))
    with pytest.raises(InputError, match="does not hold split_at='Question:'"):
        lm(split_at="Question:")._cut(LONG)


# ---------------------------------------------------------------- log-likelihoods
def test_a_short_prompt_is_scored_as_the_base_does(tmp_path: Path) -> None:
    """Where the decoder has no LoRA, it is the base, number by number: also of an empty prompt, and in a batch."""
    settings: dict[str, Any] = {"share_base": False, "encoder": SideConfig(0), "decoder": SideConfig(0)}
    base = backbone(3)
    own = RCCForCausalLM.from_base(backbone(4), base, RCCConfig(segment_length=SEGMENT, rates=[RATE], **settings))
    lm = RCCLM(save(own, tmp_path), batch_size=3, **OPTIONS)
    pairs = [(SHORT, " the willow tree"), (SHORT, " a"), ("", "Susan"), ("Susan said ", "so it was")]
    scores = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    expected = [
        plain(base, ids(SHORT), ids(" the willow tree")),
        plain(base, ids(SHORT), ids(" a")),
        plain(base, [TOKENIZER.bos_token_id], ids("Susan")),
        plain(base, ids("Susan said"), ids(" so it was")),  # lm-eval's rule: a space goes with the answer
    ]
    assert [score for score, _ in scores] == pytest.approx(expected, abs=1e-4)
    assert lm._counts["compressed"] == 0


def test_a_short_prompt_is_read_by_the_models_decoder(lm: Callable[..., RCCLM], model: RCCForCausalLM) -> None:
    """LoRA included."""
    answer = " the willow tree"
    (scored,) = lm().loglikelihood(asked((SHORT, answer)), disable_tqdm=True)
    assert scored[0] == pytest.approx(plain(model.decoder, ids(SHORT), ids(answer)), abs=1e-4)
    with base_decoder(model):
        assert scored[0] != pytest.approx(plain(model.decoder, ids(SHORT), ids(answer)), abs=1e-2)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_long_prompt_is_scored_after_its_compressed_head(
    batch: int, lm: Callable[..., RCCLM], model: RCCForCausalLM, expected: MakeExpected
) -> None:
    """As the model does directly, and as the reference computation without any cache; long, short and unequal prompts
    in one call, answered in the order they were asked."""
    texts = [LONG, " ".join(WORDS[200:240]), SHORT]
    pairs = [(text, answer) for text in texts for answer in (" the willow tree", " a", " Susan said")]
    pairs = pairs[::2] + pairs[1::2]
    scores = lm(batch_size=batch).loglikelihood(asked(*pairs), disable_tqdm=True)
    for (text, answer), (score, greedy) in zip(pairs, scores, strict=True):
        tokens = ids(text)
        if text == SHORT:
            right = plain(model.decoder, tokens, ids(answer))
        else:
            right = compressed_score(model, tokens[:-TEXT], tokens[-TEXT:], ids(answer))
        assert score == pytest.approx(right, abs=1e-4)
        assert not greedy
    tokens, one = ids(LONG), ids(" a")
    logits = expected(model).logits([tokens[:-TEXT]], tokens[-TEXT:] + one, RATE)
    right = logits[-2].double().log_softmax(-1)[one[0]].item()
    assert scores[pairs.index((LONG, " a"))][0] == pytest.approx(right, abs=1e-3)


def test_greedy_is_said_of_the_likeliest_answer(lm: Callable[..., RCCLM], model: RCCForCausalLM) -> None:
    tokens = ids(LONG)
    context = model.compress(torch.tensor([tokens[:-TEXT]]), rate=RATE)
    written = model.generate(torch.tensor([tokens[-TEXT:]]), context=context, max_new_tokens=1, do_sample=False)
    likeliest = TOKENIZER.decode(written[0, -1:])
    scores = lm().loglikelihood(asked((LONG, likeliest), (LONG, " a")), disable_tqdm=True)
    assert [greedy for _, greedy in scores] == [ids(likeliest) == written[0, -1:].tolist(), False]


def test_a_head_is_compressed_once(lm: Callable[..., RCCLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many answers and questions share it, in whatever order they come."""
    one, other = f"{LONG} Question:", f"{LONG} {SHORT} Question:"
    harness, heads = lm(split_at="Question:", batch_size=2), []
    compress = harness.model.compress
    monkeypatch.setattr(harness.model, "compress", lambda x, **more: heads.append(x.shape[1]) or compress(x, **more))
    pairs = [(f"{text} {i}?", answer) for i in range(3) for text in (one, other) for answer in (" yes", " no")]
    harness.loglikelihood(asked(*pairs), disable_tqdm=True)
    assert sorted(heads) == [len(ids(f"{LONG} ")), len(ids(f"{LONG} {SHORT} "))]
    info = harness.get_model_info()["rcc"]
    assert (info["prompts"], info["compressed"], info["rate"], info["split_at"]) == (12, 12, RATE, "Question:")


@pytest.mark.parametrize("length", [5, TEXT, 3 * TEXT + 5])
def test_a_whole_text(length: int, lm: Callable[..., RCCLM], model: RCCForCausalLM) -> None:
    """Block by block after all that stands before it, the segment that is not full included; the first one as text."""
    text = TOKENIZER.decode(ids(LONG)[:length])
    tokens = ids(text)
    assert len(tokens) == length
    (scored,) = lm().loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    right = plain(model.decoder, [TOKENIZER.bos_token_id], tokens[:TEXT])
    for start in range(TEXT, length, TEXT):
        right += compressed_score(model, tokens[:start], tokens[start - 1 : start], tokens[start : start + TEXT])
    assert scored == pytest.approx(right, abs=1e-3)


def test_a_whole_text_that_does_not_fit_begins_anew(tmp_path: Path) -> None:
    """Where no more positions fit beside a block, the context is dropped."""
    config = RCCConfig(segment_length=SEGMENT, rates=[8], encoder=SideConfig(4), decoder=SideConfig(4))
    own = RCCForCausalLM.from_base(backbone(5, window=16), config=config)
    tokens = ids(" ".join(WORDS[:80]))[:80]
    text = TOKENIZER.decode(tokens)
    lm = RCCLM(save(own, tmp_path), text_tokens=8, device="cpu")
    (scored,) = lm.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    # a block of 8 leaves room for 8 positions of 8 tokens each: the 10th block is the first one that has more before it
    right = plain(own.decoder, [TOKENIZER.bos_token_id], tokens[:8]) + plain(own.decoder, tokens[71:72], tokens[72:])
    for start in range(8, 72, 8):
        right += compressed_score(own, tokens[:start], tokens[start - 1 : start], tokens[start : start + 8], 8)
    assert scored == pytest.approx(right, abs=1e-3)


# ---------------------------------------------------------------- answers
def directly(model: RCCForCausalLM, prompt: str, new: int, **settings: Any) -> list[int]:
    """The tokens that the model writes after a long prompt."""
    tokens = ids(prompt)
    context, tail = model.compress(torch.tensor([tokens[:-TEXT]]), rate=RATE), torch.tensor([tokens[-TEXT:]])
    settings = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 2, **settings}
    return model.generate(tail, context=context, max_new_tokens=new, **settings)[0, TEXT:].tolist()


@pytest.mark.parametrize("batch", [1, 3])
def test_answers(batch: int, lm: Callable[..., RCCLM], model: RCCForCausalLM) -> None:
    """What the model writes directly, up to a stop string; prompts of unequal lengths, with and without a context."""
    texts = [LONG, " ".join(WORDS[200:240]), " ".join(WORDS[300:360])]
    settings = {"until": [], "max_gen_toks": 8, "do_sample": False}
    tokens = {text: directly(model, text, 8) for text in texts}
    short = model.generate(
        torch.tensor([ids(SHORT)]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    tokens[SHORT] = short[0, len(ids(SHORT)) :].tolist()
    written = {text: TOKENIZER.decode(ids_of, skip_special_tokens=True) for text, ids_of in tokens.items()}
    harness = lm(batch_size=batch)
    prompts = [texts[1], SHORT, texts[0], texts[2]]
    answers = harness.generate_until(asked(*((p, settings) for p in prompts)), disable_tqdm=True)
    assert answers == [written[p] for p in prompts]
    # a stop string that begins within a token and stands in one answer only
    whole = written[LONG]
    stop = whole[len(whole) // 2 :][1:4]
    until = {**settings, "until": [stop, ""]}
    answers = harness.generate_until(asked(*((p, until) for p in prompts)), disable_tqdm=True)
    assert answers == [written[p].split(stop)[0] for p in prompts]
    assert harness.generate_until(asked((LONG, {**settings, "max_gen_toks": 2})), disable_tqdm=True) == [
        TOKENIZER.decode(tokens[LONG][:2], skip_special_tokens=True)
    ]


def test_an_answer_ends_at_the_end_token(
    lm: Callable[..., RCCLM], model: RCCForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch, each answer at its own."""
    other = " ".join(WORDS[200:240])
    first, second = directly(model, LONG, 6), directly(model, other, 6)
    end = next(token for token in first[1:] if token not in second and token != first[0])
    harness = lm(batch_size=2)
    monkeypatch.setattr(harness.model.decoder.generation_config, "eos_token_id", [2, end])
    settings = {"until": [], "max_gen_toks": 6}
    answers = harness.generate_until(asked((LONG, settings), (other, settings)), disable_tqdm=True)
    assert answers == [TOKENIZER.decode(first[: first.index(end)]), TOKENIZER.decode(second)]


def test_sampling(lm: Callable[..., RCCLM], model: RCCForCausalLM) -> None:
    """The task's settings reach the model; the same request twice is two samples."""
    settings = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.5, "top_k": 20}
    harness = lm()
    torch.manual_seed(5)
    answers = harness.generate_until(asked((LONG, settings), (LONG, settings)), disable_tqdm=True)
    torch.manual_seed(5)
    right = [directly(model, LONG, 6, do_sample=True, temperature=1.5, top_k=20) for _ in range(2)]
    assert answers == [TOKENIZER.decode(sampled, skip_special_tokens=True) for sampled in right]
    assert answers[0] != answers[1]


def test_the_human_mode_asks_as_rcc_does(lm: Callable[..., RCCLM], model: RCCForCausalLM) -> None:
    """The tail is the question, in the words that models are trained on; scores are of an answer in that form."""
    question = "Question: Who is Susan?"
    prompt = f"{LONG} {question}"
    harness = lm(mode="human", split_at="Question:")
    context = model.compress(torch.tensor([ids(f"{LONG} ")]), rate=RATE)
    form = prompting.build(question, "human")
    written = answering.ask(model, TOKENIZER, context, form, 6, do_sample=False)[1]
    (answer,) = harness.generate_until(asked((prompt, {"until": ["\n\n"], "max_gen_toks": 6})), disable_tqdm=True)
    assert answer.split("\n\n")[0].strip() == written.split("\n\n")[0].strip()
    (score,) = harness.loglikelihood(asked((prompt, " A girl")), disable_tqdm=True)
    asking = token_ids(TOKENIZER, form.decoder_text, allow_special=True)[0].tolist()
    right = compressed_score(model, ids(f"{LONG} "), asking, ids("A girl"))
    assert score[0] == pytest.approx(right, abs=1e-4)
    with pytest.raises(InputError, match="mode=human puts prompts into a chat's form itself"):
        harness.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_the_tokenizers_chat_template(lm: Callable[..., RCCLM], folder: Path) -> None:
    harness, talk = lm(), [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    started = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert harness.apply_chat_template(talk) == started
    talk.append({"role": "assistant", "content": "Good"})
    assert harness.apply_chat_template(talk, add_generation_prompt=False) == f"{started}Good"
    assert harness.tokenizer_name == str(folder).replace("/", "__")
    assert "im_start" in harness.chat_template(True)
    assert (harness.rank, harness.world_size, harness.max_length) == (0, 1, 8192)


# ---------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 5}, "rate=5 does not divide the segment of 16 tokens"),
        ({"rate": "low"}, "rate='low' does not divide"),
        ({"device": "moon"}, "moon is unknown"),
        ({"dtype": "int8"}, "int8 is unknown"),
        ({"batch_size": "auto"}, "batch_size=auto is no whole number above 0"),
        ({"text_tokens": 0}, "text_tokens=0 is no whole number above 0"),
        ({"min_context": -1}, "min_context=-1 is no whole number above 0"),
        ({"mode": "chat"}, "mode=chat is unknown: use one of raw, human"),
        ({"pretrained": "x"}, "the model rcc has no argument pretrained: it has model, rate"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], message: str, lm: Callable[..., RCCLM]) -> None:
    with pytest.raises(InputError, match=message):
        lm(**options)


def test_arguments_of_the_harness(folder: Path) -> None:
    """Its default device is none; what the model's own arguments say comes before the command line's options."""
    own = {"model": str(folder), "batch_size": 4}
    made = RCCLM.create_from_arg_obj(own, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})
    assert (made.batch_size, made.device.type) == (4, "cuda" if torch.cuda.is_available() else "cpu")
    made = RCCLM.create_from_arg_string(f"model={folder},rate=8,text_tokens=7", {"device": "cpu"})
    assert (made.rate, made.text_tokens, made.device.type) == (8, 7, "cpu")


def test_the_rate_is_the_lowest_that_fits(tmp_path: Path) -> None:
    """With rate=auto, prompt by prompt; a prompt that fits at none is refused before anything is computed."""
    config = RCCConfig(segment_length=SEGMENT, rates=[4, 8], encoder=SideConfig(4), decoder=SideConfig(4))
    lm = RCCLM(save(RCCForCausalLM.from_base(backbone(6, window=64), config=config), tmp_path), text_tokens=12)
    lm.min_context = 8
    tokens = ids(" ".join(WORDS[:400]))
    rates = []
    for length in (50, 160, 300):
        parts = lm._cut(TOKENIZER.decode(tokens[:length]))
        rates.append(lm._request(0, parts, tokens[:12], [1]).rate)
    assert rates == [4, 4, 8]
    requests = asked(*((TOKENIZER.decode(tokens[:n]), " a") for n in (50, 500)))
    with pytest.raises(WindowError, match="tokens do not fit: at the highest trained rate, 8"):
        lm.loglikelihood(requests, disable_tqdm=True)
    lm.rate = 4
    with pytest.raises(WindowError, match="more than the decoder's window of 64: use a higher rate"):
        lm.loglikelihood(asked((TOKENIZER.decode(tokens[:300]), " a")), disable_tqdm=True)
    with pytest.raises(WindowError, match="0 positions for what is compressed and 84 for text and answer"):
        lm.generate_until(asked((TOKENIZER.decode(tokens[:4]), {"max_gen_toks": 80})), disable_tqdm=True)


def test_a_batch_fits_where_each_of_it_does(tmp_path: Path) -> None:
    """A long context with a short answer beside a short context with a long one."""
    config = RCCConfig(segment_length=SEGMENT, rates=[4], encoder=SideConfig(4), decoder=SideConfig(4))
    own = RCCForCausalLM.from_base(backbone(7, window=64), config=config)
    lm = RCCLM(save(own, tmp_path), text_tokens=12, device="cpu", batch_size=2)
    lm.min_context = 8
    tokens = ids(" ".join(WORDS[:300]))
    pairs = [(TOKENIZER.decode(tokens[:200]), " a"), (LONG, " the" * 25)]
    (first, _), (second, _) = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    assert first == pytest.approx(compressed_score(own, tokens[:188], tokens[188:200], ids(" a")), abs=1e-4)
    long = ids(LONG)
    assert second == pytest.approx(compressed_score(own, long[:-12], long[-12:], ids(" the" * 25)), abs=1e-3)


def test_an_untrained_rate_and_a_task_of_short_prompts_are_said(
    lm: Callable[..., RCCLM], caplog: pytest.LogCaptureFixture
) -> None:
    """Once each, not for every prompt."""
    harness = lm(rate=16)
    harness.loglikelihood(asked((LONG, " a"), (f"{LONG} {SHORT}", " a")), disable_tqdm=True)
    harness.loglikelihood(asked((SHORT, " a"), (SHORT, " b")), disable_tqdm=True)
    assert [record.getMessage() for record in caplog.records] == [
        "tiny was not trained at rate 16, only at 4, 8: expect little of it.",
        "none of the 2 prompts was compressed: they have fewer than 8 tokens before what stays text.",
    ]


# ---------------------------------------------------------------- the command
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}} Question: {{{{question}}}} Answer:"
"""
WRITE = """
output_type: generate_until
doc_to_target: "{{answers[label]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: answers
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    words = [sys.executable, "-m", "rcc", "eval", "harness", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_the_command(
    folder: Path, tmp_path: Path, lm: Callable[..., RCCLM], default_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own, offline: local tasks of both kinds, whose answers are those of the model in this process, and
    RULER's first needle, at its own length."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows: list[dict[str, Any]] = [
        {"text": " ".join(WORDS[i : i + 50]), "question": "Who?", "answers": ["Susan", "a lamb"], "label": i % 2}
        for i in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in (("written", WRITE), ("chosen", CHOOSE)):
        task = TASK.format(name=f"rcc_{name}", data=tmp_path / "rows.jsonl") + kind
        (tmp_path / f"{name}.yaml").write_text(task)
    options = ",".join(f"{name}={value}" for name, value in OPTIONS.items())
    done = command(
        *("--model", "rcc", "--model_args", f"model={folder},{options}", "--batch_size", 2),
        *("--tasks", "rcc_written,rcc_chosen,niah_single_1", "--include_path", tmp_path, "--limit", 2),
        *("--metadata", f"tokenizer={default_base}", "max_seq_lengths=[4096]"),
        *("--gen_kwargs", "max_gen_toks=4", "--output_path", tmp_path / "out", "--log_samples"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|niah_single_1|" in done.stdout

    def samples(task: str) -> list[dict[str, Any]]:
        (path,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        logged = [json.loads(line) for line in path.read_text().splitlines()]
        return sorted(logged, key=lambda row: row["doc_id"])

    (results,) = (tmp_path / "out").rglob("results_*.json")
    said = json.loads(results.read_text())
    info = said["config"]["rcc"]
    assert (info["model"], info["rate"], info["prompts"], info["compressed"]) == ("tiny", RATE, 8, 8)
    prompts = [f"{row['text']} Question: Who? Answer:" for row in rows[:2]]
    settings = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
    harness = lm(batch_size=2)
    written = harness.generate_until(asked(*((p, settings) for p in prompts)), disable_tqdm=True)
    assert [row["resps"][0][0] for row in samples("rcc_written")] == written
    pairs = [(p, f" {answer}") for p in prompts for answer in rows[0]["answers"]]
    scores = [score for score, _ in harness.loglikelihood(asked(*pairs), disable_tqdm=True)]
    chosen = [float(answer[0][0]) for row in samples("rcc_chosen") for answer in row["resps"]]
    assert chosen == pytest.approx(scores, abs=1e-4)
    (accuracy,) = {said["results"]["rcc_chosen"]["acc,none"]}
    assert accuracy == sum((scores[2 * i] < scores[2 * i + 1]) == bool(i % 2) for i in range(2)) / 2
    needle = samples("niah_single_1")[0]
    assert 3000 < len(ids(needle["arguments"]["gen_args_0"]["arg_0"])) < 4096


def test_the_entry_point() -> None:
    """What pyproject.toml names for lm-eval to find is there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (value,) = project["entry-points"]["lm_eval.models"].values()
    assert EntryPoint("rcc", value, "lm_eval.models").load() is RCCLM


def test_what_the_command_refuses() -> None:
    """What lm-eval does not take of its arguments is one sentence and code 2, as everywhere in rcc."""
    done = command("--model", "rcc")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rcc: lm-eval: No tasks specified, or no tasks found.")


def test_the_default_model() -> None:
    """A real text, in bfloat16: an answer and a score are those of the model asked directly."""
    text = " ".join(WORDS[:500])
    prompt = f"{text}\n\nQuestion: Who is Susan?\nAnswer:"
    lm = RCCLM(rate=8, split_at="\n\nQuestion:", device="cpu")
    settings = {"until": ["\n"], "max_gen_toks": 8}
    (written,) = lm.generate_until(asked((prompt, settings)), disable_tqdm=True)
    context = lm.model.compress(torch.tensor([ids(text)]), rate=8)
    question = torch.tensor([ids("\n\nQuestion: Who is Susan?\nAnswer:")])
    out = lm.model.generate(question, context=context, max_new_tokens=8, do_sample=False, pad_token_id=0)
    right = TOKENIZER.decode(out[0, question.shape[1] :], skip_special_tokens=True)
    assert written == right.split("\n")[0]
    (score,) = lm.loglikelihood(asked((prompt, " A girl")), disable_tqdm=True)
    assert score[0] == pytest.approx(
        compressed_score(lm.model, ids(text), question[0].tolist(), ids(" A girl"), 8), abs=1e-3
    )
