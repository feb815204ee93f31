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

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metis.encoded_weight import EncodedSide, EncodedWeight
from metis.exchange import scattered_product
from metis.functional import LinearPlan, as_placeholder, operand_of
from metis.fused import scale_target
from metis.fused_operand import (
    Columns,
    ProductScales,
    all_rows,
    amaxes,
    basis_of,
    decode_into,
    fill_rows,
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
    start_columns,
    start_gathered_columns,
    thin_columns,
    thin_sums,
    wide,
    width_of,
)
from metis.gemm import scaled_product
from metis.kernels import Thin
from metis.operand import Axis


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


@dataclass(slots=True)
class _WgradCopies:
    """What writes wgrad's copies of g and x, None for one with its head added back; scales: of their product.

    What ranks exchange is on its way: codes of a copy, and sums over tokens, fp32: of_g P_g^T R_x [r_g, K],
    of_x P_x^T g [r_x, N]; None where nobody has other tokens, or R_x is still to be decoded.
    """

    scales: ProductScales
    g: Columns | None = None
    x: Columns | None = None
    of_g: Callable[[], Tensor] | None = None
    of_x: Callable[[], Tensor] | None = None


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
    copies = _start_wgrad(gradient, x, plan) if needs[1] else None
    if needs[0]:
        left, right, alpha = g, w, None
        if gradient.left is not None:
            left, right, alpha = gradient.left, gradient.right, gradient.scales.alpha  # type: ignore[assignment]
        dx = torch.empty(left.shape[0], w.shape[1], dtype=g.dtype, device=g.device)
        scaled_product(left, right.t(), dx, alpha)
        # As large as everything that backward keeps of this linear: gone before wgrad's are made.
        gradient.left = gradient.right = left = right = None  # type: ignore[assignment]
        if (others := shards_of(plan, "input")) is not None:
            finish = others.start_scatter_sum(dx)
    if needs[1]:
        dw = _weight_gradient(g, gradient, copies, w, x, plan)
    return dx if finish is None else finish(), dw


def _sum_of_tokens(left: Tensor, right: Tensor, alpha: Tensor | None, plan: LinearPlan) -> Tensor:
    """Return alpha left right^T in bf16: y of all tokens, or this rank's rows of its sum over the ranks.

    With an exchange the rows of others are multiplied first, and leave while the own are.
    """
    y = torch.empty(left.shape[0], right.shape[0], dtype=right.dtype, device=right.device)
    shards = shards_of(plan, "grad_output")
    if shards is not None and shards.exchange is not None:
        return scattered_product(
            shards.exchange, y, lambda rows, out: scaled_product(left[rows], right, out, alpha)
        )
    scaled_product(left, right, y, alpha)
    return y if shards is None else shards.scatter_sum(y)


def _weight_gradient(
    g: Tensor, gradient: _Gradient, copies: _WgradCopies | None, w: Tensor, x: SavedInput, plan: LinearPlan
) -> Tensor:
    """Form dw and deliver it: into the engine's accumulator where there is one. g: of all tokens where
    nothing is quantised. copies: None there.
    """
    main_grad: Tensor | None = getattr(w, "main_grad", None)
    out = torch.empty_like(w) if main_grad is None else main_grad
    accumulate = main_grad is not None
    alpha = None
    if plan.recipe.wgrad_grad_output.quantizer is None:
        assert x.residual is not None
        left, right = g, all_rows(x.residual, shards_of(plan, "input"))
    else:
        assert copies is not None
        left, right, alpha = _wgrad_operands(gradient, copies, w, x, plan)
    scaled_product(left.t(), right.t(), out, alpha, accumulate)
    return as_placeholder(w) if accumulate else out


def _start_wgrad(gradient: _Gradient, x: SavedInput, plan: LinearPlan) -> _WgradCopies | None:
    """Quantise what ranks exchange for wgrad, so that it travels beside dgrad's product; None where nothing
    is quantised.
    """
    name, residual = "wgrad_grad_output", gradient.residual
    quantizer = plan.recipe.wgrad_grad_output.quantizer
    if quantizer is None:
        return None
    copies = _WgradCopies(_wgrad_scales(gradient, x, plan))
    shards, others = shards_of(plan, "grad_output"), shards_of(plan, "input")
    if not is_merged(plan, name):
        assert residual is not None
        scales, gradient.residual = copies.scales, None  # the last to read it
        copies.g = start_columns(residual, quantizer, plan, name, gradient.amax, gradient.p, scales)
    if not is_merged(plan, "wgrad_input"):
        copies.x = _start_input(x, plan)
    if others is not None and gradient.p is not None and x.residual is not None:
        copies.of_g = _start_over_tokens(rows_held(gradient.p, others), x.residual, others)
    if shards is not None and x.p is not None:
        copies.of_x = _start_over_tokens(rows_held(x.p, shards), gradient.g, shards)
    return copies


def _wgrad_scales(gradient: _Gradient, x: SavedInput, plan: LinearPlan) -> ProductScales:
    names = "wgrad_grad_output", "wgrad_input"
    quantizers = tuple(getattr(plan.recipe, name).quantizer for name in names)
    has_thin = width_of(gradient.p) + width_of(x.p) > 0
    merged = tuple(is_merged(plan, name) for name in names)
    return product_scales(quantizers, (gradient.amax, x.amax), has_thin, merged)  # type: ignore[arg-type]


def _start_input(x: SavedInput, plan: LinearPlan) -> Columns:
    """Return what writes wgrad's copy of x."""
    shards, quantizer = shards_of(plan, "input"), plan.recipe.wgrad_input.quantizer
    assert quantizer is not None
    if x.residual is not None:
        return start_columns(x.residual, quantizer, plan, "wgrad_input", x.amax, x.p)
    packed, scale_bytes = x.packed, x.scale_bytes
    assert packed is not None and scale_bytes is not None
    if shards is not None:
        return start_gathered_columns((packed, scale_bytes), quantizer, shards, x.p)

    def write(place: Tensor) -> Tensor | None:
        decode_into(place, packed, scale_bytes, quantizer)
        return x.p

    return write


def _wgrad_operands(
    gradient: _Gradient, copies: _WgradCopies, w: Tensor, x: SavedInput, plan: LinearPlan
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return wgrad's operands, [M + r_g + r_x, N] and [M + r_g + r_x, K], and alpha."""
    note(gradient.amax, plan, "wgrad_grad_output")
    if x.packed is None:  # else shown when it was quantised, in forward
        note(x.amax, plan, "wgrad_input")
    shards, others = shards_of(plan, "grad_output"), shards_of(plan, "input")
    num_thin = width_of(gradient.p) + width_of(x.p)
    p = p_x = None
    if copies.g is None:
        left = all_rows(_merged_gradient(gradient, plan), shards)
        num_tokens = left.shape[0]
    else:
        num_here, num_out = gradient.g.shape
        num_tokens = num_here if shards is None else num_here * shards.num_shards
        left = wide(gradient.g, num_tokens + num_thin, num_out)
        p = copies.g(left[:num_tokens].t())
        copies.g = None  # with it goes what it was made of
    middle = num_tokens + width_of(p)
    if copies.x is None:
        assert x.residual is not None
        right = all_rows(x.residual, others)
    else:
        right = wide(w, left.shape[0], w.shape[1])
        p_x = copies.x(right[:num_tokens].t())
        copies.x = None
    factors, inverse = [], copies.scales.inverse
    if p is not None:
        assert gradient.v is not None
        factors.append(Thin(gradient.v.t(), left[num_tokens:middle], False))
        place = right[num_tokens:middle]
        if copies.of_g is None:
            _head_times_residual(place, p, right[:num_tokens], x, inverse, plan)
        else:
            place_all([Thin(copies.of_g(), place, True)], inverse)
            copies.of_g = None
    if p_x is not None:
        assert plan.v_input is not None
        factors.append(Thin(plan.v_input.t(), right[middle:], False))
        if copies.of_x is None:
            scaled_product(p_x.t(), gradient.g.t(), left[middle:], inverse)
        else:
            factors.append(Thin(copies.of_x(), left[middle:], True))
    place_all(factors, None if copies.of_x is None else inverse)
    copies.of_x = None
    return left, right, copies.scales.alpha


def _merged_gradient(gradient: _Gradient, plan: LinearPlan) -> Tensor:
    """Return wgrad's copy of g with its head added back, of the rows held here."""
    name, residual = "wgrad_grad_output", gradient.residual
    quantizer = plan.recipe.wgrad_grad_output.quantizer
    assert quantizer is not None and residual is not None
    gradient.residual = None  # the last to read it
    return merge(gradient.g, residual, quantizer, plan, name, gradient.amax)


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
    if shards is None:
        scaled_product(p.t(), residual.t(), rows, factor)
    else:
        place_all([Thin(_start_over_tokens(rows_held(p, shards), residual, shards)(), rows, True)], factor)


def _start_over_tokens(p: Tensor, matrix: Tensor, shards: Axis) -> Callable[[], Tensor]:
    """Start p^T matrix, fp32 [r, C], summed over the tokens of all ranks; p [m, r], matrix [m, C]."""
    mine = torch.empty(p.shape[1], matrix.shape[1], dtype=torch.float32, device=p.device)
    return shards.start_sum(scaled_product(p.t(), matrix.t(), mine))
