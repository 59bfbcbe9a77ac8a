"""Families: what is refused, and Mamba as an encoder, compared with tests/reference.py and transformers' own hidden
states. The other families run through tests/test_equality.py."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaModel, MistralConfig, MistralForCausalLM

import conftest
import rcc.encoder
from conftest import SHAPES, VOCABULARY, batch, make_model, randomise, tokens
from rcc import ModelError, RCCConfig, RCCForCausalLM
from test_equality import CLOSE, LENGTHS, assert_same_model, exact_in_float64, gradients, new_tokens, one, same_bits

MAMBA = {"encoder": "mamba", "share": False, "layers": (4, 3), "hidden": (32, 48)}


def mistral(sliding: int | None, window: int) -> MistralForCausalLM:
    shape = {**SHAPES["mistral"], "sliding_window": sliding, "max_position_embeddings": window}
    return MistralForCausalLM(
        MistralConfig(
            **shape,
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=None,
        )
    ).eval()


# ---------------------------------------------------------------- refusals
def test_mamba_is_no_decoder(backbone, tmp_path):
    """Mamba on the decoder's side, or shared, is refused as a module and as a folder."""
    mamba = backbone("mamba")
    mamba.save_pretrained(tmp_path / "mamba")
    for sides in ([mamba], [backbone("llama"), mamba], [tmp_path / "mamba"], [backbone("llama"), tmp_path / "mamba"]):
        with pytest.raises(ModelError, match=r"'mamba' has no KV cache.*encoder: use one of gpt_neox, llama.* decoder"):
            RCCForCausalLM.from_base(*sides)


def test_sliding_window(expected):
    """A window narrower than the positions is refused on either side; one as wide as them changes nothing."""
    narrow, wide = mistral(16, 64), mistral(64, 64)
    for sides in ([narrow], [narrow, wide], [wide, narrow]):
        with pytest.raises(ModelError, match=r"last 16 positions.*sliding_window"):
            RCCForCausalLM.from_base(*sides)
    config = RCCConfig(segment_length=16, rates=[2])
    model = randomise(RCCForCausalLM.from_base(wide, config=config))
    text, prompt = tokens(90), tokens(12, 1)
    got = model(input_ids=one(prompt), context=model.compress(one(text))).logits[0]
    torch.testing.assert_close(got, expected(model).logits([text], prompt), **CLOSE)


# ---------------------------------------------------------------- Mamba as encoder
@pytest.mark.parametrize("settings", [{}, {"states": "last"}, {"layer_map": "average"}, {"lora": 4}])
def test_mamba_encoder(tiny, expected, settings):
    """Text of every kind of length, an append at another rate and a generated answer: the reference's."""
    model = tiny("gpt_neox", **MAMBA, **settings)
    want, prompt = expected(model), tokens(6, 1)
    for length in LENGTHS:
        ids = tokens(length)
        context = model.compress(one(ids))
        got = model(input_ids=one(prompt), context=context).logits[0]
        torch.testing.assert_close(got, want.logits([ids], prompt), **CLOSE)
    longer = model.compress(one(tokens(21, 2)), rate=8, context=context)
    out = model.generate(one(prompt), context=longer, max_new_tokens=4)
    assert new_tokens(out, 6)[0] == want.greedy([ids, tokens(21, 2)], prompt, 4, [4, 8])


@torch.no_grad()
def test_mamba_states(tiny):
    """The vectors are transformers' own hidden states of each segment: embeddings, each block's output, the last one
    behind the final norm; a segment's first token reaches them all; encode and prefix make what compress makes."""
    model = tiny("gpt_neox", **MAMBA)
    ids = one(tokens(37))
    vectors = model.encode(ids)
    assert isinstance(model.encoder, MambaModel)
    for start, length in ((0, 16), (16, 16), (32, 5)):
        segment = ids[:, start : start + length]
        hidden = model.encoder(input_ids=segment, output_hidden_states=True)
        states = [model.encoder.embeddings(segment), *hidden.hidden_states[:3], hidden.last_hidden_state]
        places = [min(i + 3, length - 1) for i in range(0, length, 4)]
        want = torch.stack(states, 2)[0, places]
        torch.testing.assert_close(vectors.states[0, start // 4 :][: len(places)], want, **CLOSE)
    other = ids.clone()
    other[0, 0] += 1
    changed = (model.encode(other).states - vectors.states)[0, :4, 1:].abs().amax(-1)
    assert changed.min() > 1e-2
    assert same_bits(model.prefix(vectors), model.compress(ids))


def test_mamba_batch_and_training(tiny, expected):
    """Texts of different lengths in one batch, right padding and all: cached and in one training pass each row is the
    reference's of its own."""
    model = tiny("gpt_neox", **MAMBA)
    want = expected(model)
    texts = [tokens(length, length) for length in LENGTHS]
    prompts = [tokens(length, 1) for length in (6, 2, 9, 4, 9)]
    ids, mask = batch(texts)
    prompt_ids, prompt_mask = batch(prompts, "left")
    trained = model(prompt_ids, prompt_mask, context_ids=ids, context_mask=mask).logits
    cached = model(prompt_ids, prompt_mask, context=model.compress(ids, mask, batch_tokens=32)).logits
    for b, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        logits = want.logits([text], prompt)
        torch.testing.assert_close(trained[b, -len(prompt) :], logits, **CLOSE)
        torch.testing.assert_close(cached[b, -len(prompt) :], logits, **CLOSE)


@pytest.mark.parametrize("lora", [0, 4])
def test_mamba_gradients(lora):
    """Every trained parameter of the encoder gets a gradient, LoRA on every block's in_proj and on nothing else; along
    a random direction it is the central difference in float64; recomputing activations does not change it."""
    model = exact_in_float64(make_model("gpt_neox", **MAMBA, lora=lora))
    names = {n for n, p in model.encoder.named_parameters() if p.requires_grad}
    if lora:
        assert names == {f"layers.{i}.mixer.in_proj.lora_{x}.default.weight" for i in range(3) for x in "AB"}
    else:
        assert {n.split(".")[0] for n in names} == {"embeddings", "layers"}
        assert sum(n.endswith("A_log") for n in names) == 3  # the last block reaches no loss
    found = {k: None if g is None else g.clone() for k, g in gradients(model, tokens, batch).items()}
    for name, gradient in found.items():
        trained = model.get_parameter(name).requires_grad
        assert trained == (gradient is not None and bool(gradient.abs().max() > 0)), name

    ids, mask = batch([tokens(37), tokens(21, 1)])
    target = one(tokens(9, 2)).expand(2, -1)

    def loss() -> float:
        logits = model(input_ids=target, context_ids=ids, context_mask=mask).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()).item()

    generator = torch.Generator().manual_seed(0)
    parameters = [model.encoder.get_parameter(n) for n in sorted(names)]
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((found[f"encoder.{n}"] * d).sum()) for n, d in zip(sorted(names), direction, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            values.append(loss())
        for p, d in zip(parameters, direction, strict=True):
            p.add_(d, alpha=1e-5)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-3)

    model.train().gradient_checkpointing_enable()
    for name, gradient in gradients(model, tokens, batch).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, found[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mamba_bfloat16(expected):
    """In bfloat16, where Mamba's blocks hand on float32, logits stay within rounding of the float32 reference."""
    model = make_model("gpt_neox", **MAMBA, dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    for length in LENGTHS:
        prompt = tokens(20, length)
        got = model(input_ids=one(prompt), context=model.compress(one(tokens(length)))).logits[0].float()
        want = expected(exact).logits([tokens(length)], prompt)
        assert torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1] > 0.99
    assert same_bits(model.prefix(model.encode(one(tokens(37)))), model.compress(one(tokens(37))))


@pytest.mark.parametrize("lora", [0, 4])
def test_mamba_save_and_load(backbone, tmp_path, lora):
    """Saved and loaded from folders it is the same model; an attention implementation concerns the decoder only; a
    segment may be longer than the decoder's window."""
    backbone("mamba", layers=4, hidden=32).save_pretrained(tmp_path / "mamba")
    backbone("gpt_neox").save_pretrained(tmp_path / "neox")
    config = RCCConfig(segment_length=1024, rates=[4], encoder_lora_rank=lora)
    sides = tmp_path / "mamba", tmp_path / "neox"
    model = randomise(RCCForCausalLM.from_base(*sides, config=config, attn_implementation="eager"))
    model.save_pretrained(tmp_path / "model")
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert loaded.decoder.config._attn_implementation == "eager"
    assert_same_model(model, loaded, tokens)
    sdpa = RCCForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    assert sdpa.decoder.config._attn_implementation == "sdpa"
    given = [AutoModelForCausalLM.from_pretrained(side) for side in sides]
    assert RCCForCausalLM.from_base(*given, config=config, attn_implementation="sdpa").encoder.config.hidden_size == 32


def test_nothing_is_captured_outside_a_pass(tiny, monkeypatch):
    """The encoder by itself runs as ever, also after a pass that was cut short or failed."""
    model = tiny("gpt_neox", **MAMBA)
    model.compress(one(tokens(20)))
    assert rcc.encoder._capture.get() is None
    monkeypatch.setattr(rcc.encoder._Capture, "take", lambda *_: pytest.fail("captured"))
    model.encoder(input_ids=one(tokens(20)))
    monkeypatch.setattr(rcc.encoder._Capture, "take", lambda *_: {}["fails"])
    with pytest.raises(KeyError):
        model.compress(one(tokens(20)))
    assert rcc.encoder._capture.get() is None


def test_every_listed_family_is_tested():
    """A family in the table is one of those that the tests run on."""
    assert set(rcc.backbones.BLOCKS) == set(conftest.SHAPES)
