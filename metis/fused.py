"""Quantising through a Triton kernel: the same bits as `metis.quantize`, one pass over memory.

One idea: a fused operand is a `QuantizedTensor` that has not been taken apart. The emulated GEMM reads its
decoded bf16 matrix, a gather or a native GEMM its bytes; values and block scales in fp32 are made from the
bytes only when somebody (diagnostics, a test) asks for them.

Trap: bytes are written only if asked for (`want_bytes`), since a training step on one rank needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from metis import kernels
from metis.config import QuantizerConfig, RhtConfig
from metis.errors import ConfigError
from metis.formats import E2M1_MAX, FOUR_OVER_SIX_E4M3_BOUND, RHT_SIGN_VECTOR, TENSOR_SCALE_TARGET
from metis.kernels import GemmScales, KernelNoise, KernelOutput
from metis.quantize import QuantizedTensor, seeded_sign_vector

KernelChoice = Literal["auto", "triton", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTensor:
    """What a kernel made of a matrix [R, C]; reads like a `QuantizedTensor`.

    output: the decoded operand in bf16, packed codes and scale bytes, as far as they were asked for.
    """

    output: KernelOutput
    shape: torch.Size
    amax: Tensor
    block_shape: tuple[int, int]
    scale_target: float
    format: str
    power_of_two_scales: bool = False
    is_exact_in_bf16: bool = True

    @property
    def device(self) -> torch.device:
        """Where the operand lies."""
        return self.amax.device

    @property
    def has_tensor_scale(self) -> bool:
        """Whether `tensor_scale()` can differ from 1."""
        return self.format == "nvfp4"

    def tensor_scale(self) -> Tensor:
        """Return what the operand is to be multiplied by, as `QuantizedTensor.tensor_scale`; fp32 0-dim."""
        if not self.has_tensor_scale:
            return torch.ones_like(self.amax)
        return self.amax / torch.full_like(self.amax, self.scale_target)

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return `value * block_scale` [R, C], exact in any of bf16, fp32 and fp64."""
        if self.output.operand is None:
            return self.taken_apart().operand(dtype)
        return self.output.operand.to(dtype)

    def packed(self) -> Tensor:
        """Return the packed codes, uint8 [R, C / 2]."""
        assert self.output.packed is not None, "quantise with want_bytes"
        return self.output.packed

    def block_scale_bytes(self) -> Tensor:
        """Return the scale bytes, uint8."""
        assert self.output.scale_bytes is not None, "quantise with want_bytes"
        return self.output.scale_bytes

    def taken_apart(self) -> QuantizedTensor:
        """Return values and block scales in fp32, from the bytes."""
        return QuantizedTensor.from_bytes(
            self.packed(),
            self.block_scale_bytes(),
            self.amax,
            self.block_shape,
            self.scale_target,
            self.format,
        )

    def __getattr__(self, name: str) -> Any:
        """Anything else is read off the tensor taken apart."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.taken_apart(), name)


def can_fuse(matrix: Tensor, quantizer: QuantizerConfig, choice: KernelChoice) -> bool:
    """Whether a kernel quantises `matrix`: 4-bit formats where kernels run, unless `torch` was chosen.

    Raises ConfigError when `triton` was chosen and kernels cannot run there.
    """
    if choice == "torch" or quantizer.format not in ("nvfp4", "mxfp4"):
        return False
    if choice == "auto":
        return matrix.device.type == "cuda" and kernels.is_available(matrix.device)
    if not kernels.is_available(matrix.device):
        raise ConfigError(
            "--quantize-kernels triton",
            f"needs a CUDA device of compute capability 8.0 and Triton, received tensors on {matrix.device}; "
            "use auto or torch",
        )
    return True


def sign_vector(rht: RhtConfig | None) -> tuple[int, ...] | None:
    """Return the signs of a rotation, the fixed ones of NVIDIA's recipe without a seed; None for none."""
    if rht is None:
        return None
    return RHT_SIGN_VECTOR if rht.sign_seed is None else seeded_sign_vector(rht.sign_seed, rht.size)


def fused_amax(matrix: Tensor, quantizer: QuantizerConfig) -> Tensor:
    """Return the amax of the matrix as it will be quantised (rotated where asked), fp32 0-dim."""
    return kernels.amax(matrix, sign_vector(quantizer.rht))


def scale_target(quantizer: QuantizerConfig) -> float:
    """Return what the tensor amax is scaled to before block scales are found."""
    if quantizer.four_over_six is not None:
        return E2M1_MAX * FOUR_OVER_SIX_E4M3_BOUND
    return TENSOR_SCALE_TARGET


def kernel_quantize(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    amax: Tensor | None,
    noise: KernelNoise | None,
    want_bytes: bool,
    want_operand: bool = True,
    operand_out: Tensor | None = None,
    gemm_scales: GemmScales | None = None,
    whole: Tensor | None = None,
) -> KernelOutput:
    """Return codes, scales and operand that `metis.quantize` would make of the matrix [R, C], rotation
    included.

    amax: reduced over shards; not read where the format has no tensor scale. operand_out: where the decoded
    operand goes, bf16 [R, C]; None: a new tensor. gemm_scales: what else NVFP4 writes, see `GemmScales`.
    whole: what the matrix is the residual of; its head is added back to the operand.
    """
    common = {
        "rounding": quantizer.rounding,
        "noise": noise,
        "num_random_bits": quantizer.num_random_bits,
        "scale_rounding": quantizer.scale_rounding,
        "sign_vector": sign_vector(quantizer.rht),
        "want_packed": want_bytes,
        "want_operand": want_operand,
        "operand_out": operand_out,
        "whole": whole,
    }
    if quantizer.format == "mxfp4":
        return kernels.quantize_mxfp4(matrix, **common)
    assert amax is not None
    return kernels.quantize_nvfp4(
        matrix,
        amax,
        block_shape=quantizer.block_shape,
        four_over_six=quantizer.four_over_six,
        gemm_scales=gemm_scales,
        **common,
    )


def fused_quantize(
    matrix: Tensor,
    quantizer: QuantizerConfig,
    amax: Tensor | None,
    noise: KernelNoise | None,
    want_bytes: bool,
    want_operand: bool = True,
) -> FusedTensor:
    """Return `kernel_quantize` as a tensor; amax: None only where the format has no tensor scale (then it is
    the local one).
    """
    amax = fused_amax(matrix, quantizer) if amax is None else amax
    return FusedTensor(
        output=kernel_quantize(matrix, quantizer, amax, noise, want_bytes, want_operand),
        shape=matrix.shape,
        amax=amax,
        block_shape=quantizer.block_shape,
        scale_target=scale_target(quantizer),
        format=quantizer.format,
    )


def from_bytes(
    packed: Tensor,
    scale_bytes: Tensor | None,
    amax: Tensor,
    *,
    fused: bool,
    block_shape: tuple[int, int] | None,
    scale_target: float,
    format: str,
    power_of_two_scales: bool,
) -> QuantizedTensor | FusedTensor:
    """Return the operand of codes and scales that were kept or gathered; `fused`: decoded by a kernel."""
    if not fused:
        return QuantizedTensor.from_bytes(
            packed, scale_bytes, amax, block_shape, scale_target, format, power_of_two_scales
        )
    assert scale_bytes is not None and block_shape is not None
    operand = kernels.decode_operand(packed, scale_bytes, block_shape=block_shape, format=format)
    return FusedTensor(
        output=KernelOutput(packed=packed, scale_bytes=scale_bytes, operand=operand),
        shape=operand.shape,
        amax=amax,
        block_shape=block_shape,
        scale_target=scale_target,
        format=format,
    )
