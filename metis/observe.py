"""What quantisation does to the operands of a running training step, layer by layer.

One idea: `OperandMeter.measure` looks over the shoulder of one encoding and sees what its GEMM will see, the
decoded operand x^ = P V^T + R^ (the head's factors and the decoded residual, rotated back where its cell asks
for the Hadamard transform; the one matrix that is multiplied where heads are merged), beside its source x.
Every number is that of the whole matrix: sums of squares, counts and maxima are reduced over the ranks that
hold the rest of its rows or columns, in float64 and int64, so that no layout changes them beyond the order of
a float64 sum. All norms are Frobenius norms; `y` is what the quantiser read (the residual; rotated, where the
cell rotates), M x K the operand's size, r its rank.

| metric | formula | cost |
| --- | --- | --- |
| relative_error | |x^ - x| / |x| | 2 M K r |
| sqnr_db | -20 log10 of it | |
| tail_error | |(x^ - x)(I - U U^T)| / |x (I - U U^T)|, U the r leading right directions of x | 24 M K r |
| unsplit_relative_error, unsplit_tail_error | the same for x quantised without its head | one encoding |
| zeroed_share | non-zero elements of y that decode to zero / non-zero elements | M K |
| zeroed_share_q1 ... q4 | the same within each quartile of |y|, q1 the smallest magnitudes | M K |
| clipped_share | elements of y above what their block can hold / elements | M K |
| scale_saturated_share | block scales at the format's largest value / blocks that hold a non-zero | M K |
| scale_underflow_share | block scales that are zero or subnormal / blocks that hold a non-zero | |
| captured_energy | |P V^T|^2 / |x|^2 (|P|^2 / |x|^2 for an orthonormal V) | (M + K) r^2 |
| residual_amax_ratio | max |R| / max |x| | M K |
| residual_growth | |R| / |x| now / in the first step after the basis was made | M K |
| drift_degrees | largest principal angle between the basis in use and the one before | K r^2, per refresh |
| residual_top_singular_value | of the residual weight of a reparametrised linear | 20 N K per Krylov column |

The last three need the layer's state and are put together by `metis/training/quantization_log.py`. Where a
cell has no head, its head's metrics are absent; where a formula divides by zero (a zero operand, a tail
without energy), its metric is NaN.

`U` is not the basis in use, which may be stale: it is exact (Gram matrix, eigh, float64) up to
`EXACT_FEATURES` features, else the Ritz vectors of a block Krylov space. Where the spectrum has no gap at r,
U is not unique and tail_error hardly depends on it. Recipes without a head take the default rank, so that
their tails can be compared.

Traps:
* Sums run over ranks: all ranks that share an operand must measure it, in the same order.
* NVFP4 gives the block that holds the tensor's amax the largest scale on purpose, so scale_saturated_share is
  never zero there.
* Quartiles are cut between bf16 magnitudes; elements of one bf16 magnitude share a quartile, the lower one.
* An operand with a NaN or infinity is not measured (`metis.clock.OperandWatch` names it).
* Memory: a few float64 pieces of `_ROWS_AT_ONCE` rows, and one decoded copy of the operand (two with a head).

Source: arXiv 2509.00404 v4 for the errors. Shape letters: R rows, C columns (features), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metis.config import QuantizerConfig, RankConfig
from metis.diagnostics import exceeds_block_limit
from metis.functional import LinearPlan, is_transposed, operand_of
from metis.fused import sign_vector
from metis.operand import Axis, EncodedMatrix, SplitMatrix, encode, merged, rotate
from metis.quantize import QuantizedTensor, random_hadamard
from metis.quantize.blocks import block_amax
from metis.rng import gaussian, stream_key

EXACT_FEATURES = 512
"""Up to so many features the leading directions are exact."""

METRICS = (
    "relative_error", "sqnr_db", "tail_error", "unsplit_relative_error", "unsplit_tail_error",
    "zeroed_share", "zeroed_share_q1", "zeroed_share_q2", "zeroed_share_q3", "zeroed_share_q4",
    "clipped_share", "scale_saturated_share", "scale_underflow_share", "captured_energy",
    "residual_amax_ratio", "residual_growth", "drift_degrees", "residual_top_singular_value",
)  # fmt: skip
"""Every metric there is, in the order in which it is written."""

LOWER_IS_WORSE = frozenset({"sqnr_db", "captured_energy"})

SCALE_LIMITS = {"nvfp4": (448.0, 2.0**-6), "mxfp4": (2.0**127, 2.0**-126), "fp8": (2.0**128, 2.0**-126)}
"""Largest value and smallest normal number of a block scale (E4M3, E8M0 as fp32, fp32)."""

_ROWS_AT_ONCE = 1024
_OVERSAMPLE = 8
_TAIL_STEPS, _TOP_STEPS = 3, 24
_NO_TAIL = 1e-13
"""A smaller share of the energy is cancellation: |x U|^2 is |x|^2 in float64."""
_NUM_BINS = 1 << 15


@dataclass(frozen=True, slots=True)
class _Whole:
    """A matrix of which this rank holds `rows` x `cols`."""

    rows: Axis
    cols: Axis

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all pieces."""
        return self.rows.sum(self.cols.sum(value.contiguous()))

    def max(self, value: Tensor) -> Tensor:
        """Return the maximum of `value` over all pieces."""
        return self.rows.reduce_max(self.cols.reduce_max(value))


@dataclass(slots=True)
class OperandMeter:
    """Measures the operands of one microbatch; remembers the leading directions of those it has seen.

    Both copies of an operand (fprop_input and wgrad_input) have one source, hence one set of directions.
    """

    _directions: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def measure(
        self, plan: LinearPlan, cell_name: str, source: Tensor, split: SplitMatrix, encoded: EncodedMatrix
    ) -> dict[str, float]:
        """Return the metrics of one encoded operand; empty when it holds NaN or infinity. Synchronises.

        source: [R, C] as x, w and g are stored, whatever the cell's quantiser reads. Collective over the
        ranks that hold the rest of it.
        """
        quantizer: QuantizerConfig | None = getattr(plan.recipe, cell_name).quantizer
        assert quantizer is not None, cell_name
        whole = whole_of(plan, cell_name)
        energy = float(whole.sum(_square_sum(source)))
        if not math.isfinite(energy):
            return {}
        if split.p is not None and getattr(plan.recipe, cell_name).is_merged:
            sides = (m.t() if is_transposed(cell_name) else m for m in (source, split.residual))
            operand = merged(*sides, encoded, quantizer.rht).to(torch.float32)
            decoded = [(_as_source(operand, quantizer, cell_name), None, None)]
        else:
            decoded = [
                (_as_source(encoded.dequantize(torch.float32), quantizer, cell_name), split.p, split.v)
            ]
        if split.p is not None:
            unsplit = _encode_unsplit(plan, cell_name, source, quantizer)
            decoded.append((_as_source(unsplit.dequantize(torch.float32), quantizer, cell_name), None, None))
        directions = self._leading(plan, operand_of(cell_name), source, whole)
        errors = _errors(source, decoded, directions, whole)
        metrics = {"relative_error": errors[0][0], "tail_error": errors[0][1]}
        metrics["sqnr_db"] = _decibel(errors[0][0])
        if split.p is not None:
            metrics["unsplit_relative_error"], metrics["unsplit_tail_error"] = errors[1]
            metrics |= _head_metrics(source, split, whole, energy)
        metrics |= _shares(_as_read(split.residual, quantizer, cell_name), encoded, whole)
        return {name: metrics[name] for name in METRICS if name in metrics}

    def _leading(self, plan: LinearPlan, operand: str, source: Tensor, whole: _Whole) -> Tensor:
        key = (plan.layer, operand)
        if key not in self._directions:
            split = getattr(plan.recipe, f"{operand}_split")
            rank = RankConfig() if split is None or split.rank is None else split.rank
            columns = rank.columns(whole.cols.size)
            self._directions[key] = leading_directions(source, whole.rows, whole.cols, columns)[0]
        return self._directions[key]


def whole_of(plan: LinearPlan, cell_name: str) -> _Whole:
    """Return the axes of a cell's tensor as x, w and g are stored: rows, then features."""
    rows, cols = plan.axes(cell_name)
    return _Whole(cols, rows) if is_transposed(cell_name) else _Whole(rows, cols)


def residual_energy(plan: LinearPlan, cell_name: str, source: Tensor, split: SplitMatrix) -> Tensor:
    """Return (|R|^2, |x|^2) of the whole operand, float64 [2]; collective, no synchronisation."""
    sums = torch.stack([_square_sum(split.residual), _square_sum(source)])
    return whole_of(plan, cell_name).sum(sums)


@torch.no_grad()
def leading_directions(
    x: Tensor, rows: Axis, cols: Axis, rank: int, num_steps: int = _TAIL_STEPS
) -> tuple[Tensor, Tensor]:
    """Return (U, sigma): the leading right singular vectors [C_local, r] and values [r] of x, in float64.

    x: [R_local, C_local], finite. Exact where the whole axis has at most `EXACT_FEATURES` features, or where
    the search space would be as large; else the best of the block Krylov space of x^T x of `num_steps` powers
    from r + 8 Gaussian columns, the same on every layout. Collective over both axes.
    """
    width = rank + _OVERSAMPLE
    if cols.size <= max(EXACT_FEATURES, (num_steps + 1) * width):
        space = cols.local_rows(torch.eye(cols.size, dtype=torch.float64, device=x.device))
    else:
        space = cols.local_rows(_krylov_space(x, rows, cols, width, num_steps))
    product = cols.sum(torch.cat([piece @ space for piece in _pieces(x)]))
    energies, vectors = torch.linalg.eigh(rows.sum(product.t() @ product))
    sigma = energies.flip(0)[:rank].clamp(min=0.0).sqrt()
    return space @ vectors.flip(1)[:, :rank], sigma


def top_singular_value(matrix: Tensor, rows: Axis, cols: Axis) -> float:
    """Return the largest singular value of a matrix [R_local, C_local]; collective over both axes.

    Of a deep Krylov space, because residual weights have no gap below their first value.
    """
    return float(leading_directions(matrix, rows, cols, 1, _TOP_STEPS)[1][0])


def _krylov_space(x: Tensor, rows: Axis, cols: Axis, width: int, num_steps: int) -> Tensor:
    """Return orthonormal columns, whole [C, width * (num_steps + 1)], equal on every rank."""
    count = [torch.arange(size, device=x.device) for size in (cols.size, width)]
    block = gaussian(stream_key(0, "observe", "directions"), *count).to(torch.float64)
    space = torch.linalg.qr(block)[0]
    for _ in range(num_steps):
        mine = cols.local_rows(space[:, -width:])
        product = cols.sum(torch.cat([piece @ mine for piece in _pieces(x)]))
        z = sum(
            piece.t() @ part for piece, part in zip(_pieces(x), product.split(_ROWS_AT_ONCE), strict=True)
        )
        block = cols.gather_rows(rows.sum(z))
        for _ in range(2):  # once leaves what cancellation has left
            block = block - space @ (space.t() @ block)
            block = torch.linalg.qr(block)[0]
        space = torch.cat((space, block), dim=1)
    return space


def _pieces(x: Tensor) -> Iterator[Tensor]:
    return (piece.to(torch.float64) for piece in x.split(_ROWS_AT_ONCE))


def _square_sum(x: Tensor) -> Tensor:
    return torch.stack([piece.square().sum() for piece in _pieces(x.detach())]).sum()


def _decibel(ratio: float) -> float:
    return math.inf if ratio == 0.0 else -20.0 * math.log10(ratio)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else math.nan


def _as_read(residual: Tensor, quantizer: QuantizerConfig, cell_name: str) -> Tensor:
    """Return what the quantiser read: blocked along its columns, rotated where the cell rotates."""
    matrix = residual.t() if is_transposed(cell_name) else residual
    return rotate(matrix.to(torch.float32) if matrix.dtype == torch.float64 else matrix, quantizer.rht)


def _as_source(decoded: Tensor, quantizer: QuantizerConfig, cell_name: str) -> Tensor:
    """Return what a cell's product reads, fp32, as its source is stored, rotated back: then float64."""
    if quantizer.rht is not None:
        size = quantizer.rht.size
        eye = torch.eye(size, device=decoded.device)
        rotation = random_hadamard(eye, size, sign_vector(quantizer.rht)).to(torch.float64).sign()
        tiles = decoded.to(torch.float64).unflatten(-1, (-1, size))
        decoded = (tiles @ rotation.t() / math.sqrt(size)).flatten(-2)
    return decoded.t() if is_transposed(cell_name) else decoded


def _encode_unsplit(
    plan: LinearPlan, cell_name: str, source: Tensor, quantizer: QuantizerConfig
) -> EncodedMatrix:
    """Quantise the operand as its cell would without a head, with the same random bits."""
    rows, cols = plan.axes(cell_name)
    return encode(
        source.t() if is_transposed(cell_name) else source,
        quantizer,
        rows,
        cols,
        amax_scope=plan.recipe.amax_scope,
        noise=plan.noise(cell_name),
        noise_is_transposed=is_transposed(cell_name),
    )


def _errors(
    source: Tensor,
    decoded: list[tuple[Tensor, Tensor | None, Tensor | None]],
    directions: Tensor,
    whole: _Whole,
) -> list[tuple[float, float]]:
    """Return (relative error, tail error) of each (decoded residual, P, V) against the source.

    |e (I - U U^T)|^2 = |e|^2 - |e U|^2, since U is orthonormal.
    """
    squares, projected = [], []
    for start in range(0, source.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        x = source[rows].to(torch.float64)
        matrices = [x]
        for residual, p, v in decoded:
            approximation = residual[rows].to(torch.float64)
            if p is not None and v is not None:
                approximation = approximation + p[rows].to(torch.float64) @ v.to(torch.float64).t()
            matrices.append(approximation - x)
        squares.append(torch.stack([matrix.square().sum() for matrix in matrices]))
        projected.append(torch.stack([matrix @ directions for matrix in matrices]))
    inside = whole.cols.sum(torch.cat(projected, dim=1)).square().sum(dim=(1, 2))
    energies = whole.sum(torch.stack(squares).sum(dim=0)).tolist()
    in_span = whole.rows.sum(inside).tolist()
    tails = [max(0.0, energy - span) for energy, span in zip(energies, in_span, strict=True)]
    has_tail = tails[0] > _NO_TAIL * energies[0]
    return [
        (
            math.sqrt(_share(energy, energies[0])),
            math.sqrt(_share(tail, tails[0])) if has_tail else math.nan,
        )
        for energy, tail in zip(energies[1:], tails[1:], strict=True)
    ]


def _head_metrics(source: Tensor, split: SplitMatrix, whole: _Whole, energy: float) -> dict[str, float]:
    assert split.p is not None and split.v is not None
    p, v = split.p.to(torch.float64), split.v.to(torch.float64)
    captured = whole.sum(((p.t() @ p) * (v.t() @ v)).sum())
    amaxes = torch.stack([part.abs().amax().to(torch.float64) for part in (split.residual, source)])
    residual_amax, amax = whole.max(amaxes).tolist()
    return {
        "captured_energy": _share(float(captured), energy),
        "residual_amax_ratio": _share(residual_amax, amax),
    }


def _shares(read: Tensor, encoded: EncodedMatrix, whole: _Whole) -> dict[str, float]:
    """Return what became of the elements and the block scales of what the quantiser read [R, C]."""
    term = encoded.terms[0]
    magnitude = read.to(torch.float32).abs()
    nonzero = magnitude > 0
    zeroed = nonzero & (encoded.dequantize() == 0)
    bits = magnitude.contiguous().view(torch.int32) >> 16
    histograms = [torch.bincount(bits[mask], minlength=_NUM_BINS) for mask in (nonzero, zeroed)]
    clipped = exceeds_block_limit(read, term).sum()
    tallies = torch.cat([*histograms, clipped[None], _scale_tallies(magnitude, term)])
    counted = whole.sum(tallies).cpu()
    present, flushed = counted[:_NUM_BINS], counted[_NUM_BINS : 2 * _NUM_BINS]
    clipped_count, blocks, saturated, underflowed = counted[2 * _NUM_BINS :].tolist()
    total = int(present.sum())
    quartile = torch.div(4 * (present.cumsum(0) - present), max(total, 1), rounding_mode="floor")
    metrics = {
        "zeroed_share": _share(int(flushed.sum()), total),
        "clipped_share": clipped_count / (whole.rows.size * whole.cols.size),
    }
    for number in range(4):
        inside = quartile == number
        metrics[f"zeroed_share_q{number + 1}"] = _share(
            int(flushed[inside].sum()), int(present[inside].sum())
        )
    if term.block_scale is not None:
        metrics["scale_saturated_share"] = _share(saturated, blocks)
        metrics["scale_underflow_share"] = _share(underflowed, blocks)
    return metrics


def _scale_tallies(magnitude: Tensor, term: QuantizedTensor) -> Tensor:
    """Return how many blocks hold a non-zero, and how many of their scales are largest or below normal."""
    if term.block_scale is None or term.block_shape is None:
        return torch.zeros(3, dtype=torch.int64, device=magnitude.device)
    largest, smallest_normal = SCALE_LIMITS["fp8" if term.format.startswith("fp8") else term.format]
    occupied = block_amax(magnitude, term.block_shape) > 0
    scale: Any = term.block_scale
    tallies = (occupied, occupied & (scale >= largest), occupied & (scale < smallest_normal))
    return torch.stack([tally.sum() for tally in tallies])
