"""The bases of linears: rows are picked in backward, everything else happens once per step, for all at once.

One idea: a refresh is many small operations, and on a GPU their number is what it costs. So a step that
renews bases only puts rows aside; `renew_bases` then sketches and orthonormalises the bases of equal shape
together, and the host reads what came of it (how many rows, which bases may be used) in one go. Only a basis
that is not the regular case (cold, in Ritz order, too few rows, rank-deficient) is taken by itself.

A basis is remembered as named tensors (v, z, gram, counters) that are saved in checkpoints and never cast
with the model's parameters: z must stay float64.

Traps:
* Rows put aside take memory: those of a basis are sketched as soon as they exceed `MAX_WAITING_BYTES`.
* Collectives: ranks that share features make the same groups in the same order, since their shapes and
  numbers of rows agree. Sums over ranks that hold other tokens go in one message, by basis, not by group.

Shape letters: n sampled rows, K features held here, r rank, q columns of a sketch, G bases of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metis import kernels
from metis.config import BasisConfig
from metis.decompose import basis as algebra
from metis.decompose import sampling
from metis.decompose.orthonormal import orthonormal_columns
from metis.decompose.projector import num_chunks_for, tree_sum
from metis.decompose.sketch import sketch, sketch_in_chunks
from metis.errors import ConfigError
from metis.operand import Axis, token_mean
from metis.rng import NoisePosition, stream_key

MAX_WAITING_BYTES = 16 * 2**20
"""Rows that one basis puts aside within a step: 2048 bf16 rows of 4096 features."""

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


@lru_cache(maxsize=1024)
def _sample_size(config: BasisConfig, rank: int, num_window_tokens: int, num_rows: int) -> tuple[float, int]:
    """Return the probability of a row, and the places that a sample of num_rows rows gets."""
    wanted = sampling.num_sampled_rows(num_window_tokens, config.row_sample_fraction, rank, config.oversample)
    probability = sampling.sample_probability(wanted, num_window_tokens)
    places = sampling.row_capacity(num_rows, probability, config.num_pinned_rows)
    return probability, -(-places // 16) * 16


def picks_by_kernel(x: Tensor) -> bool:
    """Whether rows of x are picked by `metis.kernels.sampling`, which does not wait for their number."""
    return (
        x.is_cuda
        and x.stride(-1) == 1
        and x.numel() > 0
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and kernels.is_available(x.device)
    )


class OperandBasis(nn.Module):
    """One basis of one linear: V and the sketch for the next V, for the features this rank holds.

    layer, operand: names that key its random numbers. features: the axis it lives on. centred: sketches read
    rows less the mean over tokens. ordered: V is kept in Ritz order. Saved: v [K_local, q] bf16, z [K_local,
    q] float64, gram [q, q] and energies [q] float64, counters [6] int64. Rebuilt: nothing.
    """

    def __init__(
        self,
        *,
        layer: str,
        operand: str,
        features: Axis,
        rank: int,
        config: BasisConfig,
        seed: int,
        centred: bool = False,
        ordered: bool = False,
        device: Any = "cpu",
    ) -> None:
        super().__init__()
        self.layer, self.operand, self.config, self.seed = layer, operand, config, seed
        self.centred, self.ordered = centred, ordered
        self.features = features.alone() if config.tp_mode == "local" else features
        whole = algebra.empty_state(
            self._key("directions"), self.features.size, rank, config.oversample, device=torch.device(device)
        )
        self.state = self._local(whole)
        self.tracks_drift, self.drift_degrees = False, None
        self._active: tuple[Tensor, str, Tensor | None] | None = None
        self._pending: Pending | None = None
        self._active: tuple[Tensor, Tensor] | None = None

    def _local(self, whole: algebra.BasisState) -> algebra.BasisState:
        return replace(whole, v=self.features.local_rows(whole.v), z=self.features.local_rows(whole.z))

    def _key(self, purpose: str) -> tuple[int, int]:
        return stream_key(self.seed, self.layer, self.operand, purpose)

    @property
    def active(self) -> Tensor | None:
        """The basis in use, [K_local, r] bf16, one object until it changes; None before the first refresh."""
        state = self.state
        if self._active is None or self._active[0] is not state.v:
            v = algebra.active_basis(state)
            if v is None:
                return None
            self._active = state.v, v
        return self._active[1]

    @property
    def num_rows_needed(self) -> int:
        """Rows below which a refresh waits for more."""
        if self.operand == "weight":
            return 1
        return sampling.minimum_rows(self.state.rank, self.config.oversample)

    def wants_sketch(self, step: int) -> bool:
        """Whether backward of optimizer step `step` must sketch."""
        return algebra.wants_sketch(self.state, step, self.config.refresh_interval_steps)

    @torch.no_grad()
    def pick_rows(self, x: Tensor, tokens: Axis, position: NoisePosition, num_window_tokens: int) -> Tensor:
        """Return the sampled rows of one microbatch that are held here, of x [M_local, K_local].

        [n, K_local + MARK_COLUMNS] in x's dtype, or fp32 at least where rows are centred.
        """
        probability, num_places = _sample_size(self.config, self.state.rank, num_window_tokens, x.shape[0])
        pick = self._pick_by_kernel if picks_by_kernel(x) else self._pick_by_mask
        rows = pick(x.detach(), tokens, position, probability, num_places)
        if not self.centred:
            return rows
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        picked, marks = rows.split([x.shape[1], sampling.MARK_COLUMNS], dim=1)
        mean = token_mean(x, tokens).t()
        return torch.cat([(picked - mean).where(marks[:, :1] > 0, 0.0), marks], dim=1)

    def _pick_by_mask(
        self, x: Tensor, tokens: Axis, position: NoisePosition, probability: float, num_places: int
    ) -> Tensor:
        """The definition; as many rows as there are."""
        row_amax = self.features.reduce_max(x.abs().amax(dim=1).to(torch.float32))
        mask = sampling.sample_rows(
            self._key("sample"),
            position,
            torch.cat(tokens.gather(tokens.indices(x.device))),
            torch.cat(tokens.gather(row_amax)),
            probability=probability,
            num_pinned_rows=self.config.num_pinned_rows,
        )
        picked = x[mask.chunk(tokens.num_shards)[tokens.shard]]
        marks = picked.new_zeros((picked.shape[0], sampling.MARK_COLUMNS))
        marks[:, 0] = 1
        return torch.cat([picked, marks], dim=1)

    def _pick_by_kernel(
        self, x: Tensor, tokens: Axis, position: NoisePosition, probability: float, num_places: int
    ) -> Tensor:
        """The same rows in num_places places, the rest zero."""
        from metis.kernels.arguments import indices_of
        from metis.kernels.sampling import row_amax as largest_of_rows
        from metis.kernels.sampling import take_rows

        row_amax = self.features.reduce_max(largest_of_rows(x))
        index = indices_of(tokens.runs, x.device)
        if tokens.is_sharded:
            row_amax, index = (torch.cat(tokens.gather(value)) for value in (row_amax, index))
        return take_rows(
            x,
            row_amax,
            index,
            key=self._key("sample"),
            position=position,
            threshold=sampling.hash_threshold(probability),
            num_pinned_rows=self.config.num_pinned_rows,
            num_places=num_places,
            first=tokens.shard * x.shape[0],
        )

    @torch.no_grad()
    def add_rows(self, rows: Tensor, shards: Axis | None = None) -> None:
        """Put picked rows aside for this step's sketch; `shards`: ranks that hold others of the same
        microbatch.
        """
        if self._pending is None:
            self._pending = Pending()
        pending = self._pending
        pending.shards = shards if shards is not None and shards.is_sharded else None
        pending.rows.append(rows)
        if sum(waiting.nbytes for waiting in pending.rows) > MAX_WAITING_BYTES:
            _sketch_all([(self, pending)])

    def add_weight(self, weight: Tensor, rows: Axis) -> None:
        """Put all rows of w [N_local, K_local] aside for this step's sketch."""
        is_shared = rows.is_sharded and self.config.tp_mode != "local"
        self._pending = Pending(rows=[weight.detach()], shards=rows if is_shared else None)

    def take_pending(self) -> Pending | None:
        """Return what this step has for the next basis, and forget it."""
        pending, self._pending = self._pending, None
        return pending

    @torch.no_grad()
    def take_in(self, found: Sketch, num_rows: int, made: tuple[Tensor, Tensor] | None, step: int) -> None:
        """Add a step's sketch, summed over ranks; renew the basis if enough rows have been sketched.

        made: V [K, q] bf16 that a warm refresh makes of all rows sketched so far, and energies [q]; None:
        find them.
        """
        state = self.state
        if made is None or state.row_count + num_rows < self.num_rows_needed:
            self.state = algebra.accumulate(state, found.z, found.gram, num_rows)
            self.refresh(step)
            return
        whole = self._whole(state) if self.tracks_drift else None
        v, energies = made
        self.state = algebra.renewed(state, self.features.local_rows(v), energies, step)
        if whole is not None:
            self.drift_degrees = algebra.largest_principal_angle(whole, replace(self.state, v=v))

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Make the next basis if enough rows have been sketched; gathers the feature axis, slices the
        result.
        """
        config = self.config
        if self.state.row_count < self.num_rows_needed:
            return
        whole = self._whole(self.state)
        fresh = algebra.refresh(
            whole,
            step,
            refill_key=self._key("refill"),
            num_rows_needed=self.num_rows_needed,
            num_cold_steps=config.num_cold_steps,
            ordered=self.ordered,
        )
        if self.tracks_drift:
            self.drift_degrees = algebra.largest_principal_angle(whole, fresh)
        self.state = self._local(fresh)

    def _whole(self, state: algebra.BasisState) -> algebra.BasisState:
        features = self.features
        return replace(state, v=features.gather_rows(state.v), z=features.gather_rows(state.z))

    @torch.no_grad()
    def take_over(self, old: OperandBasis) -> None:
        """Go on from the basis that an earlier recipe kept for the same operand; collective on sharded axes.

        Same rank and width: with everything, less the rows sketched so far if centring has changed. Another
        rank or width: `metis.decompose.basis.resized`, in use without a gap. A basis per rank against one
        for all, or one that must now be in Ritz order: from a cold start.
        """
        self.tracks_drift = old.tracks_drift
        is_local, was_local = (basis.config.tp_mode == "local" for basis in (self, old))
        if is_local != was_local or (self.ordered and not old.ordered):
            return
        state, mine = old.state, self.state
        if (state.rank, state.v.shape) == (mine.rank, mine.v.shape):
            self.state = state if self.centred == old.centred else algebra.without_sketch(state)
            return
        width = mine.v.shape[1]
        whole = algebra.resized(
            replace(state, v=self.features.gather_rows(state.v)),
            mine.rank,
            width - mine.rank,
            key=self._key("directions"),
            refill_key=self._key("resize"),
        )
        self.state = self._local(whole)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state to save: v and z for the local features, gram and counters the same on every
        shard.
        """
        return algebra.state_tensors(self.state)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in self.tensors().items():
            destination[prefix + name] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        current = self.tensors()
        missing = [prefix + name for name in current if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        loaded = {
            name: state_dict[prefix + name].detach().to(value.device) for name, value in current.items()
        }
        for name, value in current.items():
            if loaded[name].dim() > value.dim():  # gate|up lies in checkpoints as [parts, width, columns]
                loaded[name] = loaded[name].flatten(0, 1)
            if name == "counters" and int(loaded[name].flatten()[1]) != self.state.rank:
                error_msgs.append(
                    f"{prefix}{name}: a basis of rank {int(loaded[name].flatten()[1])} is not one of rank "
                    f"{self.state.rank}"
                )
                return
            if loaded[name].shape != value.shape:
                error_msgs.append(
                    f"{prefix}{name}: shape {tuple(loaded[name].shape)} is not {tuple(value.shape)}"
                )
                return
        self.state = algebra.state_from_tensors(
            {name: value.to(current[name].dtype).clone() for name, value in loaded.items()}
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OperandBasis:
        """Follow the module to another device, but keep every dtype: z stays float64 under `.bfloat16()`."""
        device = fn(torch.empty(0, device=self.state.v.device)).device
        state = self.state
        self.state = replace(
            state,
            v=state.v.to(device),
            z=state.z.to(device),
            gram=state.gram.to(device),
            energies=state.energies.to(device),
        )
        return self


@torch.no_grad()
def renew_bases(bases: Iterable[OperandBasis], step: int, token_group: Any = None) -> None:
    """Turn what was put aside in optimizer step `step` into new bases; call it on every rank.

    token_group: ranks that saw other tokens of the step.
    """
    bases = list(bases)
    taken = [(basis, basis.take_pending()) for basis in bases]
    work = [(basis, pending) for basis, pending in taken if pending is not None]
    _sketch_all(work)
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


def _sketch_all(work: Sequence[tuple[OperandBasis, Pending]]) -> None:
    """Turn rows put aside into sketches, bases of equal shape together."""
    groups: dict[tuple[Any, ...], list[tuple[OperandBasis, Pending]]] = {}
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


def _sketch_group(group: Sequence[tuple[OperandBasis, Pending]]) -> None:
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


def _sums(x_GnK: Tensor, v_GKq: Tensor, basis: OperandBasis) -> tuple[Tensor, Tensor]:
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


def _sum_over_shards(work: Sequence[tuple[OperandBasis, Pending]]) -> None:
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
    bases: Sequence[OperandBasis], found: Sequence[Sketch]
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
