"""Operand-exact emulation of FP4 and FP8 GEMMs: the products are the hardware's, only the additions differ.

A decoded operand without its tensor scale has few significant bits (E2M1 times E4M3: 6; E2M1 times a power of
two: 2; FP8: 4) and is exact in bf16, and a product of two is exact in fp32. So a bf16 tensor-core GEMM with
fp32 accumulation computes exactly the FP4 or FP8 tensor core's products; the tensor scales stay out of the
operands and are applied to the accumulator as one fp32 factor alpha. On the CPU the same operands go through
an fp32 GEMM; in the exact test mode through a float64 one.

FP8 blocks with fp32 scales are the exception (`is_exact_in_bf16` is False): a value times its scale has 28
bits. Their scales multiply the partial sum of each block along the contraction axis, as FP8 kernels with
128-blocks do: right, and slow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metis.gemm import cublas
from metis.quantize import QuantizedTensor, gemm_alpha


def scaled_product(
    a: Tensor, b: Tensor, out: Tensor, alpha: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """Compute `out = alpha a b^T`, or `out += alpha a b^T` with `accumulate`; returns `out`.

    a: [M, K], b: [N, K] bf16, each contiguous along one axis; out: [M, N] fp32 or bf16, contiguous along N.
    alpha: fp32 0-dim on the same device. Summed in fp32, rounded once. On CUDA one cuBLAS call
    (`metis.gemm.cublas`), elsewhere plain torch.
    """
    if cublas.is_available() and a.is_cuda:
        return cublas.gemm(a, b, out, alpha=alpha, accumulate=accumulate)
    result = a.to(torch.float32) @ b.to(torch.float32).t()
    if alpha is not None:
        result *= alpha
    return out.copy_(result + out if accumulate else result)


def product(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    """Return a b^T accumulated in `accumulate`: a [M, K], b [N, K] -> [M, N] in `accumulate`.

    bf16 operands on CUDA use the tensor cores with an fp32 result; everything else multiplies in
    `accumulate`.
    """
    if a.device.type == "cuda" and accumulate == torch.float32 and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.to(accumulate) @ b.to(accumulate).t()


@dataclass(frozen=True, slots=True)
class EmulatedGemm:
    """The emulated backend. kernels: who quantises its operands, see `metis.fused.can_fuse`. weight_cache:
    what linears on kernels keep of a quantised weight within a step, see `metis.encoded_weight`.
    """

    kernels: Literal["auto", "triton", "torch"] = "auto"
    weight_cache: Literal["auto", "operand", "codes"] = "auto"
    name: ClassVar[str] = "emulated"
    reads_bytes: ClassVar[bool] = False

    def multiply(self, a: QuantizedTensor, b: QuantizedTensor, accumulate: torch.dtype) -> Tensor:
        """Return alpha * A B^T, [M, N] in `accumulate`; alpha is `gemm_alpha(a, b)`, in fp32.

        a [M, K], b [N, K]: any formats, blocks along K. Operands that are exact in bf16 meet in one GEMM;
        otherwise `sum_j f(scale_a_j * scale_b_j) * (values_a_j values_b_j^T)` over the blocks j along K, each
        step in `accumulate`, an exact operand counting with its block scales in its values.
        """
        on_cuda = a.device.type == "cuda" and accumulate == torch.float32
        dtype = torch.bfloat16 if on_cuda else accumulate
        if a.is_exact_in_bf16 and b.is_exact_in_bf16:
            accumulator = product(a.operand(dtype), b.operand(dtype), accumulate)
        else:
            accumulator = _product_by_blocks(a, b, dtype, accumulate)
        if not (a.has_tensor_scale or b.has_tensor_scale):
            return accumulator
        return accumulator.mul_(gemm_alpha(a, b).to(accumulate))


def _product_by_blocks(
    a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype, accumulate: torch.dtype
) -> Tensor:
    """Sum the products of blocks along K, each times its scales: [M, N] in `accumulate`."""
    width = next(q.block_shape[1] for q in (a, b) if not q.is_exact_in_bf16)
    (values_a, scales_a), (values_b, scales_b) = _apart(a, dtype, accumulate), _apart(b, dtype, accumulate)
    accumulator = torch.zeros(a.shape[0], b.shape[0], dtype=accumulate, device=a.device)
    for index, start in enumerate(range(0, a.shape[1], width)):
        columns = slice(start, start + width)
        partial = product(values_a[:, columns], values_b[:, columns], accumulate)
        if scales_a is not None and scales_b is not None:
            scale = scales_a[:, index, None] * scales_b[None, :, index]
        elif scales_a is not None:
            scale = scales_a[:, index, None]
        else:
            scale = scales_b[None, :, index]
        accumulator.add_(partial.mul_(scale))
    return accumulator


def _apart(
    quantized: QuantizedTensor, dtype: torch.dtype, accumulate: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return (operand [R, K], None) when exact, else (values [R, K], block scales per row [R, K / width])."""
    if quantized.is_exact_in_bf16:
        return quantized.operand(dtype), None
    scales = quantized.block_scale.to(accumulate)
    return quantized.values.to(dtype), scales.repeat_interleave(quantized.block_shape[0], dim=0)
