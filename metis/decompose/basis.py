"""When and how a basis is renewed: sampled rows, one warm power step, every few steps.

One idea: a basis is a small value (`BasisState`) and renewing it is a pure function of that value and of
sketches summed since. Forward only reads it, so activation recompute and resume reproduce the same bits. A
sketch of rows x_s with directions V is

    B = x_s V,   Z = x_s^T B,   gram = B^T B        (float64, summed over microbatches and ranks)

Phases, one optimizer step each as long as enough rows came in; `refresh` runs after the optimizer step:

    phase   directions V of the sketch         basis in use     refresh makes of Z               next
    empty   Gaussian, r + oversample columns   none: no split   orthonormal, strongest first     cold
    cold    those r + oversample columns       leading r        Z U, U = top r of eigh(gram)     warm
    warm    the r columns in use               all r            orthonormal                      warm

So with plenty of tokens: step 0 runs unsplit, refreshes follow steps 0 and 1, then every step t with
t % refresh_interval_steps == refresh_interval_steps - 1. `num_cold_steps` other than 2 makes the cold start
longer (refreshes of phase cold that keep all columns come in between) or shorter (the first refresh keeps the
r strongest columns and is warm at once). With `ordered` a warm refresh also rotates V into the Ritz
directions of its sketch, strongest first, and keeps their energies; without it V is left as the power step
made it, because such a rotation is discontinuous where two energies meet.

Traps:
* Too few rows: no refresh, the accumulator grows over further steps (and is saved in checkpoints) until there
  are enough. Zero or non-finite sketches: the old basis stays, `num_kept` counts it, the accumulator starts
  anew.
* Z in bf16 loses the weak directions (residual 3.5 times the optimum at sigma_1 / sigma_r = 1e3). Z is
  float64 here; V is rounded to bf16 once, when it is put to use.
* Sums are the caller's: on a sharded axis pass complete B, Z and gram and a global row count. `refresh` needs
  all K rows of Z; gather them (K x r, once per refresh) and slice the result.

For a weight w_NK the "tokens" are its N rows; `minimum_rows` is then 1.

Shape letters: n sampled rows, K features, r rank, q = r + oversample (at most K) columns, M rows of a
microbatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from metis.decompose.orthonormal import noise_level, order_by_energy, orthonormalize, with_fixed_signs
from metis.errors import ShapeError
from metis.rng import NoisePosition, gaussian

_PHASES = ("empty", "cold", "warm")


@dataclass(frozen=True, slots=True)
class BasisState:
    """A basis, and the sketch that will become the next one. Tensors keep their shape through all phases.

    phase: see the module docstring. rank: columns of the basis in use, r <= K.
    v: [K, q] bf16; in phase warm the columns past r are zero.
    z: [K, q] float64 and gram: [q, q] float64, sums since the last refresh; a z without rows takes no memory
    (`at_rest`) and, like all of these, is never written to. row_count: rows in them, over all
    ranks. last_refresh_step: optimizer step after which v was made, -1 for none. num_kept: refreshes that
    kept the old v. num_refreshes: those that made a new one
    since the last cold start. energies: [q] float64, singular values of V^T Z
    when v was made and ordered (sigma_i^2 of the rows sketched), else zero.
    """

    phase: Literal["empty", "cold", "warm"]
    rank: int
    v: Tensor
    z: Tensor
    gram: Tensor
    energies: Tensor
    row_count: int = 0
    last_refresh_step: int = -1
    num_kept: int = 0
    num_refreshes: int = 0

    @property
    def num_sketch_columns(self) -> int:
        """Columns of the directions that the next sketch uses: q until warm, then r."""
        return self.rank if self.phase == "warm" else self.v.shape[1]


def empty_state(
    key: tuple[int, int], num_features: int, rank: int, oversample: int, device: torch.device | str = "cpu"
) -> BasisState:
    """Return the state before step 0: Gaussian sketch directions, no basis in use.

    key: stream of this basis (seed, layer, operand). The rank is cut to K, the width r + oversample too.
    """
    rank = min(rank, num_features)
    width = min(rank + oversample, num_features)
    return BasisState(
        phase="empty",
        rank=rank,
        v=initial_sketch_directions(key, num_features, width, device),
        z=_zeros(num_features, width, torch.device(device)),
        gram=torch.zeros(width, width, dtype=torch.float64, device=device),
        energies=torch.zeros(width, dtype=torch.float64, device=device),
    )


def initial_sketch_directions(
    key: tuple[int, int], num_features: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return [K, width] bf16 Gaussian directions, addressed by global feature and column."""
    rows = torch.arange(num_features, dtype=torch.int64, device=device)
    cols = torch.arange(width, dtype=torch.int64, device=device)
    return gaussian(key, rows, cols).to(torch.bfloat16)


def active_basis(state: BasisState) -> Tensor | None:
    """Return the basis in use, V [K, r] bf16, or None before the first refresh (no basis, no split)."""
    return None if state.phase == "empty" else state.v[:, : state.rank]


def sketch_directions(state: BasisState) -> Tensor:
    """Return the directions of the next sketch, [K, q] bf16 until warm, [K, r] then."""
    return state.v[:, : state.num_sketch_columns]


def wants_sketch(state: BasisState, step: int, refresh_interval_steps: int) -> bool:
    """Return whether backward of optimizer step `step` (from 0) must sketch.

    True while cold starting, at the last step of every interval, and while an earlier sketch waits for more
    rows.
    """
    return (
        state.phase != "warm"
        or state.row_count > 0
        or step % refresh_interval_steps == refresh_interval_steps - 1
    )


def accumulate(state: BasisState, z_Kq: Tensor, gram_qq: Tensor, row_count: int) -> BasisState:
    """Return the state with a sketch of `row_count` rows added to its accumulator.

    z_Kq, gram_qq: of `sketch` with `sketch_directions(state)`, summed over the ranks that hold different
    tokens.
    """
    columns = state.num_sketch_columns
    if z_Kq.shape != (state.z.shape[0], columns) or gram_qq.shape != (columns, columns):
        raise ShapeError(
            "accumulate",
            f"a {state.phase} basis takes z [{state.z.shape[0]}, {columns}] and gram [{columns}, {columns}], "
            f"received {tuple(z_Kq.shape)} and {tuple(gram_qq.shape)}",
        )
    z, gram = state.z.clone(), state.gram.clone()
    z[:, :columns] += z_Kq
    gram[:columns, :columns] += gram_qq
    return replace(state, z=z, gram=gram, row_count=state.row_count + row_count)


def refresh(
    state: BasisState,
    step: int,
    *,
    refill_key: tuple[int, int],
    num_rows_needed: int = 1,
    num_cold_steps: int = 2,
    ordered: bool = False,
) -> BasisState:
    """Return the state after optimizer step `step`: a new basis if enough rows were sketched.

    num_rows_needed: `minimum_rows(...)` for tokens, 1 for weights. refill_key: stream of random directions
    for a rank-deficient sketch. num_cold_steps, ordered: see the module docstring. Call it after every step;
    with too few rows it returns the same state.

    A zero or non-finite sketch keeps v and the phase and counts in num_kept. The accumulator is zero
    afterwards in either case.
    """
    if state.row_count < max(1, num_rows_needed):
        return state
    becomes_warm = state.phase == "warm" or state.num_refreshes + 1 >= num_cold_steps
    v = _next_basis(state, NoisePosition(step, 0), refill_key, becomes_warm)
    if v is None:
        return replace(without_sketch(state), num_kept=state.num_kept + 1)
    energies = torch.zeros_like(state.energies)
    if ordered:
        z = state.z[:, : state.num_sketch_columns]
        v = order_by_energy(v, z)
        values = torch.linalg.svdvals(v.T @ z)
        energies[: values.numel()] = values
    new_v = torch.zeros_like(state.v)
    new_v[:, : v.shape[1]] = v.to(torch.bfloat16)
    return renewed(state, new_v, energies, step, phase="warm" if becomes_warm else "cold")


def renewed(
    state: BasisState, v_Kq: Tensor, energies: Tensor, step: int, phase: Literal["cold", "warm"] = "warm"
) -> BasisState:
    """Return the state after a refresh at `step` that made v_Kq, [K, q] bf16, and energies, [q] float64."""
    old = without_sketch(state)
    # Not by `replace`, which looks every field up: this is done for every basis of a model.
    return BasisState(
        phase=phase,
        rank=old.rank,
        v=v_Kq,
        z=old.z,
        gram=old.gram,
        energies=energies,
        last_refresh_step=step,
        num_kept=old.num_kept,
        num_refreshes=old.num_refreshes + 1,
    )


def _next_basis(
    state: BasisState, position: NoisePosition, refill_key: tuple[int, int], becomes_warm: bool
) -> Tensor | None:
    """The orthonormal float64 columns that the accumulated sketch makes, or None to keep the old ones."""
    if not bool(torch.isfinite(state.gram).all()):
        return None
    columns = state.rank if becomes_warm else state.num_sketch_columns
    z = state.z[:, : state.num_sketch_columns]
    if state.phase == "cold" and becomes_warm:
        z = z @ _ritz_rotation(state.gram, columns)
    if state.phase == "empty" and becomes_warm:
        # Gaussian directions have no order to keep: the strongest columns of what they span are wanted.
        wide = orthonormalize(z, refill_key=refill_key, num_columns=z.shape[1], position=position).v
        return None if wide is None else order_by_energy(wide, z)[:, :columns]
    v = orthonormalize(z, refill_key=refill_key, num_columns=columns, position=position).v
    return v if v is None or state.phase != "empty" else order_by_energy(v, z)


def _ritz_rotation(gram_qq: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of gram, [q, k <= rank], descending; those without energy are left to the refill.

    Directions at rounding level would be scaled up to unit length and differ from layout to layout.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(gram_qq)
    top = eigenvalues.flip(0)[:rank]
    keep = top > noise_level(gram_qq.shape[0]) * top[0]
    return with_fixed_signs(eigenvectors.flip(1)[:, :rank][:, keep])


def resized(
    state: BasisState, rank: int, oversample: int, *, key: tuple[int, int], refill_key: tuple[int, int]
) -> BasisState:
    """Return a basis of another rank or width that goes on with the directions of `state`.

    state: with all K rows of v. Its leading columns (power steps keep them strongest first) are completed by
    random directions orthonormal to them; the leading `rank` are in use at once, so that the head never gets
    worse than it was for a larger rank. The phase is cold again: the next refreshes sketch the whole new
    width and end with its strongest directions. Rows sketched so far are dropped. A state that has no basis
    yet starts over.

    key: as in `empty_state`. refill_key: stream of the random directions, at position `last_refresh_step`.
    """
    fresh = empty_state(key, state.v.shape[0], rank, oversample, device=state.v.device)
    if state.phase == "empty":
        return fresh
    width = fresh.v.shape[1]
    v = orthonormalize(
        sketch_directions(state)[:, :width].to(torch.float64),
        refill_key=refill_key,
        num_columns=width,
        position=NoisePosition(state.last_refresh_step, 0),
    ).v
    if v is None:
        return fresh
    energies, kept = torch.zeros_like(fresh.energies), min(width, state.energies.numel())
    energies[:kept] = state.energies[:kept]
    return replace(
        fresh,
        phase="cold",
        v=v.to(torch.bfloat16).contiguous(),  # as after a load: the layout in memory decides last bits
        energies=energies,
        last_refresh_step=state.last_refresh_step,
        num_kept=state.num_kept,
    )


def without_sketch(state: BasisState) -> BasisState:
    """Return the state with the rows sketched since the last refresh forgotten."""
    if state.row_count == 0:  # the sums are zero, and tensors of a state never change
        return state
    return at_rest(replace(state, gram=torch.zeros_like(state.gram), row_count=0))


def at_rest(state: BasisState) -> BasisState:
    """Return the state with a z that takes no memory where no rows have been sketched, as is the rule between
    two refreshes.
    """
    if state.row_count > 0 or state.z.stride() == (0, 0):
        return state
    return replace(state, z=_zeros(*state.z.shape, state.z.device))


def _zeros(num_features: int, width: int, device: torch.device) -> Tensor:
    """Return a zero that is read as [K, q] float64."""
    return torch.zeros(1, 1, dtype=torch.float64, device=device).expand(num_features, width)


def largest_principal_angle(before: BasisState, after: BasisState) -> float | None:
    """Return the largest angle between the spans of two bases in use, in degrees; None unless both exist.

    arcsin ||(I - V V^T) V'||_2 of the bf16 bases orthonormalised, so that their rounding does not show.
    """
    old, new = active_basis(before), active_basis(after)
    if old is None or new is None or after.last_refresh_step == before.last_refresh_step:
        return None
    q_old, q_new = (torch.linalg.qr(v.to(torch.float64))[0] for v in (old, new))
    sine = torch.linalg.matrix_norm(q_new - q_old @ (q_old.T @ q_new), ord=2)
    return math.degrees(math.asin(min(1.0, float(sine))))


def state_tensors(state: BasisState) -> dict[str, Tensor]:
    """Return the state as tensors for a checkpoint; in v and z the feature axis comes first.

    counters: [6] int64 = phase (0 empty, 1 cold, 2 warm), rank, row_count, last_refresh_step, num_kept,
    num_refreshes.
    """
    counters = [
        _PHASES.index(state.phase),
        state.rank,
        state.row_count,
        state.last_refresh_step,
        state.num_kept,
        state.num_refreshes,
    ]
    return {
        "v": _by_itself(state.v),
        "z": state.z.contiguous(),
        "gram": state.gram,
        "energies": _by_itself(state.energies),
        "counters": torch.tensor(counters, dtype=torch.int64),
    }


def _by_itself(made: Tensor) -> Tensor:
    """Copy a tensor that was made together with others: a file would take them all along."""
    return made.clone() if made.untyped_storage().nbytes() > made.nbytes else made


def state_from_tensors(tensors: dict[str, Tensor]) -> BasisState:
    """Return the state that `state_tensors` wrote."""
    phase, rank, row_count, last_refresh_step, num_kept, num_refreshes = (int(c) for c in tensors["counters"])
    return at_rest(
        BasisState(
            phase=_PHASES[phase],
            rank=rank,
            v=tensors["v"],
            z=tensors["z"],
            gram=tensors["gram"],
            energies=tensors["energies"],
            row_count=row_count,
            last_refresh_step=last_refresh_step,
            num_kept=num_kept,
            num_refreshes=num_refreshes,
        )
    )
