"""What a model is trained on: a task turns what was drawn from the sources into a sample.

| task             | the encoder reads            | the decoder's prompt     | the target                     |
|------------------|------------------------------|--------------------------|--------------------------------|
| `reconstruction` | a text                       | the opening of a span    | the rest of the span           |
| `continuation`   | a text                       | the token that follows   | what follows that              |
| `instruction`    | passages and, but in `human` | the form of a question   | the answer, in `reconstruct`   |
|                  | mode, the question           | to a stored context      | after the question             |
| `cloze`          | a text and, but in `human`   | the same                 | the name or number that is     |
|                  | mode, the question           |                          | missing in a sentence of it    |
| `passkey`        | filler around a number       | the question for it      | the number                     |

Samples have exactly the form in which :mod:`rcc.text.prompting` asks. All chance comes from the generator that a
task is given, so a sample is a pure function of it and of what was drawn. A new task is a file with one class, and its
entry in `TASKS`.
"""

from __future__ import annotations

from .base import Task
from .cloze import Cloze
from .continuation import Continuation
from .instruction import Instruction
from .passkey import Passkey
from .reconstruction import Reconstruction

TASKS: dict[str, type[Task]] = {task.name: task for task in (Reconstruction, Continuation, Instruction, Cloze, Passkey)}
"""The tasks by the names that recipes give them."""

__all__ = ["TASKS", "Cloze", "Continuation", "Instruction", "Passkey", "Reconstruction", "Task"]
