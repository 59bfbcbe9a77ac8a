"""LongBench's metrics, by hand."""

from __future__ import annotations

import pytest

from rcc.evaluation.qa.longbench import METRICS


@pytest.mark.parametrize(
    ("metric", "written", "answers", "classes", "value"),
    [
        ("f1", "The red fox!", ["a red fox"], [], 1.0),
        ("f1", "red fox jumps", ["red fox", "dog"], [], 0.8),  # precision 2/3, recall 1
        ("f1", "", ["fox"], [], 0.0),
        ("f1_first_line", "\nfox\nor a dog", ["fox"], [], 1.0),
        ("f1_first_line", "fox or dog", ["fox"], [], 0.5),  # precision 1/3, recall 1
        ("rouge_l", "the cat sat", ["the cat sat down", "no"], [], 6 / 7),  # 3 of 3, 3 of 4
        ("rouge_l_first_line", "the cat\nsat", ["the cat sat down"], [], 2 / 3),  # 2 of 2, 2 of 4
        ("classification", "It is a City or a Country", ["City"], ["City", "Country", "Date"], 0.5),
        # "Number" is only a part of "Number of something": it does not count against it
        ("classification", "Number of something", ["Number of something"], ["Number", "Number of something"], 1.0),
        ("classification", "Date", ["City"], ["City", "Date"], 0.0),
        ("count", "There are 7, no, 8 of 8", ["8"], [], 2 / 3),
        ("count", "none", ["8"], [], 0.0),
        ("retrieval", "Paragraph 12 or 3", ["Paragraph 12"], [], 0.5),
        ("retrieval", "I do not know", ["Paragraph 12"], [], 0.0),
    ],
)
def test_metrics_of_longbench(metric: str, written: str, answers: list[str], classes: list[str], value: float) -> None:
    assert METRICS[metric](written, answers, classes) == pytest.approx(value)
