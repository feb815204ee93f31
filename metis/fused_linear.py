"""The linear on kernels: the six cells of `metis.functional` with every extra pass over memory taken out.

One idea: the terms of a product are laid side by side along the contraction axis, so that one GEMM forms them
all and its epilogue applies the tensor scales. With alpha the product of the two tensor scales,

    y  = alpha [q(R_x) | P_x           | R_x V_w / alpha] [q(W_R) | w V_x / alpha   | U  ]^T
    dx = alpha [q(R_g) | P_g           | R_g U / alpha  ] [q(W_R) ; V_g^T w / alpha ; V_w^T]
    dw = alpha [q(R_g) ; V_g^T ; P_x^T g / alpha]^T [q(R_x) ; P_g^T R_x / alpha ; V_x^T]

each in fp32, rounded once to the output. The quantised terms are exactly those of `metis.functional` (codes
times block scales, exact in bf16, alpha in the epilogue); a thin factor is rounded to bf16 once, after the
division by alpha. dw is added to the engine's fp32 accumulator in the same call.

What depends on the weight alone is made once per optimizer step (`EncodedWeight`). Saved for backward are R_x
(which takes the place of x) and P_x; nothing else is larger than a thin factor.

`metis.functional` stays the definition, and runs whatever is not covered here (`is_fusable`, `can_run`).
Coefficients and residuals come from `metis.kernels.projection`, within fp32 rounding of the definition's.

Shape letters: M tokens, K in_features, N out_features, r ranks (of x, w and g, which may differ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metis import kernels
from metis.config import CellConfig, QuantizerConfig, Recipe
from metis.decompose.projector import num_chunks_for
from metis.formats import as_float32
from metis.functional import LinearPlan, as_placeholder, operand_of
from metis.functional import quantized_linear as reference_linear
from metis.fused import can_fuse, fused_quantize, scale_target, sign_vector
from metis.gemm import EmulatedGemm, scaled_product
from metis.operand import Axis

MAX_RANK = 128
"""Columns of a basis that the kernels hold, of `metis.kernels.projection`."""

_ANY_QUANTIZER = QuantizerConfig()
_GEMMS = {
    "fprop": ("fprop_input", "fprop_weight"),
    "dgrad": ("dgrad_grad_output", "dgrad_weight"),
    "wgrad": ("wgrad_grad_output", "wgrad_input"),
}


def is_fusable(recipe: Recipe, in_features: int, out_features: int) -> bool:
    """Whether this file covers a recipe: 4-bit cells of one term, bf16 heads, no mean, no packed saving.

    Both cells of a GEMM are quantised or neither; both cells of an operand split alike (or one is whole).
    """
    if recipe.save_packed or recipe.spectral_learning_rate is not None:
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


def can_run(x_MK: Tensor, plan: LinearPlan) -> bool:
    """Whether a pass runs here: a fusable recipe, bf16 on a device with kernels, no shards to gather."""
    return (
        plan.weights is not None
        and x_MK.dtype == torch.bfloat16
        and plan.gather is None
        and isinstance(plan.backend, EmulatedGemm)
        and can_fuse(x_MK, _ANY_QUANTIZER, plan.backend.kernels)
    )


@dataclass(frozen=True, slots=True)
class _Side:
    """One operand of one GEMM in a buffer whose further columns (or rows) hold thin factors.

    buffer: [rows, features + extra] or [rows + extra, features] bf16. amax: of what was quantised, None
    without a tensor scale.
    """

    buffer: Tensor
    amax: Tensor | None


@dataclass(frozen=True, slots=True)
class EncodedWeight:
    """What a linear's products read of its weight in one optimizer step.

    fprop: [N, K + r_x + r_w]; dgrad: [N + r_g + r_w, K]; one buffer where both cells quantise alike in tiles.
    t_input = w V_x, fp32 [N, r_x]; t_grad = V_g^T w, fp32 [r_g, K]. u = P of the weight, [N, r_w].
    """

    fprop: _Side
    dgrad: _Side
    t_input: Tensor | None
    t_grad: Tensor | None
    u: Tensor | None


class WeightCache:
    """Keeps the encoded weight of the running step; `clear` whenever the weight may have changed.

    The training loop clears it after the optimizer step (`advance_bases`). An in-place change that torch
    counts (an optimizer's, a `load_state_dict`) is noticed without that.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._encoded: EncodedWeight | None = None

    def clear(self) -> None:
        """Forget the weight."""
        self._key = self._encoded = None

    def get(self, w_NK: Tensor, plan: LinearPlan) -> EncodedWeight:
        """Return the weight as this step's products read it."""
        bases = (plan.v_input, plan.v_weight, plan.v_grad_output)
        key = (w_NK.data_ptr(), w_NK._version, plan.position.step, *bases)
        if self._key is None or not _same(key, self._key):
            self._key = self._encoded = None  # the old one goes before the new one comes
            self._encoded = encode_weight(w_NK, plan)
            self._key = key
        assert self._encoded is not None
        return self._encoded

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightCache, ()


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(x is y if isinstance(x, Tensor) or x is None else x == y for x, y in zip(a, b, strict=True))


def encode_weight(w_NK: Tensor, plan: LinearPlan) -> EncodedWeight:
    """Split and quantise a weight for both products that read it, with the factors that go beside it."""
    recipe = plan.recipe
    fprop_cell, dgrad_cell = recipe.fprop_weight, recipe.dgrad_weight
    num_out, num_in = w_NK.shape
    splits_x, splits_g = _basis(plan, "fprop_input"), _basis(plan, "dgrad_grad_output")
    v_w = _basis(plan, "fprop_weight" if fprop_cell.split is not None else "dgrad_weight")
    r_x, r_g, r_w = (0 if v is None else v.shape[1] for v in (splits_x, splits_g, v_w))
    u, amax, residual = None, None, w_NK
    quantizers = [cell.quantizer for cell in (fprop_cell, dgrad_cell) if cell.quantizer is not None]
    if not quantizers:
        plain = _Side(w_NK, None)
        return EncodedWeight(plain, plain, None, None, None)
    if v_w is not None:
        u, amax, residual, _ = _split(w_NK, v_w, plan.in_features, plan)
    shares = (
        fprop_cell.quantizer == dgrad_cell.quantizer
        and fprop_cell.quantizer is not None
        and fprop_cell.quantizer.block_shape == (16, 16)
        and fprop_cell.quantizer.rht is None
    )
    if shares:
        whole = _empty(w_NK, num_out + r_g + r_w, num_in + r_x + r_w)
        sides = {"fprop_weight": whole[:num_out], "dgrad_weight": whole[:, :num_in]}
    else:
        sides = {
            "fprop_weight": _empty(w_NK, num_out, num_in + r_x + r_w),
            "dgrad_weight": _empty(w_NK, num_out + r_g + r_w, num_in),
        }
    result: dict[str, _Side] = {}
    for name, cell in (("fprop_weight", fprop_cell), ("dgrad_weight", dgrad_cell)):
        buffer = sides[name]
        if cell.quantizer is None:
            result[name] = _Side(w_NK, None)
            continue
        if name == "dgrad_weight" and shares:
            result[name] = _Side(buffer, result["fprop_weight"].amax)
            continue
        transposed = name == "dgrad_weight"
        matrix = residual.t() if transposed else residual
        place = buffer[:num_out].t() if transposed else buffer[:, :num_in]
        known = amax if cell.quantizer.rht is None else None
        known = _quantize_into(matrix, cell.quantizer, plan, name, place, known)
        result[name] = _Side(buffer, known)
    if u is not None:
        if fprop_cell.quantizer is not None:
            sides["fprop_weight"][:num_out, num_in + r_x :].copy_(u)
        if dgrad_cell.quantizer is not None:
            sides["dgrad_weight"][num_out + r_g :, :num_in].copy_(v_w.t())
    t_input = None if splits_x is None else _fp32(w_NK, splits_x.t())
    t_grad = None if splits_g is None else _fp32(splits_g.t(), w_NK.t())
    return EncodedWeight(result["fprop_weight"], result["dgrad_weight"], t_input, t_grad, u)


def _fp32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T in fp32."""
    return scaled_product(a, b, torch.empty(a.shape[0], b.shape[0], dtype=torch.float32, device=a.device))


def _empty(like: Tensor, rows: int, cols: int) -> Tensor:
    return torch.empty(rows, cols, dtype=torch.bfloat16, device=like.device)


def _basis(plan: LinearPlan, cell_name: str) -> Tensor | None:
    """Return the basis in use for a cell, None where it splits nothing (yet)."""
    cell: CellConfig = getattr(plan.recipe, cell_name)
    return None if cell.split is None else getattr(plan, f"v_{operand_of(cell_name)}")


def _split(
    x: Tensor,
    v: Tensor,
    features: Axis,
    plan: LinearPlan,
    *,
    beside: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (P, amax of R held here, R, partial sums of R F); P is written to `beside` as well."""
    basis = plan.recipe.basis
    assert basis is not None
    features = features.alone() if basis.tp_mode == "local" else features
    total = num_chunks_for(features.size // features.parts, basis.num_canonical_chunks)
    partials = kernels.project(x, v, max(1, total // features.num_shards), features.parts)
    if features.is_sharded:
        mine = kernels.fold(partials, dtype=torch.float32)
        partials = torch.stack(features.gather(mine))
    p = torch.empty(x.shape[0], v.shape[1], dtype=torch.bfloat16, device=x.device)
    kernels.fold(partials, out=p, other_out=beside)
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    residual, sums = kernels.residual(x, p, v, amax, factor)
    return p, amax, residual, sums


def _reduced(amax: Tensor, plan: LinearPlan, cell_name: str) -> Tensor:
    """Return the amax over the ranks that hold the rest of the tensor."""
    if plan.recipe.amax_scope != "global":
        return amax
    for axis in plan.axes(cell_name):
        amax = axis.reduce_max(amax)
    return amax


def _noted(amax: Tensor | None, plan: LinearPlan, cell_name: str) -> None:
    if amax is not None and plan.watch is not None:
        plan.watch.note_amax(plan.layer, cell_name, amax)


def _quantize_into(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    plan: LinearPlan,
    cell_name: str,
    place: Tensor,
    amax: Tensor | None,
) -> Tensor | None:
    """Quantise a matrix [rows, contraction axis] into `place`; returns the amax that was used.

    amax: of this rank's matrix as the cell reads it, None: not known yet.
    """
    if quantizer.has_tensor_amax:
        amax = kernels.amax(matrix, sign_vector(quantizer.rht)) if amax is None else amax
        amax = _reduced(amax, plan, cell_name)
    fused_quantize(matrix, quantizer, amax, _noise(quantizer, plan, cell_name), False, operand_out=place)
    _noted(amax, plan, cell_name)
    return amax


def _noise(quantizer: QuantizerConfig, plan: LinearPlan, cell_name: str) -> kernels.KernelNoise | None:
    if quantizer.rounding != "stochastic":
        return None
    is_transposed = cell_name in ("dgrad_weight", "wgrad_grad_output", "wgrad_input")
    return plan.noise(cell_name).for_kernel(*plan.axes(cell_name), is_transposed)


def _scales(
    left: QuantizerConfig,
    right: QuantizerConfig,
    amaxes: tuple[Tensor | None, Tensor | None],
    has_extra: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return (alpha, 1 / alpha) of a product, None without tensor scales."""
    if amaxes[0] is None or amaxes[1] is None:
        return None, None
    reciprocal = as_float32(1 / (scale_target(left) * scale_target(right)))
    return kernels.gemm_scales(*amaxes, reciprocal, invertible=has_extra)


def _scaled_into(place: Tensor, thin: Tensor, inverse: Tensor | None) -> None:
    """Write a thin fp32 factor, divided by alpha, into its place beside an operand."""
    if inverse is None:
        place.copy_(thin)
    else:
        torch.mul(thin, inverse, out=place)


@dataclass(slots=True)
class _SavedInput:
    """What backward needs of x: R (x itself where nothing is split), P, and the amaxes known so far."""

    residual: Tensor
    p: Tensor | None
    amax: Tensor | None
    rotated_amax: Tensor | None


def _forward(x: Tensor, w: Tensor, plan: LinearPlan, needs_wgrad: bool) -> tuple[Tensor, _SavedInput]:
    """Return y in bf16 and what backward needs."""
    recipe = plan.recipe
    encoded = plan.weights.get(w, plan)  # type: ignore[union-attr]
    num_in = x.shape[1]
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    cell, wgrad_quantizer = recipe.fprop_input, recipe.wgrad_input.quantizer
    quantizer = cell.quantizer
    v_x = _basis(plan, "fprop_input" if quantizer is not None else "wgrad_input")
    if quantizer is None:
        scaled_product(x, w, y)
        if v_x is None or not needs_wgrad:
            return y, _SavedInput(x, None, None, None)
        p, amax, residual, _ = _split(x, v_x, plan.in_features, plan)
        return y, _SavedInput(residual, p, amax, None)
    r_x = 0 if v_x is None else v_x.shape[1]
    r_w = 0 if encoded.u is None else encoded.u.shape[1]
    v_w = _basis(plan, "fprop_weight")
    left = _empty(x, x.shape[0], num_in + r_x + r_w)
    p = sums = amax = rotated = None
    residual = x
    if v_x is not None:
        beside = left[:, num_in : num_in + r_x]
        p, amax, residual, sums = _split(x, v_x, plan.in_features, plan, beside=beside, factor=v_w)
    elif v_w is not None:
        sums = kernels.project(x, v_w, num_chunks_for(num_in, 8))
    rotation = None if wgrad_quantizer is None else sign_vector(wgrad_quantizer.rht)
    if quantizer.has_tensor_amax and quantizer.rht is None and amax is None:
        if needs_wgrad and rotation is not None and residual.shape[0] % len(rotation) == 0:
            amax, rotated = kernels.amax_both(residual, rotation)
        else:
            amax = kernels.amax(residual)
    used = _quantize_into(
        residual, quantizer, plan, "fprop_input", left[:, :num_in], amax if quantizer.rht is None else None
    )
    assert recipe.fprop_weight.quantizer is not None
    alpha, inverse = _scales(
        quantizer, recipe.fprop_weight.quantizer, (used, encoded.fprop.amax), r_x + r_w > 0
    )
    right = encoded.fprop.buffer
    if sums is not None:
        kernels.fold(sums, out=left[:, num_in + r_x :], factor=inverse)
    if encoded.t_input is not None and r_x:
        _scaled_into(right[:, num_in : num_in + r_x], encoded.t_input, inverse)
    scaled_product(left, right, y, alpha)
    if wgrad_quantizer is None:
        return y, _SavedInput(x, None, None, None)
    return y, _SavedInput(residual, p, amax, rotated)


def _backward(
    g: Tensor, w: Tensor, x: _SavedInput, plan: LinearPlan, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and what stands for dw."""
    recipe = plan.recipe
    dgrad_cell, wgrad_cell = recipe.dgrad_grad_output, recipe.wgrad_grad_output
    dgrad_quantizer = dgrad_cell.quantizer if needs[0] else None
    wgrad_quantizer = wgrad_cell.quantizer if needs[1] else None
    encoded = plan.weights.get(w, plan)  # type: ignore[union-attr]
    num_tokens, num_out = g.shape
    num_in = w.shape[1]
    is_split = dgrad_quantizer is not None or wgrad_quantizer is not None
    v_g = _basis(plan, "dgrad_grad_output" if dgrad_cell.split is not None else "wgrad_grad_output")
    v_g = v_g if is_split else None
    r_g = 0 if v_g is None else v_g.shape[1]
    u = encoded.u if dgrad_quantizer is not None else None
    r_w = 0 if u is None else u.shape[1]
    left = wleft = p = sums = amax = None
    if dgrad_quantizer is not None:
        left = _empty(g, num_tokens, num_out + r_g + r_w)
    r_x = 0 if x.p is None else x.p.shape[1]
    if wgrad_quantizer is not None:
        wleft = _empty(g, num_tokens + r_g + r_x, num_out)
    residual = g
    if v_g is not None:
        beside = None if left is None else left[:, num_out : num_out + r_g]
        p, amax, residual, sums = _split(g, v_g, plan.out_features, plan, beside=beside, factor=u)
    elif u is not None:
        sums = kernels.project(g, u, num_chunks_for(num_out, 8))
    used = _quantize_gradient(residual, (dgrad_quantizer, wgrad_quantizer), plan, (left, wleft), amax)
    dx = dw = None
    if needs[0]:
        dx = torch.empty(num_tokens, num_in, dtype=g.dtype, device=g.device)
        if dgrad_quantizer is None:
            scaled_product(g, w.t(), dx)
        else:
            assert recipe.dgrad_weight.quantizer is not None and left is not None
            amaxes = (used[0], encoded.dgrad.amax)
            alpha, inverse = _scales(dgrad_quantizer, recipe.dgrad_weight.quantizer, amaxes, r_g + r_w > 0)
            right = encoded.dgrad.buffer
            if sums is not None:
                kernels.fold(sums, out=left[:, num_out + r_g :], factor=inverse)
            if encoded.t_grad is not None and r_g:
                _scaled_into(right[num_out : num_out + r_g], encoded.t_grad, inverse)
            scaled_product(left, right.t(), dx, alpha)
    left = None
    if needs[1]:
        dw = _weight_gradient(g, residual, p, v_g, w, x, plan, wleft, used[1])
    return dx, dw


def _quantize_gradient(
    residual: Tensor,
    quantizers: tuple[QuantizerConfig | None, QuantizerConfig | None],
    plan: LinearPlan,
    buffers: tuple[Tensor | None, Tensor | None],
    amax: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Quantise g's residual for dgrad and wgrad; returns the amaxes used."""
    dgrad, wgrad = quantizers
    rotated = None
    if amax is None and dgrad is not None and wgrad is not None and wgrad.rht is not None:
        rotation = sign_vector(wgrad.rht)
        assert rotation is not None
        if dgrad.rht is None and dgrad.has_tensor_amax and wgrad.has_tensor_amax:
            amax, rotated = kernels.amax_both(residual, rotation)
    if amax is None and any(q is not None and q.has_tensor_amax and q.rht is None for q in quantizers):
        amax = kernels.amax(residual)
    used: list[Tensor | None] = [None, None]
    if dgrad is not None:
        assert buffers[0] is not None
        place, known = buffers[0][:, : residual.shape[1]], amax if dgrad.rht is None else None
        used[0] = _quantize_into(residual, dgrad, plan, "dgrad_grad_output", place, known)
    if wgrad is not None:
        assert buffers[1] is not None
        place, known = buffers[1][: residual.shape[0]].t(), amax if wgrad.rht is None else rotated
        used[1] = _quantize_into(residual.t(), wgrad, plan, "wgrad_grad_output", place, known)
    return used[0], used[1]


def _weight_gradient(
    g: Tensor,
    residual: Tensor,
    p: Tensor | None,
    v_g: Tensor | None,
    w: Tensor,
    x: _SavedInput,
    plan: LinearPlan,
    left: Tensor | None,
    amax: Tensor | None,
) -> Tensor:
    """Form dw and deliver it: into the engine's accumulator where there is one."""
    recipe = plan.recipe
    g_quantizer, x_quantizer = recipe.wgrad_grad_output.quantizer, recipe.wgrad_input.quantizer
    main_grad: Tensor | None = getattr(w, "main_grad", None)
    out = torch.empty_like(w) if main_grad is None else main_grad
    accumulate = main_grad is not None
    if left is None:
        scaled_product(g.t(), x.residual.t(), out, None, accumulate)
    else:
        assert g_quantizer is not None and x_quantizer is not None
        num_tokens, num_in = x.residual.shape
        r_g, r_x = (0 if factor is None else factor.shape[1] for factor in (p, x.p))
        right = _empty(g, num_tokens + r_g + r_x, num_in)
        known = x.amax if x_quantizer.rht is None else x.rotated_amax
        place = right[:num_tokens].t()
        x_amax = _quantize_into(x.residual.t(), x_quantizer, plan, "wgrad_input", place, known)
        alpha, inverse = _scales(g_quantizer, x_quantizer, (amax, x_amax), r_g + r_x > 0)
        if p is not None:
            assert v_g is not None
            left[num_tokens : num_tokens + r_g].copy_(v_g.t())
            scaled_product(p.t(), x.residual.t(), right[num_tokens : num_tokens + r_g], inverse)
        if x.p is not None:
            v_x = plan.v_input
            assert v_x is not None
            right[num_tokens + r_g :].copy_(v_x.t())
            scaled_product(x.p.t(), g.t(), left[num_tokens + r_g :], inverse)
        scaled_product(left.t(), right.t(), out, alpha, accumulate)
    return as_placeholder(w) if accumulate else out


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, plan: LinearPlan, keep: bool) -> Tensor:
        _observe(plan, ("fprop_input", x), ("fprop_weight", w))
        y, saved = _forward(x, w, plan, keep)
        if keep:
            rows = None if plan.sketch is None else plan.sketch.pick("input", x)
            ctx.plan, ctx.weight, ctx.is_sketched = plan, w, False
            tensors = (saved.residual, saved.p, saved.amax, saved.rotated_amax)
            ctx.save_for_backward(w, rows, x if _is_observed(plan) else None, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        plan: LinearPlan = ctx.plan
        w, rows, observed, *saved = ctx.saved_tensors
        g = g.contiguous()
        if observed is not None:
            _observe(plan, ("dgrad_grad_output", g), ("dgrad_weight", w))
            _observe(plan, ("wgrad_grad_output", g), ("wgrad_input", observed))
        dx, dw = _backward(g, ctx.weight, _SavedInput(*saved), plan, ctx.needs_input_grad[:2])
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
    if _is_observed(plan):
        for cell_name, matrix in operands:
            if getattr(plan.recipe, cell_name).quantizer is not None:
                plan.open(matrix, cell_name, None).encode_here()


def quantized_linear(x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> Tensor:
    """Return y = x w^T as `metis.functional.quantized_linear` defines it, on kernels where they cover it."""
    if not can_run(x_MK, plan):
        return reference_linear(x_MK, w_NK, plan)
    with torch.autocast(x_MK.device.type, enabled=False):
        return _FusedLinear.apply(x_MK, w_NK, plan, torch.is_grad_enabled())
