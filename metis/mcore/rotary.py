"""Rotary position embedding in one pass, forward and backward.

megatron-core's plain function makes about ten passes over query and key and rounds each of its products to
their dtype; Transformer Engine has a fused one, but is not always there. `FusedRotary` has the signatures of
Transformer Engine's two functions, so the engine calls it in their place. The one idea of its QKV form:
cutting the projection into query, key and value is a copy anyway (grouped queries are not contiguous), so the
rotation happens in that copy, and in backward in the copy that joins the three gradients.

Products and sum are fp32 and rounded once; the plain function rounds cosine, sine, both products and the sum.
Backward is the transposed rotation.

Traps: importing this module imports Triton. Positions are whatever the angles say: under context parallelism
the engine hands over the angles of this rank's tokens. Only halves are rotated against each other, not
neighbouring channels (`--rotary-interleaved`).

Letters: s local sequence, b batch, G key/value groups, Q query heads of a group, d head size, r <= d rotated
channels. A slot is one head of the projection: Q queries, a key and a value per group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from metis.errors import ConfigError, ShapeError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS_PER_PROGRAM = 2048


@triton.jit
def _load(packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k, lane, mask,
          HAS_KV: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """Return channels `lane` of some slots in fp32: from the projection, or in backward from its parts."""
    if not BACKWARD:
        return tl.load(packed + slot * p_h + lane, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(q + q_head * q_h + lane, mask=mask & is_q, other=0.0).to(tl.float32)
    if HAS_KV:
        is_v = (is_q | is_k) == 0
        x += tl.load(k + group * k_h + lane, mask=mask & is_k, other=0.0).to(tl.float32)
        x += tl.load(v + group * v_h + lane, mask=mask & is_v, other=0.0).to(tl.float32)
    return x


@triton.jit
def _store(value, packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k, lane, mask,
           HAS_KV: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """Write what `_load` reads in the other direction."""
    value = value.to(packed.dtype.element_ty)
    if BACKWARD:
        tl.store(packed + slot * p_h + lane, value, mask=mask)
    else:
        tl.store(q + q_head * q_h + lane, value, mask=mask & is_q)
        if HAS_KV:
            is_v = (is_q | is_k) == 0
            tl.store(k + group * k_h + lane, value, mask=mask & is_k)
            tl.store(v + group * v_h + lane, value, mask=mask & is_v)


@triton.jit
def _rotary_kernel(
    packed, q, k, v, cos, sin, num_slots, batch,
    p_s, p_b, p_h, q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h,
    Q: tl.constexpr, ROTATED: tl.constexpr, CHANNELS: tl.constexpr, HAS_KV: tl.constexpr,
    BACKWARD: tl.constexpr, SLOTS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate the slots of one token: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; backward its transpose."""
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    packed += s * p_s + b * p_b
    q += s * q_s + b * q_b
    if HAS_KV:
        k += s * k_s + b * k_b
        v += s * v_s + b * v_b
    slot = (tl.program_id(1) * SLOTS + tl.arange(0, SLOTS))[:, None]
    if HAS_KV:
        group, part = slot // (Q + 2), slot % (Q + 2)
        q_head, is_q, is_k = group * Q + part, part < Q, part == Q
    else:
        group, q_head, is_q, is_k = slot, slot, slot >= 0, slot < 0
    half = tl.arange(0, HALF)[None, :]
    in_half = half < ROTATED // 2
    low, high = half, half + ROTATED // 2
    mask = (slot < num_slots) & in_half
    x1 = _load(packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k, low, mask,
               HAS_KV, BACKWARD)  # fmt: skip
    x2 = _load(packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k, high, mask,
               HAS_KV, BACKWARD)  # fmt: skip
    c1 = tl.load(cos + s * ROTATED + low, mask=in_half, other=1.0)
    c2 = tl.load(cos + s * ROTATED + high, mask=in_half, other=1.0)
    s1 = tl.load(sin + s * ROTATED + low, mask=in_half, other=0.0)
    s2 = tl.load(sin + s * ROTATED + high, mask=in_half, other=0.0)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    rotates = is_q | is_k | (not HAS_KV)
    _store(tl.where(rotates, y1, x1), packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k,
           low, mask, HAS_KV, BACKWARD)  # fmt: skip
    _store(tl.where(rotates, y2, x2), packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k,
           high, mask, HAS_KV, BACKWARD)  # fmt: skip
    if ROTATED < CHANNELS:
        lane = ROTATED + tl.arange(0, REST)[None, :]
        mask = (slot < num_slots) & (lane < CHANNELS)
        x = _load(packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k, lane, mask,
                  HAS_KV, BACKWARD)  # fmt: skip
        _store(x, packed, q, k, v, slot, q_head, group, p_h, q_h, k_h, v_h, is_q, is_k, lane, mask,
               HAS_KV, BACKWARD)  # fmt: skip


def _launch(
    packed: Tensor, parts: Sequence[Tensor], table: tuple[Tensor, Tensor], per_group: int, backward: bool
) -> None:
    """Run the kernel between packed [s, b, slots, d] and parts (q [s, b, H, d], and k, v [s, b, G, d] or
    none).

    Every tensor is contiguous along d.
    """
    cos, sin = table
    num_tokens_s, batch, num_slots, channels = packed.shape
    has_kv = len(parts) == 3
    strides = [stride for x in (packed, *parts) for stride in x.stride()[:3]]
    if not has_kv:
        parts, strides = [*parts, *parts, *parts], [*strides, *strides[3:], *strides[3:]]
    rotated = cos.shape[-1]
    slots = min(triton.next_power_of_2(num_slots), max(1, _CHANNELS_PER_PROGRAM // channels))
    grid = (num_tokens_s * batch, triton.cdiv(num_slots, slots))
    _rotary_kernel[grid](
        packed, *parts, cos, sin, num_slots, batch, *strides,
        Q=per_group, ROTATED=rotated, CHANNELS=channels, HAS_KV=has_kv, BACKWARD=backward, SLOTS=slots,
        HALF=triton.next_power_of_2(rotated // 2), REST=triton.next_power_of_2(max(1, channels - rotated)),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _RotateQkv(torch.autograd.Function):
    """Cut [s, b, G (Q + 2), d] into query, key and value and rotate the first two."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, packed: Tensor, cos: Tensor, sin: Tensor, per_group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, num_slots, channels = packed.shape
        groups = num_slots // (per_group + 2)
        heads = (groups * per_group, groups, groups)
        parts = tuple(packed.new_empty(s, b, count, channels) for count in heads)
        _launch(packed, parts, (cos, sin), per_group, backward=False)
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.per_group = packed.shape, per_group
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = grads[0].new_empty(ctx.shape)
        parts = [_dense_channels(grad) for grad in grads]
        _launch(packed, parts, ctx.saved_tensors, ctx.per_group, backward=True)
        return packed, None, None, None


class _Rotate(torch.autograd.Function):
    """Rotate the heads of one tensor [s, b, H, d]."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch(_dense_channels(x), [y], (cos, sin), x.shape[2], backward=False)
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _launch(packed, [_dense_channels(grad)], ctx.saved_tensors, grad.shape[2], backward=True)
        return packed, None, None


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    flat = angles.detach().float().reshape(angles.shape[0], -1)
    return flat.cos(), flat.sin()


class FusedRotary:
    """Both fused functions, with the cosines and sines of the angles that it has seen.

    The engine makes one tensor of angles per sequence length and hands the same one over in every layer.
    """

    def __init__(self) -> None:
        # angles -> (their version, (cosine, sine))
        self._tables = WeakTensorKeyDictionary()

    def _table(self, angles: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, fp32 [s, r], of angles [s, 1, 1, r] for x [s, b, H, d]."""
        if x.dtype not in DTYPES:
            raise ConfigError(
                "--no-rope-fusion", f"must be given for {x.dtype}; the fused kernel computes in fp32"
            )
        s, rotated = angles.shape[0], angles.shape[-1]
        if s != x.shape[0] or angles.numel() != s * rotated or rotated > x.shape[-1] or rotated % 2:
            raise ShapeError(
                "rotary embedding",
                f"angles must be [s, 1, 1, r] with s = {x.shape[0]} and even r <= {x.shape[-1]}, received "
                f"{list(angles.shape)}",
            )
        if angles.is_cuda and torch.cuda.is_current_stream_capturing():
            return _cos_sin(angles)  # part of the graph: its input is refilled before each replay
        version = 0 if angles.is_inference() else angles._version
        if angles not in self._tables or self._tables[angles][0] != version:
            self._tables[angles] = (version, _cos_sin(angles))
        return self._tables[angles][1]

    def rotate(self, x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
        """Return x [s, b, H, d] with its first r channels rotated by angles [s, 1, 1, r], the rest as it is.

        y_i = x_i cos_i - x_{i + r/2} sin_i for i < r/2, y_i = x_i cos_i + x_{i - r/2} sin_i for the next
        half, in fp32, rounded once to x's dtype (fp32, bf16 or fp16). Raises `ConfigError` for neighbouring
        channels or another dtype, `ShapeError` for angles that do not fit.
        """
        if interleaved:
            raise ConfigError("--no-rope-fusion", "must be given with --rotary-interleaved")
        return _Rotate.apply(x, *self._table(angles, x))

    def rotate_qkv(
        self, mixed: Tensor, q_angles: Tensor, k_angles: Tensor, widths: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return query [s, b, G Q, d], key and value [s, b, G, d] of mixed [s, b, G, (Q + 2) d], rotated as
        by `rotate`.

        widths: channels of queries, key and value in a group, (Q d, d, d). Raises as `rotate` does.
        """
        s, b = mixed.shape[:2]
        channels = widths[1]
        if q_angles is not k_angles or widths[0] % channels or widths[2] != channels:
            raise ShapeError(
                "rotary embedding",
                f"query and key must share angles and head size, received widths {list(widths)}",
            )
        packed = mixed.reshape(s, b, -1, channels)
        return _RotateQkv.apply(packed, *self._table(q_angles, packed), widths[0] // channels)
