"""`--metrics-file`: one JSON object per line, for programs that compare runs.

One idea: after any number of kills and resumes the file equals the one an uninterrupted run would have
written. So a resume first removes every line past the loaded iteration (their steps are about to be made
again), and the torn last line of a killed process with them; after that, lines are only appended, each
flushed by itself.

Numbers are written so that reading them gives back the same double (Python's shortest such spelling, at
most 17 significant digits). JSON has no NaN or infinity: a non-finite number is written as `null`.

Traps: a run that starts at iteration 0 empties the file, whatever run wrote it. Only one rank, the last,
owns the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from metis.errors import ConfigError

_WHERE = "--metrics-file"


class MetricsFile:
    """Append-only JSON lines of kind `train` (one per iteration), `validation` (one per evaluation) and
    `quantization` (one per layer and operand of a measured iteration).

    `resume_iteration` is the iteration that was loaded, 0 for a new run; without `keep_validation` a
    validation made right at it goes as well, because this job will make it again. keep_later: lines of later
    iterations stay, because this job makes none. The constructor repairs the file and raises ConfigError when
    it cannot be written or holds something that is no metrics file.
    """

    def __init__(
        self,
        path: str | Path,
        resume_iteration: int = 0,
        *,
        keep_validation: bool = True,
        keep_later: bool = False,
    ) -> None:
        self.path = Path(path)
        self._keep_validation, self._keep_later = keep_validation, keep_later
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._truncate(resume_iteration)
            self._stream: TextIOWrapper | None = open(self.path, "a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                _WHERE, f"{path} must be writable, received: {error}; choose another file"
            ) from error

    def _truncate(self, resume_iteration: int) -> None:
        if not self.path.exists():
            return
        lines = self.path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        kept = [
            line
            for number, line in enumerate(lines)
            if self._keep(line, number, len(lines), resume_iteration)
        ]
        if kept != lines:
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
            with open(temporary, "w", encoding="utf-8") as stream:
                stream.writelines(kept)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.path)

    def _keep(self, line: str, number: int, count: int, resume_iteration: int) -> bool:
        torn = number == count - 1 and not line.endswith("\n")
        try:
            values = json.loads(line)
            iteration = int(values["iteration"])
            made_again = (
                not self._keep_validation
                and iteration == resume_iteration
                and values.get("kind") == "validation"
            )
            is_known = self._keep_later or iteration <= resume_iteration
            return not torn and is_known and not made_again
        except (ValueError, KeyError, TypeError) as error:
            if torn:
                return False
            raise ConfigError(
                _WHERE,
                f"{self.path} line {number + 1} must be a JSON object with an iteration, received "
                f"{line[:60]!r}; choose another file",
            ) from error

    def train(
        self,
        *,
        iteration: int,
        lm_loss: float | None,
        grad_norm: float | None,
        learning_rate: float | None,
        consumed_tokens: int,
        tokens_per_second: float,
        step_seconds: float,
    ) -> None:
        """Append the line of one training step; `tokens_per_second` is of all ranks together."""
        self._write(
            kind="train",
            iteration=iteration,
            lm_loss=lm_loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            consumed_tokens=consumed_tokens,
            tokens_per_second=tokens_per_second,
            step_seconds=step_seconds,
        )

    def validation(self, *, iteration: int, validation_loss: float | None) -> None:
        """Append the line of one evaluation, made after `iteration` training steps."""
        self._write(kind="validation", iteration=iteration, validation_loss=validation_loss)

    def quantization(self, *, iteration: int, layer: str, cell: str, metrics: Mapping[str, float]) -> None:
        """Append the line of one operand, measured in training step `iteration`."""
        self._write(kind="quantization", iteration=iteration, layer=layer, cell=cell, **metrics)

    def _write(self, **values: Any) -> None:
        assert self._stream is not None, "the metrics file is closed"
        self._stream.write(
            json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False) + "\n"
        )
        self._stream.flush()

    def close(self) -> None:
        """Close the file; further writes are a programming error."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
