"""Medians of single calls, as the GPU sees them.

One idea: on a GPU a call is timed between two events that are queued behind other work, so that the host's
launches are over when the first event is reached; what the host needs is measured apart. On a CPU it is
plain wall-clock time.

Traps: a call that waits for the GPU itself defeats the hiding. An event pair costs a microsecond or two,
which is in every number, the floors included. Inputs must leave the L2 cache: rotate among `num_inputs_for`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from metis.errors import ConfigError

L2_MULTIPLE = 3
MAX_INPUTS = 16
MAX_HIDDEN_SECONDS = 0.05
_CALIBRATION_CYCLES = 20_000_000


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range, 0 for fewer than two samples."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def require_kind(name: str) -> str:
    """Return cpu or cuda for auto, cpu or cuda, without starting CUDA in this process.

    Raises ConfigError when a GPU is asked for and none is there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device", "cuda needs a GPU that torch sees, received none; use cpu or auto")
    return "cuda" if available and name != "cpu" else "cpu"


def require_device(name: str) -> torch.device:
    """Return the device that auto, cpu or cuda means here: the current GPU, or the CPU.

    Raises ConfigError as `require_kind`.
    """
    kind = require_kind(name)
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


def num_inputs_for(num_bytes: int, device: torch.device) -> int:
    """Return among how many matrices of `num_bytes` to rotate, so that none is found in the L2 cache."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_INPUTS, max(2, math.ceil(L2_MULTIPLE * cache / num_bytes)))


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self._cycles_per_second = self._sleep_rate() if self.on_gpu else 0.0

    def _sleep_rate(self) -> float:
        torch.cuda._sleep(_CALIBRATION_CYCLES)  # wakes the clocks
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        return _CALIBRATION_CYCLES / (1e-3 * start.elapsed_time(end))

    def seconds(self, call: Callable[[], object], hidden_seconds: float = 0.0) -> float:
        """Return the time of one call; on a GPU behind `hidden_seconds` of other work, at most 0.05."""
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        hidden = min(MAX_HIDDEN_SECONDS, max(1e-4, hidden_seconds))
        torch.cuda._sleep(int(hidden * self._cycles_per_second))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def host_seconds(self, call: Callable[[int], object], num_calls: int = 5) -> float | None:
        """Return the time that the host needs to launch `call(i)`, the GPU being busy; None on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        torch.cuda._sleep(int(4 * MAX_HIDDEN_SECONDS * self._cycles_per_second))
        began = time.perf_counter()
        for index in range(num_calls):
            call(index)
        elapsed = time.perf_counter() - began
        torch.cuda.synchronize()
        return elapsed / num_calls


@dataclass(frozen=True, slots=True)
class Timing:
    """What `time_calls` measured of one contender."""

    samples: Samples
    host_seconds: float | None


def time_calls(
    calls: Sequence[Callable[[int], object]],
    *,
    stopwatch: Stopwatch,
    num_calls: int,
    num_inputs: int,
) -> list[Timing]:
    """Time each of `calls` `num_calls` times with the index of an input, in turn, so that clocks drift alike.

    Each is first called with every input: kernels are compiled and tuned outside the measurement.
    """
    hosts = []
    for call in calls:
        for index in range(num_inputs):
            call(index)
        hosts.append(stopwatch.host_seconds(lambda index, call=call: call(index % num_inputs)))
    seconds: list[list[float]] = [[] for _ in calls]
    for number in range(num_calls):
        index = number % num_inputs
        for call, host, collected in zip(calls, hosts, seconds, strict=True):
            collected.append(stopwatch.seconds(lambda c=call, i=index: c(i), 2.0 * (host or 0.0)))
    return [Timing(Samples(tuple(collected)), host) for collected, host in zip(seconds, hosts, strict=True)]
