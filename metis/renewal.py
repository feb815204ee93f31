"""Renewing the bases of a model together, after the optimizer step.

One idea: a refresh is many small operations, and on a GPU their number is what it costs. So the bases of
equal shape are sketched together, those of any shapes orthonormalised together, and the host reads what came
of it (how many rows, which bases may be used) in one go. Only a basis that is not the regular case (cold, in
Ritz order, too few rows, rank-deficient) is taken by itself. A step that has sketched nothing does nothing.

Traps:
* Ranks that share features make the same groups in the same order, since their shapes and numbers of rows
  agree. Ranks that hold other tokens may not: their sums go in one message, by basis, not by group.
* The order of float64 sums depends on the group. V in bf16 does not, unless an element lies on a tie to
  within their rounding.
* Whether a warm basis may be used is judged by Z alone: where B is not finite, no column of Z is.

Shape letters: n sampled rows, K features held here, r rank, q columns of a sketch, G bases of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from metis import kernels
from metis.config import BasisConfig
from metis.decompose import basis as algebra
from metis.decompose.orthonormal import orthonormal_columns
from metis.decompose.projector import tree_sum
from metis.decompose.sketch import directions_in_chunks, in_chunks, sketch, sketch_in_chunks
from metis.operand import Axis, num_chunks_held


class Renewable(Protocol):
    """What is read and called of a basis here: `metis.bases.OperandBasis`."""

    operand: str
    ordered: bool
    features: Axis
    config: BasisConfig
    state: algebra.BasisState
    num_rows_needed: int
    active: Tensor | None

    def stand_in(self) -> Any:
        """Return what a captured computation reads of it."""
        ...

    def take_pending(self) -> Any:
        """Return this step's rows and sketches, and forget them."""
        ...

    def take_in(self, *arguments: Any) -> Any:
        """Add a summed sketch to the accumulator."""
        ...

    def refresh(self, *arguments: Any, **options: Any) -> Any:
        """Make the next basis if enough rows have been sketched."""
        ...


MAX_GROUP_NUMEL = 2**22
"""Numbers that are in float64 at once (32 MiB): what a group of bases, or of a weight's rows, may have. A CPU
has them in its cache."""

GPU_GROUPS = 16
"""Times that on a GPU (512 MiB), which has nothing else to hold between two steps and waits for launches."""


@dataclass(slots=True)
class Sketch:
    """Sums over rows: z [K, q] and gram [q, q] float64, and the number of rows, [1] float64 or a number."""

    z: Tensor
    gram: Tensor
    count: Tensor | int


@dataclass(slots=True)
class Pending:
    """What a step has for one basis on this rank: rows put aside, a sketch of others, who has further rows.

    rows: [n, K + MARK_COLUMNS] each; of a weight [N, K], where every row counts.
    """

    rows: list[Tensor] = field(default_factory=list)
    sketch: Sketch | None = None
    shards: Axis | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield what lies on the device."""
        yield from self.rows
        if self.sketch is not None:
            sums = self.sketch.z, self.sketch.gram, self.sketch.count
            yield from (value for value in sums if isinstance(value, Tensor))

    def copy(self) -> Pending:
        """Return another one of the same tensors, which sketching does not change."""
        sketch = None if self.sketch is None else replace(self.sketch)
        return replace(self, rows=list(self.rows), sketch=sketch)


Made = tuple[Tensor, Tensor, Tensor | None]
"""V [K, q] bf16 that a warm refresh makes of all rows sketched so far, energies [q], and V [K, r] contiguous
where there is one."""

Work = Sequence[tuple[Renewable, Pending]]
"""Bases, and what a step has put aside for each."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the device makes of a step's rows, before the host has looked at anything.

    found: the sketch of every basis, summed over ranks; None where they have not been kept, which serves
    while every candidate may be used. counts: rows in each sketch, None for those that only the device knows.
    candidates: for bases of equal shape, their numbers and the V that a warm refresh would give them, [G, K,
    q] bf16. in_use: the same as products read them, [G, K, r] contiguous; empty where nobody has made them.
    values: float64, the unknown counts, then for every candidate whether it may be used; None where
    there is nothing to ask.
    """

    found: list[Sketch] | None
    counts: list[int | None]
    candidates: list[tuple[list[int], Tensor]]
    values: Tensor | None
    in_use: Sequence[Tensor] = ()


Compute = Callable[[Work, Any], Outcome]
"""`compute_outcome`, or what stands for it: (work, token_group) -> Outcome."""


@torch.no_grad()
def renew_bases(
    bases: Iterable[Renewable], step: int, token_group: Any = None, compute: Compute | None = None
) -> None:
    """Turn what was put aside in optimizer step `step` into new bases; call it on every rank.

    token_group: ranks that saw other tokens of the step. compute: `compute_outcome` if None.
    """
    work: list[tuple[Renewable, Pending]] = []
    for basis in bases:
        pending = basis.take_pending()
        if pending is not None:
            work.append((basis, pending))
        elif basis.state.row_count:
            basis.refresh(step)
    if not work:
        return
    outcome = (compute or compute_outcome)(work, token_group)
    counts, usable = _read(outcome)
    if outcome.found is None and not _all_are_renewed(work, counts, usable):
        outcome = compute_outcome(work, token_group)
        counts, usable = _read(outcome)
    made: dict[int, Made] = {}
    for group, (members, v_GKq) in enumerate(outcome.candidates):
        shape = (len(members), v_GKq.shape[2])
        energies = torch.zeros(shape, dtype=torch.float64, device=v_GKq.device).unbind()
        in_use = outcome.in_use[group].unbind() if outcome.in_use else (None,) * len(members)
        made.update(zip(members, zip(v_GKq.unbind(), energies, in_use, strict=True), strict=True))
    made = {number: made[number] for number, ok in zip(list(made), usable, strict=True) if ok}
    for number, (basis, _) in enumerate(work):
        sums = None if outcome.found is None else outcome.found[number]
        basis.take_in(sums, counts[number], made.get(number), step)


def _all_are_renewed(work: Work, counts: Sequence[int], usable: Sequence[bool]) -> bool:
    """Whether every basis has a candidate that may be used, of rows enough."""
    return (
        len(usable) == len(work)
        and all(usable)
        and all(
            basis.state.row_count + count >= basis.num_rows_needed
            for (basis, _), count in zip(work, counts, strict=True)
        )
    )


def compute_outcome(work: Work, token_group: Any = None) -> Outcome:
    """Sketch what was put aside, sum it over ranks and orthonormalise; the host reads nothing back."""
    sketch_pending(work)
    _sum_over_shards(work)
    found = [pending.sketch for _, pending in work if pending.sketch is not None]
    if token_group is not None and dist.get_world_size(token_group) > 1:
        of_tokens = [s for (basis, _), s in zip(work, found, strict=True) if basis.operand != "weight"]

        def total(message: Tensor) -> Tensor:
            dist.all_reduce(message, group=token_group)
            return message

        _sum_in_one_message(of_tokens, total)
    candidates, verdicts = _warm_candidates([basis for basis, _ in work], found)
    values = [s.count for s in found if isinstance(s.count, Tensor)]
    values += [ok.to(torch.float64) for ok in verdicts]
    counts = [None if isinstance(s.count, Tensor) else s.count for s in found]
    return Outcome(found, counts, candidates, torch.cat(values) if values else None)


def sketch_pending(work: Work) -> None:
    """Turn rows put aside into sketches, bases of equal shape together."""
    groups: dict[tuple[Any, ...], list[tuple[Renewable, Pending]]] = {}
    for basis, pending in work:
        if pending.rows:
            first, state, config = pending.rows[0], basis.state, basis.config
            num_rows = sum(rows.shape[0] for rows in pending.rows)
            kind = (num_rows, first.shape[1], state.v.shape, state.num_sketch_columns, basis.features,
                    config.tp_mode, config.num_canonical_chunks, first.dtype, first.device)  # fmt: skip
            groups.setdefault(kind, []).append((basis, pending))
    for kind, group in groups.items():
        size = max(1, _max_numel(kind[-1]) // max(1, kind[0] * kind[1]))
        for start in range(0, len(group), size):
            _sketch_group(group[start : start + size])


def _max_numel(device: torch.device) -> int:
    return MAX_GROUP_NUMEL if device.type == "cpu" else GPU_GROUPS * MAX_GROUP_NUMEL


def _sketch_group(group: Work) -> None:
    """Sketch the rows of bases of equal shape, and let go of them."""
    basis, num_bases = group[0][0], len(group)
    num_features, num_columns = basis.features.local_size, basis.state.num_sketch_columns
    pieces = [pending.rows for _, pending in group]
    every = [rows for its in pieces for rows in its]
    num_rows, width = sum(rows.shape[0] for rows in pieces[0]), every[0].shape[1]
    v_GKq = basis.state.v[None] if num_bases == 1 else torch.stack([basis.state.v for basis, _ in group])
    height = max(1, _max_numel(v_GKq.device) // (num_bases * num_features))
    v_GKq, marks_Gn = v_GKq[:, :, :num_columns], None
    if num_rows > 0 and _is_widened(basis, every):
        if width > num_features:
            marks_Gn = torch.cat([rows[:, num_features] for rows in every]).view(num_bases, num_rows)
        z_GKq, gram_Gqq = _sums_by_kernel(pieces, num_rows, height, v_GKq, basis)
    else:
        rows = every[0] if len(every) == 1 else torch.cat(every)
        x_GnK = rows.view(num_bases, num_rows, width)
        if width > num_features:
            marks_Gn, x_GnK = x_GnK[:, :, num_features], x_GnK[:, :, :num_features]
        x_blocks = (x_GnK,) if num_rows <= height else x_GnK.split(height, dim=1)
        z_GKq, gram_Gqq = _sums(x_blocks, v_GKq, basis)
    counts: Sequence[Tensor | int] = [num_rows] * num_bases
    if marks_Gn is not None:
        counts = marks_Gn.sum(dim=1, keepdim=True, dtype=torch.float64).unbind()
    for (_, pending), z, gram, count in zip(group, z_GKq.unbind(), gram_Gqq.unbind(), counts, strict=True):
        before, pending.rows = pending.sketch, []
        pending.sketch = Sketch(z, gram, count)
        if before is not None:
            pending.sketch = Sketch(before.z + z, before.gram + gram, before.count + count)


def _is_widened(basis: Renewable, every: Sequence[Tensor]) -> bool:
    """Whether a kernel reads these matrices where they lie."""
    return (
        basis.config.tp_mode != "fast"
        and kernels.is_available(every[0].device)
        and all(map(kernels.can_widen, every))
    )


def _sums(x_blocks: Sequence[Tensor], v_GKq: Tensor, basis: Renewable) -> tuple[Tensor, Tensor]:
    """Return Z and gram of rows, given in blocks [G, n, K], by the directions of bases like `basis`.

    B is summed over all features.
    """
    features = basis.features
    if basis.config.tp_mode == "fast":
        v_GKq = v_GKq.to(torch.float32)
        return _added(sketch(x, features.sum(x.to(torch.float32) @ v_GKq)) for x in x_blocks)
    num_chunks = num_chunks_held(features, basis.config.num_canonical_chunks)
    chunks = (in_chunks(x_GnK, num_chunks, features.parts) for x_GnK in x_blocks)
    return _sums_of_chunks(chunks, num_chunks, v_GKq, basis)


def _sums_by_kernel(
    pieces: Sequence[Sequence[Tensor]], num_rows: int, height: int, v_GKq: Tensor, basis: Renewable
) -> tuple[Tensor, Tensor]:
    """The same, of the matrices in which the rows of every basis lie, `height` rows of each at a time."""
    features = basis.features
    num_chunks = num_chunks_held(features, basis.config.num_canonical_chunks)
    chunks = (
        kernels.widen(pieces, start, min(start + height, num_rows), features.local_size, features.parts,
                      num_chunks)
        for start in range(0, num_rows, height)
    )  # fmt: skip
    return _sums_of_chunks(chunks, num_chunks, v_GKq, basis)


def _sums_of_chunks(
    blocks: Iterable[Tensor], num_chunks: int, v_GKq: Tensor, basis: Renewable
) -> tuple[Tensor, Tensor]:
    features = basis.features

    def complete(b_Gnq: Tensor) -> Tensor:
        return tree_sum(torch.stack(features.gather(b_Gnq))) if features.is_sharded else b_Gnq

    v_ckq, num_bases = directions_in_chunks(v_GKq, num_chunks, features.parts), v_GKq.shape[0]
    return _added(sketch_in_chunks(x_cnk, v_ckq, num_bases, features.parts, complete) for x_cnk in blocks)


def _added(sums: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the sum of (Z, gram) of one block after the other, of which there is at least one."""
    z, gram = next(sums := iter(sums))
    for further_z, further_gram in sums:
        z.add_(further_z)
        gram.add_(further_gram)
    return z, gram


def _sum_over_shards(work: Work) -> None:
    """Add what other ranks of the same microbatch or weight have, one message per set of ranks."""
    by_axis: dict[Axis, list[Sketch]] = {}
    for _, pending in work:
        if pending.shards is not None and pending.sketch is not None:
            by_axis.setdefault(pending.shards, []).append(pending.sketch)
    for axis, sketches in by_axis.items():
        _sum_in_one_message(sketches, axis.sum)


def _sum_in_one_message(sketches: Sequence[Sketch], total: Callable[[Tensor], Tensor]) -> None:
    """Replace sketches by their sums over ranks; a count that is a number stays."""
    parts = [(s, name) for s in sketches for name in ("z", "gram", "count")]
    parts = [(s, name) for s, name in parts if isinstance(getattr(s, name), Tensor)]
    if not parts:
        return
    values = [getattr(s, name) for s, name in parts]
    message = total(_flatten_dense_tensors(values))
    for (s, name), piece in zip(parts, _unflatten_dense_tensors(message, values), strict=True):
        setattr(s, name, piece)


def _warm_candidates(
    bases: Sequence[Renewable], found: Sequence[Sketch]
) -> tuple[list[tuple[list[int], Tensor]], list[Tensor]]:
    """Return the V [G, K, q] that warm bases would have, with their numbers, and which may be used.

    The verdicts are bool tensors on the device, together as many numbers as there are candidates, in their
    order.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, basis in enumerate(bases):
        state = basis.state
        if state.phase == "warm" and not basis.ordered:
            kind = (state.v.device, state.v.shape, state.rank, basis.features)
            groups.setdefault(kind, []).append(number)
    candidates: list[tuple[list[int], Tensor]] = []
    verdicts = []
    for batch in _batches(groups):
        sums = [_whole_sums([(bases[number].state, found[number]) for number in members], features)
                for (*_, features), members in batch]  # fmt: skip
        new, ok = orthonormal_columns(*sums)
        verdicts.append(ok)
        for ((device, shape, rank, features), members), v_GKr in zip(batch, new, strict=True):
            v_GKq = torch.zeros(len(members), features.size, shape[1], dtype=torch.bfloat16, device=device)
            v_GKq[:, :, :rank] = v_GKr
            candidates.append((members, v_GKq))
    return candidates, verdicts


def _batches(groups: dict[tuple[Any, ...], list[int]]) -> Iterator[list[tuple[tuple[Any, ...], list[int]]]]:
    """Yield (kind, members) of what is orthonormalised at once: on one device, of a limited size."""
    batch: list[tuple[tuple[Any, ...], list[int]]] = []
    room = 0
    for kind, members in groups.items():
        device, _, rank, features = kind
        size = max(1, _max_numel(device) // (features.size * rank))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            numel = len(chosen) * features.size * rank
            if batch and (numel > room or device != batch[0][0][0]):
                yield batch
                batch = []
            room = (room if batch else _max_numel(device)) - numel
            batch.append((kind, chosen))
    if batch:
        yield batch


def _whole_sums(sums: Sequence[tuple[algebra.BasisState, Sketch]], features: Axis) -> Tensor:
    """Return Z of all rows since the last refresh and all features, [G, K, r], of bases of equal shape."""
    z_GKr = torch.stack(
        [s.z if state.row_count == 0 else state.z[:, : state.rank] + s.z for state, s in sums]
    )
    if not features.is_sharded:
        return z_GKr
    return features.gather_rows(z_GKr.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()


def _read(outcome: Outcome) -> tuple[list[int], list[bool]]:
    """Return the number of rows of every sketch and all verdicts; the host waits here, once."""
    values = iter([] if outcome.values is None else outcome.values.tolist())
    counts = [round(next(values)) if count is None else count for count in outcome.counts]
    return counts, [bool(value) for value in values]
