"""What the methods keep of a text."""

from __future__ import annotations

import pytest
import torch

import rcc
from conftest import make_backbone, randomise
from rcc import RCCConfig, RCCForCausalLM, SideConfig
from rcc.evaluation.qa import run as qa
from rcc.evaluation.qa.methods.plain_text import ends
from rcc.evaluation.qa.methods.retrieved import ranked
from rcc.evaluation.qa.questions import Question
from rcc.evaluation.qa.settings import SELECTIONS
from rcc.model import answering


def test_ends_and_ranking() -> None:
    assert ends(torch.arange(10), 5).tolist() == [0, 1, 2, 8, 9]
    assert ends(torch.arange(10), 1).tolist() == [0]
    assert ends(torch.arange(3), 5).tolist() == [0, 1, 2]
    passages = ["the cat sat on the mat", "a lighthouse was built", "of the and"]
    assert ranked(passages, "Who built the lighthouse?")[0] == 1
    assert ranked(passages, "the of") == [0, 1, 2]  # nothing but stop words


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_at_1x_is_plain_text(name: str) -> None:
    """It holds pairs of the base, without LoRA; at 4x a fourth of them."""
    tokenizer = rcc.load_tokenizer("rcc-smollm2-135m")
    base = make_backbone("llama", layers=2, window=512, vocab_size=len(tokenizer), eos_token_id=2)
    side = SideConfig(lora_rank=4)
    config = RCCConfig(segment_length=16, rates=[4], encoder=side, decoder=side, share_base=True)
    model = randomise(RCCForCausalLM.from_base(base, config=config))
    question = Question("a/1", "a", "the cat sat on the mat . " * 9, "where is the cat ?", ("on the mat",))
    text = tokenizer(question.context, return_tensors="pt").input_ids[0]
    plain, chosen = qa.make_methods(model, tokenizer, [], ["plain", name], room=64)
    answers = []
    for method in (plain, chosen):
        with method.decoder():
            held = method.hold(text, 1, question)
            answers.append(
                answering.ask(method.model, tokenizer, held.context, method.prompt(question), 6, do_sample=False)
            )
            assert held.positions == len(text)
    assert answers[0] == answers[1]
    assert chosen.hold(text, 4, question).positions == -(-len(text) // 4)
