"""The blocks that contexts share: room is used where it is free, and copied where it is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from conftest import MakeExpected, MakeModel, MakeTokens
from equality import CLOSE, new_tokens, one, plain_cache, prompt_logits
from rcc.context.cache import BlockLayer, KVBlocks
from rcc.model.backbones import CACHE


def test_generation_writes_after_the_prefix(
    tiny: MakeModel, tokens: MakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate and forward after compress write into the spare capacity: the block stays where it is and no tensor of
    the prefix's size is made; the prefix itself does not change."""
    model = tiny("llama")
    context = model.compress(one(tokens(64)))
    keys = context.blocks.layers[0][0]
    before = keys[:, :, : len(context)].clone()
    pointers = set()
    monkeypatch.setattr(KVBlocks, "copies", lambda *_: pytest.fail("the prefix was copied"))
    inner = model.decoder.model.layers[0]
    hook = inner.register_forward_pre_hook(
        lambda m, a, k: pointers.add(k[CACHE].layers[0].block[0].data_ptr()), with_kwargs=True
    )
    model.generate(input_ids=one(tokens(6, 1)), context=context, max_new_tokens=9)
    model(input_ids=one(tokens(6, 1)), context=context)
    hook.remove()
    assert pointers == {keys.data_ptr()}
    assert context.blocks.layers[0][0] is keys
    assert torch.equal(keys[:, :, : len(context)], before)
    assert keys[:, :, len(context) : len(context) + 14].abs().min() > 0  # the question and its answer


def test_borrowing(tiny: MakeModel, tokens: MakeTokens) -> None:
    """One borrower writes in place, a second at the same time gets a copy, afterwards it is free again; room that is
    not there is copied; an error inside gives it back."""
    model = tiny("llama")
    context = model.compress(one(tokens(64)))
    own = context.blocks.layers[0][0].data_ptr()

    def address(cache: Cache) -> int:
        return cache.layers[0].block[0].data_ptr()

    with context.borrow(8) as first, context.borrow(8) as second:
        assert address(first) == own
        assert address(second) != own
        assert second.layers[0].capacity >= len(context) + 8
        assert torch.equal(first.layers[0].keys, second.layers[0].keys)
        assert first.get_seq_length() == second.get_seq_length() == len(context)
    with pytest.raises(KeyError), context.borrow(8):
        raise KeyError
    with context.borrow(8) as third:
        assert address(third) == own
    capacity = context.blocks.capacity
    with context.borrow(capacity - len(context)) as all_of_it:
        assert address(all_of_it) == own
    with context.borrow(capacity - len(context) + 1) as too_much:
        assert address(too_much) != own
    child = model.compress(one(tokens(5)), context=context)
    with context.borrow(1) as after_a_child, child.borrow(1) as of_the_child:
        assert address(after_a_child) != own
        assert address(of_the_child) == own
    for other in (context.expand(2), context[0]):
        with other.borrow(1) as copied:
            assert address(copied) != own


def test_an_append_shares_memory(tiny: MakeModel, tokens: MakeTokens) -> None:
    """An append goes into the room after its parent, in the same memory; a second one to the same parent does not."""
    model = tiny("llama")
    parent = model.compress(one(tokens(64)))
    first = model.compress(one(tokens(10)), context=parent)
    second = model.compress(one(tokens(10, 2)), context=parent)
    third = model.compress(one(tokens(10, 3)), context=first)
    start = [c.layer(0)[0].data_ptr() for c in (parent, first, second, third)]
    assert start[0] == start[1] == start[3] != start[2]
    assert torch.equal(parent.layer(2)[1], third.layer(2)[1][:, :, : len(parent)])


def test_a_failed_append_leaves_the_parent_usable(tiny: MakeModel, tokens: MakeTokens, expected: MakeExpected) -> None:
    """An append that breaks off half-way (an error in a progress callback) changes nothing and can be repeated."""
    model = tiny("llama")
    parent = model.compress(one(tokens(20)))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.compress(one(tokens(40, 2)), context=parent, batch_tokens=16, progress=stop)
    child = model.compress(one(tokens(40, 3)), context=parent)
    assert child.layer(0)[0].data_ptr() == parent.layer(0)[0].data_ptr()
    want = expected(model)
    got = prompt_logits(model, child, [5, 6])
    torch.testing.assert_close(got, want.logits([tokens(20), tokens(40, 3)], [5, 6]), **CLOSE)
    got = prompt_logits(model, parent, [5, 6])
    torch.testing.assert_close(got, want.logits([tokens(20)], [5, 6]), **CLOSE)


def test_threads(tiny: MakeModel, tokens: MakeTokens, expected: MakeExpected) -> None:
    """Eight threads ask and append to one context at once: each gets its own reference answer."""
    model = tiny("llama")
    want = expected(model)
    text = tokens(37)
    context = model.compress(one(text))
    prompts = [tokens(5, seed) for seed in range(8)]
    answers = [want.greedy([text], prompt, 4) for prompt in prompts]
    longer = [want.logits([text, prompt], [3]) for prompt in prompts]
    wrong: list[str] = []

    def ask(i: int) -> None:
        try:
            for _ in range(3):
                out = model.generate(input_ids=one(prompts[i]), context=context, max_new_tokens=4)
                if new_tokens(out, 5)[0] != answers[i]:
                    wrong.append(f"answer {i}")
                child = model.compress(one(prompts[i]), context=context)
                if not torch.allclose(prompt_logits(model, child, [3]), longer[i], atol=1e-4, rtol=1e-4):
                    wrong.append(f"append {i}")
        except Exception as error:
            wrong.append(f"{i}: {error!r}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def layers_of_both_kinds() -> tuple[BlockLayer, DynamicLayer]:
    """The block layer and transformers' own, holding the same."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 5, 4, generator=generator) for _ in range(2))
    block, plain = BlockLayer(8), DynamicLayer()
    for layer in (block, plain):
        layer.update(keys.clone(), values.clone())
    return block, plain


ACTIONS: dict[str, Callable[[Any], object]] = {
    "update in place": lambda layer: layer.update(torch.ones(3, 2, 2, 4), torch.ones(3, 2, 2, 4)),
    "update beyond": lambda layer: layer.update(torch.ones(3, 2, 9, 4), torch.ones(3, 2, 9, 4)),
    "crop": lambda layer: layer.crop(-2),
    "crop nothing": lambda layer: layer.crop(0),
    "crop everything": lambda layer: layer.crop(-5),
    "crop more than there is": lambda layer: layer.crop(-7),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_block_layer_behaves_like_dynamic_layer(action: str) -> None:
    """Each operation of a cache layer, then a write, leaves what transformers' own layer would hold."""
    block, plain = layers_of_both_kinds()
    for layer in (block, plain):
        ACTIONS[action](layer)
    assert block.get_seq_length() == plain.get_seq_length()
    assert block.get_mask_sizes(3) == plain.get_mask_sizes(3)
    rows = plain.keys.shape[0] if plain.is_initialized else 3
    if plain.is_initialized and plain.keys.numel():
        assert torch.equal(block.keys, plain.keys)
        assert torch.equal(block.values, plain.values)
    more = torch.full((rows, 2, 3, 4), 7.0)
    for got, want in zip(block.update(more, more), plain.update(more, more), strict=True):
        assert torch.equal(got, want)
    assert block.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("action", ["reorder", "repeat", "select", "crop", "reset"])
def test_empty_block_layer_behaves_like_dynamic_layer(action: str) -> None:
    """The same on a layer that holds nothing yet: nothing happens."""
    block, plain = BlockLayer(8), DynamicLayer()
    for layer in (plain, block):
        ACTIONS[action](layer)
        assert layer.get_seq_length() == 0


def test_block_layer_refuses_what_dynamic_layer_refuses() -> None:
    """A positive crop (the old meaning) would show memory that was never written: it is refused."""
    block, plain = layers_of_both_kinds()
    for layer in (plain, block):
        with pytest.raises(ValueError, match="crop"):
            layer.crop(2)


def test_block_layer_does_not_copy() -> None:
    """Writing within the capacity moves nothing; what is shown is a view of the block."""
    block, _ = layers_of_both_kinds()
    assert block.capacity == 8
    pointer = block.keys.data_ptr()
    keys, values = block.update(torch.ones(3, 2, 3, 4), torch.ones(3, 2, 3, 4))
    assert keys.data_ptr() == pointer
    assert block.values.data_ptr() == values.data_ptr()
    block.crop(-3)
    assert block.keys.data_ptr() == pointer
    block.update(torch.ones(3, 2, 4, 4), torch.ones(3, 2, 4, 4))
    assert block.keys.data_ptr() != pointer
    assert block.capacity > 9


def test_an_ordinary_cache_takes_a_context(tiny: MakeModel, tokens: MakeTokens, expected: MakeExpected) -> None:
    """A context is an ordinary KV cache: transformers' own caches continue from its keys and values."""
    model = tiny("gpt_neox")
    text, prompt = tokens(37), tokens(6, 1)
    context = model.compress(one(text))
    want = expected(model).logits([text], prompt)
    positions = torch.arange(10, 16)[None]
    got = model.decoder(one(prompt), **{CACHE: plain_cache(context)}, position_ids=positions).logits[0]
    torch.testing.assert_close(got, want, **CLOSE)
    static = StaticCache(config=model.decoder.config, max_cache_len=32)
    for i in range(3):
        static.update(*context.layer(i), i)
    mask = torch.ones(1, 16, dtype=torch.long)
    got = model.decoder(one(prompt), **{CACHE: static}, position_ids=positions, attention_mask=mask).logits[0]
    torch.testing.assert_close(got, want, **CLOSE)


def test_the_cache_that_generate_hands_out_is_the_callers(tiny: MakeModel, tokens: MakeTokens) -> None:
    model = tiny()
    context = model.compress(torch.tensor([tokens(40)]), rate=4)
    how: dict[str, Any] = {"context": context, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    configured = {"generation_config": GenerationConfig(return_dict_in_generate=True)}
    for settings in ({"return_dict_in_generate": True}, configured):
        out = model.generate(torch.tensor([tokens(4)]), **settings, **how)
        before = out.past_key_values.layers[0].keys.clone()
        model.generate(torch.tensor([tokens(4, seed=1)]), **how)
        model.compress(torch.tensor([tokens(30)]), rate=4, context=context)
        assert torch.equal(before, out.past_key_values.layers[0].keys)
