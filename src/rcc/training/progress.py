"""What a run says: `log.jsonl` for programs, a progress bar or lines for people."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from ..errors import FileError
from ..runtime import atomic
from ..runtime.terminal import Console, shown
from .recipe import Recipe

if TYPE_CHECKING:
    from .trainer import StageTrainer

LINE_SECONDS = 30
"""Between two lines of progress where there is no terminal to draw a bar on."""


class Log:
    """`log.jsonl`: one JSON object a line, for every step and every measurement, in order; None writes nowhere."""

    def __init__(self, path: Path | None):
        self.path = path

    def write(self, row: dict[str, Any]) -> None:
        """Append a row.

        Raises:
            FileError: the log cannot be written.
        """
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise FileError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def rewind(self, stage: str, step: int) -> None:
        """Forget what a stage wrote after a step: it will be done again. Other stages' lines stay.

        Raises:
            FileError: the log cannot be read or written.
        """
        if self.path is None or not self.path.exists():
            return
        lines = []
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # the last line of a killed process
                if not (isinstance(row, dict) and "stage" in row and isinstance(row.get("step"), int)):
                    continue  # no line of ours
                if row["stage"] != stage or row["step"] < step or (row["step"] == step and step > 0):
                    lines.append(line + "\n")
            atomic.write_text(self.path, "".join(lines))
        except OSError as error:
            raise FileError(f"{self.path} cannot be rewritten: {error.strerror or error}.") from error


class Progress:
    """A bar with loss, speed and time left on a terminal, a line now and then elsewhere; on standard error."""

    def __init__(self, recipe: Recipe, quiet: bool = False):
        self.recipe, self.quiet = recipe, quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[state]}")
        self.bar = Bar(*columns, console=self.console, transient=True, disable=quiet or not sys.stderr.isatty())
        self.task: Any = None
        self.last = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print one line that stays."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def _say_now_and_then(self, text: str, at_once: bool = False) -> None:
        """Print a line where there is no bar to draw, if the last one is some time ago."""
        now = time.perf_counter()
        if self.bar.disable and (at_once or now - self.last >= LINE_SECONDS):
            self.last = now
            self.say(text)

    def phase(self, text: str) -> None:
        """Show what is being done before the first step, for as long as it is done."""
        if self.bar.disable:
            self._say_now_and_then(text)
        elif self.task is None:
            self.task = self.bar.add_task(shown(text), total=None, state="")
        else:
            self.bar.update(self.task, description=shown(text))

    def start(self, trainer: StageTrainer) -> None:
        """Show that a stage begins, or goes on."""
        stages = self.recipe.stages
        name = shown(f"stage {trainer.number + 1}/{len(stages)} {trainer.stage.name}")
        if trainer.state.global_step:
            self.say(f"{name}: going on at step {trainer.state.global_step:,}")
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(name, total=1.0, state="")
        self.name, self.begun, self.before = name, time.perf_counter(), (trainer.tokens, trainer.spent)

    def measuring(self, done: int, count: int) -> None:
        """Show how many of the kinds of held-out samples are measured."""
        state = f"held-out samples, {done} of {count} kinds"
        self.bar.update(self.task, state=state)
        if done < count:
            self._say_now_and_then(f"{self.name}: {state}")

    def update(self, trainer: StageTrainer, logs: dict[str, float]) -> None:
        """Show how far a stage is."""
        part = trainer.part(trainer.state.global_step)
        tokens, spent = trainer.tokens - self.before[0], trainer.spent - self.before[1]
        left = timedelta(seconds=round(trainer.spent / part * max(0.0, 1 - part))) if part else "?"
        state = (
            f"step {trainer.state.global_step:,}, {trainer.tokens / 1e6:.2f}M tokens, loss {logs['loss']:.3f},"
            f" {tokens / max(spent, 1e-9):,.0f} tokens/s, {left} left"
        )
        self.bar.update(self.task, completed=part, state=state)
        self._say_now_and_then(f"{self.name}: {state}", at_once=part >= 1)

    def saved(self, trainer: StageTrainer) -> None:
        """Show that a checkpoint has been written."""
        if not self.bar.disable:
            self.say(f"{self.name}: checkpoint at step {trainer.state.global_step:,}")
