"""What the methods keep of a text."""

from __future__ import annotations

import torch

from rcc.evaluation.qa.methods.plain_text import ends
from rcc.evaluation.qa.methods.retrieved import ranked


def test_ends_and_ranking() -> None:
    assert ends(torch.arange(10), 5).tolist() == [0, 1, 2, 8, 9]
    assert ends(torch.arange(10), 1).tolist() == [0]
    assert ends(torch.arange(3), 5).tolist() == [0, 1, 2]
    passages = ["the cat sat on the mat", "a lighthouse was built", "of the and"]
    assert ranked(passages, "Who built the lighthouse?")[0] == 1
    assert ranked(passages, "the of") == [0, 1, 2]  # nothing but stop words
