"""GEMM backends behind one protocol.

A backend multiplies two quantised operands that are both blocked along the contraction axis and returns the
accumulator with the tensor scales applied. `emulated` runs anywhere; asking for a backend that this machine
lacks is an error, never a silent fallback.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from metis.gemm.emulated import EmulatedGemm, product, scaled_product
from metis.quantize import QuantizedTensor

__all__ = ["EmulatedGemm", "GemmBackend", "product", "scaled_product"]


class GemmBackend(Protocol):
    """D = alpha * A B^T with quantised A [M, K] and B [N, K], alpha applied to the accumulator.

    kernels: who makes its operands (`metis.fused`). reads_bytes: it wants codes and scales rather than the
    decoded operand.
    """

    name: str
    kernels: Literal["auto", "triton", "torch"]
    reads_bytes: bool

    def multiply(self, a: QuantizedTensor, b: QuantizedTensor, accumulate: torch.dtype) -> Tensor:
        """Return [M, N] in `accumulate` (fp32, or fp64 in the exact test mode)."""
        ...
