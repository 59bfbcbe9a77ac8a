"""Selections of models that accelerate has placed: here on the one device that there is, with its hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from command_line import Result
from conftest import make_model
from rcc import Engine, InputError, ModelError
from rcc.model.selection.selection import Selection
from word_tokens import word_tokenizer


@pytest.fixture
def folder(backbone: Any, tmp_path: Path) -> Path:
    backbone("llama", window=256).save_pretrained(tmp_path / "tiny")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w90 {{ m['role'] }} w91 {{ m['content'] }} w92 {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def written(model: Selection) -> tuple[list[torch.Tensor], list[int]]:
    """What a model keeps of a text in several chunks, and what it writes after that."""
    context = model.compress(torch.arange(5, 60)[None], rate=4)
    out = model.generate(torch.tensor([[7, 8]]), context=context, max_new_tokens=4, do_sample=False)
    return [entries for i in range(3) for entries in context.layer(i)], out[0].tolist()


def test_a_device_map_changes_nothing(folder: Path) -> None:
    want, answer = written(Selection.from_pretrained(folder, "tiny", chunk_length=20))
    for where in ({"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"device": "cpu"}):
        kept, again = written(Selection.from_pretrained(folder, "tiny", chunk_length=20, **where))
        assert again == answer
        assert all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))


def test_accelerates_hooks_change_nothing(backbone: Any) -> None:
    """They stand around every module of a model on several devices, and the copy that reads has its own."""
    plain, hooked = backbone("qwen2"), backbone("qwen2")
    places = {name: "cpu" for name, module in hooked.named_modules() if not list(module.children())}
    dispatch_model(hooked, places, main_device="cpu", force_hooks=True)
    model = Selection(hooked, word_tokenizer(), "tiny", chunk_length=20)
    reading: Any = model.reader.body.get_submodule("layers.0.self_attn.q_proj")
    assert reading._hf_hook is not hooked.get_submodule("model.layers.0.self_attn.q_proj")._hf_hook
    assert reading.forward.args[0] is reading
    kept, answer = written(model)
    want, again = written(Selection(plain, word_tokenizer(), "tiny", chunk_length=20))
    assert answer == again
    assert all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ModelError, match="does not fit into the GPUs' memory"):
        Selection.from_pretrained(
            folder, "tiny", device_map={**places, "model.rotary_emb": "cpu"}, offload_folder=tmp_path
        )


def test_all_gpus_on_the_command_line(call: Any, folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "text.rcc"
    text.write_text("w7 w8 w9 " * 10)
    result: Result = call("compress", text, "-o", out, "--model", folder, "--rate", 2, "--device", "auto")
    result.ok()
    asked = [
        call("ask", out, "w7", "--model", folder, "--max-new-tokens", 3, *more).ok().out
        for more in ((), ("--device", "auto"))
    ]
    assert asked[0] == asked[1]
    make_model(name="ours").save_pretrained(tmp_path / "ours")
    with pytest.raises(InputError, match="device auto is for selections"):
        Engine.load(tmp_path / "ours", device="auto")
