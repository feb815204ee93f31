"""The linear on kernels: the six cells of `metis.functional` with every extra pass over memory taken out.

One idea: the terms of a product are laid side by side along the contraction axis, so that one GEMM forms them
all and its epilogue applies the tensor scales. With alpha the product of the two tensor scales,

    y  = alpha [q(R_x) | P_x           | R_x V_w / alpha] [q(W_R) | w V_x / alpha   | U  ]^T
    dx = alpha [q(R_g) | P_g           | R_g U / alpha  ] [q(W_R) ; V_g^T w / alpha ; V_w^T]
    dw = alpha [q(R_g) ; V_g^T ; P_x^T g / alpha]^T [q(R_x) ; P_g^T R_x / alpha ; V_x^T]

each in fp32, rounded once to the output. The quantised terms are exactly those of `metis.functional` (codes
times block scales, exact in bf16, alpha in the epilogue); a thin factor is rounded to bf16 once, after the
division by alpha. dw is added to the engine's fp32 accumulator in the same call.

What depends on the weight alone is made once per optimizer step (`metis.encoded_weight`). Saved for backward
are R_x (which takes the place of x) and P_x; nothing else is larger than a thin factor. Under `save_packed`
the codes of wgrad's copy take the place of R_x, and P_g^T R_x reads what they decode to.

Under sequence parallelism one operand arrives as a shard of its tokens: it is projected, split and quantised
there, and gathered as codes and thin factors (`metis.fused_operand`). P_g^T R_x and P_x^T g sum over tokens:
each rank takes its own rows, and the thin sums are added over the ranks.

`metis.functional` stays the definition, and runs whatever is not covered here (`is_fusable`, `can_run`).
Coefficients and residuals come from `metis.kernels.projection`, within fp32 rounding of the definition's.

Trap: 1 / alpha must be finite, so alpha is held at 2^-100 or above where there are thin factors. A product
whose amaxes multiply to less than 6e-24 (gradients of 1e-23 beside weights of 1) loses its scale.

Shape letters: M tokens, m of them held here, K in_features, N out_features, r ranks (of x, w and g, which may
differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metis import kernels
from metis.config import QuantizerConfig, Recipe
from metis.encoded_weight import EncodedWeight, WeightCache
from metis.functional import LinearPlan, as_placeholder, operand_of
from metis.functional import quantized_linear as reference_linear
from metis.fused import can_fuse, scale_target
from metis.fused_operand import (
    amaxes,
    basis_of,
    columns_of_ranks,
    decode_into,
    fill_rows,
    gather_together,
    note,
    product_scales,
    quantize_into,
    quantize_to_bytes,
    rows_held,
    scaled_into,
    shards_of,
    split,
    thin_columns,
    thin_sums,
    wide,
    width_of,
)
from metis.gemm import EmulatedGemm, scaled_product

__all__ = ["WeightCache", "can_run", "is_fusable", "quantized_linear"]

MAX_RANK = 128
"""Columns of a basis that the kernels hold, of `metis.kernels.projection`."""
_MAX_CHUNKS = 32
"""Partial sums that one program adds, of `metis.kernels.projection.fold`."""

_ANY_QUANTIZER = QuantizerConfig()
_GEMMS = {
    "fprop": ("fprop_input", "fprop_weight"),
    "dgrad": ("dgrad_grad_output", "dgrad_weight"),
    "wgrad": ("wgrad_grad_output", "wgrad_input"),
}


def is_fusable(recipe: Recipe, in_features: int, out_features: int) -> bool:
    """Whether this file covers a recipe: 4-bit cells of one term, bf16 heads, no mean.

    Both cells of a GEMM are quantised or neither; both cells of an operand split alike (or one is whole).
    """
    if recipe.spectral_learning_rate is not None:
        return False
    if recipe.basis is not None and recipe.basis.num_canonical_chunks > _MAX_CHUNKS:
        return False
    cells = {name: getattr(recipe, name) for pair in _GEMMS.values() for name in pair}
    for name, cell in cells.items():
        split, quantizer = cell.split, cell.quantizer
        if quantizer is not None and (quantizer.format not in ("nvfp4", "mxfp4") or quantizer.num_terms != 1):
            return False
        if split is None:
            continue
        if quantizer is None or split.head_format != "bf16" or split.mean_first or split.rank is None:
            return False
        features = out_features if operand_of(name) == "grad_output" else in_features
        if split.rank.columns(features) > MAX_RANK:
            return False
    for left, right in _GEMMS.values():
        if (cells[left].quantizer is None) != (cells[right].quantizer is None):
            return False
    for one, other in (
        ("fprop_input", "wgrad_input"),
        ("fprop_weight", "dgrad_weight"),
        ("dgrad_grad_output", "wgrad_grad_output"),
    ):
        a, b = cells[one], cells[other]
        if a.quantizer is not None and b.quantizer is not None and a.split != b.split:
            return False
    return True


def can_run(x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> bool:
    """Whether a pass runs here: a fusable recipe, bf16 on a device with kernels, shards that share their
    amaxes.
    """
    shards_fit = plan.gather is None or (plan.recipe.amax_scope == "global" and plan.gather.parts == 1)
    return (
        plan.weights is not None
        and x_MK.dtype == w_NK.dtype == torch.bfloat16
        and w_NK.stride(1) == 1
        and shards_fit
        and isinstance(plan.backend, EmulatedGemm)
        and can_fuse(x_MK, _ANY_QUANTIZER, plan.backend.kernels)
    )


@dataclass(slots=True)
class _SavedInput:
    """What backward needs of x, of the tokens held here.

    residual: R, [m, K] (x itself where nothing is split); or, packed, codes [K, m / 2] and scales of wgrad's
    copy. p: [m, r]. amax: of wgrad's copy, over all ranks, where it is known.
    """

    residual: Tensor | None
    p: Tensor | None = None
    amax: Tensor | None = None
    packed: Tensor | None = None
    scale_bytes: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the fields in order."""
        return self.residual, self.p, self.amax, self.packed, self.scale_bytes


def _forward(x: Tensor, w: Tensor, plan: LinearPlan, keep: bool) -> tuple[Tensor, _SavedInput]:
    """Return y of all tokens in bf16, and what backward needs of x."""
    recipe, shards = plan.recipe, shards_of(plan, "input")
    quantizer, wgrad_quantizer = recipe.fprop_input.quantizer, recipe.wgrad_input.quantizer
    wgrad_quantizer = wgrad_quantizer if keep else None
    encoded: EncodedWeight = plan.weights.get(w, plan)
    num_here, num_in = x.shape
    num_tokens = num_here if shards is None else num_here * shards.num_shards
    y = torch.empty(num_tokens, w.shape[0], dtype=x.dtype, device=x.device)
    v_x = v_w = None
    if quantizer is not None:
        v_x, v_w = basis_of(plan, "fprop_input"), basis_of(plan, "fprop_weight")
    elif wgrad_quantizer is not None:
        v_x = basis_of(plan, "wgrad_input")
    left = thin = beside = None
    if quantizer is not None:
        left = wide(x, num_tokens, num_in + width_of(v_x) + width_of(v_w))
        thin = thin_columns(left, num_in, shards)
        beside = thin[:, : width_of(v_x)]
    p = amax = sums = None
    residual = x
    if v_x is not None:
        p, amax, residual, sums = split(x, v_x, plan.in_features, plan, beside=beside, factor=v_w)
    elif v_w is not None:
        sums = thin_sums(x, v_w)
    used = amaxes(residual, plan, ("fprop_input", "wgrad_input"), (quantizer, wgrad_quantizer), amax)
    if quantizer is None:
        scaled_product(x if shards is None else shards.gather_rows(x), w, y)
    else:
        _fprop(residual, sums, (left, thin), encoded, plan, used[0], y)  # type: ignore[arg-type]
    if wgrad_quantizer is None:
        return y, _SavedInput(x)
    if not recipe.save_packed:
        return y, _SavedInput(residual, p, used[1])
    codes = quantize_to_bytes(residual.t(), wgrad_quantizer, plan, "wgrad_input", used[1])
    note(used[1], plan, "wgrad_input")
    return y, _SavedInput(None, p, used[1], *codes)


def _fprop(
    residual: Tensor,
    sums: Tensor | None,
    buffers: tuple[Tensor, Tensor],
    encoded: EncodedWeight,
    plan: LinearPlan,
    amax: Tensor | None,
    y: Tensor,
) -> None:
    """Complete the left operand (P_x is in its place) and multiply."""
    (left, thin), num_in = buffers, residual.shape[1]
    quantizer, w_quantizer = plan.recipe.fprop_input.quantizer, plan.recipe.fprop_weight.quantizer
    assert quantizer is not None and w_quantizer is not None
    pair = amax, encoded.fprop.amax
    alpha, inverse = product_scales((quantizer, w_quantizer), pair, thin.shape[1] > 0)
    if sums is not None:
        kernels.fold(sums, out=thin[:, thin.shape[1] - sums.shape[2] :], factor=inverse)
    fill_rows(left, residual, quantizer, plan, "fprop_input", amax, thin)
    right = encoded.fprop.buffer
    if encoded.t_input is not None:
        scaled_into(right[:, num_in : num_in + encoded.t_input.shape[1]], encoded.t_input, inverse)
    note(amax, plan, "fprop_input")
    note(encoded.fprop.amax, plan, "fprop_weight")
    scaled_product(left, right, y, alpha)


@dataclass(slots=True)
class _Gradient:
    """g of a backward pass: split, quantised for both products, whole again where it came as a shard.

    g: what arrived, [m, N]. p: of all tokens, [M, r_g]. left: dgrad's operand [M, N + r_g + r_w]; for_wgrad:
    wgrad's [M + r_g + r_x, N], whose last r_x rows are still open. amaxes: of both copies.
    """

    g: Tensor
    p: Tensor | None
    left: Tensor | None
    for_wgrad: Tensor | None
    amaxes: tuple[Tensor | None, Tensor | None]
    alpha: Tensor | None = None
    inverse: Tensor | None = None


def _open_gradient(
    g: Tensor, encoded: EncodedWeight, plan: LinearPlan, needs: tuple[bool, bool], r_x: int
) -> _Gradient:
    """Split g and write both copies; thin factors of dgrad are complete, those of wgrad but for x's."""
    recipe, shards = plan.recipe, shards_of(plan, "grad_output")
    cells = recipe.dgrad_grad_output, recipe.wgrad_grad_output
    dgrad, wgrad = (cell.quantizer if need else None for cell, need in zip(cells, needs, strict=True))
    num_here, num_out = g.shape
    num_tokens = num_here if shards is None else num_here * shards.num_shards
    v_g = u = None
    if dgrad is not None or wgrad is not None:
        v_g = basis_of(plan, "dgrad_grad_output" if dgrad is not None else "wgrad_grad_output")
    if dgrad is not None:
        u = encoded.u
    r_g = width_of(v_g)
    left = thin = beside = for_wgrad = p = amax = sums = None
    if dgrad is not None:
        left = wide(g, num_tokens, num_out + r_g + width_of(u))
        thin = thin_columns(left, num_out, shards)
        beside = thin[:, :r_g]
    residual = g
    if v_g is not None:
        p, amax, residual, sums = split(g, v_g, plan.out_features, plan, beside=beside, factor=u)
    elif u is not None:
        sums = thin_sums(g, u)
    used = amaxes(residual, plan, ("dgrad_grad_output", "wgrad_grad_output"), (dgrad, wgrad), amax)
    alpha = inverse = None
    if dgrad is not None:
        assert thin is not None and left is not None and recipe.dgrad_weight.quantizer is not None
        pair = used[0], encoded.dgrad.amax
        alpha, inverse = product_scales((dgrad, recipe.dgrad_weight.quantizer), pair, thin.shape[1] > 0)
        if sums is not None:
            kernels.fold(sums, out=thin[:, r_g:], factor=inverse)
        fill_rows(left, residual, dgrad, plan, "dgrad_grad_output", used[0], thin)
        note(used[0], plan, "dgrad_grad_output")
        note(encoded.dgrad.amax, plan, "dgrad_weight")
    if wgrad is not None:
        for_wgrad = wide(g, num_tokens + r_g + r_x, num_out)
        p = _fill_columns(for_wgrad[:num_tokens].t(), residual, wgrad, plan, used[1], p)
        if v_g is not None:
            for_wgrad[num_tokens : num_tokens + r_g].copy_(v_g.t())
        note(used[1], plan, "wgrad_grad_output")
    return _Gradient(g, p, left, for_wgrad, used, alpha, inverse)


def _fill_columns(
    place: Tensor,
    residual: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    amax: Tensor | None,
    p: Tensor | None,
) -> Tensor | None:
    """Quantise g's residual [m, N] along its tokens into `place` [N, M]; returns P of all tokens."""
    shards = shards_of(plan, "grad_output")
    if shards is None:
        quantize_into(residual.t(), quantizer, plan, "wgrad_grad_output", amax, place)
        return p
    codes = quantize_to_bytes(residual.t(), quantizer, plan, "wgrad_grad_output", amax)
    return _gather_columns(place, codes, quantizer, shards, p)


def _gather_columns(
    place: Tensor, codes: tuple[Tensor, Tensor], quantizer: QuantizerConfig, shards: Any, p: Tensor | None
) -> Tensor | None:
    """Decode the columns of all ranks into `place` [features, M]; returns their P, [M, r]."""
    packed, scale_bytes, *others = gather_together(shards, *codes, *([] if p is None else [p]))
    decode_into(columns_of_ranks(place, shards), packed, scale_bytes, quantizer)
    return others[0].flatten(0, 1) if others else None


def _backward(
    g: Tensor, w: Tensor, x: _SavedInput, plan: LinearPlan, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx of all tokens and what stands for dw."""
    recipe, shards = plan.recipe, shards_of(plan, "grad_output")
    encoded: EncodedWeight = plan.weights.get(w, plan)
    gradient = _open_gradient(g, encoded, plan, needs, width_of(x.p))
    if shards is not None and (
        (needs[0] and recipe.dgrad_grad_output.quantizer is None)
        or (needs[1] and recipe.wgrad_grad_output.quantizer is None)
    ):
        g = shards.gather_rows(g)
    dx = dw = None
    if needs[0]:
        num_out, num_in = w.shape
        num_tokens = g.shape[0] if gradient.left is None else gradient.left.shape[0]
        dx = torch.empty(num_tokens, num_in, dtype=g.dtype, device=g.device)
        if gradient.left is None:
            scaled_product(g, w.t(), dx)
        else:
            right = encoded.dgrad.buffer
            if encoded.t_grad is not None:
                rows = right[num_out : num_out + encoded.t_grad.shape[0]]
                scaled_into(rows, encoded.t_grad, gradient.inverse)
            scaled_product(gradient.left, right.t(), dx, gradient.alpha)
            gradient.left = None
    if needs[1]:
        dw = _weight_gradient(g, gradient, w, x, plan)
    return dx, dw


def _weight_gradient(g: Tensor, gradient: _Gradient, w: Tensor, x: _SavedInput, plan: LinearPlan) -> Tensor:
    """Form dw and deliver it: into the engine's accumulator where there is one. g: of all tokens where
    nothing is quantised.
    """
    main_grad: Tensor | None = getattr(w, "main_grad", None)
    out = torch.empty_like(w) if main_grad is None else main_grad
    accumulate = main_grad is not None
    left, p = gradient.for_wgrad, gradient.p
    if left is None:
        shards = shards_of(plan, "input")
        assert x.residual is not None
        whole = x.residual if shards is None else shards.gather_rows(x.residual)
        scaled_product(g.t(), whole.t(), out, None, accumulate)
        return as_placeholder(w) if accumulate else out
    quantizers = plan.recipe.wgrad_grad_output.quantizer, plan.recipe.wgrad_input.quantizer
    assert quantizers[0] is not None and quantizers[1] is not None
    r_g, r_x = width_of(p), width_of(x.p)
    num_tokens = left.shape[0] - r_g - r_x
    right = wide(w, left.shape[0], w.shape[1])
    x_amax, p_x = _fill_input(right[:num_tokens].t(), x, quantizers[1], plan)
    has_thin = p is not None or x.p is not None
    alpha, inverse = product_scales(quantizers, (gradient.amaxes[1], x_amax), has_thin)  # type: ignore[arg-type]
    if p is not None:
        rows = right[num_tokens : num_tokens + r_g]
        _head_times_residual(rows, p, right[:num_tokens], x, x_amax, inverse, plan)
    if p_x is not None:
        assert plan.v_input is not None
        right[num_tokens + r_g :].copy_(plan.v_input.t())
        rows, shards = left[num_tokens + r_g :], shards_of(plan, "grad_output")
        _over_tokens(rows, p_x if shards is None else rows_held(p_x, shards), gradient.g, inverse, shards)
    scaled_product(left.t(), right.t(), out, alpha, accumulate)
    return as_placeholder(w) if accumulate else out


def _fill_input(
    place: Tensor, x: _SavedInput, quantizer: QuantizerConfig, plan: LinearPlan
) -> tuple[Tensor | None, Tensor | None]:
    """Write wgrad's copy of x into `place` [K, M]; returns (its amax, P of all tokens)."""
    shards, name = shards_of(plan, "input"), "wgrad_input"
    if x.packed is not None:
        assert x.scale_bytes is not None
        if shards is None:
            decode_into(place, x.packed, x.scale_bytes, quantizer)
            return x.amax, x.p
        return x.amax, _gather_columns(place, (x.packed, x.scale_bytes), quantizer, shards, x.p)
    assert x.residual is not None
    note(x.amax, plan, name)
    if shards is None:
        quantize_into(x.residual.t(), quantizer, plan, name, x.amax, place)
        return x.amax, x.p
    codes = quantize_to_bytes(x.residual.t(), quantizer, plan, name, x.amax)
    return x.amax, _gather_columns(place, codes, quantizer, shards, x.p)


def _head_times_residual(
    rows: Tensor,
    p: Tensor,
    decoded: Tensor,
    x: _SavedInput,
    amax: Tensor | None,
    inverse: Tensor | None,
    plan: LinearPlan,
) -> None:
    """Write P_g^T R_x / alpha into `rows` [r_g, K].

    p: of all tokens, [M, r_g]. decoded: wgrad's copy of x without its tensor scale, [M, K]; read in place of
    R_x where that was not kept.
    """
    shards, residual, factor = shards_of(plan, "input"), x.residual, inverse
    if residual is None:
        residual = decoded if shards is None else rows_held(decoded, shards)
        quantizer = plan.recipe.wgrad_input.quantizer
        assert quantizer is not None
        if inverse is not None:
            assert amax is not None
            factor = inverse * (amax / scale_target(quantizer))
    _over_tokens(rows, p if shards is None else rows_held(p, shards), residual, factor, shards)


def _over_tokens(rows: Tensor, p: Tensor, matrix: Tensor, factor: Tensor | None, shards: Any) -> None:
    """Write factor * p^T matrix into `rows`, summed over the tokens of all ranks; p [m, r], matrix [m, C]."""
    if shards is None:
        scaled_product(p.t(), matrix.t(), rows, factor)
        return
    mine = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    scaled_into(rows, shards.sum(scaled_product(p.t(), matrix.t(), mine)), factor)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, plan: LinearPlan, keep: bool) -> Tensor:
        is_packed, is_observed = plan.recipe.save_packed, _is_observed(plan)
        if is_observed:
            early = [("wgrad_input", x)] if keep and is_packed else []
            _observe(plan, ("fprop_input", x), ("fprop_weight", w), *early)
        y, saved = _forward(x, w, plan, keep)
        if keep:
            rows = None if plan.sketch is None else plan.sketch.pick("input", x)
            ctx.plan, ctx.weight, ctx.is_sketched = plan, w, False
            source = x if is_observed and not is_packed else None
            ctx.save_for_backward(w, rows, source, *saved.tensors())
        if plan.gathered_operand == "grad_output":
            assert plan.gather is not None
            y = plan.gather.scatter_sum(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(g.device.type):  # it would turn fp32 accumulation into bf16
            with torch.autocast(g.device.type, enabled=False):
                return _FusedLinear._backward(ctx, g)
        return _FusedLinear._backward(ctx, g)

    @staticmethod
    def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        plan: LinearPlan = ctx.plan
        w, rows, source, *saved = ctx.saved_tensors
        needs, g = ctx.needs_input_grad[:2], g.contiguous()
        if _is_observed(plan):
            seen = [("dgrad_grad_output", g), ("dgrad_weight", w)] if needs[0] else []
            seen += [("wgrad_grad_output", g)] if needs[1] else []
            seen += [("wgrad_input", source)] if needs[1] and source is not None else []
            _observe(plan, *seen)
        dx, dw = _backward(g, ctx.weight, _SavedInput(*saved), plan, needs)
        if dx is not None and plan.gathered_operand == "input":
            assert plan.gather is not None
            dx = plan.gather.scatter_sum(dx)
        if plan.sketch is not None and not ctx.is_sketched:
            ctx.is_sketched = True  # a graph that is kept may be walked again
            for operand, picked in (("input", rows), ("grad_output", plan.sketch.pick("grad_output", g))):
                if picked is not None:
                    plan.sketch.add(operand, picked)
        return dx, dw, None, None


def _is_observed(plan: LinearPlan) -> bool:
    return plan.watch is not None and plan.watch.observer is not None


def _observe(plan: LinearPlan, *operands: tuple[str, Tensor]) -> None:
    """Show operands to an observer as `metis.functional` would split and encode them."""
    for cell_name, matrix in operands:
        if getattr(plan.recipe, cell_name).quantizer is not None:
            plan.open(matrix, cell_name, None).encode_here()


def quantized_linear(x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> Tensor:
    """Return y = x w^T as `metis.functional.quantized_linear` defines it, on kernels where they cover it."""
    if not can_run(x_MK, w_NK, plan):
        return reference_linear(x_MK, w_NK, plan)
    x = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    if not torch.is_autocast_enabled(x.device.type):
        return _FusedLinear.apply(x, w_NK, plan, torch.is_grad_enabled())
    with torch.autocast(x.device.type, enabled=False):
        return _FusedLinear.apply(x, w_NK, plan, torch.is_grad_enabled())
