"""The renewal of all bases as one CUDA graph, beside those of the steps (`metis.training.graphs`).

One idea: a renewal is hundreds of small operations and the host is slower than the GPU at all of them. In the
regular case their shapes never change: all bases are warm, nothing waits from earlier steps, and the rows lie
where a replayed step has written them. Then one graph makes of them what `metis.renewal.compute_outcome`
would, with the same bits, and the host reads once.

What a graph reads besides rows and weights are the old bases, copied into places of its own before a replay;
what it has made of V is copied out after it, because tensors of a state never change.

Traps:
* The first regular renewal is launched: libraries set themselves up then.
* Rows of a step that was launched lie elsewhere every time; such a renewal is launched too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metis.config import BasisConfig
from metis.decompose.basis import BasisState
from metis.errors import ConfigError
from metis.operand import Axis
from metis.renewal import Outcome, Work, compute_outcome


@dataclass(frozen=True, slots=True)
class _StandIn:
    """A basis as `compute_outcome` reads it, its V in a place that stays."""

    operand: str
    ordered: bool
    features: Axis
    config: BasisConfig
    state: BasisState


@dataclass(frozen=True, slots=True)
class _Captured:
    """A graph with what it reads (rows and weights; places of old bases) and what it makes."""

    graph: torch.cuda.CUDAGraph
    rows: tuple[Tensor, ...]
    places: list[Tensor]
    outcome: Outcome


class RenewalGraph:
    """Stands for `metis.renewal.compute_outcome`.

    pool: returns the memory pool that graphs share. lasting: returns the rows that replays overwrite.
    """

    def __init__(self, pool: Callable[[], Any], lasting: Callable[[], Iterable[Tensor]]) -> None:
        self._pool, self._lasting = pool, lasting
        self._captured: _Captured | None = None
        self._launched: tuple[Any, ...] | None = None

    def __call__(self, work: Work, token_group: Any = None) -> Outcome:
        """Return what becomes of the rows put aside; by a graph where there is one or can be."""
        if not _is_regular(work):
            return compute_outcome(work, token_group)
        rows = tuple(rows for _, pending in work for rows in pending.rows)
        if self._captured is None or not _are_same(rows, self._captured.rows):
            self.release()
            layout = tuple((basis, *(r.shape for r in pending.rows)) for basis, pending in work)
            if layout != self._launched or not self._will_last(work):
                self._launched = layout
                return compute_outcome(work, token_group)
            self._captured = self._capture(work, token_group, rows)
        return self._replay(work)

    def release(self) -> None:
        """Let go of the graph, whoever still holds what it has made."""
        if self._captured is not None:
            self._captured.graph.reset()
            self._captured = None

    def _will_last(self, work: Work) -> bool:
        """Whether all rows are weights or what replayed steps overwrite."""
        lasting = {id(rows) for rows in self._lasting()}
        return all(
            basis.operand == "weight" or all(id(rows) in lasting for rows in pending.rows)
            for basis, pending in work
        )

    def _capture(self, work: Work, token_group: Any, rows: tuple[Tensor, ...]) -> _Captured:
        places = [torch.empty_like(basis.state.v) for basis, _ in work]
        stand_ins = [
            (
                _StandIn(
                    basis.operand, basis.ordered, basis.features, basis.config, replace(basis.state, v=place)
                ),
                replace(pending, rows=list(pending.rows)),
            )
            for (basis, pending), place in zip(work, places, strict=True)
        ]
        graph = torch.cuda.CUDAGraph()
        dist.barrier()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool(),
                stream=torch.cuda.current_stream(),
                capture_error_mode="thread_local",
            ):
                outcome = compute_outcome(stand_ins, token_group)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise capture_error("a renewal of bases", error) from error
        return _Captured(graph, rows, places, outcome)

    def _replay(self, work: Work) -> Outcome:
        captured = self._captured
        assert captured is not None
        torch._foreach_copy_(captured.places, [basis.state.v for basis, _ in work])
        captured.graph.replay()
        made = captured.outcome
        return replace(made, candidates=[(members, v.clone()) for members, v in made.candidates])


def capture_error(what: str, error: BaseException) -> ConfigError:
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


def _is_regular(work: Work) -> bool:
    return all(
        basis.state.phase == "warm"
        and not basis.ordered
        and basis.state.row_count == 0
        and pending.sketch is None
        and bool(pending.rows)
        for basis, pending in work
    )


def _are_same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
