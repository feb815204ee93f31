"""Renewing the bases of a model together, after the optimizer step.

One idea: a refresh is many small operations, and on a GPU their number is what it costs. So the bases of
equal shape are sketched and orthonormalised together, and the host reads what came of it (how many rows,
which bases may be used) in one go. Only a basis that is not the regular case (cold, in Ritz order, too few
rows, rank-deficient) is taken by itself.

Traps:
* Ranks that share features make the same groups in the same order, since their shapes and numbers of rows
  agree. Ranks that hold other tokens may not: their sums go in one message, by basis, not by group.
* The order of float64 sums depends on the group. V in bf16 does not, unless an element lies on a tie to
  within their rounding.

Shape letters: n sampled rows, K features held here, r rank, q columns of a sketch, G bases of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from metis.config import BasisConfig
from metis.decompose import basis as algebra
from metis.decompose.orthonormal import orthonormal_columns
from metis.decompose.projector import num_chunks_for, tree_sum
from metis.decompose.sketch import sketch, sketch_in_chunks
from metis.errors import ConfigError
from metis.operand import Axis


class Renewable(Protocol):
    """What is read and called of a basis here: `metis.bases.OperandBasis`."""

    operand: str
    ordered: bool
    features: Axis
    config: BasisConfig
    state: algebra.BasisState

    def take_pending(self) -> Any:
        """Return this step's rows and sketches, and forget them."""
        ...

    def take_in(self, *arguments: Any) -> Any:
        """Add a summed sketch to the accumulator."""
        ...

    def refresh(self, *arguments: Any, **options: Any) -> Any:
        """Make the next basis if enough rows have been sketched."""
        ...


MAX_GROUP_NUMEL = 2**24
"""Numbers that are in float64 at once (128 MiB): what a group of bases, or of a weight's rows, may have."""


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


@torch.no_grad()
def renew_bases(bases: Iterable[Renewable], step: int, token_group: Any = None) -> None:
    """Turn what was put aside in optimizer step `step` into new bases; call it on every rank.

    token_group: ranks that saw other tokens of the step.
    """
    bases = list(bases)
    taken = [(basis, basis.take_pending()) for basis in bases]
    work = [(basis, pending) for basis, pending in taken if pending is not None]
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
    counts, usable = _read(found, verdicts)
    for number, ((basis, _), sums) in enumerate(zip(work, found, strict=True)):
        made = candidates[number] if usable.get(number) else None
        basis.take_in(sums, counts[number], made, step)
    for basis, pending in taken:
        if pending is None:
            basis.refresh(step)


def sketch_pending(work: Sequence[tuple[Renewable, Pending]]) -> None:
    """Turn rows put aside into sketches, bases of equal shape together."""
    groups: dict[tuple[Any, ...], list[tuple[Renewable, Pending]]] = {}
    for basis, pending in work:
        if pending.rows:
            first, columns = pending.rows[0], basis.state.num_sketch_columns
            num_rows = sum(rows.shape[0] for rows in pending.rows)
            kind = (first.device, first.dtype, num_rows, first.shape[1], columns, basis.features,
                    basis.config.tp_mode, basis.config.num_canonical_chunks)  # fmt: skip
            groups.setdefault(kind, []).append((basis, pending))
    for kind, group in groups.items():
        size = max(1, MAX_GROUP_NUMEL // max(1, kind[2] * kind[3]))
        for start in range(0, len(group), size):
            _sketch_group(group[start : start + size])


def _sketch_group(group: Sequence[tuple[Renewable, Pending]]) -> None:
    """Sketch the rows of bases of equal shape, and let go of them."""
    basis = group[0][0]
    num_features = basis.features.local_size
    pieces = [rows for _, pending in group for rows in pending.rows]
    rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    x_GnK = rows.unflatten(0, (len(group), -1)) if rows.shape[0] else rows.expand(len(group), -1, -1)
    directions = [algebra.sketch_directions(basis.state) for basis, _ in group]
    v_GKq = directions[0][None] if len(group) == 1 else torch.stack(directions)
    is_marked = x_GnK.shape[2] > num_features
    counts: Sequence[Tensor | int] = [x_GnK.shape[1]] * len(group)
    if is_marked:
        counts = x_GnK[:, :, num_features].sum(dim=1, keepdim=True, dtype=torch.float64).unbind()
    z_GKq = gram_Gqq = None
    height = max(1, MAX_GROUP_NUMEL // (len(group) * num_features))
    for start in range(0, max(1, x_GnK.shape[1]), height):
        z, gram = _sums(x_GnK[:, start : start + height, :num_features], v_GKq, basis)
        z_GKq = z if z_GKq is None else z_GKq.add_(z)
        gram_Gqq = gram if gram_Gqq is None else gram_Gqq.add_(gram)
    assert z_GKq is not None and gram_Gqq is not None
    for (_, pending), z, gram, count in zip(group, z_GKq.unbind(), gram_Gqq.unbind(), counts, strict=True):
        before, pending.rows = pending.sketch, []
        pending.sketch = Sketch(z, gram, count)
        if before is not None:
            pending.sketch = Sketch(before.z + z, before.gram + gram, before.count + count)


def _sums(x_GnK: Tensor, v_GKq: Tensor, basis: Renewable) -> tuple[Tensor, Tensor]:
    """Return Z and gram of rows by the directions of bases like `basis`, B summed over all features."""
    features, config = basis.features, basis.config
    if config.tp_mode == "fast":
        b = features.sum(x_GnK.to(torch.float32) @ v_GKq.to(torch.float32))
        return sketch(x_GnK, b)

    def complete(b_Gnq: Tensor) -> Tensor:
        return tree_sum(torch.stack(features.gather(b_Gnq))) if features.is_sharded else b_Gnq

    total = num_chunks_for(features.size // features.parts, config.num_canonical_chunks)
    if total % features.num_shards:
        raise ConfigError(
            "basis.num_canonical_chunks",
            f"must be a multiple of the tensor-parallel size, received {total} chunks (of an axis of "
            f"{features.size}) and {features.num_shards} ranks; raise the setting or lower the parallel size",
        )
    return sketch_in_chunks(x_GnK, v_GKq, total // features.num_shards, features.parts, complete)


def _sum_over_shards(work: Sequence[tuple[Renewable, Pending]]) -> None:
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
    message = total(torch.cat([value.flatten() for value in values]))
    pieces = message.split([value.numel() for value in values])
    for (s, name), value, piece in zip(parts, values, pieces, strict=True):
        setattr(s, name, piece.view_as(value))


def _warm_candidates(
    bases: Sequence[Renewable], found: Sequence[Sketch]
) -> tuple[dict[int, tuple[Tensor, Tensor]], list[tuple[list[int], Tensor]]]:
    """Return V [K, q] and energies [q] that every warm basis would have, by number, and which may be used.

    The second list: (numbers, [G] bool on the device) for each group of equal shape.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, basis in enumerate(bases):
        state = basis.state
        if state.phase == "warm" and not basis.ordered:
            kind = (state.v.device, state.v.shape, state.rank, basis.features)
            groups.setdefault(kind, []).append(number)
    candidates: dict[int, tuple[Tensor, Tensor]] = {}
    verdicts = []
    for (_, shape, rank, features), members in groups.items():
        size = max(1, MAX_GROUP_NUMEL // (features.size * rank))
        for start in range(0, len(members), size):
            chosen = members[start : start + size]
            sums = [_with_earlier_rows(bases[number].state, found[number]) for number in chosen]
            z_GKr = torch.stack([z for z, _ in sums])
            if features.is_sharded:
                z_GKr = features.gather_rows(z_GKr.transpose(0, 1).contiguous()).transpose(0, 1)
            v_GKr, ok = orthonormal_columns(z_GKr.contiguous())
            grams = torch.stack([gram for _, gram in sums])
            ok &= torch.linalg.vector_norm(grams, ord=torch.inf, dim=(1, 2)) < torch.inf
            v_GKq = torch.zeros(
                (len(chosen), features.size, shape[1]), dtype=torch.bfloat16, device=v_GKr.device
            )
            v_GKq[:, :, :rank] = v_GKr
            energies = ok.new_zeros((len(chosen), shape[1]), dtype=torch.float64)
            made = zip(v_GKq.unbind(), energies.unbind(), strict=True)
            candidates.update(zip(chosen, made, strict=True))
            verdicts.append((chosen, ok))
    return candidates, verdicts


def _with_earlier_rows(state: algebra.BasisState, found: Sketch) -> tuple[Tensor, Tensor]:
    """Return z and gram of all rows since the last refresh."""
    if state.row_count == 0:
        return found.z, found.gram
    columns = state.num_sketch_columns
    return state.z[:, :columns] + found.z, state.gram[:columns, :columns] + found.gram


def _read(
    found: Sequence[Sketch], verdicts: Sequence[tuple[list[int], Tensor]]
) -> tuple[list[int], dict[int, bool]]:
    """Return the number of rows of every sketch and the verdict on every candidate; the host waits here."""
    unknown = [number for number, s in enumerate(found) if isinstance(s.count, Tensor)]
    tensors = [found[number].count for number in unknown] + [ok.to(torch.float64) for _, ok in verdicts]
    values = torch.cat(tensors).tolist() if tensors else []
    counts = [0 if isinstance(s.count, Tensor) else s.count for s in found]
    for number, value in zip(unknown, values, strict=False):
        counts[number] = round(value)
    judged = [number for chosen, _ in verdicts for number in chosen]
    return counts, dict(zip(judged, map(bool, values[len(unknown) :]), strict=True))
