"""LongBench's English tasks (arXiv 2308.14508): how each asks, how long answers may be, and its metric.

The instructions, lengths and metrics are those of its published evaluation, so that figures can be compared. It puts a
task's instruction before and after the text; a compressed text is asked with what comes after. Its sets of code and in
Chinese are not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..metrics import f1, rouge_l


@dataclass(frozen=True)
class LongBenchTask:
    """A set of LongBench.

    Attributes:
        prompt: the instruction after the text, with a place for `{input}`.
        metric: a name in :data:`METRICS`.
        tokens: of an answer, at most.
    """

    prompt: str
    metric: str
    tokens: int


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    "\n\nQuestion: {input}\nAnswer:"
)
_PAPER = (
    "Answer the question based on the above article as concisely as you can, using a single phrase or sentence if"
    " possible. If the question cannot be answered based on the information in the article, write"
    ' "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide'
    " any explanation.\n\nQuestion: {input}\n\nAnswer:"
)
_STORY = (
    "Now, answer the question based on the story as concisely as you can, using a single phrase if possible. Do not"
    " provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
)
_FIELDS = (
    "Now, answer the following question based on the above text, only give me the answer and do not output any other"
    " words.\n\nQuestion: {input}\nAnswer:"
)
_COUNT = (
    "Please enter the final count of unique paragraphs after removing duplicates. The output format should only"
    " contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "
)
_RETRIEVE = (
    "The following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from."
    ' The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
)
TASKS = {
    "narrativeqa": LongBenchTask(_STORY, "f1", 128),
    "qasper": LongBenchTask(_PAPER, "f1", 128),
    "multifieldqa_en": LongBenchTask(_FIELDS, "f1", 64),
    "hotpotqa": LongBenchTask(_PASSAGES, "f1", 32),
    "2wikimqa": LongBenchTask(_PASSAGES, "f1", 32),
    "musique": LongBenchTask(_PASSAGES, "f1", 32),
    "triviaqa": LongBenchTask("{input}", "f1_first_line", 32),
    "gov_report": LongBenchTask("Now, write a one-page summary of the report.\n\nSummary:", "rouge_l", 512),
    "qmsum": LongBenchTask(
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
        "rouge_l",
        512,
    ),
    "multi_news": LongBenchTask("Now, write a one-page summary of all the news.\n\nSummary:", "rouge_l", 512),
    "samsum": LongBenchTask("{input}", "rouge_l_first_line", 128),
    "trec": LongBenchTask("{input}", "classification", 64),
    "passage_count": LongBenchTask(_COUNT, "count", 32),
    "passage_retrieval_en": LongBenchTask(_RETRIEVE, "retrieval", 32),
}


def first_line(written: str) -> str:
    """Return the first line that is not empty."""
    return written.lstrip("\n").split("\n")[0]


def classification(written: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """Return 1 over the number of classes named in the first line, if the right one is among them, else 0.

    A class whose name is only a part of the right one's does not count.
    """
    named = [name for name in classes if name in first_line(written)]
    best = 0.0
    for truth in answers:
        counted = [name for name in named if not (name in truth and name != truth)]
        best = max(best, 1 / len(counted) if truth in counted else 0.0)
    return best


def count(written: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return the share of the numbers written that are the right one."""
    numbers = re.findall(r"\d+", written)
    return max(sum(n == truth for n in numbers) / len(numbers) for truth in answers) if numbers else 0.0


def retrieval(written: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Return the same of the number in "Paragraph 7"."""
    numbers = [match[1] for truth in answers if (match := re.search(r"Paragraph (\d+)", truth))]
    return count(written, numbers) if numbers else 0.0


def best_rouge(written: str, answers: Sequence[str]) -> float:
    """Return the best ROUGE-L against the accepted answers, by rouge-score.

    LongBench's own figures are by another package, `rouge`, and differ in the second digit.
    """
    return max(rouge_l(written, truth) for truth in answers)


METRICS: dict[str, Callable[[str, Sequence[str], Sequence[str]], float]] = {
    "f1": lambda written, answers, classes: f1(written, answers),
    "f1_first_line": lambda written, answers, classes: f1(first_line(written), answers),
    "rouge_l": lambda written, answers, classes: best_rouge(written, answers),
    "rouge_l_first_line": lambda written, answers, classes: best_rouge(first_line(written), answers),
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
}
"""A set's own metric by name: what was written, the accepted answers, the classes → 0 to 1."""
