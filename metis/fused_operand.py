"""One operand of a product on kernels: split, quantised into its place, gathered where ranks share its rows.

One idea: an operand is written once, as the product reads it: codes times block scales in the wide buffer of
`metis.fused_linear`, thin factors in the columns or rows beside them. Where ranks hold shards of its tokens
each projects and quantises its own, codes, scales and thin factors travel in one message, and what arrives is
decoded into the same buffer: the bits of codes, P and heads are those of an operand that was never cut. (Sums
R F are fp32, and how many pieces they are of depends on the rows held here.)

Traps: amaxes are reduced before they are used or kept, never again. P and R must not depend on the layout, so
partial sums are gathered and added as a tree, not summed by the library.

Shape letters: M tokens, T ranks with m = M / T tokens each, K features held here, r columns of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metis import kernels
from metis.config import CellConfig, QuantizerConfig
from metis.decompose.projector import num_chunks_for
from metis.formats import as_float32
from metis.functional import LinearPlan, is_transposed, operand_of
from metis.fused import kernel_quantize, scale_target, sign_vector
from metis.kernels import GemmScales, KernelNoise, KernelOutput, Thin
from metis.operand import Axis, num_chunks_held

Columns = Callable[[Tensor], Tensor | None]
"""Writes wgrad's copy of an operand, of all tokens, to its place [features, M]; returns P of all of them."""

_ALIGNMENT = 16
"""Bytes at whose multiples the parts of a message begin, so that kernels may read them in wide words."""


def wide(like: Tensor, rows: int, cols: int) -> Tensor:
    """Return an uninitialised bf16 buffer for an operand and what lies beside it."""
    return torch.empty(rows, cols, dtype=torch.bfloat16, device=like.device)


def width_of(factor: Tensor | None) -> int:
    """Return the columns of a basis or of its coefficients, 0 for none."""
    return 0 if factor is None else factor.shape[1]


def shards_of(plan: LinearPlan, operand: str) -> Axis | None:
    """Return the ranks that hold other tokens of an operand which arrives as a shard of them."""
    return plan.gather if operand == plan.gathered_operand else None


def basis_of(plan: LinearPlan, cell_name: str) -> Tensor | None:
    """Return the basis in use for a cell, contiguous along r, or None where it splits nothing (yet)."""
    cell: CellConfig = getattr(plan.recipe, cell_name)
    v = None if cell.split is None else getattr(plan, f"v_{operand_of(cell_name)}")
    return v if v is None or v.stride(1) == 1 else v.contiguous()


def is_merged(plan: LinearPlan, cell_name: str) -> bool:
    """Whether a cell's head is added back to its operand: asked for, and split off in this step."""
    cell: CellConfig = getattr(plan.recipe, cell_name)
    return cell.is_merged and getattr(plan, f"v_{operand_of(cell_name)}") is not None


def head_basis_of(plan: LinearPlan, cell_name: str) -> Tensor | None:
    """Return the basis of a head that enters products by itself, None where there is none."""
    return None if is_merged(plan, cell_name) else basis_of(plan, cell_name)


def split(
    x: Tensor,
    v: Tensor,
    features: Axis,
    plan: LinearPlan,
    *,
    beside: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (P, amax of R held here, R, partial sums of R F); P is written to `beside` as well.

    P over the whole feature axis: canonical chunks are added in a fixed tree, whichever ranks hold them.
    """
    basis = plan.recipe.basis
    assert basis is not None
    features = features.alone() if basis.tp_mode == "local" else features
    num_chunks = num_chunks_held(features, basis.num_canonical_chunks)
    if not features.is_sharded and kernels.can_split(x, v, factor, num_chunks):
        return kernels.split(x, v, num_chunks, features.parts, beside, factor)
    partials = kernels.project(x, v, num_chunks, features.parts)
    if features.is_sharded:
        partials = features.gather_stacked(kernels.fold(partials, dtype=torch.float32))
    p = torch.empty(x.shape[0], v.shape[1], dtype=torch.bfloat16, device=x.device)
    amax = torch.empty((), dtype=torch.float32, device=x.device)
    kernels.fold(partials, out=p, other_out=beside, zeroed=amax)
    if factor is None or kernels.is_aligned(v, factor):
        residual, sums = kernels.residual(x, p, v, amax, factor)
    else:
        residual, _ = kernels.residual(x, p, v, amax)
        sums = thin_sums(residual, factor)
    return p, amax, residual, sums


def thin_sums(x: Tensor, factor: Tensor) -> Tensor:
    """Return the partial sums of x F where nothing is split off x."""
    return kernels.project(x, factor, num_chunks_for(x.shape[1]))


def amaxes(
    matrix: Tensor,
    plan: LinearPlan,
    cells: tuple[str, str],
    quantizers: tuple[QuantizerConfig | None, QuantizerConfig | None],
    known: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the two copies of a matrix are scaled by: amaxes over all ranks that share it, in one
    message.

    The first cell reads the matrix, the second its transpose, each perhaps rotated. known: amax of what is
    held here. None for a copy that is not made. A format without tensor scale gets the local amax, for the
    watch, or None.
    """
    first, second = quantizers
    signs = tuple(None if q is None else sign_vector(q.rht) for q in quantizers)
    wanted = tuple(q is not None and (q.has_tensor_amax or plan.watch is not None) for q in quantizers)
    plain_is_missing = known is None and any(w and s is None for w, s in zip(wanted, signs, strict=True))
    turned = None
    if wanted[1] and signs[1] is not None and plain_is_missing:
        known, turned = kernels.amax_both(matrix, signs[1])
    elif wanted[1] and signs[1] is not None:
        turned = kernels.amax(matrix.t(), signs[1])
    elif plain_is_missing:
        known = kernels.amax(matrix)
    a = b = None
    if wanted[0]:
        a = known if signs[0] is None else kernels.amax(matrix, signs[0])
    if wanted[1]:
        b = known if signs[1] is None else turned
    axes = [axis for axis in plan.axes(cells[0]) if axis.is_sharded]
    if plan.recipe.amax_scope != "global" or not axes:
        return a, b
    a_is_shared = first is not None and first.has_tensor_amax
    b_is_shared = second is not None and second.has_tensor_amax
    if a_is_shared and b_is_shared and a is not b:
        assert a is not None and b is not None
        a, b = _over_ranks(torch.stack((a, b)), axes).unbind()
    elif a_is_shared and b_is_shared:
        assert a is not None
        a = b = _over_ranks(a, axes)
    elif a_is_shared:
        assert a is not None
        a = _over_ranks(a, axes)
    elif b_is_shared:
        assert b is not None
        b = _over_ranks(b, axes)
    return a, b


def _over_ranks(amax: Tensor, axes: list[Axis]) -> Tensor:
    for axis in axes:
        amax = axis.reduce_max(amax)
    return amax


def note(amax: Tensor | None, plan: LinearPlan, cell_name: str) -> None:
    """Show the watch the amax of an operand that is about to be multiplied."""
    if amax is not None and plan.watch is not None:
        plan.watch.note_amax(plan.layer, cell_name, amax)


@dataclass(frozen=True, slots=True)
class ProductScales:
    """What a product's epilogue multiplies by, alpha, and what its thin factors carry, 1 / alpha; None
    without tensor scales.

    written: by the launch that quantises one of the operands, None where it has been written.
    """

    alpha: Tensor | None = None
    inverse: Tensor | None = None
    written: GemmScales | None = None


def product_scales(
    quantizers: tuple[QuantizerConfig, QuantizerConfig],
    amaxes: tuple[Tensor | None, Tensor | None],
    has_thin: bool,
    merged: tuple[bool, bool] = (False, False),
) -> ProductScales:
    """Return the scales of a product, to be handed to the launch that quantises the first operand.

    has_thin: thin factors stand beside the operands; only then is the inverse written. merged: whether the
    scale of an operand is in it, as where its head is added back; thin factors stand beside neither then.
    """
    left, right = quantizers
    if not left.has_tensor_amax or all(merged):
        return ProductScales()
    if any(merged):
        other, amax = (right, amaxes[1]) if merged[0] else (left, amaxes[0])
        assert amax is not None and not has_thin
        return ProductScales(amax / torch.full_like(amax, scale_target(other)))
    assert amaxes[0] is not None and amaxes[1] is not None
    reciprocal = as_float32(1 / (scale_target(left) * scale_target(right)))
    if left.four_over_six is not None:  # its kernel writes nothing else
        return ProductScales(*kernels.gemm_scales(*amaxes, reciprocal, invertible=has_thin))
    out = torch.empty(2, dtype=torch.float32, device=amaxes[0].device)
    written = GemmScales(other_amax=amaxes[1], out=out, reciprocal_target=reciprocal, invertible=has_thin)
    return ProductScales(*out.unbind(), written)


def quantize_into(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    cell_name: str,
    amax: Tensor | None,
    place: Tensor,
    scales: GemmScales | None = None,
    whole: Tensor | None = None,
) -> None:
    """Write the decoded operand of a matrix [rows, contraction axis] into `place`; amax: of `amaxes`.

    whole: what the matrix is the residual of, where the head is added back (`metis.operand.merged`).
    """
    noise = _noise(quantizer, plan, cell_name)
    kernel_quantize(matrix, quantizer, amax, noise, False, operand_out=place, gemm_scales=scales, whole=whole)


def merge(
    whole: Tensor,
    residual: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    cell_name: str,
    amax: Tensor | None,
) -> Tensor:
    """Return the operand of a cell with its head added back, bf16, of the rows held here, as `whole` lies."""
    merged = torch.empty_like(whole)
    sides = whole, residual, merged
    if is_transposed(cell_name):
        sides = whole.t(), residual.t(), merged.t()
    quantize_into(sides[1], quantizer, plan, cell_name, amax, sides[2], whole=sides[0])
    return merged


def all_rows(held: Tensor, shards: Axis | None) -> Tensor:
    """Return the rows of all ranks that hold some of a matrix, in shard order."""
    return held if shards is None else shards.gather_rows(held)


def quantize_to_bytes(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    cell_name: str,
    amax: Tensor | None,
    scales: GemmScales | None = None,
) -> tuple[Tensor, Tensor]:
    """Return packed codes and scale bytes of a matrix [rows, contraction axis]."""
    noise = _noise(quantizer, plan, cell_name)
    output: KernelOutput = kernel_quantize(
        matrix, quantizer, amax, noise, True, want_operand=False, gemm_scales=scales
    )
    assert output.packed is not None and output.scale_bytes is not None
    return output.packed, output.scale_bytes


def _noise(quantizer: QuantizerConfig, plan: LinearPlan, cell_name: str) -> KernelNoise | None:
    if quantizer.rounding != "stochastic":
        return None
    return plan.noise(cell_name).for_kernel(*plan.axes(cell_name), is_transposed(cell_name))


def decode_into(place: Tensor, packed: Tensor, scale_bytes: Tensor, quantizer: QuantizerConfig) -> None:
    """Write the operand of codes and scales into `place`: [R, C], or [T, R, C] of what T ranks sent."""
    assert quantizer.block_shape is not None
    kernels.decode_operand(
        packed, scale_bytes, block_shape=quantizer.block_shape, format=quantizer.format, operand_out=place
    )


def start_gather(shards: Axis, *parts: Tensor) -> Callable[[], list[Tensor]]:
    """Start to gather tensors; the returned function waits and gives each of every rank, [T, ...], in shard
    order. One message for all of them.

    parts: of equal shapes on all ranks, contiguous. What comes back is a view of the message, to be used up
    before the next one.
    """
    starts, size = [], 0
    for part in parts:
        starts.append(size)
        size += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
    message = shards.message(size, parts[0].device)
    for start, part in zip(starts, parts, strict=True):
        message[start : start + part.nbytes].copy_(part.view(-1).view(torch.uint8))
    arrive, kinds = shards.start_gather_stacked(message), [(p.nbytes, p.dtype, p.shape) for p in parts]

    def finish() -> list[Tensor]:
        whole = arrive()
        return [
            whole[:, start : start + num_bytes].view(dtype).unflatten(1, shape)
            for start, (num_bytes, dtype, shape) in zip(starts, kinds, strict=True)
        ]

    return finish


def rows_of_ranks(buffer: Tensor, shards: Axis) -> Tensor:
    """Return [M, ...] as [T, m, ...]: the rows of every rank; a view."""
    return buffer.unflatten(0, (shards.num_shards, -1))


def columns_of_ranks(place: Tensor, shards: Axis) -> Tensor:
    """Return [K, M] as [T, K, m]: the columns of every rank; a view."""
    return place.unflatten(1, (shards.num_shards, -1)).transpose(0, 1)


def rows_held(value: Tensor, shards: Axis) -> Tensor:
    """Return this rank's rows [m, ...] of [M, ...]; a view."""
    return rows_of_ranks(value, shards)[shards.shard]


def fill_rows(
    buffer: Tensor,
    matrix: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    cell_name: str,
    amax: Tensor | None,
    scales: ProductScales,
    thin: Tensor,
    factors: Sequence[Thin],
) -> None:
    """Complete a left operand [M, K + c]: the matrix quantised along its rows, and the thin factors.

    thin: of `thin_columns`; factors: what is written there (or elsewhere) once 1 / alpha is known. Where
    ranks hold other tokens, theirs come in here.
    """
    num_columns = matrix.shape[1]
    shards = shards_of(plan, operand_of(cell_name))
    if shards is None:
        place = buffer[:, :num_columns]
        quantize_into(matrix, quantizer, plan, cell_name, amax, place, scales.written)
        place_all(factors, scales.inverse)
        return
    codes = quantize_to_bytes(matrix, quantizer, plan, cell_name, amax, scales.written)
    place_all(factors, scales.inverse)
    packed, scale_bytes, *others = start_gather(shards, *codes, *([thin] if thin.shape[1] else []))()
    decode_into(rows_of_ranks(buffer[:, :num_columns], shards), packed, scale_bytes, quantizer)
    for gathered in others:
        rows_of_ranks(buffer[:, num_columns:], shards).copy_(gathered)


def start_columns(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    cell_name: str,
    amax: Tensor | None,
    p: Tensor | None,
    scales: ProductScales | None = None,
) -> Columns:
    """Return what writes a matrix [m, features], quantised along its tokens, to a place. Where ranks hold
    other tokens the own ones are quantised now, and on their way.
    """
    shards, written = shards_of(plan, operand_of(cell_name)), None if scales is None else scales.written
    if shards is not None:
        codes = quantize_to_bytes(matrix.t(), quantizer, plan, cell_name, amax, written)
        return start_gathered_columns(codes, quantizer, shards, p)

    def write(place: Tensor) -> Tensor | None:
        quantize_into(matrix.t(), quantizer, plan, cell_name, amax, place, written)
        return p

    return write


def start_gathered_columns(
    codes: tuple[Tensor, Tensor], quantizer: QuantizerConfig, shards: Axis, p: Tensor | None
) -> Columns:
    """Send the codes of the columns held here, and P; return what decodes those of all ranks."""
    arrive = start_gather(shards, *codes, *([] if p is None else [p]))

    def write(place: Tensor) -> Tensor | None:
        packed, scale_bytes, *others = arrive()
        decode_into(columns_of_ranks(place, shards), packed, scale_bytes, quantizer)
        return torch.cat(others[0].unbind()) if others else None

    return write


def thin_columns(buffer: Tensor, num_columns: int, shards: Axis | None) -> Tensor:
    """Return where the thin factors of the rows held here are to be written: beside the operand, or to be
    sent.
    """
    if shards is None:
        return buffer[:, num_columns:]
    return wide(buffer, buffer.shape[0] // shards.num_shards, buffer.shape[1] - num_columns)


def place_all(factors: Sequence[Thin], factor: Tensor | None) -> None:
    """Write thin factors to their places, those that are scaled times `factor`; two in a launch."""
    for first in range(0, len(factors), 2):
        kernels.place(*factors[first : first + 2], factor=factor)
