"""The authors' published layout, converted: the same numbers as an independent computation, or one clear sentence."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from conftest import Call, MakeTokens
from published import CONFIG, Published, buffers, save, weights
from rcc import RCCConfig, RCCForCausalLM, load_tokenizer
from rcc.checkpoints.convert import Conversion, convert_checkpoint
from rcc.checkpoints.published import IncompleteError
from rcc.errors import ModelError

SEGMENT, RATE = 16, 4
SIZES = ("--segment-length", str(SEGMENT), "--rate", str(RATE))
PROMPT = [5, 17, 80, 3, 44]


def convert(source: Path, out: Path, **options: Any) -> Conversion:
    return convert_checkpoint(source, out, **{"segment_length": SEGMENT, "rate": RATE, **options})


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return weights(CONFIG) | buffers(CONFIG)


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint in three files, to be damaged."""
    return save(tmp_path / "theirs", CONFIG, tensors, 3)


# ---------------------------------------------------------------- the same numbers
VARIANTS: dict[str, dict[str, Any]] = {
    "one file": {},
    "three files": {"files": 3},
    "three files, no index, says mamba": {"files": 3, "index": False, "encoder": "mamba"},
    "sequential": {"use_parallel_residual": False},
    "rotary": {"rotary_pct": 0.5, "rotary_emb_base": 50},
    "full rotary, wide epsilon": {"rotary_pct": 1.0, "layer_norm_eps": 0.1},
    "no attention bias": {"attention_bias": False},
    "tied": {"tie_word_embeddings": True},
    "bfloat16": {"dtype": torch.bfloat16, "torch_dtype": "bfloat16"},
    "float16, config says float32": {"dtype": torch.float16},
    "mixed types": {"dtype": torch.bfloat16, "mixed": True},
}


def build(folder: Path, variant: dict[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    variant = dict(variant)
    layout = {key: variant.pop(key) for key in ("files", "index") if key in variant}
    made = {key: variant.pop(key) for key in ("encoder", "dtype") if key in variant}
    mixed = variant.pop("mixed", False)
    config = CONFIG | variant
    tensors = weights(config, **made)
    if mixed:
        tensors = {name: t.float() * 1.001 if "norm" in name or "2gpt" in name else t for name, t in tensors.items()}
    return save(folder / "theirs", config, tensors | buffers(config), **layout), config, tensors


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_vectors_logits_and_tokens(tmp_path: Path, tokens: MakeTokens, variant: str) -> None:
    source, config, tensors = build(tmp_path, VARIANTS[variant])
    convert(source, tmp_path / "ours")
    model = RCCForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs = Published(config, tensors, SEGMENT, RATE)
    prompt = torch.tensor([PROMPT])
    for length in (1, 5, 8, 16, 32, 41):  # short, divides the segment, a segment, two, and more
        ids = tokens(length)
        vectors = theirs.vectors([ids])
        ours = model.encode(torch.tensor([ids])).states[0]
        torch.testing.assert_close(ours, vectors.float(), rtol=0, atol=1e-4)
        context = model.compress(torch.tensor([ids]))
        logits = model(input_ids=prompt, context=context).logits[0]
        torch.testing.assert_close(logits, theirs.logits(vectors, PROMPT).float(), rtol=0, atol=1e-4)
        written = model.generate(prompt, context=context, max_new_tokens=6, do_sample=False)[0, len(PROMPT) :]
        assert written.tolist() == theirs.greedy(vectors, PROMPT, 6)


def test_every_tensor_that_is_used_matters(tmp_path: Path, tensors: dict[str, Tensor], tokens: MakeTokens) -> None:
    """And no other: the reference itself would else let a wrong name pass."""
    ids = tokens(20)

    def logits(changed: dict[str, Tensor]) -> Tensor:
        theirs = Published(CONFIG, changed, SEGMENT, RATE)
        return theirs.logits(theirs.vectors([ids]), PROMPT)

    done = convert(save(tmp_path / "theirs", CONFIG, tensors), tmp_path / "ours")
    before = logits(tensors)
    generator = torch.Generator().manual_seed(1)
    last = CONFIG["num_hidden_layers"] - 1
    # these change only a last state, which no term but the last reads
    silent = (f"rcc_encoder.gpt_neox.layers.{last}.", "rcc_encoder.gpt_neox.final_layer_norm")
    for fate in done.tensors:
        if not tensors[fate.name].is_floating_point():
            continue
        noise = torch.randn(tensors[fate.name].shape, generator=generator)  # a shift would pass a norm unseen
        matters = not torch.equal(before, logits(tensors | {fate.name: tensors[fate.name] + noise}))
        assert matters == (fate.fate == "used" and not any(word in fate.name for word in silent)), fate


def test_the_published_segment(tmp_path: Path, tokens: MakeTokens) -> None:
    """2,048 tokens at 32×, as the checkpoint was trained, unless something else is said."""
    config = CONFIG | {"max_position_embeddings": 2048, "num_hidden_layers": 2, "num_attention_heads": 2}
    tensors = weights(config)
    convert_checkpoint(save(tmp_path / "theirs", config, tensors), tmp_path / "ours")
    settings = RCCConfig.load(tmp_path / "ours")
    assert (settings.segment_length, settings.rates, settings.segment_padding) == (2048, [32], "repeat")
    model = RCCForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs = Published(config, tensors, 2048, 32)
    for length, positions in ((100, 64), (2048, 64), (2100, 128)):
        ids = tokens(length)
        vectors = theirs.vectors([ids])
        assert len(vectors) == positions
        ours = model.encode(torch.tensor([ids])).states[0]
        torch.testing.assert_close(ours, vectors.float(), rtol=0, atol=1e-4)


def test_padding_by_hand(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """What the encoder reads, written out: the published rule without the two faults of the authors' code."""
    convert(save(tmp_path / "theirs", CONFIG, tensors), tmp_path / "ours", segment_length=4, rate=2)
    model = RCCForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    table: Any = model.encoder.get_input_embeddings().weight
    cases = {
        (7,): [7, 7, 7, 7],
        (7, 8): [7, 8, 7, 8],
        (7, 8, 9): [7, 8, 9, 7],
        (7, 8, 9, 10): [7, 8, 9, 10],
        (7, 8, 9, 10, 11): [9, 10, 11, 7, 8, 9, 10, 11],
        (7, 8, 9, 10, 11, 12, 13, 14): [7, 8, 9, 10, 11, 12, 13, 14],
    }
    for ids, read in cases.items():
        first_states = model.encode(torch.tensor([ids])).states[0, :, 0]
        assert torch.equal(first_states, table[read[1::2]]), ids


# ---------------------------------------------------------------- the folder
@pytest.mark.parametrize("variant", ["one file", "tied", "bfloat16", "mixed types"])
def test_folder(tmp_path: Path, variant: str) -> None:
    """Ordinary bases, byte for byte the tensors that were given, hashes that fit, and settings in today's form."""
    source, config, tensors = build(tmp_path, VARIANTS[variant])
    done = convert(source, tmp_path / "ours")
    ours = tmp_path / "ours"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
    assert sorted(p.name for p in ours.iterdir()) == ["config.json", "decoder", "encoder", "model.safetensors"]
    autos: dict[str, Any] = {"decoder": AutoModelForCausalLM, "encoder": AutoModel}
    for side, auto in autos.items():
        _, loading = auto.from_pretrained(ours / side, output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
        with safe_open(ours / side / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
        settings = json.loads((ours / side / "config.json").read_text())
        assert settings["rope_parameters"]["partial_rotary_factor"] == config["rotary_pct"]
        assert not {"rotary_pct", "rotary_emb_base", "torch_dtype"} & set(settings)
    written = load_file(ours / "model.safetensors")
    for side in ("decoder", "encoder"):
        held = load_file(ours / side / "model.safetensors")
        written |= {f"{side}/{name}": tensor for name, tensor in held.items()}
    used = {fate.note: fate.name for fate in done.tensors if fate.fate == "used"}
    assert set(used) == set(written)
    for number, name in used.items():
        assert written[number].dtype == tensors[name].dtype
        assert torch.equal(written[number], tensors[name]), name

    model = RCCForCausalLM.from_pretrained(ours)
    assert model.config.name == "ours"
    assert model.dtype == done.dtype == (torch.bfloat16 if variant == "bfloat16" else torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {done.dtype}
    assert model.fingerprint == model.compute_fingerprint()
    model.save_pretrained(tmp_path / "again")
    again = RCCForCausalLM.from_pretrained(tmp_path / "again")
    assert again.fingerprint == model.fingerprint


def test_what_became_of_each(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    extra = {"gpt_neox.layers.0.attention.lora_A": torch.zeros(2), "counter": torch.zeros(1, dtype=torch.int64)}
    done = convert(save(tmp_path / "theirs", CONFIG, tensors | extra, 2), tmp_path / "ours")
    fates = {fate.name: fate for fate in done.tensors}
    assert set(fates) == set(tensors | extra)
    ignored = {name: fate.note for name, fate in fates.items() if fate.fate == "ignored"}
    for name, words in {
        "gpt_neox.embed_out.weight": "second",
        "gpt_neox.rcc_encoder.embed_out.weight": "output layer",
        "gpt_neox.rcc_encoder2gpt_A_matrix.2.weight": "no KV entry",
        "gpt_neox.layers.1.attention.bias": "buffer",
        "gpt_neox.layers.1.attention.masked_bias": "buffer",
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq": "buffer",
        "gpt_neox.layers.0.attention.lora_A": "unknown",
        "counter": "unknown",
    }.items():
        assert words in ignored[name]
    assert len(ignored) == 3 + 3 * CONFIG["num_hidden_layers"] + 2
    assert fates["gpt_neox.rcc_encoder2gpt_embed.weight"].note == "projections.0.weight"
    assert fates["gpt_neox.rcc_encoder2gpt_A_matrix.1.weight"].note == "projections.2.weight"
    assert fates["embed_out.weight"].note == "decoder/embed_out.weight"
    assert fates["gpt_neox.rcc_encoder.gpt_neox.embed_in.weight"].note == "encoder/embed_in.weight"
    assert done.summary() == f"{len(fates) - len(ignored)} tensors used, {len(ignored)} ignored (2 of them unknown)"


def test_names_of_both_kinds_and_equal_copies(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """Projections called mamba's beside an encoder that is not, and a tensor that two files have."""
    named = {name.replace("rcc_encoder2gpt", "mamba2gpt"): tensor for name, tensor in tensors.items()}
    source = save(tmp_path / "theirs", CONFIG, named)
    twice = {"embed_out.weight": tensors["embed_out.weight"].clone()}
    save_file(twice, source / "more.safetensors")
    done = convert(source, tmp_path / "ours")
    (copy,) = (fate for fate in done.tensors if "the same as" in fate.note)
    assert (copy.name, copy.fate) == ("embed_out.weight", "ignored")
    convert(save(tmp_path / "plain", CONFIG, tensors), tmp_path / "expected")
    names = RCCConfig.load(tmp_path / "ours").fingerprint, RCCConfig.load(tmp_path / "expected").fingerprint
    assert names[0] == names[1]


def test_a_tied_checkpoint_may_repeat_the_table(tmp_path: Path) -> None:
    source, _, tensors = build(tmp_path, VARIANTS["tied"])
    save_file({"embed_out.weight": tensors["gpt_neox.embed_in.weight"].clone()}, source / "more.safetensors")
    done = convert(source, tmp_path / "ours")
    assert {fate.name: fate.note for fate in done.tensors}["embed_out.weight"].startswith("config.json ties it")
    save_file({"embed_out.weight": tensors["gpt_neox.embed_in.weight"] + 1}, source / "more.safetensors")
    with pytest.raises(ModelError, match=r"ties embed_out.weight .* but they differ: set tie_word_embeddings"):
        convert(source, tmp_path / "other")


# ---------------------------------------------------------------- the verb
def test_verb(call: Call, tmp_path: Path, tokenizer: Path) -> None:
    config = CONFIG | {"vocab_size": 300}
    source, out = save(tmp_path / "theirs", config, weights(config), 3), tmp_path / "ours"
    told = call("convert-checkpoint", source, out, *SIZES).ok()
    *rows, missing, last = told.out.splitlines()
    assert "used      embed_out.weight → decoder/embed_out.weight" in rows
    assert any(row.startswith("ignored   gpt_neox.embed_out.weight – ") for row in rows)
    assert len(rows) == sum(len(load_file(file)) for file in source.glob("*.safetensors"))
    assert missing.startswith("no tokenizer: ")
    assert str(out / "decoder") in missing
    assert last.startswith(f"{out}: ")
    assert f"rcc ask --model {out} " in last
    assert told.err == ""

    out.rename(tmp_path / "first")
    out.mkdir()  # empty: as good as none
    told = json.loads(call("convert-checkpoint", source, out, *SIZES, "--tokenizer", tokenizer, "--json").ok().out)
    assert told["folder"] == str(out)
    assert told["tokenizer"] == str(tokenizer)
    assert len(told["tensors"]) == len(rows)
    assert {"name": "embed_out.weight", "fate": "used", "note": "decoder/embed_out.weight"} in told["tensors"]
    assert (
        load_tokenizer(out)("Who?")["input_ids"]
        == Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode("Who?").ids
    )
    before = {name: RCCConfig.load(tmp_path / name) for name in ("first", "ours")}
    assert before["first"].weights_sha256 == before["ours"].weights_sha256


# ---------------------------------------------------------------- the three ways to ask
TEXT = "Ann keeps a red kite. Ben has a drum.\n"
QUESTION = "Who has a drum?"
HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes and a few merges, which also join the end of a text with what follows: joined texts are other tokens."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    inner.train_from_iterator([f"{TEXT}\n\n{QUESTION}{HEADER}"] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    inner.save(str(folder / "tokenizer.json"))
    # the class that Pythia's names, which transformers 5 would give splitting rules of its own
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXTokenizer", "model_max_length": 2048}')
    return folder


@pytest.fixture(scope="module")
def asked(
    tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor], Callable[..., str]]:
    """A converted folder with a tokenizer, its tensors, and text → ids by the tokenizer's file itself."""
    folder = tmp_path_factory.mktemp("asked")
    config = CONFIG | {"vocab_size": 300, "num_hidden_layers": 2}
    tensors = weights(config)
    source = save(folder / "theirs", config, tensors)
    for file in tokenizer.iterdir():
        shutil.copy(file, source)
    done = convert(source, folder / "ours")  # the tokenizer is in the same folder
    assert done.tokenizer == source
    (folder / "text.txt").write_text(TEXT)
    inner = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def expected(texts: list[str], prompt: str, padding: str = "repeat") -> str:
        """What is written after a prompt that reads texts with a segment of their own each."""
        theirs = Published(config, tensors, SEGMENT, RATE, padding)
        vectors = theirs.vectors([inner.encode(text).ids for text in texts])
        written = inner.decode(theirs.greedy(vectors, inner.encode(prompt).ids, 8), skip_special_tokens=False)
        return written.split("<|im_end|>")[0].strip()

    joined, apart = (
        inner.encode(f"{TEXT}\n\n{QUESTION}").ids,
        [*inner.encode(TEXT).ids, *inner.encode(f"\n\n{QUESTION}").ids],
    )
    assert joined != apart
    return folder, tensors, expected


@pytest.mark.parametrize("mode", ["reconstruct", "human", "compress"])
@pytest.mark.parametrize("padding", ["repeat", "none"])
def test_ask_a_text(
    call: Call, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, padding: str
) -> None:
    """The published checkpoint's encoder reads text and question as one, another model's as two texts."""
    folder, _, expected = asked
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    model = folder / "ours"
    if padding == "none":
        model = shutil.copytree(model, tmp_path / "plain")
        settings = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(settings | {"segment_padding": "none"}))
    asking = ("ask", folder / "text.txt", QUESTION, "--mode", mode, "--model", model, "--max-new-tokens", "8", "--json")
    done = call(*asking).ok()
    (row,) = json.loads(done.out)["answers"]
    if mode == "human":
        turn = f"{HEADER}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        assert row["answer"] == expected([TEXT], turn, padding)
        return
    ways = {"repeat": [f"{TEXT}\n\n{QUESTION}"], "none": [TEXT, f"\n\n{QUESTION}"]}
    prompt, key = (HEADER, "reconstructed_question") if mode == "reconstruct" else ("Answer:", "answer")
    assert row[key] == expected(ways[padding], prompt, padding)
    assert row[key] != expected(ways["none" if padding == "repeat" else "repeat"], prompt, padding)
    stored = list((tmp_path / "home").rglob("*.rcc"))
    assert len(stored) == (padding == "none")  # what holds one question is of no use to another


def test_ask_several_questions_and_a_stored_context(
    call: Call, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a stored context the question is a segment of its own, padded as every other."""
    folder, _, expected = asked
    monkeypatch.setenv("RCC_HOME", str(tmp_path / "home"))
    other = "What is red?"
    options = ("--mode", "compress", "--model", folder / "ours", "--max-new-tokens", "8", "--json")
    rows = json.loads(call("ask", folder / "text.txt", QUESTION, other, *options).ok().out)["answers"]
    assert [row["answer"] for row in rows] == [expected([f"{TEXT}\n\n{q}"], "Answer:") for q in (QUESTION, other)]
    call("compress", folder / "text.txt", "-o", tmp_path / "text.rcc", "--model", folder / "ours").ok()
    (row,) = json.loads(call("ask", tmp_path / "text.rcc", QUESTION, *options).ok().out)["answers"]
    assert row["answer"] == expected([TEXT, f"\n\n{QUESTION}"], "Answer:")


# ---------------------------------------------------------------- memory, and what interrupts it
def test_memory(tmp_path: Path) -> None:
    """In memory there is never more than a small part of the checkpoint, however its files are cut."""
    config = CONFIG | {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 10,
        "vocab_size": 8000,
        "torch_dtype": "bfloat16",
    }
    source = save(tmp_path / "theirs", config, weights(config, dtype=torch.bfloat16), 3)
    largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
    assert largest > 50e6
    measure = """
import sys
from rcc.checkpoints.convert import convert_checkpoint
def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
before = memory("VmRSS:")
convert_checkpoint(*sys.argv[1:], segment_length=16, rate=4)
print(memory("VmHWM:") - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", measure, source, tmp_path / "ours"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 1.3 * largest, f"{int(done.stdout) / 1e6:.0f} MB, shards of {largest / 1e6:.0f} MB"
    shutil.rmtree(source)


def test_interrupted(source: Path, folder: Path) -> None:
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done > total / 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, folder / "ours", progress=stop)
    assert calls[0][0] == 0
    assert len({total for _, total in calls}) == 1


def test_progress_reaches_its_end(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "ours", progress=lambda *numbers: calls.append(numbers))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


def test_file_size_limit(call: Call, source: Path, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        result = call("convert-checkpoint", source, folder / "ours", *SIZES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result.refused(str(folder / "ours"), "cannot be written", "File too large")


# ---------------------------------------------------------------- bad input
def edit(source: Path, **changes: Any) -> None:
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(source: Path, name: str, tensor: Tensor | None, file: str = "model-00001-of-00003.safetensors") -> None:
    """Put a tensor into one of the files, or (None) take it out of whichever has it."""
    for path in source.glob("*.safetensors"):
        held = load_file(path)
        if tensor is None and held.pop(name, None) is not None:
            save_file(held, path)
    if tensor is not None:
        path = source / file
        save_file((load_file(path) if path.exists() else {}) | {name: tensor}, path)


def only_pickles(source: Path) -> None:
    for file in source.glob("*.safetensors"):
        file.rename(source / f"pytorch_{file.stem}.bin")


def cut(source: Path, size: int) -> None:
    os.truncate(source / "model-00002-of-00003.safetensors", size)


def quantize(source: Path) -> None:
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    shape = load_all(source)[name].shape
    change(source, name, None)
    change(source, name, torch.zeros(shape, dtype=torch.int8))


def load_all(source: Path) -> dict[str, Tensor]:
    return {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}


EMBED = "embed_out.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["is not a folder"]),
    "no config": (lambda s: (s / "config.json").unlink(), ["has no config.json"]),
    "no json": (lambda s: (s / "config.json").write_text("{"), ["config.json", "cannot be read as JSON"]),
    "not utf-8": (lambda s: (s / "config.json").write_bytes(b"\xff{}"), ["config.json", "cannot be read as JSON"]),
    "a list": (lambda s: (s / "config.json").write_text("[]"), ["config.json", "not a JSON object"]),
    "llama": (lambda s: edit(s, model_type="llama"), ["'llama'", "'gpt_neox'"]),
    "no family": (lambda s: (s / "config.json").write_text("{}"), ["None", "'gpt_neox'"]),
    "wrong type": (lambda s: edit(s, hidden_size="wide"), ["config.json describes no GPT-NeoX model"]),
    "heads": (lambda s: edit(s, num_attention_heads=5), ["config.json describes no GPT-NeoX model", "heads"]),
    "activation": (lambda s: edit(s, hidden_act="foo"), ["config.json describes no GPT-NeoX model", "foo"]),
    "no weights": (lambda s: [f.unlink() for f in s.glob("*.safetensors")], ["has no *.safetensors file"]),
    "pickles": (only_pickles, ["no *.safetensors file", "pytorch_model-00001-of-00003.bin", "not read"]),
    "a shard is missing": (
        lambda s: (s / "model-00002-of-00003.safetensors").unlink(),
        ["lacks model-00002-of-00003.safetensors", "model.safetensors.index.json names"],
    ),
    "cut": (lambda s: cut(s, 5000), ["model-00002-of-00003.safetensors is damaged or cut short"]),
    "cut in the header": (lambda s: cut(s, 50), ["model-00002-of-00003.safetensors is damaged or cut short"]),
    "empty": (lambda s: cut(s, 0), ["model-00002-of-00003.safetensors is damaged or cut short"]),
    "garbage": (
        lambda s: (s / "model-00002-of-00003.safetensors").write_bytes(os.urandom(5000)),
        ["model-00002-of-00003.safetensors is damaged or cut short"],
    ),
    "two checkpoints": (
        lambda s: change(s, EMBED, load_all(s)[EMBED] + 1, "other.safetensors"),
        ["embed_out.weight in other.safetensors is not what", "model-00001-of-00003.safetensors"],
    ),
    "two names": (
        lambda s: change(s, "gpt_neox.mamba2gpt_embed.weight", torch.zeros(32, 32), "other.safetensors"),
        ["gpt_neox.mamba2gpt_embed.weight in other.safetensors is not what gpt_neox.rcc_encoder2gpt_embed.weight in"],
    ),
    "no layers": (lambda s: edit(s, num_hidden_layers=0), ["config.json describes no GPT-NeoX model"]),
    "quantized": (quantize, ["gpt_neox.layers.1.mlp.dense_4h_to_h.weight", "stored as I8"]),
    "damaged index": (
        lambda s: (s / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json cannot be read as JSON"],
    ),
    "a small window": (lambda s: edit(s, max_position_embeddings=8), ["segment_length=16", "8 positions"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_source(call: Call, source: Path, folder: Path, damage: str) -> None:
    do, words = DAMAGES[damage]
    do(source)
    done = call("convert-checkpoint", source, folder / "ours", *SIZES)
    done.refused(*words)


@pytest.mark.parametrize("encoder", ["rcc_encoder", "mamba"])
def test_missing_tensors(call: Call, tmp_path: Path, folder: Path, encoder: str) -> None:
    """The first one and their number in the error; a line for each."""
    tensors = weights(CONFIG, encoder)
    lost = [f"gpt_neox.{encoder}.gpt_neox.layers.1.mlp.dense_h_to_4h.bias", f"gpt_neox.{encoder}2gpt_embed.weight"]
    left = {name: tensor for name, tensor in tensors.items() if name not in lost}
    done = call("convert-checkpoint", save(tmp_path / "theirs", CONFIG, left), folder / "ours", *SIZES)
    assert done.code == 2
    assert done.err.startswith("rcc: ")
    assert done.err.count("\n") == 1
    assert f"lacks {lost[0]}, one of 2 tensors that are missing: " in done.err
    rows = done.out.splitlines()
    assert [row for row in rows if row.startswith("missing")] == [
        f"missing   {name} – the model needs it" for name in lost
    ]
    assert len(rows) == len(tensors)


def test_no_tensors_at_all(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(IncompleteError, match=r"lacks gpt_neox\.embed_in\.weight, one of 82 tensors"):
        convert(save(tmp_path / "theirs", CONFIG, {}), folder / "ours")


def test_the_last_projection_may_be_missing(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """It is not used."""
    left = {name: tensor for name, tensor in tensors.items() if name != "gpt_neox.rcc_encoder2gpt_A_matrix.2.weight"}
    convert(save(tmp_path / "theirs", CONFIG, left), tmp_path / "ours")


def test_another_configuration(source: Path, folder: Path) -> None:
    edit(source, vocab_size=96)
    name = "embed_out.weight in .* has shape \\[97, 32\\] instead of \\[96, 32\\], which config.json asks for"
    with pytest.raises(IncompleteError, match=name + r" \(3 tensors do not fit\)") as caught:
        convert(source, folder / "ours")
    assert {fate.name for fate in caught.value.tensors if fate.fate == "misshapen"} == {
        "embed_out.weight",
        "gpt_neox.embed_in.weight",
        "gpt_neox.rcc_encoder.gpt_neox.embed_in.weight",
    }
    edit(source, vocab_size=97, num_hidden_layers=4)
    with pytest.raises(
        IncompleteError, match=r"lacks gpt_neox.layers.3.attention.dense.bias, one of 24 tensors that are missing"
    ):
        convert(source, folder / "ours")


def test_bad_output(call: Call, source: Path, folder: Path, tmp_path: Path) -> None:
    call("convert-checkpoint", source, source, *SIZES).refused(f"{source} is not empty")
    call("convert-checkpoint", source, source / "config.json", *SIZES).refused("is a file")
    call("convert-checkpoint", source, folder / "no" / "ours", *SIZES).refused("no is not a folder")
    call("convert-checkpoint", source, folder / ("x" * 300), *SIZES).refused("cannot be written", "too long")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing" / "there")
    call("convert-checkpoint", source, tmp_path / "dangling", *SIZES).refused("is not a folder")
    if os.geteuid():  # root may write anywhere
        folder.chmod(0o500)
        call("convert-checkpoint", source, folder / "ours", *SIZES).refused("cannot be written", "ermission")
        folder.chmod(0o700)


def test_bad_settings(call: Call, source: Path, folder: Path) -> None:
    call("convert-checkpoint", source, folder / "ours", "--segment-length", "100").refused("rate=32 does not divide")
    call("convert-checkpoint", source, folder / "ours", "--rate", "0").refused("--rate")
    call("convert-checkpoint", source, folder / "ours").refused("segment_length=2048", "512 positions")


def test_bad_tokenizer(call: Call, source: Path, folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    call("convert-checkpoint", source, folder / "ours", *SIZES, "--tokenizer", tmp_path / "no").refused(
        "has no tokenizer", "tokenizer.json"
    )
    # 290 tokens where the model has 97
    call("convert-checkpoint", source, folder / "ours", *SIZES, "--tokenizer", tokenizer).refused(
        "token ids up to 289", "97 tokens"
    )
    (source / "tokenizer.json").write_text("{}")
    call("convert-checkpoint", source, folder / "ours", *SIZES).refused("the tokenizer in", "cannot be loaded")


def test_names_are_those_of_transformers(tmp_path: Path) -> None:
    """The layout that these tests make has the names and shapes of GPT-NeoX as transformers itself saves it."""
    config = {key: value for key, value in CONFIG.items() if key not in ("torch_dtype", "transformers_version")}
    GPTNeoXForCausalLM(GPTNeoXConfig.from_dict(config)).save_pretrained(tmp_path)
    saved = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    theirs = weights(CONFIG)
    decoder = {n: t.shape for n, t in theirs.items() if "rcc_encoder" not in n and n != "gpt_neox.embed_out.weight"}
    top = "gpt_neox.rcc_encoder."
    assert saved == decoder
    assert saved == {n.removeprefix(top): t.shape for n, t in theirs.items() if n.startswith(top)}


def test_the_tokenizer_keeps_its_own_rules(tokenizer: Path, asked: Any) -> None:
    """transformers 5 gives a GPT-NeoX tokenizer splitting rules of its own; the file's are those of the checkpoint."""
    ours, inner = load_tokenizer(asked[0] / "ours"), Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    assert isinstance(ours, PreTrainedTokenizerFast)
    for text in (TEXT, f"{TEXT}\n\n{QUESTION}", "cafe\u0301  12345\n\n\n", HEADER):
        assert ours(text, add_special_tokens=False)["input_ids"] == inner.encode(text).ids
