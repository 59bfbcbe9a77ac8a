"""Options of tasks, and samples shown to people."""

from __future__ import annotations

from typing import Any

import pytest

from rcc.errors import InputError
from rcc.text import prompting
from rcc.training.tasks import TASKS, Reconstruction
from rcc.training.tasks.base import describe
from task_samples import (
    PROSE,
    ROWS,
    TOKENIZER,
    only,
    row_of,
    sampled,
)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("reconstruction", {"prompt_tokens": 0}),
        ("reconstruction", {"prompt_tokens": 1.5}),
        ("continuation", {"share": 0}),
        ("passkey", {"share": float("nan")}),
        ("instruction", {"share": True}),
        ("instruction", {"modes": {"humane": 1}}),
        ("instruction", {"modes": {"human": 0}}),
        ("instruction", {"modes": {"human": -1, "compress": 2}}),
        ("instruction", {"before": 1.1}),
        ("instruction", {"own_segment": "often"}),
        ("instruction", {"distractors": -0.1}),
        ("instruction", {"unanswerable": None}),
        ("instruction", {"turns": 0}),
        ("instruction", {"quoted": 2}),
        ("instruction", {"renamed": -1}),
        ("cloze", {"renamed": 0.5}),
        ("reconstruction", {"spans": 0}),
        ("reconstruction", {"wrong": 1.1}),
        ("reconstruction", {"repeated": 2}),
        ("cloze", {"worded": 1.5}),
    ],
)
def test_options_that_cannot_be_used_are_named(task: str, options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(InputError, match=rf"^tasks\.{task}\.{key} must be .*, not .*\.$"):
        TASKS[task](**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="promt_tokens"):
        TASKS["reconstruction"](promt_tokens=3)  # type: ignore[call-arg]
    assert {name: (task.name, task.reads) for name, task in TASKS.items()} == {
        "reconstruction": ("reconstruction", "text"),
        "continuation": ("continuation", "text"),
        "instruction": ("instruction", "questions"),
        "cloze": ("cloze", "text"),
        "passkey": ("passkey", None),
    }


def test_describe() -> None:
    text = describe(
        sampled(only("compress", own_segment=1.0, before=0.0, distractors=1.0), row_of(*ROWS[0])), TOKENIZER
    )
    assert "instruction" in text
    assert " […] " in text
    assert r"'\n\nWhere did Ada go?'" in text
    assert "prompt (2 tokens): 'Answer:'" in text
    assert f"'Paris{prompting.END}'" in text
    assert "[…]" not in describe(sampled(Reconstruction(), PROSE[:50]), TOKENIZER)
