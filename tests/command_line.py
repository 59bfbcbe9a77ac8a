"""`rcc` as a user runs it: processes with pipes or on a terminal, their output and exit codes."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

RCC = [sys.executable, "-m", "rcc"]
LIMIT = 240  # seconds a process may take; other tests may be running beside it


@dataclass
class Result:
    code: int
    out: str
    err: str

    def ok(self) -> Result:
        assert self.code == 0, self.err
        return self

    def refused(self, *words: str) -> str:
        """One sentence on standard error, exit code 2, no output, no traceback; it says all of `words`."""
        assert self.code == 2, self
        assert self.out == ""
        assert re.fullmatch(r"rcc: [^\n]+\.\n", self.err), self.err
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err
        return self.err


def environment(**more: str) -> dict[str, str]:
    drop = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "RCC_VERBOSE", "PYTHONIOENCODING")
    # OpenMP's threads otherwise spin while they wait, which costs minutes where other tests want the same cores
    quiet = {"TERM": "xterm", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    return {k: v for k, v in os.environ.items() if k not in drop} | quiet | more


def process(*args: Any, stdin: bytes = b"", **env: str) -> Result:
    """`rcc …` with pipes."""
    done = subprocess.run(
        [*RCC, *map(os.fspath, args)], input=stdin, capture_output=True, timeout=LIMIT, env=environment(**env)
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


class Terminal:
    """`rcc …` on a terminal of 100 columns."""

    def __init__(self, *args: Any) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(environment(COLUMNS="100", LINES="30"))
            os.execv(RCC[0], [*RCC, *map(os.fspath, args)])
        self.screen = ""

    def read(self, seconds: float = 0.2) -> bool:
        """Take in what has been written; False at the end."""
        if select.select([self.fd], [], [], seconds)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # how Linux says that the other side is closed
                return False
            self.screen += data.decode(errors="replace")
            return bool(data)
        return True

    def wait_for(self, pattern: str) -> str:
        end = time.monotonic() + LIMIT
        while not (match := re.search(pattern, self.screen)):
            assert self.read(), f"ended without {pattern}: {self.screen[-500:]}"
            assert time.monotonic() < end, f"no {pattern} in time: {self.screen[-500:]}"
        return match[0]

    def type(self, text: str) -> None:
        self.screen = ""
        os.write(self.fd, text.encode())

    def end(self, keys: str = "") -> int:
        """→ the exit status; `keys` are typed every five seconds until then."""
        stop, pressed = time.monotonic() + LIMIT, 0.0
        while self.read():
            assert time.monotonic() < stop, self.screen[-500:]
            if keys and time.monotonic() > pressed + 5:
                os.write(self.fd, keys.encode())
                pressed = time.monotonic()
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def text(self) -> str:
        """What was written, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.screen)
