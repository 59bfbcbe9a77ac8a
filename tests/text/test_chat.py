"""The chat form is read out of a tokenizer's template, and put around questions as the template would."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

import rcc
from rcc import InputError, ModelError
from rcc.text import prompting
from rcc.text.chat import CHATML, chat_form
from word_tokens import word_tokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
"""In the manner of Llama 3."""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
"""In the manner of Mistral, which has no system message."""


def with_template(template: str, marks: list[str], **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": marks, **tokens})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ["rcc-smollm2-135m"])
def test_the_shipped_bases_have_the_shipped_form(name: str) -> None:
    """Their template gives the very header, turn and end mark that the RCC models were trained with."""
    form = chat_form(rcc.load_tokenizer(name))
    assert form == CHATML


def test_a_template_in_the_manner_of_llama() -> None:
    form = chat_form(
        with_template(LLAMA, ["<|start|>", "<|end|>", "<|eot|>"], bos_token="<|begin|>", eos_token="<|eot|>")
    )
    system = f"<|begin|><|start|>system<|end|>\n\n{prompting.SYSTEM}<|eot|>"
    assert form.header == f"{system}<|start|>user<|end|>\n\n"
    assert form.turn == "<|eot|><|start|>assistant<|end|>\n\n"
    assert form.following == "<|eot|><|start|>user<|end|>\n\n"
    assert form.ends == ("<|eot|>",)


def test_a_template_without_a_system_message() -> None:
    form = chat_form(with_template(MISTRAL, ["[INST]", "[/INST]"], bos_token="<s>", eos_token="</s>"))
    assert (form.header, form.turn, form.following) == ("<s>[INST] ", " [/INST]", "</s>[INST] ")
    assert form.ends == ("</s>",)


def test_a_talk_is_what_the_template_makes_of_it() -> None:
    """Header, text, and a prompt with a history are the template's rendering of the same messages."""
    tokenizer = with_template(LLAMA, ["<|start|>", "<|end|>", "<|eot|>"], bos_token="<|begin|>", eos_token="<|eot|>")
    form = chat_form(tokenizer)
    prompt = form.prompt(prompting.with_hint(" Why? ", "Briefly."), [("Who?", "Susan.")])
    talk = [
        {"role": "system", "content": prompting.SYSTEM},
        {"role": "user", "content": "A text.\n\nWho?"},
        {"role": "assistant", "content": "Susan."},
        {"role": "user", "content": "Why? Briefly."},
    ]
    whole = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert f"{form.header}A text.{prompt.decoder_text}" == whole
    assert [part.text for part in prompt.decoder_parts if part.given] == ["Who?", "Susan.", "Why? Briefly."]
    assert prompt.parse(" Because.<|eot|>and more") == (None, "Because.")
    with pytest.raises(InputError, match="question is empty"):
        form.prompt(" ")
    alone = tokenizer.apply_chat_template(
        [talk[0], {"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert form.first(prompting.with_hint(" Why? ", "")).decoder_text == alone


def test_without_a_template() -> None:
    """ChatML where its marks are known; else plain words, an answer ending with its line."""
    tokenizer = word_tokenizer()
    form = chat_form(tokenizer)
    assert (form.header, form.turn, form.ends) == ("Text:\n", "\nAnswer:", ("\n",))
    assert form.prompt("Who?").parse("\n Susan.\nQuestion: no") == (None, "Susan.")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert chat_form(tokenizer) == CHATML


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ nothing.at_all() }}", "cannot be rendered"),
        ("{{ messages[0]['content'] }}", "does not show"),
        ("{% for", "cannot be rendered"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
    ],
)
def test_a_bad_template_is_refused(template: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        chat_form(with_template(template, []))
