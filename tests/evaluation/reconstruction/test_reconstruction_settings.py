"""What a reconstruction asks of a document: the paper's protocol, and others in proportion."""

from __future__ import annotations

from dataclasses import replace

from rcc.evaluation.reconstruction.settings import ReconstructionSettings


def test_the_papers_protocol() -> None:
    """At 2,048 tokens it is the paper's: five prompts 300 apart, 500 tokens after each; others in proportion."""
    protocol = ReconstructionSettings(rates=[32], lengths=[2048])
    assert protocol.spans(2048) == [(start, start + 510) for start in (0, 300, 600, 900, 1200)]
    assert protocol.spans(512) == [(start, start + 135) for start in (0, 75, 150, 225, 300)]
    assert protocol.spans(8192)[-1] == (4800, 4800 + 510)  # not more than the paper's
    assert replace(protocol, prompts=1).starts(2048) == [0]
    assert replace(protocol, target_tokens=300).spans(512)[-1] == (300, 512)  # the text ends
