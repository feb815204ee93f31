"""When a run ends before its last iteration: signals, the `EXIT_NOW` file, a time limit, an iteration
interval.

One idea: ranks decide together. A signal reaches processes at different moments and clocks differ, so every
rank contributes what it has seen to one all-reduce per iteration and all of them act on the same answer.

Order, as in the reference trainer: signal (and `EXIT_NOW`), periodic save, duration, exit interval.
`exit_reason` folds that order into one decision. Traps: torchrun reports failure after SIGTERM even when
every rank saved and left cleanly, so launch scripts should look for `SAVE/EXITED_CLEANLY`, which is removed
at the start and written at the very end; a signal is noticed at the end of a step, not inside one.
"""

from __future__ import annotations

import contextlib
import signal
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

EXIT_NOW = "EXIT_NOW"
EXITED_CLEANLY = "EXITED_CLEANLY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitDecision:
    """What the end of a step asks for: write a checkpoint, and leave with `message` (None: go on)."""

    save: bool
    message: str | None


class ExitWatcher:
    """Collects the reasons to stop on this rank; a context manager that owns the signal handler meanwhile.

    Reads `args.exit_signal_handler`, `exit_signal` (name or number), `exit_duration_in_mins`, `save` and
    `device`. `start_seconds` is the moment on `time.time()`'s clock from which the duration counts; default
    now. Without any of these options `agree` makes no collective call.
    """

    def __init__(self, args: Namespace, start_seconds: float | None = None) -> None:
        self._handles_signal = bool(getattr(args, "exit_signal_handler", False))
        self.signal = parse_signal(getattr(args, "exit_signal", None) or signal.SIGTERM)
        self._duration = getattr(args, "exit_duration_in_mins", None)
        self._exit_file = Path(args.save) / EXIT_NOW if getattr(args, "save", None) else None
        self._device = getattr(args, "device", "cpu")
        self._start_seconds = time.time() if start_seconds is None else start_seconds
        self._received = False
        self._previous: Any = None

    def __enter__(self) -> ExitWatcher:
        if self._handles_signal:
            self._previous = signal.signal(self.signal, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handles_signal:
            signal.signal(self.signal, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agree(self) -> tuple[bool, bool, float]:
        """Return `(signal received, EXIT_NOW seen, minutes since start)`, each the maximum over all ranks."""
        if not (self._handles_signal or self._exit_file is not None or self._duration is not None):
            return False, False, 0.0
        sees_file = self._exit_file is not None and _rank() == 0 and self._exit_file.exists()
        minutes = (time.time() - self._start_seconds) / 60.0
        seen = torch.tensor([self._received, sees_file, minutes], dtype=torch.float64, device=self._device)
        if dist.is_initialized():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        received, file_seen, minutes = seen.tolist()
        return bool(received), bool(file_seen), minutes


def parse_signal(value: str | int | signal.Signals) -> signal.Signals:
    """Return the signal for a name (`SIGTERM`, `Signals.SIGTERM`) or a number; raises ValueError or
    KeyError.
    """
    if isinstance(value, str) and not value.isdecimal():
        return signal.Signals[value.rpartition(".")[2]]
    return signal.Signals(int(value))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def exit_reason(args: Namespace, iteration: int, watcher: ExitWatcher) -> ExitDecision:
    """Decide, equally on all ranks, what follows completed `iteration`; a collective call.

    A save is asked for at multiples of `args.save_interval` and before every exit, if `args.save` is set.
    """
    received, file_seen, minutes = watcher.agree()
    can_save = bool(getattr(args, "save", None))
    if received:
        return ExitDecision(save=can_save, message=f"exiting program after receiving {watcher.signal.name}.")
    if file_seen:
        return ExitDecision(
            save=can_save, message=f"exiting program after finding {Path(args.save) / EXIT_NOW}"
        )
    duration = getattr(args, "exit_duration_in_mins", None)
    if duration is not None and minutes > duration:
        return ExitDecision(save=can_save, message=f"exiting program after {minutes:.1f} minutes")
    exit_interval = getattr(args, "exit_interval", None)
    if exit_interval and iteration % exit_interval == 0:
        return ExitDecision(save=can_save, message=f"exiting program at iteration {iteration}")
    save_interval = getattr(args, "save_interval", None)
    periodic = can_save and bool(save_interval) and iteration % save_interval == 0
    return ExitDecision(save=periodic, message=None)


def mark_started(save: str | None) -> None:
    """Remove the `EXITED_CLEANLY` and `EXIT_NOW` files of an earlier job from the save directory (rank 0
    only).
    """
    if save and _rank() == 0:
        for name in (EXITED_CLEANLY, EXIT_NOW):
            (Path(save) / name).unlink(missing_ok=True)


def mark_exited_cleanly(save: str | None, iteration: int, message: str) -> None:
    """Leave `SAVE/EXITED_CLEANLY` (iteration and reason) and take `EXIT_NOW` away; after the last save, on
    rank 0.

    A save directory that cannot be written any more does not turn a finished run into a failed one.
    """
    if save and _rank() == 0:
        with contextlib.suppress(OSError):
            (Path(save) / EXIT_NOW).unlink(missing_ok=True)
            Path(save).mkdir(parents=True, exist_ok=True)
            (Path(save) / EXITED_CLEANLY).write_text(f"{iteration}\t{message}\n")
