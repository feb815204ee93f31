"""The linear layer's three GEMMs, read from the six-cell table; pure functions of their arguments.

    fprop  y  = x w^T    dgrad  dx = g w    wgrad  dw = g^T x          x [M, K], w [N, K], g = dL/dy [M, N]

With x = P_x V_x^T + R_x, w = U V_w^T + W_R and g = P_g V_g^T + R_g the products are, exactly when q is the
identity,

    y  = P_x (V_x^T w^T) + (R_x V_w) U^T + q(R_x) q(W_R)^T
    dx = P_g (V_g^T w) + (R_g U) V_w^T + q(R_g) q(W_R)
    dw = V_g ((P_g^T P_x) V_x^T + P_g^T R_x) + (R_g^T P_x) V_x^T + q(R_g)^T q(R_x)

and only the last term of each line is full size and runs in FP4; a head that a cell does not ask for drops
out. Each copy is quantised from the high-precision residual, never from another FP4 tensor.

Under tensor parallelism every term is linear in this rank's shard (P is global), so the engine's own
reduction of the output or of dx sums the terms of all ranks. Source: arXiv 2509.00404 v4; arXiv 2509.25149
for which cell gets what. Trap: the thin products use the unquantised R and w; dropping (R_x V_w) U^T costs a
third of y when x and w share directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metis.config import BasisConfig, CellConfig, Recipe
from metis.gemm import EmulatedGemm, GemmBackend, product
from metis.operand import Axis, NoiseStream, SplitMatrix, encode, split_matrix
from metis.quantize import QuantizedTensor
from metis.rng import NoisePosition

Memo = dict[Any, Tensor]
"""What one pass may keep for the next of the same microbatch: P per operand and reduced tensor amaxes. Both
cost messages between ranks, and both are small; results are the same without it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """Everything a linear needs beside its tensors; captured at forward, used again in backward.

    layer: global name of the layer. tokens, in_features, out_features: the axes of x, w and g. v_input,
    v_weight,
    v_grad_output: active bases (bf16 [features_local, r]) or None. sketch: called in backward with ("input"
    or "grad_output", matrix in c) when this step's bases must be refreshed. backend: who multiplies FP4
    operands.
    """

    recipe: Recipe
    layer: str
    tokens: Axis
    in_features: Axis
    out_features: Axis
    seed: int = 0
    position: NoisePosition = field(default_factory=lambda: NoisePosition(step=0, microbatch=0))
    v_input: Tensor | None = None
    v_weight: Tensor | None = None
    v_grad_output: Tensor | None = None
    sketch: Callable[[str, Tensor], None] | None = None
    backend: GemmBackend = field(default_factory=EmulatedGemm)

    def split(self, x: Tensor, cell_name: str, rows: Axis, features: Axis, memo: Memo | None) -> SplitMatrix:
        """Split a matrix as its cell asks."""
        cell: CellConfig = getattr(self.recipe, cell_name)
        operand = operand_of(cell_name)
        return split_matrix(
            x,
            getattr(self, f"v_{operand}"),
            cell.split,
            rows,
            features,
            num_chunks=(self.recipe.basis or BasisConfig()).num_canonical_chunks,
            amax_scope=self.recipe.amax_scope,
            memo=memo,
            memo_key=(operand, "p"),
        )

    def encode(
        self, matrix: Tensor, cell_name: str, rows: Axis, cols: Axis, tokens_are_cols: bool, memo: Memo | None
    ) -> QuantizedTensor | Tensor:
        """Quantise a residual as its cell asks, or return it as it is."""
        cell: CellConfig = getattr(self.recipe, cell_name)
        if cell.quantizer is None:
            return matrix
        memo = {} if memo is None else memo
        key = (operand_of(cell_name), "amax", cell.split is not None, cell.quantizer.rht)
        encoded = encode(
            matrix,
            cell.quantizer,
            rows,
            cols,
            amax_scope=self.recipe.amax_scope,
            noise=self.noise(cell_name),
            tokens_are_cols=tokens_are_cols,
            amax=memo.get(key),
        )
        memo[key] = encoded.amax
        return encoded

    def noise(self, operand: str) -> NoiseStream:
        """Return the stream of random bits of one cell."""
        return NoiseStream(seed=self.seed, layer=self.layer, operand=operand, position=self.position)


def operand_of(cell_name: str) -> str:
    """Return the tensor that a cell reads: input, weight or grad_output."""
    return cell_name.split("_", 1)[1]


def _multiply(
    plan: LinearPlan,
    left: tuple[Tensor, str, Axis, Axis, bool],
    right: tuple[Tensor, str, Axis, Axis, bool],
    accumulate: torch.dtype,
    memo: Memo | None,
) -> Tensor:
    """Return left right^T; each side is (matrix, cell name, row axis, column axis, tokens are columns)."""
    a, b = plan.encode(*left, memo), plan.encode(*right, memo)
    if isinstance(a, Tensor):
        return product(a, b, accumulate)
    return plan.backend.multiply(a, b, accumulate)


def fprop(
    x_MK: Tensor, w_NK: Tensor, plan: LinearPlan, accumulate: torch.dtype, memo: Memo | None = None
) -> Tensor:
    """Return this rank's y = x w^T, [M, N] in `accumulate`; x and w in c."""
    c = x_MK.dtype
    x = plan.split(x_MK, "fprop_input", plan.tokens, plan.in_features, memo)
    w = plan.split(w_NK, "fprop_weight", plan.out_features, plan.in_features, memo)
    y = _multiply(
        plan,
        (x.residual, "fprop_input", plan.tokens, plan.in_features, False),
        (w.residual, "fprop_weight", plan.out_features, plan.in_features, False),
        accumulate,
        memo,
    )
    if x.p is not None:
        y += product(x.p, _thin(w_NK, x.v.t(), accumulate, c), accumulate)
    if w.p is not None:
        y += product(_thin(x.residual, w.v.t(), accumulate, c), w.p, accumulate)
    return y


def dgrad(
    g_MN: Tensor, w_NK: Tensor, plan: LinearPlan, accumulate: torch.dtype, memo: Memo | None = None
) -> Tensor:
    """Return this rank's dx = g w, [M, K] in `accumulate`; g and w in c."""
    c = g_MN.dtype
    g = plan.split(g_MN, "dgrad_grad_output", plan.tokens, plan.out_features, memo)
    w = plan.split(w_NK, "dgrad_weight", plan.out_features, plan.in_features, memo)
    dx = _multiply(
        plan,
        (g.residual, "dgrad_grad_output", plan.tokens, plan.out_features, False),
        (w.residual.t(), "dgrad_weight", plan.in_features, plan.out_features, False),
        accumulate,
        memo,
    )
    if g.p is not None:
        dx += product(g.p, _thin(w_NK.t(), g.v.t(), accumulate, c), accumulate)
    if w.p is not None:
        dx += product(_thin(g.residual, w.p.t(), accumulate, c), w.v, accumulate)
    return dx


def wgrad(
    g_MN: Tensor, x_MK: Tensor, plan: LinearPlan, accumulate: torch.dtype, memo: Memo | None = None
) -> Tensor:
    """Return this rank's dw = g^T x, [N, K] in `accumulate`; g and x in c."""
    c = g_MN.dtype
    g = plan.split(g_MN, "wgrad_grad_output", plan.tokens, plan.out_features, memo)
    x = plan.split(x_MK, "wgrad_input", plan.tokens, plan.in_features, memo)
    dw = _multiply(
        plan,
        (g.residual.t(), "wgrad_grad_output", plan.out_features, plan.tokens, True),
        (x.residual.t(), "wgrad_input", plan.in_features, plan.tokens, True),
        accumulate,
        memo,
    )
    if g.p is not None:
        right = product(x.residual.t(), g.p.t(), accumulate)  # (P_g^T R_x)^T, [K, r]
        if x.p is not None:
            right += product(x.v, _thin(g.p.t(), x.p.t(), accumulate, c), accumulate)
        dw += product(g.v, right if accumulate == torch.float64 else right.to(c), accumulate)
    if x.p is not None:
        dw += product(_thin(g.residual.t(), x.p.t(), accumulate, c), x.v, accumulate)
    return dw


def _thin(a: Tensor, b: Tensor, accumulate: torch.dtype, c: torch.dtype) -> Tensor:
    """Return a b^T as a factor of a further product: rounded to c (kept in float64 where that
    accumulates).
    """
    result = product(a, b, accumulate)
    return result if accumulate == torch.float64 else result.to(c)


class _QuantizedLinear(torch.autograd.Function):
    """fprop in forward; dgrad and wgrad in backward, from the same plan. dw goes straight to main_grad if
    there is one.
    """

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> Tensor:
        ctx.plan, ctx.weight, ctx.memo = plan, w_NK, {}
        ctx.save_for_backward(x_MK, w_NK)
        return fprop(x_MK, w_NK, plan, _accumulate_dtype(x_MK.dtype), ctx.memo).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MK, w_NK = ctx.saved_tensors
        plan: LinearPlan = ctx.plan
        accumulate, memo = _accumulate_dtype(x_MK.dtype), dict(ctx.memo)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = dgrad(g_MN, w_NK, plan, accumulate, memo).to(x_MK.dtype)
        if ctx.needs_input_grad[1]:
            dw = deliver_weight_grad(ctx.weight, wgrad(g_MN, x_MK, plan, accumulate, memo))
        if plan.sketch is not None:
            plan.sketch("input", x_MK)
            plan.sketch("grad_output", g_MN)
        return dx, dw, None


def deliver_weight_grad(weight: Tensor, dw: Tensor) -> Tensor:
    """Accumulate dw into `weight.main_grad` (fp32) when the engine keeps one, else return it in the weight's
    dtype.

    The engine's data-parallel hook adds `param.grad` to `main_grad` unless `grad_added_to_main_grad` is set;
    adding here keeps the fp32 accumulator out of bf16. What is returned then is a placeholder that the hook
    discards.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return dw.to(weight.dtype)
    main_grad.add_(dw)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return weight.new_zeros(()).expand(weight.shape)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantized_linear(x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> Tensor:
    """Return y = x w^T with the recipe's fprop, and its dgrad and wgrad in backward.

    x: [M, K] and w: [N, K], both fp32 or both bf16 (float64 in the exact test mode, where quantisers read
    fp32).
    """
    return _QuantizedLinear.apply(x_MK, w_NK, plan)
