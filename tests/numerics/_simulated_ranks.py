"""Several ranks in one process: each is a thread, and the collectives of an `Axis` meet at a barrier.

For tests of what sharding does to numbers where no process group is wanted: exact, deterministic (every rank
receives the same list in shard order) and a thousand times cheaper than spawning processes. Backward runs in
the calling thread on the CPU, so collectives inside it work too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from metis.operand import Axis

T = TypeVar("T")

TIMEOUT_SECONDS = 60.0


class Team:
    """The group of `size` simulated ranks; stands where a process group stands in an `Axis`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, shard: int, value: Tensor) -> list[Tensor]:
        """Return every rank's value, in shard order."""
        self._slots[shard] = value.detach().clone()
        self._barrier.wait(TIMEOUT_SECONDS)
        values = list(self._slots)
        self._barrier.wait(TIMEOUT_SECONDS)
        return values

    def run(self, work: Callable[[int], T]) -> list[T]:
        """Return `work(shard)` of every rank; the first failure of any rank is raised here."""
        results: list[Any] = [None] * self.size
        failures: list[BaseException] = []

        def one(shard: int) -> None:
            try:
                results[shard] = work(shard)
            except BaseException as error:
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(shard,)) for shard in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = [error for error in failures if not isinstance(error, threading.BrokenBarrierError)]
        if failures:
            raise (real or failures)[0]
        return results


def use_simulated_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the collectives of an `Axis` use the `Team` in `axis.group`."""

    def gather(self: Axis, value: Tensor) -> list[Tensor]:
        return self.group.exchange(self.shard, value) if self.is_sharded else [value]

    def start_gather_stacked(self: Axis, value: Tensor) -> Callable[[], Tensor]:
        every = torch.stack(gather(self, value))
        return lambda: every

    def total(self: Axis, value: Tensor) -> Tensor:
        if self.is_sharded:
            value.copy_(torch.stack(self.group.exchange(self.shard, value)).sum(dim=0))
        return value

    def start_sum(self: Axis, value: Tensor) -> Callable[[], Tensor]:
        result = total(self, value)
        return lambda: result

    def start_scatter_sum(self: Axis, value: Tensor) -> Callable[[], Tensor]:
        mine = self.local_rows(total(self, value.clone()))
        return lambda: mine

    monkeypatch.setattr(Axis, "gather", gather)
    monkeypatch.setattr(Axis, "gather_stacked", lambda axis, value: start_gather_stacked(axis, value)())
    monkeypatch.setattr(Axis, "start_gather_stacked", start_gather_stacked)
    monkeypatch.setattr(Axis, "scatter_sum", lambda axis, value: start_scatter_sum(axis, value)())
    monkeypatch.setattr(Axis, "start_scatter_sum", start_scatter_sum)
    monkeypatch.setattr(Axis, "sum", total)
    monkeypatch.setattr(Axis, "start_sum", start_sum)


def shard_of(size: int, shard: int, team: Team, parts: int = 1) -> Axis:
    """Return one rank's piece of an axis cut evenly; with parts, a piece of every part."""
    width = size // parts
    local = width // team.size
    runs = tuple((part * width + shard * local, local) for part in range(parts))
    return Axis(size=size, runs=runs, parts=parts, num_shards=team.size, shard=shard, group=team)
