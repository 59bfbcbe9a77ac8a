"""How close an answer is to the accepted ones, and a text written back to the original: by hand."""

from __future__ import annotations

import math
import re

import pytest

from rcc.evaluation import metrics


def test_metrics_by_hand() -> None:
    truth = "the cat sat on the mat"
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples
    assert metrics.bleu("the cat sat on a mat", truth) == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert metrics.bleu("the cat sat on", truth) == pytest.approx(math.exp(1 - 6 / 4))  # all right, but short
    assert (metrics.bleu(truth, truth), metrics.bleu("dogs bark", truth)) == (1, 0)
    assert metrics.bleu("the cat", "the cat") == 1  # too short for a quadruple
    assert re.search(r"eff:yes\|tok:13a\|smooth:exp\|version:2", metrics.bleu_settings())
    # in common, in order: the cat on the, of 5 words written and 6 of the truth
    assert metrics.rouge_l("The cat on the dog.", truth) == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert metrics.matching([1, 2, 9, 4], [1, 2, 3, 4]) == (3 / 4, 2)
    assert metrics.matching([1, 2], [1, 2]) == (1, 2)
    assert metrics.matching([9, 2], [1, 2]) == (1 / 2, 0)


def test_exact_match() -> None:
    assert metrics.exact_match("The Eels.", ["electric eels", "eels"]) == 1
    assert metrics.exact_match("the eels swim", ["eels"]) == 0
