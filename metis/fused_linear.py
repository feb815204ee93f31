"""The linear on kernels: `metis.functional.quantized_linear` with every extra pass over memory taken out.

One idea: `metis.functional` stays the definition, `metis.fused_products` computes the same six cells on
kernels, and this file decides who runs: a recipe is covered or not (`is_fusable`), a pass can run there or
not (`can_run`). Whatever is not covered runs as it is defined.

Watches, observers and sketches are told what the definition tells them; an observer is shown operands as the
definition splits and encodes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metis.config import QuantizerConfig, Recipe
from metis.encoded_weight import WeightCache
from metis.functional import LinearPlan, feed_sketch, operand_of
from metis.functional import quantized_linear as reference_linear
from metis.fused import can_fuse
from metis.fused_products import SavedInput, backward, forward
from metis.gemm import EmulatedGemm

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

    Both cells of a GEMM are quantised or neither; both cells of an operand split alike (or one is whole); all
    heads apart, or all merged.
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
        if cell.is_merged and quantizer.four_over_six is not None:
            return False
        features = out_features if operand_of(name) == "grad_output" else in_features
        if split.rank.columns(features) > MAX_RANK:
            return False
    if len({cell.is_merged for cell in cells.values() if cell.split is not None}) > 1:
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


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, plan: LinearPlan, keep: bool) -> Tensor:
        is_packed, is_observed = plan.recipe.save_packed, _is_observed(plan)
        if is_observed:
            early = [("wgrad_input", x)] if keep and is_packed else []
            _observe(plan, ("fprop_input", x), ("fprop_weight", w), *early)
        y, saved = forward(x, w, plan, keep)
        if keep:
            rows = None if plan.sketch is None else plan.sketch.pick("input", x)
            ctx.plan, ctx.weight, ctx.is_done = plan, w, False
            source = x if is_observed and not is_packed else None
            ctx.save_for_backward(w, rows, source, *saved.tensors())
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
        dx, dw = backward(g, ctx.weight, SavedInput(*saved), plan, needs)
        if not ctx.is_done:
            ctx.is_done = True  # a graph that is kept may be walked again
            if plan.sketch is not None:
                feed_sketch(plan.sketch, rows, g)
            if plan.after_backward is not None:
                plan.after_backward()
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
    lies_well = x_MK.stride(1) == 1 and x_MK.stride(0) >= x_MK.shape[1]
    x = x_MK if lies_well else x_MK.contiguous()
    if not torch.is_autocast_enabled(x.device.type):
        return _FusedLinear.apply(x, w_NK, plan, torch.is_grad_enabled())
    with torch.autocast(x.device.type, enabled=False):
        return _FusedLinear.apply(x, w_NK, plan, torch.is_grad_enabled())
