"""The linear layer's three GEMMs, read from the six-cell table; pure functions of their arguments.

    fprop  y  = x w^T    dgrad  dx = g w    wgrad  dw = g^T x          x [M, K], w [N, K], g = dL/dy [M, N]

With x = P_x V_x^T + R_x, w = U V_w^T + W_R and g = P_g V_g^T + R_g the products are, exactly when q is the
identity,

    y  = P_x (V_x^T w^T) + (R_x V_w) U^T + q(R_x) q(W_R)^T
    dx = P_g (V_g^T w) + (R_g U) V_w^T + q(R_g) q(W_R)
    dw = V_g ((P_g^T P_x) V_x^T + P_g^T R_x) + (R_g^T P_x) V_x^T + q(R_g)^T q(R_x)

and only the last term of each line is full size and runs in low precision; a head that a cell does not ask
for drops out. An operand with a merged head counts as one without a head: its own x^ = bf16(x + (q(R) - R))
in the full-size product, x itself in thin ones. Each copy is quantised from the high-precision residual,
never from another FP4 tensor.

Under tensor parallelism every term is linear in this rank's shard (P is global), so the engine's own
reduction of the output or of dx sums the terms of all ranks. Under sequence parallelism one operand (x of a
column-parallel linear, g of a row-parallel one) arrives as a shard of its tokens: it is split and quantised
there, and codes, scales and P are gathered instead of the matrix. `Operand` hides which of the two it is.

Source: arXiv 2509.00404 v4; arXiv 2509.25149 for which cell gets what. Trap: the thin products use the
unquantised R and w; dropping (R_x V_w) U^T costs a third of y when x and w share directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metis.clock import OperandWatch
from metis.config import CELL_AXES, BasisConfig, CellConfig, Recipe
from metis.fused import FusedTensor, from_bytes
from metis.gemm import EmulatedGemm, GemmBackend, product
from metis.operand import (
    Axis,
    EncodedMatrix,
    NoiseStream,
    SplitMatrix,
    encode,
    merged,
    split_matrix,
)
from metis.quantize import QuantizedTensor
from metis.rng import NoisePosition

Memo = dict[Any, Tensor]
"""What one pass may keep for the next of the same microbatch: P and mean per operand and reduced tensor
amaxes. They cost messages between ranks, and they are small; results are the same without it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralFactors:
    """What the adaptive spectral learning rate multiplies g's head columns [r] and its residual with.

    The factors meet the accumulator of a thin product, before it is rounded: P itself is not rounded again.
    """

    head: Tensor
    residual: float
    on_dx: bool

    def of_columns(self, thin: Tensor) -> Tensor:
        """Return the factor of every column of `thin` [features, r]; a mean's column in front keeps the
        first.
        """
        extra = thin.shape[1] - self.head.numel()
        head = torch.cat((self.head[:1].expand(extra), self.head)) if extra else self.head
        return head.to(thin.dtype)


class BasisSketch(Protocol):
    """Takes the rows that the next bases of a linear are made from; called in backward only."""

    def pick(self, operand: str, matrix: Tensor) -> Tensor | None:
        """Return the sampled rows of "input" or "grad_output" held here, None when it wants none."""
        ...

    def add(self, operand: str, rows: Tensor) -> None:
        """Add picked rows to this step's sketch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """Everything a linear needs beside its tensors; captured at forward, used again in backward.

    layer: global name of the layer. tokens, in_features, out_features: the axes of x, w and g. token_shard:
    the axis of the operand that arrives as a shard of the tokens, and `gathered_operand` its name ("input" or
    "grad_output"); gather: the tensor-parallel ranks that hold the other shards. v_input, v_weight,
    v_grad_output: active bases (bf16 [features_local, r]) or None. spectral: factors of the adaptive spectral
    learning rate. sketch: takes rows for this step's new bases, when there are any to make. backend: who
    multiplies quantised operands. watch: told about every encoded operand. weights: what is kept of the
    weight within a step, where kernels compute (`metis.encoded_weight.WeightCache`). after_backward: called
    once when the backward of this pass is over.
    """

    recipe: Recipe
    layer: str
    tokens: Axis
    in_features: Axis
    out_features: Axis
    token_shard: Axis | None = None
    gather: Axis | None = None
    gathered_operand: str = ""
    seed: int = 0
    position: NoisePosition = field(default_factory=lambda: NoisePosition(step=0, microbatch=0))
    v_input: Tensor | None = None
    v_weight: Tensor | None = None
    v_grad_output: Tensor | None = None
    spectral: SpectralFactors | None = None
    sketch: BasisSketch | None = None
    backend: GemmBackend = field(default_factory=EmulatedGemm)
    watch: OperandWatch | None = None
    weights: Any = None
    after_backward: Callable[[], None] | None = None

    def axes(self, cell_name: str) -> tuple[Axis, Axis]:
        """Return the row and column axes of the matrix that a cell's quantiser reads."""
        tokens = self.token_shard if operand_of(cell_name) == self.gathered_operand else self.tokens
        named = {"tokens": tokens, "in_features": self.in_features, "out_features": self.out_features}
        rows, cols = CELL_AXES[cell_name]
        return named[rows], named[cols]  # type: ignore[return-value]

    def open(self, matrix: Tensor, cell_name: str, memo: Memo | None) -> Operand:
        """Split a matrix [tokens or out_features, features] as its cell asks."""
        cell: CellConfig = getattr(self.recipe, cell_name)
        operand, basis = operand_of(cell_name), self.recipe.basis or BasisConfig()
        rows, cols = self.axes(cell_name)
        if is_transposed(cell_name):
            rows, cols = cols, rows
        split = split_matrix(
            matrix,
            getattr(self, f"v_{operand}"),
            cell.split,
            rows,
            cols,
            num_chunks=basis.num_canonical_chunks,
            amax_scope=self.recipe.amax_scope,
            tp_mode=basis.tp_mode,
            memo=memo,
            memo_key=operand,
        )
        gather = self.gather if operand == self.gathered_operand else None
        return Operand(plan=self, cell_name=cell_name, source=matrix, split=split, gather=gather, memo=memo)

    def noise(self, cell_name: str) -> NoiseStream:
        """Return the random bits of one cell; both copies of a weight share theirs, fixed for the step."""
        if operand_of(cell_name) == "weight":
            position = self.position.at_first_microbatch()
            return NoiseStream(seed=self.seed, layer=self.layer, operand="weight", position=position)
        return NoiseStream(seed=self.seed, layer=self.layer, operand=cell_name, position=self.position)


def operand_of(cell_name: str) -> str:
    """Return the tensor that a cell reads: input, weight or grad_output."""
    return cell_name.split("_", 1)[1]


def is_transposed(cell_name: str) -> bool:
    """Whether a cell's quantiser reads the transpose of the tensor as x, w and g are stored."""
    return cell_name in ("dgrad_weight", "wgrad_grad_output", "wgrad_input")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A split matrix as one cell sees it: its codes for the full-size product, its residual for the thin
    ones.

    split: residual, p and v of the rows held here. gather: tensor-parallel ranks that hold the other rows of
    the same matrix (sequence parallelism); what leaves this class is then complete. encoded: codes made
    earlier (a packed activation), in place of the residual.
    """

    plan: LinearPlan
    cell_name: str
    source: Tensor | None
    split: SplitMatrix
    gather: Axis | None = None
    memo: Memo | None = None
    encoded: EncodedMatrix | None = None

    @property
    def is_split(self) -> bool:
        """Whether something was split off."""
        return self.split.p is not None

    @property
    def is_merged(self) -> bool:
        """Whether what was split off is added back before the full-size product."""
        cell: CellConfig = getattr(self.plan.recipe, self.cell_name)
        return self.is_split and cell.is_merged

    @property
    def has_head(self) -> bool:
        """Whether a head enters products by itself."""
        return self.is_split and not self.is_merged

    @property
    def p(self) -> Tensor:
        """P of all rows, [rows, r]."""
        assert self.split.p is not None
        return self.split.p if self.gather is None else self.gather.gather_rows(self.split.p)

    @property
    def v(self) -> Tensor:
        """V of the features held here, [features_local, r]."""
        assert self.split.v is not None
        return self.split.v

    @property
    def residual(self) -> Tensor:
        """What the full-size product stands for, of the rows held here: R as split, or decoded from a packed
        copy (blocked along the rows); the whole operand where the head is merged.
        """
        if self.encoded is not None:
            return self.encoded.dequantize(self.split.residual.dtype).t()
        if self.is_merged:
            assert self.source is not None
            return self.source
        return self.split.residual

    def times(self, v: Tensor, accumulate: torch.dtype) -> Tensor:
        """Return R v for all rows as a factor of a further product: [rows, r]; v [features_local, r]."""
        result = _factor(product(self.residual, v.t(), accumulate), self.split.residual.dtype)
        return result if self.gather is None else self.gather.gather_rows(result)

    def transposed_times(self, p: Tensor, accumulate: torch.dtype) -> Tensor:
        """Return R^T p, [features_local, r] in `accumulate`; p [all rows, r]."""
        mine = p if self.gather is None else self.gather.local_rows(p)
        result = product(self.residual.t(), mine.t(), accumulate)
        return result if self.gather is None else self.gather.sum(result)

    def encode_here(self) -> EncodedMatrix | Tensor:
        """Return the codes of the rows held here, blocks along the contraction axis; or R, not quantised."""
        if self.encoded is not None:
            return self.encoded
        plan, name = self.plan, self.cell_name
        cell: CellConfig = getattr(plan.recipe, name)
        matrix = self.split.residual.t() if is_transposed(name) else self.split.residual
        if cell.quantizer is None:
            return matrix
        memo = {} if self.memo is None else self.memo
        # Rotated along another axis it is another matrix with an amax of its own.
        rotation = None if cell.quantizer.rht is None else name
        key = (operand_of(name), "amax", self.is_split, rotation)
        rows, cols = plan.axes(name)
        encoded = encode(
            matrix,
            cell.quantizer,
            rows,
            cols,
            amax_scope=plan.recipe.amax_scope,
            noise=plan.noise(name),
            noise_is_transposed=is_transposed(name),
            amax=memo.get(key) if cell.quantizer.has_tensor_amax else None,
            kernels=plan.backend.kernels,
            want_bytes=self.needs_bytes,
            want_operand=not plan.backend.reads_bytes,
            gather=self.gather,
        )
        if cell.quantizer.has_tensor_amax:
            memo[key] = encoded.amax
        if plan.watch is not None:
            plan.watch.note(plan, name, self.source, self.split, encoded)
        return encoded

    @property
    def needs_bytes(self) -> bool:
        """Whether somebody will read codes and scales: a gather, a packed save, the backend, an observer."""
        plan = self.plan
        is_packed = plan.recipe.save_packed and self.cell_name == "wgrad_input"
        is_observed = plan.watch is not None and plan.watch.observer is not None
        return self.gather is not None or is_packed or is_observed or plan.backend.reads_bytes

    def _merged(self, encoded: EncodedMatrix) -> Tensor:
        """Return the operand of the rows held here with its head added back, bf16."""
        quantizer = getattr(self.plan.recipe, self.cell_name).quantizer
        assert self.source is not None and quantizer is not None
        x, residual = self.source, self.split.residual
        if is_transposed(self.cell_name):
            x, residual = x.t(), residual.t()
        return merged(x, residual, encoded, quantizer.rht)

    def factors(self) -> tuple[QuantizedTensor | Tensor, ...]:
        """Return the terms of the full-size product: the whole operand, blocks along the contraction axis."""
        encoded: EncodedMatrix | Tensor = self.encode_here()
        along_columns = CELL_AXES[self.cell_name][1] == "tokens"
        if self.is_merged and isinstance(encoded, EncodedMatrix):
            encoded = self._merged(encoded)
        if isinstance(encoded, Tensor):
            if self.gather is None:
                return (encoded,)
            whole = self.gather.gather_rows(encoded.t() if along_columns else encoded)
            return (whole.t() if along_columns else whole,)
        if self.gather is None:
            return encoded.terms
        return tuple(gather_codes(term, self.gather, along_columns) for term in encoded.terms)


def gather_codes(term: QuantizedTensor, shards: Axis, along_columns: bool) -> QuantizedTensor:
    """Return the whole operand from every rank's rows (or columns): packed bytes and scale bytes travel."""

    def whole(value: Tensor) -> Tensor:
        if along_columns:
            return shards.gather_rows(value.t().contiguous()).t()
        return shards.gather_rows(value)

    scales = term.block_scale_bytes()
    return from_bytes(
        whole(term.packed()).contiguous(),
        None if scales is None else whole(scales).contiguous(),
        term.amax,
        **_layout(term),
    )


def _layout(term: QuantizedTensor) -> dict[str, Any]:
    """Return what `from_bytes` must know beside the bytes and the amax."""
    return {
        "fused": isinstance(term, FusedTensor),
        "block_shape": term.block_shape,
        "scale_target": term.scale_target,
        "format": term.format,
        "power_of_two_scales": term.power_of_two_scales,
    }


def multiply(left: Operand, right: Operand, accumulate: torch.dtype) -> Tensor:
    """Return the full-size product left right^T over the contraction axis, each term with each other."""
    total: Tensor | None = None
    lefts, rights = left.factors(), right.factors()
    for a in lefts:
        for b in rights:
            if isinstance(a, Tensor) or isinstance(b, Tensor):
                part = _product_with_matrix(a, b, accumulate)
            else:
                part = left.plan.backend.multiply(a, b, accumulate)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _product_with_matrix(
    a: QuantizedTensor | Tensor, b: QuantizedTensor | Tensor, accumulate: torch.dtype
) -> Tensor:
    """Return a b^T where a or b is a plain matrix: the other one's tensor scale goes onto the accumulator."""
    on_cuda, scale = a.device.type == "cuda" and accumulate == torch.float32, None
    matrices = []
    for factor in (a, b):
        if isinstance(factor, Tensor):
            matrices.append(factor)
            continue
        # Where bf16 does not hold the operand (FP8 blocks with fp32 scales) its own scales go in, in fp32.
        matrices.append(factor.operand(torch.bfloat16 if on_cuda and factor.is_exact_in_bf16 else accumulate))
        if factor.has_tensor_scale:
            scale = factor.tensor_scale().to(accumulate)
    result = product(matrices[0], matrices[1], accumulate)
    return result if scale is None else result.mul_(scale)


def fprop(
    x_MK: Tensor, w_NK: Tensor, plan: LinearPlan, accumulate: torch.dtype, memo: Memo | None = None
) -> Tensor:
    """Return this rank's y = x w^T, [M, N] in `accumulate`; x and w in c."""
    memo = {} if memo is None else memo
    x, w = plan.open(x_MK, "fprop_input", memo), plan.open(w_NK, "fprop_weight", memo)
    y = multiply(x, w, accumulate)
    if x.has_head:
        y += product(x.p, _factor(product(w_NK, x.v.t(), accumulate), w_NK.dtype), accumulate)
    if w.has_head:
        y += product(x.times(w.v, accumulate), w.p, accumulate)
    return y


def dgrad(
    g_MN: Tensor, w_NK: Tensor, plan: LinearPlan, accumulate: torch.dtype, memo: Memo | None = None
) -> Tensor:
    """Return this rank's dx = g w, [M, K] in `accumulate`; g and w in c."""
    memo = {} if memo is None else memo
    g, w = plan.open(g_MN, "dgrad_grad_output", memo), plan.open(w_NK, "dgrad_weight", memo)
    spectral = plan.spectral if plan.spectral is not None and plan.spectral.on_dx and g.has_head else None
    dx = multiply(g, w, accumulate)
    if w.has_head:
        dx += product(g.times(w.p, accumulate), w.v, accumulate)
    if spectral is not None:
        dx *= spectral.residual
    if g.has_head:
        right = product(w_NK.t(), g.v.t(), accumulate)  # (V_g^T w)^T, [K, r]
        if spectral is not None:
            right *= spectral.of_columns(right)
        dx += product(g.p, _factor(right, w_NK.dtype), accumulate)
    return dx


def wgrad(
    g_MN: Tensor, x: Tensor | Operand, plan: LinearPlan, accumulate: torch.dtype, memo: Memo | None = None
) -> Tensor:
    """Return this rank's dw = g^T x, [N, K] in `accumulate`; g in c; x in c, or as an operand kept from
    forward.
    """
    memo = {} if memo is None else memo
    g = plan.open(g_MN, "wgrad_grad_output", memo)
    if isinstance(x, Tensor):
        x = plan.open(x, "wgrad_input", memo)
    spectral = plan.spectral if g.has_head else None
    dw = multiply(g, x, accumulate)
    if x.has_head:
        dw += product(_factor(g.transposed_times(x.p, accumulate), g_MN.dtype), x.v, accumulate)
    if spectral is not None:
        dw *= spectral.residual
    if g.has_head:
        right = x.transposed_times(g.p, accumulate)  # (P_g^T R_x)^T, [K, r]
        if x.has_head:
            right += product(x.v, _factor(product(g.p.t(), x.p.t(), accumulate), g_MN.dtype), accumulate)
        if spectral is not None:
            right *= spectral.of_columns(right)
        dw += product(g.v, _factor(right, g_MN.dtype), accumulate)
    return dw


def _factor(value: Tensor, c: torch.dtype) -> Tensor:
    """Return a thin product as a factor of a further one: rounded to c (kept in float64 where that
    accumulates).
    """
    return value if value.dtype == torch.float64 else value.to(c)


class _QuantizedLinear(torch.autograd.Function):
    """fprop in forward; dgrad and wgrad in backward, from the same plan. dw goes straight to main_grad if
    there is one.
    """

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, plan: LinearPlan, keep: bool) -> Tensor:
        ctx.plan, ctx.weight, ctx.memo, ctx.kept, ctx.is_done = plan, w_NK, {}, None, False
        y = fprop(x_MK, w_NK, plan, _accumulate_dtype(x_MK.dtype), ctx.memo).to(x_MK.dtype)
        if keep and plan.recipe.save_packed:
            ctx.kept = PackedInput(plan.open(x_MK, "wgrad_input", ctx.memo))
            rows = None if plan.sketch is None else plan.sketch.pick("input", x_MK)
            ctx.save_for_backward(w_NK, rows, *ctx.kept.tensors())
        elif keep:
            ctx.save_for_backward(w_NK, x_MK)
        if plan.gathered_operand == "grad_output":
            assert plan.gather is not None
            y = plan.gather.scatter_sum(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g_MN.device.type, enabled=False):
            return _QuantizedLinear._backward(ctx, g_MN)

    @staticmethod
    def _backward(ctx: Any, g_MN: Tensor) -> tuple[Tensor | None, ...]:
        plan: LinearPlan = ctx.plan
        accumulate, memo = _accumulate_dtype(g_MN.dtype), dict(ctx.memo)
        w_NK, first, *saved = ctx.saved_tensors
        x = first if ctx.kept is None else ctx.kept.unpack(saved)
        dx = dw = finish = None
        if ctx.needs_input_grad[0]:
            dx = dgrad(g_MN, w_NK, plan, accumulate, memo).to(g_MN.dtype)
            if plan.gathered_operand == "input":
                assert plan.gather is not None
                finish = plan.gather.start_scatter_sum(dx)
        if ctx.needs_input_grad[1]:
            dw = deliver_weight_grad(ctx.weight, wgrad(g_MN, x, plan, accumulate, memo))
        if not ctx.is_done:
            ctx.is_done = True  # a graph that is kept may be walked again
            if plan.sketch is not None:
                rows = plan.sketch.pick("input", x) if ctx.kept is None else first
                feed_sketch(plan.sketch, rows, g_MN)
            if plan.after_backward is not None:
                plan.after_backward()
        return dx if finish is None else finish(), dw, None, None


def feed_sketch(sketch: BasisSketch, input_rows: Tensor | None, g_MN: Tensor) -> None:
    """Add what the next bases want of one microbatch: rows of the input, picked before, and of g."""
    for operand, picked in (("input", input_rows), ("grad_output", sketch.pick("grad_output", g_MN))):
        if picked is not None:
            sketch.add(operand, picked)


class PackedInput:
    """The input as wgrad will read it: packed codes, scales, amaxes and P, in place of the matrix itself.

    NVFP4: 4.5 bits per element and r bf16 numbers per token.
    """

    def __init__(self, operand: Operand) -> None:
        encoded = operand.encode_here()
        assert isinstance(encoded, EncodedMatrix)
        self.plan, self.gather = operand.plan, operand.gather
        self.v, self.dtype = operand.split.v, operand.split.residual.dtype
        self._terms, self._p, self.has_head = encoded.terms, operand.split.p, operand.has_head
        self.layouts = [_layout(term) for term in encoded.terms]

    def tensors(self) -> list[Tensor | None]:
        """Return what to save, and let go of it here."""
        saved: list[Tensor | None] = [] if self._p is None else [self._p]
        for term in self._terms:
            saved += [term.packed(), term.block_scale_bytes(), term.amax]
        self._p, self._terms = None, ()
        return saved

    def unpack(self, saved: list[Tensor]) -> Operand:
        """Return the operand again from the saved tensors."""
        p, parts = (saved[0], saved[1:]) if self.has_head else (None, saved)
        terms = tuple(
            from_bytes(*parts[3 * i : 3 * i + 3], **layout) for i, layout in enumerate(self.layouts)
        )
        return Operand(
            plan=self.plan,
            cell_name="wgrad_input",
            source=None,
            split=SplitMatrix(residual=parts[0].new_empty(0, dtype=self.dtype), p=p, v=self.v),
            gather=self.gather,
            encoded=EncodedMatrix(terms=terms),
        )


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
    return as_placeholder(weight)


def as_placeholder(weight: Tensor) -> Tensor:
    """Mark a gradient as accumulated already and return what stands for it in autograd.

    Not even written where the engine's hook discards it (it has set the mark before); else zeros.
    """
    hook_discards_it = hasattr(weight, "grad_added_to_main_grad")
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if hook_discards_it and not getattr(weight, "zero_out_wgrad", False):
        return torch.empty_like(weight)  # dense: autograd would copy an expanded one
    return torch.zeros_like(weight)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantized_linear(x_MK: Tensor, w_NK: Tensor, plan: LinearPlan) -> Tensor:
    """Return y = x w^T with the recipe's fprop, and its dgrad and wgrad in backward.

    x: [M, K] and w: [N, K], both fp32 or both bf16 (float64 in the exact test mode, where quantisers read
    fp32).
    """
    with torch.autocast(x_MK.device.type, enabled=False):  # it would turn fp32 accumulation into bf16
        return _QuantizedLinear.apply(x_MK, w_NK, plan, torch.is_grad_enabled())
