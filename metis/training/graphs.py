"""`--cuda-graph-impl local`: forward and backward of a whole step as one CUDA graph, replayed step after
step.

One idea: with small models the host is slower than the GPU, and a replay costs the host one call. What
differs between two steps sits in memory that the graph reads: the batches, the position that random bits are
drawn for, the weights, the bases in use. What differs in the sequence of kernels makes another *kind* of step
with a graph of its own: a number of microbatches, a batch layout, recipes, which bases exist, which are
sketched. The first steps, and the first step of every kind, run as they always do.

A step leaves things behind in Python while it is captured: reports, amaxes noted by the watch, rows put aside
for the next bases. They are kept with the graph and handed out again after every replay, when their memory
holds the new step's numbers.

Traps:
* Nothing may ask the device inside a step: no timers of the engine (it is given none), no dropout, no
  recomputation (both read generator states), no loss scaling, no check of gradients inside backward
  (`metis.training.operand_guard` makes it afterwards).
* Bases are overwritten in place (`OperandBasis.active`), parameters and gradient buffers never move.
* The model is built, and everything runs, on a stream that is not the default one (`initialize`).
* All graphs share one memory pool: what a replay left behind is gone after the next one. A pool whose graphs
  have all gone cannot be used again while any tensor of theirs is left.
* NCCL wants a message captured on all of its ranks or on none, so whatever decides between a graph and
  launches must be the same everywhere; and it waits, when a communicator is destroyed, for the graphs that
  hold its messages (`release`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from metis.bases import OperandBasis
from metis.clock import NotedAmaxes, TrainingClock
from metis.errors import ConfigError
from metis.kernels.arguments import as_signed
from metis.nn import LinearCore
from metis.renewal import Pending
from metis.training.batches import batch_on_this_cp_rank
from metis.training.initialize import at_shut_down
from metis.training.renewal_graph import RenewalGraphs, are_same, capture

IS_LOCAL = "is_local"
"""Field of a batch that holds this context-parallel rank's part already."""

POSITION_WORDS = "position_words"
"""Field of a staged batch: int32 [2] on the device, microbatch and step, of `metis.rng.NoisePosition`."""

MAX_KINDS = 8
"""Kinds of steps that are remembered, with their graphs; the one that came last the longest ago goes first.
Those of recipes and bases that have gone are let go of."""

Batch = dict[str, Any]
Reports = list[dict[str, Tensor]]
Schedule = Callable[[Iterator[Batch], int], Reports]
"""Runs forward and backward of so many microbatches."""


def on_this_rank(batch: Batch) -> Batch:
    """Return this context-parallel rank's part of a batch, which may have been taken already."""
    if IS_LOCAL in batch:
        return batch
    cp_rank = parallel_state.get_context_parallel_rank()
    cp_size = parallel_state.get_context_parallel_world_size()
    return batch_on_this_cp_rank(batch, cp_rank, cp_size) | {IS_LOCAL: True}


@dataclass(slots=True)
class _Staged:
    """Where batches of one layout lie for graphs to read: fields of each microbatch; words: int32 [n, 2]."""

    batches: list[Batch]
    words: Tensor

    def fill(self, batches: list[Batch], microbatches: list[int], step: int) -> None:
        """Copy what a step reads; asynchronous where the batches are pinned."""
        rows = [[as_signed(microbatch), as_signed(step)] for microbatch in microbatches]
        self.words.copy_(torch.tensor(rows, dtype=torch.int32), non_blocking=True)
        for target, batch in zip(self.batches, batches, strict=True):
            for name, value in target.items():
                if isinstance(value, Tensor) and name != POSITION_WORDS:
                    value.copy_(batch[name], non_blocking=True)


@dataclass(slots=True)
class _Captured:
    """A graph, and what the captured step left behind in Python."""

    graph: torch.cuda.CUDAGraph
    reports: Reports
    amaxes: NotedAmaxes
    pending: list[tuple[OperandBasis, Pending]]


@dataclass(slots=True)
class StepGraphs:
    """Runs the passes of training steps, by graphs once they are warm.

    cores: of the linears of this rank that compute by a recipe. run: the schedule as it is without graphs.
    num_warmup_steps: steps of this process that run so whatever they are. renewals: what computes bases after
    a step, in graphs of its own.
    """

    args: Namespace
    cores: Sequence[LinearCore]
    clock: TrainingClock
    run: Schedule
    num_warmup_steps: int
    renewals: RenewalGraphs = field(init=False)
    _kinds: dict[tuple[Any, ...], _Captured | None] = field(default_factory=dict)
    _staged: dict[tuple[Any, ...], _Staged] = field(default_factory=dict)
    _owners: tuple[Any, ...] = ()
    _num_steps: int = 0
    _pool: Any = None

    def __post_init__(self) -> None:
        if self.args.device != "cuda":
            raise ConfigError("--cuda-graph-impl", f"local needs a GPU, received device {self.args.device}")
        self.renewals = RenewalGraphs(self._its_pool, self._lasting)
        at_shut_down(self.release)

    def __call__(self, data_iterator: Iterator[Batch], num_microbatches: int) -> Reports:
        """Run the passes of one step of `num_microbatches` microbatches."""
        batches = [on_this_rank(next(data_iterator)) for _ in range(num_microbatches)]
        self._num_steps += 1
        kind = self._kind(batches)
        is_new = kind not in self._kinds
        captured = self._kinds.pop(kind, None)
        if is_new or self._num_steps <= self.num_warmup_steps:
            self._remember(kind, captured)
            return self.run(iter(batches), num_microbatches)
        staged = self._stage(batches)
        if captured is None:
            captured = self._capture(staged)
        self._remember(kind, captured)
        return self._replay(captured)

    def release(self) -> None:
        """Let go of all graphs, whoever still holds what they left behind; before communicators go."""
        self.renewals.release()
        for captured in self._kinds.values():
            if captured is not None:
                captured.graph.reset()
        self._kinds.clear()
        self._staged.clear()
        self._pool = None

    def _remember(self, kind: tuple[Any, ...], captured: _Captured | None) -> None:
        """Put a kind behind all others, and forget the first one where there are too many."""
        self._kinds[kind] = captured
        if len(self._kinds) <= MAX_KINDS:
            return
        oldest = self._kinds.pop(next(iter(self._kinds)))
        if oldest is not None:
            oldest.graph.reset()
            self.renewals.forget(_left_behind(oldest))
        layouts = {layout for layout, *_ in self._kinds}
        self._staged = {layout: staged for layout, staged in self._staged.items() if layout in layouts}
        if not any(self._kinds.values()):
            self.renewals.release()
            self._pool = None

    def _kind(self, batches: list[Batch]) -> tuple[Any, ...]:
        """Return what decides which kernels run, for the recipes and bases in use.

        Asks every basis for its place, which writes a new one there. Graphs that read other places go.
        """
        cores = self.cores
        bases = [basis for core in cores for _, basis in core.own_bases()]
        owners = (
            *(core.recipe for core in cores), *(core.weights for core in cores), *(b.active for b in bases)
        )  # fmt: skip
        if not are_same(owners, self._owners):
            self.release()
            self._owners = owners
        # Of a warm basis and of a cold one other sums may be made.
        sketched = tuple(basis.wants_sketch(self.clock.step) and basis.state.phase for basis in bases)
        return tuple(map(_layout, batches)), self.clock.num_tokens_per_step, sketched

    def _stage(self, batches: list[Batch]) -> _Staged:
        layout = tuple(map(_layout, batches))
        staged = self._staged.get(layout)
        if staged is None:
            words = torch.zeros(len(batches), 2, dtype=torch.int32, device="cuda")
            rows = [
                {
                    name: torch.empty_like(value, device="cuda") if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                }
                | {POSITION_WORDS: row}
                for batch, row in zip(batches, words, strict=True)
            ]
            staged = self._staged[layout] = _Staged(rows, words)
        size = self.args.micro_batch_size
        staged.fill(batches, [int(batch["first_sample"]) // size for batch in batches], self.clock.step)
        return staged

    def _its_pool(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _lasting(self) -> Iterator[Tensor]:
        """Yield rows and sketches that replays write again where they lie."""
        for captured in self._kinds.values():
            yield from () if captured is None else _left_behind(captured)

    def _capture(self, staged: _Staged) -> _Captured:
        watch = self.clock.watch
        bases = [basis for core in self.cores for _, basis in core.own_bases()]
        for basis in bases:
            basis.take_pending()
        before = watch.take_noted()
        with _quiet_engine(), capture("a step", self._its_pool()) as graph:
            reports = self.run(iter(staged.batches), len(staged.batches))
            amaxes = watch.take_noted()
        pending = [(basis, left) for basis in bases if (left := basis.take_pending()) is not None]
        captured = _Captured(graph, reports, amaxes, pending)
        watch.put_back(before)
        return captured

    def _replay(self, captured: _Captured) -> Reports:
        captured.graph.replay()
        self.clock.watch.put_back(captured.amaxes)
        for basis, left in captured.pending:
            basis.put_aside(left)
        return captured.reports


def _left_behind(captured: _Captured) -> Iterator[Tensor]:
    for _, pending in captured.pending:
        yield from pending.tensors()


def _layout(batch: Batch) -> tuple[Any, ...]:
    return tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name,)
        for name, value in sorted(batch.items())
    )


@contextmanager
def _quiet_engine() -> Iterator[None]:
    """Keep the engine from reading generator states, which a capture does not allow.

    Sequence parallelism enters a stream of random numbers that nothing draws from, since dropout is off.
    """
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.fork = lambda *name: nullcontext()
    try:
        yield
    finally:
        del tracker.fork
