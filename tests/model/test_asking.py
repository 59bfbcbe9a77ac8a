"""A single row is multiplied as a vector, which changes nothing but the time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from conftest import MakeModel, MakeTokens
from equality import one
from rcc.model.asking import RowLinear


def row_linear(bias: bool, dtype: torch.dtype) -> RowLinear:
    torch.manual_seed(0)
    return RowLinear(96, 200, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products of a matrix and a vector that are made."""
    made: list[str] = []
    for name in ("mv", "addmv"):
        product = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, name=name, product=product: made.append(name) or product(*a))
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (96,)])
def test_a_row_in_bfloat16_is_a_vector(bias: bool, shape: tuple[int, ...], vectors: list[str]) -> None:
    """With the shape of a linear layer's output, and its values to their rounding; also of a strided row."""
    layer = row_linear(bias, torch.bfloat16)
    wide = torch.randn(*shape[:-1], 2 * 96).bfloat16()
    for rows in (wide[..., :96].contiguous(), wide[..., ::2]):
        got = layer(rows)
        want = linear(rows.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())
        assert got.shape == (*shape[:-1], 200)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-3)
    assert vectors == ["addmv" if bias else "mv"] * 2


def test_all_else_is_an_ordinary_product(vectors: list[str]) -> None:
    """Several rows, another precision, and weights or states that learn."""
    layer = row_linear(True, torch.bfloat16)
    rows = torch.randn(2, 96).bfloat16()
    assert torch.equal(layer(rows), linear(rows, layer.weight, layer.bias))
    row_linear(False, torch.float32)(torch.randn(1, 96))
    layer(rows[:1].requires_grad_()).sum().backward()
    row_linear(True, torch.bfloat16).requires_grad_()(torch.randn(1, 96).bfloat16()).sum().backward()
    assert vectors == []


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_a_decoder_writes_so(fresh: MakeModel, tokens: MakeTokens, family: str, vectors: list[str]) -> None:
    """Every linear layer of it for each token after the first, and the head for that too."""
    model = fresh(family).to(torch.bfloat16)
    layers = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)]
    row = [layer for layer in layers if type(layer) is RowLinear]
    context = model.compress(one(tokens(40)))
    vectors.clear()
    seen: list[Tensor] = []
    row[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    model.generate(one(tokens(9)), context=context, max_new_tokens=3, do_sample=False)
    assert [states.shape[1] for states in seen] == [9, 1, 1]
    assert len(vectors) == 1 + 2 * len(row)
