"""The renewal of all bases as one CUDA graph, beside those of the steps (`metis.training.graphs`).

One idea: a renewal is hundreds of small operations and the host is slower than the GPU at all of them. In the
regular case their shapes never change: all bases are warm, nothing waits from earlier steps, and the rows, or
sketches of rows that were too many to keep, lie where a replayed step has written them. Then one graph makes
of them what `metis.renewal.compute_outcome` would, with the same bits, and the host reads once.

A graph reads rows, sketches, weights and the bases in use (`OperandBasis.active`), all of which stay where
they are. What it has made of V is copied out after every replay, because tensors of a state never change. Its
sums are not kept: where one is wanted after all (a basis cannot be renewed), everything is computed again by
launches.

Traps:
* The first regular renewal is launched: libraries set themselves up then.
* Rows of a step that was launched lie elsewhere every time; such a renewal is launched, and the graphs stay.
* NCCL wants a message captured on all of its ranks or on none. Phases, counts, verdicts and the kinds of
  steps are the same on all ranks that share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metis.errors import ConfigError
from metis.renewal import Outcome, Work, compute_outcome

MAX_GRAPHS = 8
"""Sets of rows and sketches that have a graph: as many as kinds of steps. The one used the longest ago goes
first.
"""


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A graph, the rows, sketches and weights that it reads, and what it makes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outcome: Outcome


class RenewalGraphs:
    """Stands for `metis.renewal.compute_outcome`.

    pool: returns the memory pool that graphs share. lasting: returns the rows and sketches that replays
    overwrite.
    """

    def __init__(self, pool: Callable[[], Any], lasting: Callable[[], Iterable[Tensor]]) -> None:
        self._pool, self._lasting = pool, lasting
        self._captured: list[_Captured] = []
        self._owners: tuple[Any, ...] = ()
        self._launched: tuple[Any, ...] = ()

    def __call__(self, work: Work, token_group: Any = None) -> Outcome:
        """Return what becomes of the rows put aside; by a graph where there is one or can be."""
        if not _is_regular(work):
            return compute_outcome(work, token_group)
        owners = (*(basis for basis, _ in work), *(basis.active for basis, _ in work))
        if not are_same(owners, self._owners):
            self.release()
            self._owners = owners
        inputs = tuple(tensor for _, pending in work for tensor in pending.tensors())
        captured = next((c for c in self._captured if are_same(c.inputs, inputs)), None)
        if captured is not None:
            self._captured.remove(captured)
        else:
            layout = tuple(tuple(tensor.shape for tensor in pending.tensors()) for _, pending in work)
            if layout != self._launched or not self._will_last(work):
                self._launched = layout
                return compute_outcome(work, token_group)
            captured = self._capture(work, token_group, inputs)
        self._captured.append(captured)
        if len(self._captured) > MAX_GRAPHS:
            self._captured.pop(0).graph.reset()
        captured.graph.replay()
        return _with_copies(captured.outcome, work)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Let go of graphs that read rows or sketches which nothing will write again."""
        gone = {id(tensor) for tensor in tensors}
        for captured in [c for c in self._captured if any(id(tensor) in gone for tensor in c.inputs)]:
            captured.graph.reset()
            self._captured.remove(captured)

    def release(self) -> None:
        """Let go of all graphs, whoever still holds what they have made, and of the bases."""
        for captured in self._captured:
            captured.graph.reset()
        self._captured, self._owners, self._launched = [], (), ()

    def _will_last(self, work: Work) -> bool:
        """Whether all that is read are weights or what replayed steps overwrite."""
        lasting = {id(tensor) for tensor in self._lasting()}
        return all(
            basis.operand == "weight" or all(id(tensor) in lasting for tensor in pending.tensors())
            for basis, pending in work
        )

    def _capture(self, work: Work, token_group: Any, inputs: tuple[Tensor, ...]) -> _Captured:
        stand_ins = [(basis.stand_in(), pending.copy()) for basis, pending in work]
        with capture("a renewal of bases", self._pool()) as graph:
            outcome = compute_outcome(stand_ins, token_group)  # type: ignore[arg-type]
        return _Captured(graph, inputs, replace(outcome, found=None))


def _with_copies(outcome: Outcome, work: Work) -> Outcome:
    """Return the outcome of a replay with every V in memory of its own, as wide as its state keeps it."""
    candidates, in_use = [], []
    for members, v_GKr in outcome.candidates:
        num_bases, num_features, rank = v_GKr.shape
        v_GKq = v_GKr.new_zeros(num_bases, num_features, work[members[0]][0].state.v.shape[1])
        v_GKq[:, :, :rank] = v_GKr
        candidates.append((members, v_GKq))
        in_use.append(v_GKr.clone())
    return replace(outcome, candidates=candidates, in_use=in_use)


@contextmanager
def capture(what: str, pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Record what is launched inside as a graph, on the stream in use; all ranks begin together."""
    graph = torch.cuda.CUDAGraph()
    dist.barrier()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(
            graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            yield graph
    except RuntimeError as error:
        raise _capture_error(what, error) from error


def _capture_error(what: str, error: BaseException) -> ConfigError:
    """Return what to say of a capture that failed, on the rank where it did."""
    reason: BaseException = error
    while reason.__context__ is not None:  # the end of a capture that has failed fails too
        reason = reason.__context__
    said = (str(reason).splitlines() or [type(reason).__name__])[0]
    failure = ConfigError(
        "--cuda-graph-impl", f"must be none for this run: {what} cannot be captured ({said})"
    )
    failure.found_by_one_rank = True  # out of memory, for one
    return failure


def are_same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether two tuples hold the same objects."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _is_regular(work: Work) -> bool:
    widths: dict[tuple[int, int], int] = {}  # of equal bases; what a graph makes is widened group by group
    for basis, _ in work:
        num_features, width = basis.state.v.shape
        if widths.setdefault((num_features, basis.state.rank), width) != width:
            return False
    return all(
        basis.state.phase == "warm"
        and not basis.ordered
        and basis.state.row_count == 0
        and any(True for _ in pending.tensors())
        for basis, pending in work
    )
