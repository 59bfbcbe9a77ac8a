"""The shipped passkey model does what its card says, on few samples (the card has more)."""

from __future__ import annotations

import torch

from rcc import RCCForCausalLM, load_tokenizer
from rcc.evaluation.evaluation import evaluate
from rcc.evaluation.passkey.run import PasskeyEvaluation
from rcc.evaluation.passkey.settings import PasskeySettings
from rcc.runtime.precision import computing

MODEL = "rcc-smollm2-135m-passkey"


def test_it_finds_keys() -> None:
    """In 16 and in 256 vectors of 512 tokens each, and in no text whose key is replaced."""
    model = RCCForCausalLM.from_pretrained(MODEL, dtype=computing(torch.bfloat16, "cpu"))
    settings = PasskeySettings([8192, 131072], rates=[512], keys=2, controls=1)
    measured = evaluate(PasskeyEvaluation(model, load_tokenizer(MODEL), settings))
    right = {
        context: [row["right"] for row in measured.rows if row["key"]["context"] == context]
        for context in ("whole", "replaced")
    }
    assert sum(right["whole"]) >= 11
    assert right["replaced"] == [False] * 6
