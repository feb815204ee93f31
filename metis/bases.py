"""The basis of one operand of a linear, as a module keeps it: V in use, the sketch for the next one, its
rows.

One idea: a basis is remembered as named tensors (v, z, gram, counters) that are saved in checkpoints and
never cast with the model's parameters: z must stay float64. What a running step adds is put aside, rows
picked in its passes and nothing computed from them; `metis.renewal` does that after the optimizer step, for
all bases of a model at once.

Traps:
* Rows put aside take memory: those of a basis are sketched as soon as they exceed `MAX_WAITING_BYTES`, in a
  CUDA graph by the V in use (a cold basis, whose directions are another tensor every time, keeps its rows).
* Tensors of a state never change in place; `active` does. Those of new bases are pieces of larger ones.

Shape letters: n sampled rows, M rows of a microbatch, K features, r rank, q columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from metis import kernels
from metis.config import BasisConfig
from metis.decompose import basis as algebra
from metis.decompose import sampling
from metis.operand import Axis, token_mean
from metis.renewal import Made, Pending, Sketch, sketch_pending
from metis.rng import NoisePosition, stream_key

MAX_WAITING_BYTES = 32 * 2**20
"""Rows that one basis puts aside within a step: 4096 bf16 rows of 4096 features."""


@lru_cache(maxsize=1024)
def _sample_size(config: BasisConfig, rank: int, num_window_tokens: int, num_rows: int) -> tuple[float, int]:
    """Return the probability of a row, and the places that a sample of num_rows rows gets."""
    wanted = sampling.num_sampled_rows(
        num_window_tokens, config.row_sample_fraction, rank, config.oversample, config.max_rows_per_column
    )
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


@dataclass(frozen=True, slots=True)
class StandIn:
    """A basis as `metis.renewal` reads it, its V in a place that stays, [K, r]."""

    operand: str
    ordered: bool
    features: Axis
    config: BasisConfig
    state: algebra.BasisState


def _is_captured(x: Tensor) -> bool:
    """Whether launches are being recorded instead of made."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _fitting(place: Tensor | None, value: Tensor) -> Tensor:
    if place is not None and place.shape == value.shape and place.device == value.device:
        return place
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@torch.no_grad()
def overwrite_active(bases: Iterable[OperandBasis]) -> None:
    """Write what states hold into the places that `active` returns, in one go; it would come to it one by
    one. A basis that nobody has asked for yet gets no place.
    """
    with torch.inference_mode(False):
        asked = [b for b in bases if b._active is not None and b._active[0] is not b.state.v]
        pairs = [pair for basis in asked for pair in basis._renew_places()]
        if pairs:
            torch._foreach_copy_([place for place, _ in pairs], [value for _, value in pairs])


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
        self._pending: Pending | None = None
        self._active: tuple[Tensor, ...] | None = None  # state.v, then the places
        self._in_use_soon: tuple[Tensor, Tensor] | None = None  # state.v, and what to copy to its place

    def __setattr__(self, name: str, value: Any) -> None:
        """Set what is neither parameter, buffer nor module: it takes modules long to find that out."""
        object.__setattr__(self, name, value)

    def _local(self, whole: algebra.BasisState) -> algebra.BasisState:
        v, z = (self.features.local_rows(value) for value in (whole.v, whole.z))
        return algebra.at_rest(replace(whole, v=v, z=z))

    def _key(self, purpose: str) -> tuple[int, int]:
        return stream_key(self.seed, self.layer, self.operand, purpose)

    @property
    def active(self) -> Tensor | None:
        """The basis in use, [K_local, r] bf16; None before the first refresh.

        One tensor, overwritten when the state has a new basis, so that captured launches find it.
        """
        places = self._in_use()
        return None if places is None else places[0]

    @property
    def active_energies(self) -> Tensor | None:
        """Energies of the basis in use, [r] float64, overwritten like `active`; None before the first refresh
        and where bases are not `ordered`.
        """
        places = self._in_use() if self.ordered else None
        return None if places is None else places[1]

    def _in_use(self) -> tuple[Tensor, ...] | None:
        """Return the places of V and, where it is `ordered`, of its energies, holding those of the state."""
        if self._active is None or self._active[0] is not self.state.v:
            with torch.inference_mode(False), torch.no_grad():
                for place, value in self._renew_places():
                    place.copy_(value)
        return None if self._active is None or self.state.phase == "empty" else self._active[1:]

    def _renew_places(self) -> list[tuple[Tensor, Tensor]]:
        """Have places for what the state holds, the same ones where they fit; return (place, value) of those
        that the caller has to fill.
        """
        state = self.state
        if self._active is not None and self._active[0] is state.v:
            return []
        soon, self._in_use_soon = self._in_use_soon, None
        # A copy of what lies in one piece is a part of a launch for all bases; of columns, a launch.
        v = soon[1] if soon is not None and soon[0] is state.v else algebra.active_basis(state)
        if v is None:
            return []
        values = (v, state.energies[: state.rank]) if self.ordered else (v,)
        places = (None,) * len(values) if self._active is None else self._active[1:]
        places = tuple(map(_fitting, places, values))
        self._active = state.v, *places
        return list(zip(places, values, strict=True))

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
            num_mark_columns=sampling.MARK_COLUMNS,
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
        if sum(waiting.nbytes for waiting in pending.rows) <= MAX_WAITING_BYTES:
            return
        if not _is_captured(rows):
            sketch_pending([(self, pending)])
        elif self.state.phase == "warm":
            sketch_pending([(self.stand_in(), pending)])

    def add_weight(self, weight: Tensor, rows: Axis) -> None:
        """Put all rows of w [N_local, K_local] aside for this step's sketch."""
        is_shared = rows.is_sharded and self.config.tp_mode != "local"
        self._pending = Pending(rows=[weight], shards=rows if is_shared else None)  # read without gradients

    def stand_in(self) -> StandIn:
        """Return what a captured computation reads of a warm basis; replays find the basis then in use."""
        assert self.state.phase == "warm"
        return StandIn(
            operand=self.operand,
            ordered=self.ordered,
            features=self.features,
            config=self.config,
            state=replace(self.state, v=self.active),
        )

    def put_aside(self, pending: Pending) -> None:
        """Have for this step's sketch what an earlier `take_pending` returned, which stays as it is."""
        self._pending = pending.copy()

    def take_pending(self) -> Pending | None:
        """Return what this step has for the next basis, and forget it."""
        pending = self._pending
        self._pending = None
        return pending

    def take_in(self, found: Sketch | None, num_rows: int, made: Made | None, step: int) -> None:
        """Add a step's sketch, summed over ranks; renew the basis if enough rows have been sketched.

        found: may be None where `made` is used. made: what a warm refresh makes; None: find it.
        """
        state = self.state
        if made is None or state.row_count + num_rows < self.num_rows_needed:
            assert found is not None
            self.state = algebra.accumulate(state, found.z, found.gram, num_rows)
            self.refresh(step)
            return
        whole = self._whole(state) if self.tracks_drift else None
        v, energies, in_use = made
        self.state = algebra.renewed(state, self.features.local_rows(v), energies, step)
        self._in_use_soon = None if in_use is None else (self.state.v, self.features.local_rows(in_use))
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
        self._pending = None  # of a step that is not the loaded one
        self.state = algebra.state_from_tensors(
            {name: value.to(current[name].dtype).clone() for name, value in loaded.items()}
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OperandBasis:
        """Follow the module to another device, but keep every dtype: z stays float64 under `.bfloat16()`."""
        device = fn(torch.empty(0, device=self.state.v.device)).device
        state = self.state
        names = "v", "z", "gram", "energies"
        moved = {name: getattr(state, name).to(device) for name in names}
        self.state = algebra.at_rest(replace(state, **moved))
        return self
