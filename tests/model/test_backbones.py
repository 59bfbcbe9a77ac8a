"""Families: what is refused, sliding layers, tied weights, and what is Mamba's own. That each family works, as decoder
and as encoder, is shown by the tests of tests/model/ that run on conftest.SIDES."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import conftest
import rcc.model.backbones
import rcc.model.encoder
from conftest import MakeBackbone, MakeExpected, MakeModel, batch, make_model, randomise, tokens
from equality import (
    CLOSE,
    LENGTHS,
    assert_same_model,
    exact_in_float64,
    gradients,
    new_tokens,
    one,
    run_training_pass,
    same_bits,
)
from rcc import ModelError, RCCConfig, RCCForCausalLM, SideConfig
from rcc.model import attention

STATE_SPACE = {name: sides for name, sides in conftest.SIDES.items() if name in ("gpt_neox-mamba", "gpt_neox-mamba2")}
MAMBA = conftest.SIDES["gpt_neox-mamba"]
state_space = pytest.mark.parametrize("sides", STATE_SPACE.values(), ids=STATE_SPACE)


# ---------------------------------------------------------------- refusals
def test_mamba_is_no_decoder(backbone: MakeBackbone, tmp_path: Path) -> None:
    """Mamba on the decoder's side, or shared, is refused as a module and as a folder."""
    mamba = backbone("mamba")
    mamba.save_pretrained(tmp_path / "mamba")
    for sides in ([mamba], [backbone("llama"), mamba], [tmp_path / "mamba"], [backbone("llama"), tmp_path / "mamba"]):
        with pytest.raises(ModelError, match=r"'mamba' has no KV cache.*encoder: use one of gemma3_text, gpt_neox, "):
            RCCForCausalLM.from_base(*sides)


def test_a_decoder_that_slides_everywhere(backbone: MakeBackbone, expected: MakeExpected) -> None:
    """Refused where its window is narrower than its positions; as an encoder it reads as its model defines, and a
    window as wide as the positions changes nothing."""
    narrow, wide = backbone("mistral", sliding_window=5), backbone("mistral", sliding_window=512)
    all_slide = backbone("qwen3", **SLIDING, max_window_layers=0)
    for sides in ((narrow, None), (wide, narrow), (narrow, narrow), (all_slide, None)):
        with pytest.raises(ModelError, match=r"last \d positions only \(sliding_window\).*full attention as decoder"):
            RCCForCausalLM.from_base(*sides)
    config = RCCConfig(segment_length=16, rates=[2])
    text, prompt = tokens(90), tokens(12, 1)
    logits_of = []
    for sides in ((wide, None), (narrow, wide), (wide, wide)):
        model = randomise(RCCForCausalLM.from_base(*sides, config=config))
        logits_of.append(model(input_ids=one(prompt), context=model.compress(one(text))).logits[0])
        torch.testing.assert_close(logits_of[-1], expected(model).logits([text], prompt), **CLOSE)
    assert (logits_of[1] - logits_of[2]).abs().max() > 1e-2


def test_both_directions_are_refused(backbone: MakeBackbone) -> None:
    """A backbone whose attention is not causal is refused on either side."""
    both = backbone("gemma3_text", use_bidirectional_attention=True)
    for sides in ((both, None), (both, backbone("llama"))):
        with pytest.raises(ModelError, match="attends in both directions"):
            RCCForCausalLM.from_base(*sides)


# ---------------------------------------------------------------- layers by turns
SLIDING = {"use_sliding_window": True, "sliding_window": 7}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma3_text", {}),
        ("qwen2", {**SLIDING, "max_window_layers": 1}),
        ("qwen3", {**SLIDING, "max_window_layers": 2}),
    ],
)
def test_sliding_layers(expected: MakeExpected, family: str, more: Any, attn: str) -> None:
    """A prefix much longer than the window: the layers that slide see no more of it, those that do not see it whole;
    in batches with gaps, where windows count positions and not gaps, cached and in one training pass; and written on
    from a cache that holds every position of every layer."""
    body = conftest.make_backbone(family, attn=attn, **more)
    kinds = body.config.layer_types
    assert {"sliding_attention", "full_attention"} == set(kinds)
    model = randomise(RCCForCausalLM.from_base(body, config=RCCConfig(segment_length=16, rates=[2])))
    want = expected(model)
    texts, prompts = [tokens(75), tokens(33, 1), tokens(4, 2)], [tokens(3, 3), tokens(20, 4), tokens(11, 5)]
    ids, mask = batch(texts)
    context = model.compress(ids, mask, batch_tokens=32)
    assert {context.layer(i)[0].shape[2] for i in range(len(kinds))} == {38}
    prompt_ids, prompt_mask = batch(prompts, "left")
    cached = model(prompt_ids, prompt_mask, context=context).logits
    trained = run_training_pass(model, prompt_ids, prompt_mask, context_ids=ids, context_mask=mask).logits
    out = model.generate(prompt_ids, prompt_mask, context=context, max_new_tokens=9)
    for b, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        logits = want.logits([text], prompt)
        torch.testing.assert_close(cached[b, -len(prompt) :], logits, **CLOSE)
        torch.testing.assert_close(trained[b, -len(prompt) :], logits, **CLOSE)
        assert new_tokens(out, 20)[b] == want.greedy([text], prompt, 9)
    model.decoder.config.sliding_window = 6  # which the reference reads, and the model did when it was made
    assert (expected(model).logits([texts[0]], prompts[0]) - cached[0, -3:]).abs().max() > 1e-2


# ---------------------------------------------------------------- tied and untied
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("family", conftest.DECODERS)
def test_tied_and_untied_embeddings(
    backbone: MakeBackbone, expected: MakeExpected, tmp_path: Path, family: str, tie: bool, share: bool
) -> None:
    """Whether head and embeddings are one matrix or two: the reference's logits, saved and loaded, whole too."""
    body = backbone(family, tie_word_embeddings=tie)
    same = body.get_output_embeddings().weight is body.get_input_embeddings().weight
    assert same == tie
    body.save_pretrained(tmp_path / "base")
    sides = tmp_path / "base", None if share else tmp_path / "base"
    model = randomise(RCCForCausalLM.from_base(*sides, config=RCCConfig(segment_length=16, rates=[4])))
    got = model(input_ids=one(tokens(6, 1)), context=model.compress(one(tokens(37)))).logits[0]
    torch.testing.assert_close(got, expected(model).logits([tokens(37)], tokens(6, 1)), **CLOSE)
    for full in (False, True):
        model.save_pretrained(tmp_path / "model", full=full)
        assert_same_model(model, RCCForCausalLM.from_pretrained(tmp_path / "model"), tokens)


# ---------------------------------------------------------------- Mamba as encoder
@pytest.mark.parametrize("settings", [{"states": "last"}, {"layer_map": "average"}, {"lora": 4}])
@state_space
def test_mamba_encoder(
    tiny: MakeModel, expected: MakeExpected, sides: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Text of every kind of length, an append at another rate and a generated answer: the reference's."""
    model = tiny(**sides, **settings)
    want, prompt = expected(model), tokens(6, 1)
    for length in LENGTHS:
        ids = tokens(length)
        context = model.compress(one(ids))
        got = model(input_ids=one(prompt), context=context).logits[0]
        torch.testing.assert_close(got, want.logits([ids], prompt), **CLOSE)
    longer = model.compress(one(tokens(21, 2)), rate=8, context=context)
    out = model.generate(one(prompt), context=longer, max_new_tokens=4)
    assert new_tokens(out, 6)[0] == want.greedy([ids, tokens(21, 2)], prompt, 4, [4, 8])


@state_space
@torch.no_grad()
def test_mamba_states(tiny: MakeModel, sides: dict[str, Any]) -> None:
    """The vectors are transformers' own hidden states of each segment: embeddings, each block's output, the last one
    after the final norm; a segment's first token reaches them all; encode and prefix make what compress makes."""
    model = tiny(**sides)
    ids = one(tokens(37))
    vectors = model.encode(ids)
    for start, length in ((0, 16), (16, 16), (32, 5)):
        segment = ids[:, start : start + length]
        encoder: Any = model.encoder
        hidden = encoder(input_ids=segment, output_hidden_states=True)
        states = [encoder.embeddings(segment), *hidden.hidden_states[:3], hidden.last_hidden_state]
        ends = [min(i + 3, length - 1) for i in range(0, length, 4)]
        want = torch.stack(states, 2)[0, ends]
        torch.testing.assert_close(vectors.states[0, start // 4 :][: len(ends)], want, **CLOSE)
    other = ids.clone()
    other[0, 0] += 1
    changed = (model.encode(other).states - vectors.states)[0, :4, 1:].abs().amax(-1)
    assert changed.min() > 1e-3
    assert same_bits(model.prefix(vectors), model.compress(ids))


@pytest.mark.parametrize("lora", [0, 4])
@state_space
def test_mamba_gradients(sides: dict[str, Any], lora: int) -> None:
    """Every trained parameter of the encoder gets a gradient, LoRA on every block's in_proj and on nothing else;
    recomputing activations does not change it."""
    model = exact_in_float64(make_model(**sides, lora=lora))
    names = {n for n, p in model.encoder.named_parameters() if p.requires_grad}
    if lora:
        assert names == {f"layers.{i}.mixer.in_proj.lora_{x}.default.weight" for i in range(3) for x in "AB"}
    else:
        assert {n.split(".")[0] for n in names} == {"embeddings", "layers"}
        assert sum(n.endswith("A_log") for n in names) == 3  # the last block reaches no loss
    got = {k: None if g is None else g.clone() for k, g in gradients(model, tokens, batch).items()}
    for name, gradient in got.items():
        trained = model.get_parameter(name).requires_grad
        assert trained == (gradient is not None and bool(gradient.abs().max() > 0)), name
    model.train().gradient_checkpointing_enable()
    for name, gradient in gradients(model, tokens, batch).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, got[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("family", conftest.STATE_SPACE)
def test_mamba_save_and_load(backbone: MakeBackbone, tmp_path: Path, family: str, lora: int) -> None:
    """Saved and loaded from folders it is the same model; an attention implementation concerns the decoder only; a
    segment may be longer than the decoder's window."""
    backbone(family, layers=4, hidden=32).save_pretrained(tmp_path / "mamba")
    backbone("gpt_neox").save_pretrained(tmp_path / "neox")
    config = RCCConfig(segment_length=1024, rates=[4], encoder=SideConfig(lora))
    sides = tmp_path / "mamba", tmp_path / "neox"
    model = randomise(RCCForCausalLM.from_base(*sides, config=config, attn_implementation="eager"))
    model.save_pretrained(tmp_path / "model")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert loaded.decoder.config._attn_implementation == "eager"
    assert_same_model(model, loaded, tokens)
    sdpa = RCCForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    assert sdpa.decoder.config._attn_implementation == attention.NAME
    encoder, decoder = (AutoModelForCausalLM.from_pretrained(side) for side in sides)
    model = RCCForCausalLM.from_base(encoder, decoder, config, attn_implementation="sdpa")
    assert model.encoder.config.hidden_size == 32


def test_nothing_is_captured_outside_a_pass(tiny: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder by itself runs as ever, also after a pass that was cut short or failed."""
    model = tiny(**MAMBA)
    model.compress(one(tokens(20)))
    assert rcc.model.encoder._capture.get() is None
    monkeypatch.setattr(rcc.model.encoder._Capture, "take", lambda *_: pytest.fail("captured"))
    model.encoder(input_ids=one(tokens(20)))
    monkeypatch.setattr(rcc.model.encoder._Capture, "take", lambda *_: dict[str, int]()["fails"])
    with pytest.raises(KeyError):
        model.compress(one(tokens(20)))
    assert rcc.model.encoder._capture.get() is None


def test_every_listed_family_is_tested() -> None:
    """A family in the table is one of those that the tests run on."""
    assert set(rcc.model.backbones.BLOCKS) == set(conftest.SHAPES)
