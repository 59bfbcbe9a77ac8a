"""One page of any number of evaluations: charts, tables, and the samples of every figure (`rcc report`).

`page.html` is the page's form. Nothing of the page is fetched from anywhere, and no script runs in it but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from ...errors import FileError, InputError, RCCError, brief
from ...runtime import atomic
from .chapters import CHAPTERS, Chapter
from .folders import Finished, SampleLists, read
from .groups import ChartGroup
from .tables import Table, table


@dataclass
class Section:
    """All folders of one kind; tables by the folder's name."""

    task: str
    title: str
    lead: str
    runs: list[Finished]
    groups: list[ChartGroup]
    tables: dict[str, list[Table]]


def page(folders: Sequence[Path], limit: int = 50) -> str:
    """Return the HTML of a page.

    Args:
        folders: that `rcc eval` wrote.
        limit: samples that the page holds of each figure, at most.

    Raises:
        InputError: one of them holds no finished evaluation, or is named twice.
    """
    try:
        return _page(folders, limit)
    except RCCError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, jinja2.TemplateError) as error:
        names = ", ".join(map(str, folders))
        raise InputError(f"{names}: no readable evaluation ({brief(error)}): make it again.") from error


def _page(folders: Sequence[Path], limit: int) -> str:
    runs, samples = read(folders), SampleLists(limit)
    measured = dict.fromkeys(run.task for run in runs)
    tasks = [*(task for task in CHAPTERS if task in measured), *(task for task in measured if task not in CHAPTERS)]
    sections = [_section(task, [run for run in runs if run.task == task], samples) for task in tasks]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # keys in their order
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    embedded = {"rows": samples.rows, "lists": samples.lists}
    return environment.get_template("page.html").render(sections=sections, samples=embedded, limit=limit)


def _section(task: str, runs: list[Finished], samples: SampleLists) -> Section:
    for number, run in enumerate(runs if len(runs) > 1 else []):
        run.number, run.letter = number, chr(ord("A") + number) if number < 26 else str(number + 1)
    known = CHAPTERS.get(task, Chapter(task, "", lambda runs, samples: iter(())))
    groups = [group for group in known.groups(runs, samples) if group.main or group.heat or any(group.charts)]
    tables = {run.name: [table(run, name, samples) for name in run.groupings] for run in runs}
    return Section(task, known.title, known.lead, runs, groups, tables)


def write(path: Path, html: str, replace: bool = True) -> None:
    """Write the page, whole or not at all.

    Raises:
        ExistsError: it exists, and is not to be replaced. FileError: it cannot be written.
    """
    try:
        atomic.write_text(path, html, replace)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}.") from error
