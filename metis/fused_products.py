"""The three products of a linear on kernels: the six cells of `metis.functional` with every extra pass over
memory taken out.

One idea: the terms of a product are laid side by side along the contraction axis, so that one GEMM forms them
all and its epilogue applies the tensor scales. With alpha the product of the two tensor scales,

    y  = alpha [q(R_x) | P_x           | R_x V_w / alpha] [q(W_R) | w V_x / alpha   | U  ]^T
    dx = alpha [q(R_g) | P_g           | R_g U / alpha  ] [q(W_R) ; V_g^T w / alpha ; V_w^T]
    dw = alpha [q(R_g) ; V_g^T ; P_x^T g / alpha]^T [q(R_x) ; P_g^T R_x / alpha ; V_x^T]

each in fp32, rounded once to the output. The quantised terms are exactly those of `metis.functional` (codes
times block scales, exact in bf16, alpha in the epilogue); a thin factor is rounded to bf16 once, after the
division by alpha. dw is added to the engine's fp32 accumulator in the same call.

What depends on the weight alone is made once per optimizer step (`metis.encoded_weight`) and opened by each
product that reads it: kept as codes, it lies decoded in memory for that product only. Saved for backward
are R_x (which takes the place of x) and P_x; nothing else is larger than a thin factor. Under `save_packed`
the codes of wgrad's copy take the place of R_x, and P_g^T R_x reads what they decode to.

An operand whose head is added back (`head_placement: merged`) is one bf16 matrix with its scale in it and
nothing beside it; wgrad's copy of x is then made in forward, and saved in place of R_x and P_x.

Under sequence parallelism one operand arrives as a shard of its tokens: it is projected, split and quantised
there, and gathered as codes and thin factors (`metis.fused_operand`), or merged. P_g^T R_x and P_x^T g sum
over tokens: each rank takes its own rows, and the thin sums are added over the ranks.

Coefficients and residuals come from `metis.kernels.projection`, within fp32 rounding of the definition's.

Trap: 1 / alpha must be finite, so alpha is held at 2^-100 or above where there are thin factors. A product
whose amaxes multiply to less than 6e-24 (gradients of 1e-23 beside weights of 1) loses its scale.

Shape letters: M tokens, m of them held here, K in_features, N out_features, r ranks (of x, w and g, which may
differ).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metis.encoded_weight import EncodedSide, EncodedWeight
from metis.exchange import scattered_product
from metis.functional import LinearPlan, as_placeholder, operand_of
from metis.fused import scale_target
from metis.fused_operand import (
    ProductScales,
    all_rows,
    amaxes,
    basis_of,
    decode_into,
    fill_columns,
    fill_rows,
    gather_columns,
    head_basis_of,
    is_merged,
    merge,
    note,
    place_all,
    product_scales,
    quantize_to_bytes,
    rows_held,
    shards_of,
    split,
    thin_columns,
    thin_sums,
    wide,
    width_of,
)
from metis.gemm import scaled_product
from metis.kernels import Thin


@dataclass(slots=True)
class SavedInput:
    """What backward needs of x, of the tokens held here.

    residual: R, [m, K] (x itself where nothing is split, wgrad's copy of it where heads are merged); or,
    packed, codes [K, m / 2] and scales of wgrad's copy. p: [m, r]. amax: of wgrad's copy, over all ranks,
    where it is known.
    """

    residual: Tensor | None
    p: Tensor | None = None
    amax: Tensor | None = None
    packed: Tensor | None = None
    scale_bytes: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the fields in order."""
        return self.residual, self.p, self.amax, self.packed, self.scale_bytes


def forward(x: Tensor, w: Tensor, plan: LinearPlan, keep: bool) -> tuple[Tensor, SavedInput]:
    """Return y in bf16, of all tokens or of the rank's own where its gradient comes as a shard of them, and
    what backward needs of x.
    """
    recipe, shards = plan.recipe, shards_of(plan, "input")
    quantizer, wgrad_quantizer = recipe.fprop_input.quantizer, recipe.wgrad_input.quantizer
    wgrad_quantizer = wgrad_quantizer if keep else None
    encoded: EncodedWeight = plan.weights.get(w, plan)
    num_here, num_in = x.shape
    num_tokens = num_here if shards is None else num_here * shards.num_shards
    v_x = v_w = None
    if quantizer is not None:
        v_x, v_w = basis_of(plan, "fprop_input"), head_basis_of(plan, "fprop_weight")
    elif wgrad_quantizer is not None:
        v_x = basis_of(plan, "wgrad_input")
    merges = is_merged(plan, "fprop_input") or is_merged(plan, "wgrad_input")
    left = thin = beside = None
    if quantizer is not None and not merges:
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
        y = _sum_of_tokens(all_rows(x, shards), w, None, plan)
    else:
        assert encoded.fprop is not None
        left, right, scales = _operands(  # type: ignore[assignment]
            (x, residual, sums), (left, thin), encoded.fprop, plan, ("fprop_input", "fprop_weight"), used[0]
        )
        y = _sum_of_tokens(left, right, scales.alpha, plan)  # type: ignore[arg-type]
    if wgrad_quantizer is None:
        return y, SavedInput(x)
    if merges:
        copy = merge(x, residual, wgrad_quantizer, plan, "wgrad_input", used[1])
        return y, SavedInput(copy, None, used[1])
    if not recipe.save_packed:
        return y, SavedInput(residual, p, used[1])
    codes = quantize_to_bytes(residual.t(), wgrad_quantizer, plan, "wgrad_input", used[1])
    note(used[1], plan, "wgrad_input")
    return y, SavedInput(None, p, used[1], *codes)


def _operands(
    matrices: tuple[Tensor, Tensor, Tensor | None],
    buffers: tuple[Tensor | None, Tensor | None],
    side: EncodedSide,
    plan: LinearPlan,
    cells: tuple[str, str],
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, ProductScales]:
    """Return the operands of fprop or dgrad and their scales: what arrived as the product reads it, and the
    weight.

    matrices: x or g, its residual, and the partial sums of the residual's product with the weight's head.
    buffers: the left operand with P in its place, and the columns of its thin factors; None where heads are
    merged. cells: names of both operands. amax: of the residual.
    """
    (source, residual, sums), (left, thin), name = matrices, buffers, cells[0]
    quantizers = tuple(getattr(plan.recipe, cell).quantizer for cell in cells)
    merges = is_merged(plan, name)
    right, factors = side.open()
    has_thin = thin is not None and thin.shape[1] > 0
    scales = product_scales(quantizers, (amax, side.amax), has_thin, (merges, side.is_merged))  # type: ignore[arg-type]
    if merges:
        assert not factors
        left = all_rows(
            merge(source, residual, quantizers[0], plan, name, amax), shards_of(plan, operand_of(name))
        )
    else:
        assert left is not None and thin is not None
        if sums is not None:
            factors.append(Thin(sums, thin[:, thin.shape[1] - sums.shape[2] :], True))
        fill_rows(left, residual, quantizers[0], plan, name, amax, scales, thin, factors)
    note(amax, plan, name)
    note(side.amax, plan, cells[1])
    return left, right, scales


@dataclass(slots=True)
class _Gradient:
    """g as the products read it, of the tokens held here; complete for dgrad, prepared for wgrad.

    v, p: of a head that enters products by itself; p of all tokens once wgrad's copy is written. residual,
    amax: what wgrad's copy is made of (amax over all ranks). left, right, scales: dgrad's operands [M, N +
    r_g + r_w] and [N + r_g + r_w, K], and its scales.
    """

    g: Tensor
    v: Tensor | None = None
    p: Tensor | None = None
    residual: Tensor | None = None
    amax: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    scales: ProductScales = field(default_factory=ProductScales)


def _open_gradient(
    g: Tensor, encoded: EncodedWeight, plan: LinearPlan, needs: tuple[bool, bool]
) -> _Gradient:
    """Split g and write dgrad's operands."""
    recipe, shards, opened = plan.recipe, shards_of(plan, "grad_output"), _Gradient(g)
    names = "dgrad_grad_output", "wgrad_grad_output"
    dgrad, wgrad = (
        getattr(recipe, name).quantizer if n else None for name, n in zip(names, needs, strict=True)
    )
    if dgrad is None and wgrad is None:
        return opened
    num_here, num_out = g.shape
    num_tokens = num_here if shards is None else num_here * shards.num_shards
    its_cell = names[0] if dgrad is not None else names[1]
    basis, merges = basis_of(plan, its_cell), is_merged(plan, its_cell)
    opened.v = v_g = None if merges else basis
    u = None if dgrad is None else encoded.u
    thin = beside = amax = sums = None
    if dgrad is not None and not merges:
        opened.left = wide(g, num_tokens, num_out + width_of(v_g) + width_of(u))
        thin = thin_columns(opened.left, num_out, shards)
        beside = thin[:, : width_of(v_g)]
    residual = g
    if basis is not None:
        p, amax, residual, sums = split(g, basis, plan.out_features, plan, beside=beside, factor=u)
        opened.p = None if merges else p
    elif u is not None:
        sums = thin_sums(g, u)
    used = amaxes(residual, plan, names, (dgrad, wgrad), amax)
    opened.residual, opened.amax = residual, used[1]
    if dgrad is None:
        return opened
    assert encoded.dgrad is not None
    opened.left, opened.right, opened.scales = _operands(
        (g, residual, sums), (opened.left, thin), encoded.dgrad, plan, (names[0], "dgrad_weight"), used[0]
    )
    return opened


def backward(
    g: Tensor, w: Tensor, x: SavedInput, plan: LinearPlan, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx, of the rank's own tokens where x is a shard of them, and what stands for dw."""
    recipe, shards = plan.recipe, shards_of(plan, "grad_output")
    encoded: EncodedWeight = plan.weights.get(w, plan)
    gradient = _open_gradient(g, encoded, plan, needs)
    if shards is not None and (
        (needs[0] and recipe.dgrad_grad_output.quantizer is None)
        or (needs[1] and recipe.wgrad_grad_output.quantizer is None)
    ):
        g = shards.gather_rows(g)
    dx = dw = finish = None
    if needs[0]:
        left, right, alpha = g, w, None
        if gradient.left is not None:
            left, right, alpha = gradient.left, gradient.right, gradient.scales.alpha  # type: ignore[assignment]
        dx = torch.empty(left.shape[0], w.shape[1], dtype=g.dtype, device=g.device)
        scaled_product(left, right.t(), dx, alpha)
        # As large as everything that backward keeps of this linear: gone before wgrad's are made.
        gradient.left = gradient.right = left = right = None  # type: ignore[assignment]
        if plan.gathered_operand == "input":
            assert plan.gather is not None
            finish = plan.gather.start_scatter_sum(dx)
    if needs[1]:
        dw = _weight_gradient(g, gradient, w, x, plan)
    return dx if finish is None else finish(), dw


def _sum_of_tokens(left: Tensor, right: Tensor, alpha: Tensor | None, plan: LinearPlan) -> Tensor:
    """Return alpha left right^T in bf16: y of all tokens, or this rank's rows of its sum over the ranks.

    With an exchange the rows of others are multiplied first, and leave while the own are.
    """
    y = torch.empty(left.shape[0], right.shape[0], dtype=right.dtype, device=right.device)
    scatters = plan.gathered_operand == "grad_output"
    exchange = plan.gather.exchange if scatters and plan.gather is not None else None
    if exchange is None:
        scaled_product(left, right, y, alpha)
        return plan.gather.scatter_sum(y) if scatters and plan.gather is not None else y
    return scattered_product(exchange, y, lambda rows, out: scaled_product(left[rows], right, out, alpha))


def _weight_gradient(g: Tensor, gradient: _Gradient, w: Tensor, x: SavedInput, plan: LinearPlan) -> Tensor:
    """Form dw and deliver it: into the engine's accumulator where there is one. g: of all tokens where
    nothing is quantised.
    """
    main_grad: Tensor | None = getattr(w, "main_grad", None)
    out = torch.empty_like(w) if main_grad is None else main_grad
    accumulate = main_grad is not None
    alpha = None
    if plan.recipe.wgrad_grad_output.quantizer is None:
        assert x.residual is not None
        left, right = g, all_rows(x.residual, shards_of(plan, "input"))
    else:
        left, right, alpha = _wgrad_operands(gradient, w, x, plan)
    scaled_product(left.t(), right.t(), out, alpha, accumulate)
    return as_placeholder(w) if accumulate else out


def _wgrad_operands(
    gradient: _Gradient, w: Tensor, x: SavedInput, plan: LinearPlan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return wgrad's operands, [M + r_g + r_x, N] and [M + r_g + r_x, K], and alpha."""
    left, p, scales = _wgrad_gradient(gradient, x, plan)
    if is_merged(plan, "wgrad_input"):
        assert x.residual is not None and p is None
        note(x.amax, plan, "wgrad_input")
        return left, all_rows(x.residual, shards_of(plan, "input")), scales.alpha
    r_g, r_x = width_of(p), width_of(x.p)
    num_tokens = left.shape[0] - r_g - r_x
    middle = num_tokens + r_g
    right, factors = wide(w, left.shape[0], w.shape[1]), []
    p_x = _fill_input(right[:num_tokens].t(), x, plan)
    if p is not None:
        assert gradient.v is not None
        factors.append(Thin(gradient.v.t(), left[num_tokens:middle], False))
        _head_times_residual(right[num_tokens:middle], p, right[:num_tokens], x, scales.inverse, plan)
    if p_x is not None:
        assert plan.v_input is not None
        factors.append(Thin(plan.v_input.t(), right[middle:], False))
        shards = shards_of(plan, "grad_output")
        p_x = p_x if shards is None else rows_held(p_x, shards)
        _over_tokens(left[middle:], p_x, gradient.g, scales.inverse, shards)
    place_all(factors, None)
    return left, right, scales.alpha


def _wgrad_gradient(
    gradient: _Gradient, x: SavedInput, plan: LinearPlan
) -> tuple[Tensor, Tensor | None, ProductScales]:
    """Write wgrad's copy of g; return it with its thin rows still open, P of all tokens, and the scales."""
    recipe, name, shards = plan.recipe, "wgrad_grad_output", shards_of(plan, "grad_output")
    quantizer, residual, amax = recipe.wgrad_grad_output.quantizer, gradient.residual, gradient.amax
    assert quantizer is not None and residual is not None and recipe.wgrad_input.quantizer is not None
    num_thin, merges = width_of(gradient.p) + width_of(x.p), is_merged(plan, name)
    scales = product_scales(
        (quantizer, recipe.wgrad_input.quantizer),
        (amax, x.amax),
        num_thin > 0,
        (merges, is_merged(plan, "wgrad_input")),
    )
    note(amax, plan, name)
    gradient.residual = None  # the last to read it
    if merges:
        left = all_rows(merge(gradient.g, residual, quantizer, plan, name, amax), shards)
        return left, None, scales
    num_here, num_out = gradient.g.shape
    num_tokens = num_here if shards is None else num_here * shards.num_shards
    left = wide(gradient.g, num_tokens + num_thin, num_out)
    p = fill_columns(left[:num_tokens].t(), residual, quantizer, plan, name, amax, gradient.p, scales)
    return left, p, scales


def _fill_input(place: Tensor, x: SavedInput, plan: LinearPlan) -> Tensor | None:
    """Write wgrad's copy of x into `place` [K, M]; returns P of all tokens."""
    shards, quantizer = shards_of(plan, "input"), plan.recipe.wgrad_input.quantizer
    assert quantizer is not None
    if x.residual is not None:
        note(x.amax, plan, "wgrad_input")
        return fill_columns(place, x.residual, quantizer, plan, "wgrad_input", x.amax, x.p)
    assert x.packed is not None and x.scale_bytes is not None
    if shards is not None:
        return gather_columns(place, (x.packed, x.scale_bytes), quantizer, shards, x.p)
    decode_into(place, x.packed, x.scale_bytes, quantizer)
    return x.p


def _head_times_residual(
    rows: Tensor,
    p: Tensor,
    decoded: Tensor,
    x: SavedInput,
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
            assert x.amax is not None
            factor = inverse * (x.amax / scale_target(quantizer))
    _over_tokens(rows, p if shards is None else rows_held(p, shards), residual, factor, shards)


def _over_tokens(rows: Tensor, p: Tensor, matrix: Tensor, factor: Tensor | None, shards: Any) -> None:
    """Write factor * p^T matrix into `rows`, summed over the tokens of all ranks; p [m, r], matrix [m, C]."""
    if shards is None:
        scaled_product(p.t(), matrix.t(), rows, factor)
        return
    mine = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    place_all([Thin(shards.sum(scaled_product(p.t(), matrix.t(), mine)), rows, True)], factor)
