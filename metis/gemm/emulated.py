"""Operand-exact emulation of the FP4 GEMM: the products are the Blackwell ones, only the additions differ.

A decoded operand without its tensor scale (E2M1 times E4M3) has at most 6 significant bits and is exact in
bf16, and a product of two is exact in fp32. So a bf16 tensor-core GEMM with fp32 accumulation computes
exactly the FP4 tensor core's products; the tensor scales stay out of the operands and are applied to the
accumulator as one fp32 factor alpha. On the CPU the same operands go through an fp32 GEMM; in the exact test
mode through a float64 one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.quantize import QuantizedTensor, gemm_alpha


def product(a: Tensor, b: Tensor, accumulate: torch.dtype) -> Tensor:
    """Return a b^T accumulated in `accumulate`: a [M, K], b [N, K] -> [M, N] in `accumulate`.

    bf16 operands on CUDA use the tensor cores with an fp32 result; everything else multiplies in
    `accumulate`.
    """
    if a.device.type == "cuda" and accumulate == torch.float32 and a.dtype == b.dtype == torch.bfloat16:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.to(accumulate) @ b.to(accumulate).t()


class EmulatedGemm:
    """The emulated backend; stateless."""

    name = "emulated"

    def multiply(self, a: QuantizedTensor, b: QuantizedTensor, accumulate: torch.dtype) -> Tensor:
        """Return alpha * A B^T, [M, N] in `accumulate`, with alpha = amax_A amax_B / (6 * 448)^2 in fp32."""
        on_cuda = a.amax.device.type == "cuda" and accumulate == torch.float32
        dtype = torch.bfloat16 if on_cuda else accumulate
        accumulator = product(a.operand(dtype), b.operand(dtype), accumulate)
        return accumulator.mul_(gemm_alpha(a.amax, b.amax).to(accumulate))
