"""What a prompt is put together of; without torch, so that a bad question is refused before it is imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptPart:
    """A part of a prompt.

    Attributes:
        text: its characters.
        given: whether a user, a document or a model wrote it, rather than the chat form.
    """

    text: str
    given: bool = False
