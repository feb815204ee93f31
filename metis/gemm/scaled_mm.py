"""Native FP4 GEMM through `torch.nn.functional.scaled_mm`: the same bytes, multiplied by Blackwell's tensor
cores.

One idea: this file only lays out. Codes, block scales and amaxes are those of the `QuantizedTensor` that the
emulation multiplies, so the two backends differ in the order of additions and in one rounding of alpha:
torch forms fp32(g_a * g_b) from the two tensor scales g = fp32(amax / 2688), the emulation rounds
amax_a * amax_b / 2688^2.

Layout (cuBLASLt, TN only): codes two per byte along K, [M, K / 2] row-major and the other operand as the
transposed view of [N, K / 2]; block scales as E4M3 bytes in 128 x 4 tiles, flat and padded with zeros.

Traps:
* **This has not run on Blackwell.** Arguments are checked by torch's own shape checks and by decoding them
  again; the product is not.
* NVFP4 only. MXFP4 fits the function's signature, but on NVIDIA torch multiplies it only in builds with a
  further library and rounds the result to bf16, which is not the fp32 accumulator of a GEMM here.
* K must be a multiple of 32 and blocks make it one of 16: codes are padded with zeros, which is exact. N must
  be a multiple of 16.
* Compute capability 10.0 and 10.3 are the families that FP4 training is specified for. 11.x and 12.x have
  FP4 tensor cores and the GEMM, but not the instructions of Transformer Engine's training kernels
  (NVIDIA/TransformerEngine issue 2255); quantisation here needs none of them, so they may be asked for, and
  are never chosen without being asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from metis.errors import ConfigError, ShapeError
from metis.quantize import QuantizedTensor, expand_tile_scales, swizzle_block_scales

MINIMUM_CAPABILITY = (10, 0)
TRAINING_MAJOR = 10
"""10.0 and 10.3: where FP4 training is specified, and what `auto` takes."""
MINIMUM_CUDA = (12, 8)
"""First CUDA whose cuBLASLt multiplies E2M1 with a scale for 16 values."""
K_MULTIPLE = 32
N_MULTIPLE = 16
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class NativeOperand:
    """One operand as scaled_mm takes it.

    codes: float4_e2m1fn_x2 [R, K / 2], K padded to a multiple of 32. block_scale: float8_e4m3fn, flat,
    roundup(R, 128) * roundup(K / 16, 4) values in 128 x 4 tiles. tensor_scale: fp32 [1].
    """

    codes: Tensor
    block_scale: Tensor
    tensor_scale: Tensor


def native_operand(x: QuantizedTensor) -> NativeOperand:
    """Lay out a quantised matrix [R, K] for scaled_mm; every byte and scale is the tensor's own."""
    packed = x.packed()
    missing = -x.shape[1] % K_MULTIPLE // 2
    if missing:
        packed = functional.pad(packed, (0, missing))
    scales = x.block_scale_bytes()
    if x.block_shape[0] > 1:
        scales = expand_tile_scales(scales)
    return NativeOperand(
        codes=packed.contiguous().view(torch.float4_e2m1fn_x2),
        block_scale=swizzle_block_scales(scales).view(torch.float8_e4m3fn),
        tensor_scale=x.tensor_scale().reshape(1),
    )


@dataclass(frozen=True, slots=True)
class ScaledMmGemm:
    """The native backend. Make it with `scaled_mm_backend`, which checks the device. kernels: who quantises
    its operands, see `metis.fused.can_fuse`.
    """

    kernels: Literal["auto", "triton", "torch"] = "auto"
    name: ClassVar[str] = "scaled_mm"
    reads_bytes: ClassVar[bool] = True

    def multiply(self, a: QuantizedTensor, b: QuantizedTensor, accumulate: torch.dtype) -> Tensor:
        """Return g_a g_b A B^T, [M, N]: accumulated in fp32, returned in `accumulate` (fp32 or bf16).

        a: [M, K], b: [N, K], both NVFP4. Raises ShapeError when N is no multiple of 16 or `accumulate` is
        another dtype, ConfigError for another format.
        """
        for x in (a, b):
            if x.format != "nvfp4":
                raise ConfigError("scaled_mm", f"multiplies NVFP4 operands only, received {x.format}")
        if accumulate not in OUTPUT_DTYPES:
            raise ShapeError(
                "scaled_mm", f"accumulates in fp32, received {accumulate}; use the emulated backend"
            )
        if b.shape[0] % N_MULTIPLE:
            raise ShapeError(
                "scaled_mm",
                f"must have N (rows of the right operand) a multiple of {N_MULTIPLE}, received {b.shape[0]}",
            )
        return _scaled_mm(native_operand(a), native_operand(b), accumulate)


def _scaled_mm(a: NativeOperand, b: NativeOperand, output_dtype: torch.dtype) -> Tensor:
    """Call torch; nothing but the call."""
    recipe = [functional.ScalingType.BlockWise1x16, functional.ScalingType.TensorWise]
    swizzle = [functional.SwizzleType.SWIZZLE_32_4_4, functional.SwizzleType.NO_SWIZZLE]
    return functional.scaled_mm(
        a.codes,
        b.codes.t(),
        scale_a=[a.block_scale, a.tensor_scale],
        scale_recipe_a=recipe,
        scale_b=[b.block_scale, b.tensor_scale],
        scale_recipe_b=recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=output_dtype,
    )


def native_gemm_available(device: torch.device | str) -> tuple[bool, str]:
    """Return whether `device` can multiply FP4 natively, and what was found there, for a log or an error.

    Looks at the device and at torch's build; calls no kernel.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return False, f"device {device.type}"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__}, not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    found = f"{torch.cuda.get_device_name(device)} of compute capability {major}.{minor}"
    if (major, minor) < MINIMUM_CAPABILITY:
        return False, found
    if tuple(int(part) for part in torch.version.cuda.split(".")[:2]) < MINIMUM_CUDA:
        return False, f"{found}, but torch {torch.__version__} built for CUDA {torch.version.cuda}"
    if not hasattr(functional, "scaled_mm"):
        return False, f"{found}, but torch {torch.__version__} without torch.nn.functional.scaled_mm"
    return True, found


def is_training_family(device: torch.device | str) -> bool:
    """Return whether a CUDA device is of compute capability 10.x, which `auto` requires of a native run."""
    return torch.cuda.get_device_capability(device)[0] == TRAINING_MAJOR


def scaled_mm_backend(
    device: torch.device | str, kernels: Literal["auto", "triton", "torch"] = "auto"
) -> ScaledMmGemm:
    """Return the native backend for `device`; raises ConfigError where it cannot run."""
    require_native_gemm(device, ScaledMmGemm.name)
    return ScaledMmGemm(kernels=kernels)


def require_native_gemm(device: torch.device | str, asked: str) -> None:
    """Raise ConfigError, at `--gemm-backend`, unless `device` can multiply FP4 natively."""
    available, found = native_gemm_available(device)
    if not available:
        raise ConfigError("--gemm-backend", needs_blackwell(asked, found))


def needs_blackwell(asked: str, found: str) -> str:
    """Return the message for a native backend that this machine lacks."""
    return (
        f"{asked} needs a Blackwell GPU (compute capability 10.0 or higher, CUDA 12.8 or higher), received "
        f"{found}; use emulated or auto"
    )
