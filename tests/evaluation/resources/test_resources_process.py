"""What goes wrong in a process that measures one thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rcc import ModelError
from rcc.evaluation.resources import process as resources_process
from rcc.evaluation.resources.process import Job
from rcc.evaluation.results import Skipped
from rcc.runtime import allocator


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_what_goes_wrong_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies leaves a cell out; what rcc refuses stays refused."""
    monkeypatch.setattr(allocator, "configure", lambda: True)
    np.save(tmp_path / "ids.npy", np.ones(64, dtype=np.int32))
    job = Job("unknown", "./nowhere", tmp_path / "ids.npy", tmp_path / "c", 64, 4, 8, "cpu", None, None)
    with pytest.raises(Skipped, match="ended with code 1"):
        resources_process.measure(job)
    sent: list[Any] = []
    sender = SimpleNamespace(send=sent.append)
    resources_process._run(replace(job, task="compress"), sender)  # type: ignore[arg-type]
    monkeypatch.setitem(resources_process.TASKS, "compress", lambda job: torch.empty(2**60))
    resources_process._run(replace(job, task="compress"), sender)  # type: ignore[arg-type]
    assert [type(error) for error in sent] == [ModelError, Skipped]
