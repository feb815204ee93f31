"""What the quickstart shows while it works: on a terminal a line that changes, else one every ten seconds.

One idea: every long piece of work is a subprocess whose output goes to a log file; here it is watched, and
its end is either a duration or `RunFailed` with the tail of that log.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 10.0
TAIL_LINES = 25


class RunFailed(RuntimeError):  # noqa: N818
    """A subprocess failed; the message holds its command, status and the tail of its log."""


class StatusLine:
    """Progress on `stream`. `update` replaces the line (terminal) or prints now and then; `say` prints."""

    def __init__(self, stream: TextIO = sys.stdout, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal = stream.isatty()
        self._open = False
        self._printed_at = clock()

    def update(self, text: str) -> None:
        """Show the present state."""
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{text[:width]}")
            self._open = True
        elif self._clock() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._printed_at = self._clock()
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._open else f"{text}\n")
        self._stream.flush()
        self._open = False
        self._printed_at = self._clock()


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    cwd: Path,
    tick: Callable[[float], None],
    environment: Mapping[str, str] | None = None,
) -> float:
    """Run `command` with its output appended to `log`, call `tick(elapsed_seconds)` meanwhile.

    Returns:
        Seconds that the command took.

    Raises:
        RunFailed: it ended with another status than 0.
    """
    started = time.monotonic()
    with open(log, "a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
        )
        try:
            while process.poll() is None:
                tick(time.monotonic() - started)
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        # The launcher reports last and says little; what the program said about itself goes first.
        said = [line for line in lines[:-TAIL_LINES] if line.startswith("error:")][-1:]
        raise RunFailed(
            f"{' '.join(command[:3])} ... ended with status {process.returncode}; the end of {log}:\n"
            + "\n".join(f"    {line}" for line in [*said, *lines[-TAIL_LINES:]])
        )
    return time.monotonic() - started


def clock_time(seconds: float) -> str:
    """Return `m:ss`."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02d}"
