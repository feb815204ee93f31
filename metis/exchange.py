"""Messages between the ranks that share tokens, cut so that products run beside them.

Under sequence parallelism a rank has its own rows at once and the others' only by a message, or it makes sums
for everybody and needs its own. One idea: both kinds of message are started before whatever can be computed
meanwhile, and asked for after it: a product begins with the own rows while the others arrive, or ends with
them while the others' leave.

    Gathering   rows [m, ...] of every rank -> [T m, ...] in rank order
    Scattering  sums of every rank for every rank -> own rows of the total, [m, ...]

`MessageExchange` sends by the process group, on any device. `PeerExchange` lets copy engines write into the
other GPUs' memory, which takes no multiprocessor from the products beside it.

Traps:
* All ranks of the group make the same calls in the same order.
* What a gathering returns lies where the next one of the same exchange writes: use it up before, in the
  stream that asked for it. So does what a scattering receives: one at a time.
* Captured CUDA graphs read and write memory of an exchange where it lies: it is kept until the process ends.
* A rank that waits for a peer occupies its GPU; after `timeout_seconds` the kernel that waits is aborted.

Shape letters: T ranks, m rows of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

MIN_ROWS = 1024
"""Rows that a product is cut into at least where those of several ranks can be multiplied at once."""

_GRANULE = 2**21
"""Bytes at whose multiples memory that GPUs share is allocated."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """Rows of all ranks, on their way.

    rows: what is sent, which must not go before it has been read. result: where all of them lie once `arrive`
    has been called.
    """

    rows: Tensor
    result: Tensor
    arrive: Callable[[], object]

    def wait(self) -> Tensor:
        """Return them, [T m, ...], in rank order; to be used up before the next gathering begins."""
        self.arrive()
        return self.result


class Scattering(Protocol):
    """Sums of all ranks, on their way to those that want them."""

    def send(self, rank: int, rows: Tensor) -> None:
        """Give another rank its rows, [m, ...] contiguous; they must stay as they are until `finish`."""
        ...

    def finish(self, own: Tensor) -> Tensor:
        """Return `own` [m, ...] plus what every other rank has sent, rounded once."""
        ...


class Exchange(Protocol):
    """What one rank of a group sends and receives through. rank, size: its place in the group."""

    rank: int
    size: int

    def gather(self, rows: Tensor, *, whole: bool = True) -> Gathering:
        """Start to send `rows` [m, ...], contiguous, to all ranks. whole: False leaves the own rows of the
        result unwritten.
        """
        ...

    def own_place(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return memory, uint8 [num_bytes], that `gather` sends from without a copy; write it once the last
        gathering has been waited for.
        """
        ...

    def scatter(self, shape: Sequence[int], dtype: torch.dtype) -> Scattering:
        """Return a scattering of rows [m, ...] of this shape and dtype; each other rank is sent some once."""
        ...


def others_of(exchange: Exchange) -> list[int]:
    """Return the other ranks, the next one first, so that no two send to the same one at a time."""
    return [(exchange.rank + step) % exchange.size for step in range(1, exchange.size)]


def total_of(pieces: Sequence[Tensor]) -> Tensor:
    """Return the sum of equal shapes in rank order; half precision is summed in fp32 and rounded once."""
    if len(pieces) == 2:
        return pieces[0] + pieces[1]
    dtype = pieces[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = pieces[0].to(wide, copy=True)
    for piece in pieces[1:]:
        total += piece
    return total.to(dtype)


def gathered_product(
    exchange: Exchange,
    rows: Tensor,
    out: Tensor,
    multiply: Callable[[Tensor, Tensor], object],
    *,
    whole: bool = True,
) -> Tensor:
    """Write a product of all ranks' rows to `out` [T m, ...], this rank's first, and return the rows
    themselves, [T m, ...].

    rows: [m, ...]. multiply(some rows, their part of out) writes it. whole: the own rows are wanted in what
    is returned.
    """
    m, rank, size = rows.shape[0], exchange.rank, exchange.size
    gathering = exchange.gather(rows, whole=whole)
    multiply(rows, out[rank * m : (rank + 1) * m])
    every = gathering.wait()
    for first, last in ((0, rank), (rank + 1, size)):
        if first < last:
            multiply(every[first * m : last * m], out[first * m : last * m])
    return every


def scattered_product(exchange: Exchange, out: Tensor, multiply: Callable[[slice, Tensor], object]) -> Tensor:
    """Return this rank's rows [m, ...] of the sum over ranks of a product [T m, ...], whose own part is
    written to `out`, this rank's rows last.

    multiply(rows, their part of out) writes some rows.
    """
    m, rank = out.shape[0] // exchange.size, exchange.rank
    pieces = out.split(m)
    scattering = exchange.scatter(pieces[0].shape, out.dtype)
    step = -(-MIN_ROWS // m)
    for first, last in ((rank + 1, exchange.size), (0, rank)):
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = slice(start * m, stop * m)
            multiply(rows, out[rows])
            for other in range(start, stop):
                scattering.send(other, pieces[other])
    multiply(slice(rank * m, (rank + 1) * m), pieces[rank])
    return scattering.finish(pieces[rank])


def start_scatter(exchange: Exchange, sums: Tensor) -> Callable[[], Tensor]:
    """Send every other rank its rows of `sums` [T m, ...], contiguous; the returned function waits for this
    rank's rows [m, ...] of the total. `sums` must stay as they are until then.
    """
    pieces = sums.chunk(exchange.size)
    scattering = exchange.scatter(pieces[0].shape, sums.dtype)
    for rank in others_of(exchange):
        scattering.send(rank, pieces[rank])
    return lambda: scattering.finish(pieces[exchange.rank])


@dataclass(slots=True)
class MessageExchange:
    """Sends by a process group's asynchronous messages."""

    group: Any
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def __deepcopy__(self, memo: Any) -> MessageExchange:
        return self  # of the group, not of the module that uses it

    def gather(self, rows: Tensor, *, whole: bool = True) -> Gathering:
        """Start to send `rows`; see `Exchange`."""
        result = rows.new_empty(self.size * rows.numel())  # flat: the one shape that all backends take
        work = dist.all_gather_into_tensor(result, rows.view(-1), group=self.group, async_op=True)
        return Gathering(rows, result.view(-1, *rows.shape[1:]), work.wait)

    def own_place(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return memory for a message; see `Exchange`."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def scatter(self, shape: Sequence[int], dtype: torch.dtype) -> Scattering:
        """Return a scattering; see `Exchange`."""
        return _MessageScattering(self, tuple(shape), dtype)


@dataclass(slots=True)
class _MessageScattering:
    exchange: MessageExchange
    shape: tuple[int, ...]
    dtype: torch.dtype
    sent: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    works: list[Any] = field(default_factory=list)

    def send(self, rank: int, rows: Tensor) -> None:
        self.sent[rank] = rows
        if len(self.sent) < self.exchange.size - 1:
            return
        group, messages = self.exchange.group, []
        for rank, rows in self.sent.items():  # all at once: NCCL pairs what it is given together
            peer, arrives = dist.get_global_rank(group, rank), torch.empty_like(rows)
            assert rows.shape == self.shape and rows.dtype == self.dtype
            self.received[rank] = arrives
            messages += [
                dist.P2POp(dist.isend, rows, peer, group),
                dist.P2POp(dist.irecv, arrives, peer, group),
            ]
        self.works = dist.batch_isend_irecv(messages)

    def finish(self, own: Tensor) -> Tensor:
        for work in self.works:
            work.wait()
        pieces = self.received | {self.exchange.rank: own}
        assert len(pieces) == self.exchange.size, (
            "every other rank is sent its rows before the sum is asked for"
        )
        return total_of([pieces[rank] for rank in range(self.exchange.size)])


class PeerExchange:
    """Copies into memory of the other GPUs of one host (NVLink), by their copy engines.

    Raises what torch raises where the GPUs of a group cannot map each other's memory; all ranks of the group
    build it together. Source: torch.distributed._symmetric_memory.
    """

    def __init__(self, group: Any, timeout_seconds: float = 600.0) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group, self._timeout_ms = group, round(1000 * timeout_seconds)
        self._stream = torch.cuda.Stream(priority=-1)
        self._inboxes: dict[str, list[_Inbox]] = {"gather": [], "scatter": []}
        self._signals = _Inbox.shared(_GRANULE, group)
        self._meet(0)

    def __deepcopy__(self, memo: Any) -> PeerExchange:
        return self  # of the group, not of the module that uses it

    def gather(self, rows: Tensor, *, whole: bool = True) -> Gathering:
        """Start to send `rows`; see `Exchange`."""
        data, inbox = _bytes(rows), self._inbox("gather", self.size * rows.nbytes)
        own = _slot(inbox.memory[self.rank], self.rank, data.numel())
        with self._beside():
            self._meet(0)  # nobody reads what came before any more
            for rank in others_of(self):
                _slot(inbox.memory[rank], self.rank, data.numel()).copy_(data)
            self._meet(1)  # everybody has written
            if whole and own.data_ptr() != data.data_ptr():
                own.copy_(data)
            done = self._stream.record_event()
        result = inbox.memory[self.rank][: self.size * rows.nbytes].view(rows.dtype)
        return Gathering(
            rows,
            result.view(-1, *rows.shape[1:]),
            lambda: torch.cuda.current_stream().wait_event(done),
        )

    def own_place(self, num_bytes: int, device: torch.device) -> Tensor:
        """Return memory for a message; see `Exchange`."""
        return _slot(self._inbox("gather", self.size * num_bytes).memory[self.rank], self.rank, num_bytes)

    def scatter(self, shape: Sequence[int], dtype: torch.dtype) -> Scattering:
        """Return a scattering; see `Exchange`."""
        num_bytes = prod(shape) * dtype.itemsize
        inbox = self._inbox("scatter", self.size * num_bytes)
        with self._beside():
            self._meet(0)
        return _PeerScattering(self, inbox, tuple(shape), dtype, num_bytes)

    def _beside(self) -> Any:
        """Return the context in which the exchange's stream goes on from here."""
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _meet(self, channel: int) -> None:
        """Wait, on the GPU, until all ranks have come to this point of their streams."""
        self._signals.handle.barrier(channel=channel, timeout_ms=self._timeout_ms)

    def _inbox(self, kind: str, num_bytes: int) -> _Inbox:
        """Return memory of at least this size, which every rank has a piece of."""
        inboxes = self._inboxes[kind]
        fitting = [inbox for inbox in inboxes if inbox.num_bytes >= num_bytes]
        if fitting:
            return min(fitting, key=lambda inbox: inbox.num_bytes)
        assert not torch.cuda.is_current_stream_capturing(), (
            "the first message of a size must not be captured"
        )
        # Twice the last one at least, so that all of them together are less than twice the largest.
        num_bytes = max([num_bytes, *(2 * inbox.num_bytes for inbox in inboxes)])
        inboxes.append(_Inbox.shared(-(-num_bytes // _GRANULE) * _GRANULE, self._group))
        return inboxes[-1]


@dataclass(frozen=True, slots=True)
class _Inbox:
    """Memory that all ranks write to: of every rank as this one sees it, uint8 [num_bytes] each."""

    num_bytes: int
    memory: list[Tensor]
    handle: Any

    @classmethod
    def shared(cls, num_bytes: int, group: Any) -> _Inbox:
        """Allocate it; on every rank of the group."""
        import torch.distributed._symmetric_memory as symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        own = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.synchronize()  # some versions of torch fill it with zeros, which must not come late
        handle = symmetric_memory.rendezvous(own, group.group_name)
        ranks = range(dist.get_world_size(group))
        return cls(num_bytes, [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in ranks], handle)


@dataclass(slots=True)
class _PeerScattering:
    exchange: PeerExchange
    inbox: _Inbox
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    sent: list[Tensor] = field(default_factory=list)
    done: Any = None

    def send(self, rank: int, rows: Tensor) -> None:
        assert rows.shape == self.shape and rows.dtype == self.dtype
        self.sent.append(rows)
        with self.exchange._beside():
            _slot(self.inbox.memory[rank], self.exchange.rank, self.num_bytes).copy_(_bytes(rows))
            if len(self.sent) == self.exchange.size - 1:
                self.exchange._meet(1)
                self.done = self.exchange._stream.record_event()

    def finish(self, own: Tensor) -> Tensor:
        size, rank = self.exchange.size, self.exchange.rank
        assert len(self.sent) == size - 1, "every other rank is sent its rows before the sum is asked for"
        torch.cuda.current_stream().wait_event(self.done)
        pieces = [_slot(self.inbox.memory[rank], r, self.num_bytes).view(self.dtype) for r in range(size)]
        pieces = [piece.view(self.shape) for piece in pieces]
        pieces[rank] = own
        return total_of(pieces)


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(-1).view(torch.uint8)


def _slot(memory: Tensor, rank: int, num_bytes: int) -> Tensor:
    """Return where the rows of one rank lie in an inbox."""
    return memory[rank * num_bytes : (rank + 1) * num_bytes]
