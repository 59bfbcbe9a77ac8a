"""A context of a text and an appended one, and its file: what the tests of contexts look at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import MakeModel, MakeTokens
from rcc import CompressedContext, RCCForCausalLM


@pytest.fixture(scope="session")
def tiny_llama(tiny: MakeModel) -> RCCForCausalLM:
    """The model that made the context; not to be changed."""
    return tiny("llama", name="tiny-llama")


@pytest.fixture(scope="session")
def appended(tiny_llama: RCCForCausalLM, tokens: MakeTokens) -> CompressedContext:
    """An appended text: two pieces at two rates."""
    first = tiny_llama.compress(torch.tensor([tokens(37)]))
    return tiny_llama.compress(torch.tensor([tokens(9, 2)]), rate=2, context=first)


@pytest.fixture(scope="session")
def appended_file(appended: CompressedContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of that context; not to be changed."""
    path = tmp_path_factory.mktemp("context") / "book.rcc"
    appended.save(path)
    return path


def answer(model: RCCForCausalLM, context: CompressedContext, tokens: MakeTokens) -> list[int]:
    return model.generate(torch.tensor([tokens(6, 1)]), context=context, max_new_tokens=6)[0].tolist()
