"""The trainer's model against transformers' own modules: same loss, same gradients; untrained at 1x it is the base.

pytest research/gpu/test_gpu.py
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import model as M
from reference import Reference

RATES, SINK, SEGMENT = [1, 4, 8], 7, 32


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=192,
        vocab_size=300,
        rope_theta=1e6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    base = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for q in base.parameters():
        torch.nn.init.normal_(q, std=0.08) if q.ndim > 1 else torch.nn.init.normal_(q, mean=1.0, std=0.1)
    return base


def ours(base):
    return M.RCC(
        {k: v.detach() for k, v in base.state_dict().items() if k != "lm_head.weight"},
        M.Shape(128, 4, 2, 1, 64, 192),
        RATES,
        SINK,
        rank=4,
    )


def batch(rows, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 300, (rows, tokens), generator=g), torch.randint(0, 300, (rows, 21), generator=g)


def targets(x, asked=7):
    """Places with a target, what follows there, weights."""
    w = torch.zeros_like(x[:, 1:], dtype=torch.float32)
    w[:, asked:] = torch.rand(w[:, asked:].shape) + 0.1
    at = w.flatten().nonzero()[:, 0]
    return at, x[:, 1:].flatten()[at], w.flatten()[at]


def test_untrained_at_1x_reads_as_the_base_does(base):
    net, (ids, x) = ours(base), batch(2, SEGMENT, 1)
    h = net.decode(net.encode(ids.view(2, 1, SEGMENT), 1), x)
    plain = base.model(torch.cat([torch.full((2, 1), SINK), ids, x], 1)).last_hidden_state[:, 1 + SEGMENT :]
    assert (h - plain).abs().max() < 2e-4


@pytest.mark.parametrize("rate", [4, 8, [8, 1]])
def test_same_loss_and_gradients(base, rate):
    net, (ids, x) = ours(base), batch(2, 2 * SEGMENT, 3)
    net.load({k: torch.randn_like(v) * 0.1 for k, v in net.state(torch.float32).items()})
    at, y, w = targets(x)
    loss, _ = net(ids.view(2, 2, SEGMENT), rate, x[:, :-1], at, y, w, chunk=8)
    loss.backward()
    state = {k: v.requires_grad_() for k, v in net.state(torch.float32).items()}
    theirs = Reference(base, state, RATES, SINK, SEGMENT)
    lp = torch.stack(
        [theirs.logits(theirs.decoder, x[b, :-1].tolist(), theirs.compress(ids[b].tolist(), rate)) for b in range(2)]
    ).log_softmax(-1)
    expected = -(lp.flatten(0, 1)[at, y] * w).sum() / w.sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    mine = gradients(net)
    assert len(state) > 60
    assert set(mine) == set(state)
    for name, v in state.items():
        g = torch.zeros_like(v) if v.grad is None else v.grad
        assert (g - mine[name]).abs().max() < 1e-4 * max(1.0, g.abs().max().item()), name


def gradients(net):
    """Every learnt tensor's gradient by its own name.

    `tensors` gives views, so the gradients take the parameters' place for a moment."""
    old = {q: q.data for q in net.parameters()}
    for q in old:
        q.data = torch.zeros_like(q) if q.grad is None else q.grad
    out = {k: v.detach().clone() for k, v in net.tensors()}
    for q, data in old.items():
        q.data = data
    return out


def test_state_round_trip(base):
    net = ours(base)
    s = {k: torch.randn_like(v) for k, v in net.state(torch.float32).items()}
    net.load(s)
    assert all(torch.equal(s[k], v) for k, v in net.state(torch.float32).items())


def test_exact_reads_after_the_sink(base):
    net, (_, x) = ours(base), batch(2, SEGMENT, 1)
    net.load({k: torch.randn_like(v) * 0.1 for k, v in net.state(torch.float32).items()})
    theirs = Reference(base, net.state(torch.float32), RATES, SINK, SEGMENT)
    mine = net.decode(net.encode(torch.zeros(2, 0, SEGMENT, dtype=torch.long), 1), x)[1] @ net.embed.t()
    with torch.no_grad():
        assert (mine - theirs.logits(theirs.decoder, x[1].tolist(), theirs.sink_cache())).abs().max() < 1e-3


def test_a_share_of_the_exact_reading_enters_the_gradient(base):
    net, (ids, x) = ours(base), batch(2, 2 * SEGMENT, 6)
    ids = ids.view(2, 2, SEGMENT)
    at, y, w = targets(x)
    x = x[:, :-1]
    net(ids, 4, x, at, y, w, chunk=16, share=0.4)[0].backward()
    got = {name: q.grad.clone() for name, q in net.named_parameters() if q.grad is not None}
    net.zero_grad()
    wanted = 0.4 * torch.softmax(net.exact(ids, x, at) @ net.embed.t(), -1)
    wanted[torch.arange(len(y)), y] += 0.6
    logits = net.decode(net.encode(ids, 4), x).flatten(0, 1)[at] @ net.embed.t()
    (-(wanted * torch.log_softmax(logits, -1)).sum(-1) * w / w.sum()).sum().backward()
    assert got
    for name, q in net.named_parameters():
        if name in got:
            assert torch.allclose(got[name], q.grad, atol=1e-5, rtol=1e-3), name
