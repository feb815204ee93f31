"""NVFP4 quantisation in one pass over memory: twin of `metis.quantize.quantize`."""

from __future__ import annotations

from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import FORMAT_BLOCK_SHAPES
from metis.kernels.arguments import (
    GemmScales,
    KernelNoise,
    KernelOutput,
    require_amax,
    require_matrix,
    require_outputs,
    require_rounding,
    require_whole,
)
from metis.kernels.blockwise import NVFP4_STANDARD, NVFP4_UP, Tile, launch
from metis.kernels.four_over_six import launch_four_over_six

SCALE_RULES = {"standard": NVFP4_STANDARD, "up": NVFP4_UP}


def quantize_nvfp4(
    x: Tensor,
    amax: Tensor,
    *,
    block_shape: tuple[int, int] = (1, 16),
    rounding: str = "rne",
    noise: KernelNoise | None = None,
    num_random_bits: int = 16,
    scale_rounding: str = "standard",
    four_over_six: str | None = None,
    sign_vector: tuple[int, ...] | None = None,
    want_packed: bool = False,
    want_operand: bool = True,
    operand_out: Tensor | None = None,
    gemm_scales: GemmScales | None = None,
    whole: Tensor | None = None,
    tile: Tile | None = None,
) -> KernelOutput:
    """Quantise a matrix by the formulas of `metis.quantize.nvfp4`, bit for bit.

    x: [R, C] fp32, bf16 or fp16, any strides; C, and R too for (16, 16) blocks, a multiple of 16, C also of
    the rotation's size. amax: fp32 0-dim on the device of x, `kernels.amax(x, sign_vector)` reduced over
    shards; never read by the host. rounding "stochastic" takes its words from `noise`, b = 8, 16 or 24 bits
    of each. sign_vector: rotate first (`metis.quantize.random_hadamard` with these signs; 16, 32, 64 or 128).
    four_over_six: "mae" or "mse", as the oracle; with rounding "rne", scales "standard" and no rotation only.
    want_packed, want_operand: which outputs are written, at least one. operand_out: bf16 [R, C] of any
    strides for the operand, None: a new tensor. gemm_scales: the factor of the product with another
    operand, written in the same launch (not with four_over_six). whole: of the shape and dtype of x, which is
    what is left of it: the operand becomes `metis.operand.merged` (not with four_over_six). tile: for
    measuring; None chooses.

    Raises ShapeError and ConfigError as the oracle does, and ConfigError where kernels cannot run.
    """
    block_shape = tuple(block_shape)
    if block_shape not in FORMAT_BLOCK_SHAPES["nvfp4"]:
        raise ShapeError(
            "block_shape", f"must be one of {FORMAT_BLOCK_SHAPES['nvfp4']}, received {block_shape}"
        )
    if scale_rounding not in SCALE_RULES:
        raise ConfigError("scale_rounding", f"must be 'standard' or 'up', received {scale_rounding!r}")

    def check() -> None:
        require_matrix("quantize_nvfp4", x, block_shape, sign_vector)
        require_rounding("quantize_nvfp4", x, rounding, noise, num_random_bits)
        require_outputs("quantize_nvfp4", want_packed, want_operand)
        require_whole("quantize_nvfp4", x, whole, want_operand)

    if four_over_six is not None:
        check()
        require_amax("quantize_nvfp4", amax, x.device)
        _require_plain(rounding, scale_rounding, sign_vector, four_over_six)
        if whole is not None:
            raise ConfigError("whole", "must be None with four_over_six, whose kernel adds no head back")
        assert gemm_scales is None
        return launch_four_over_six(
            x, amax, block_shape=block_shape, error=four_over_six, want_packed=want_packed,
            want_operand=want_operand, operand_out=operand_out, tile=tile,
        )  # fmt: skip
    if (rounding == "stochastic") != (noise is not None):
        check()
    require_amax("quantize_nvfp4", amax, x.device)
    return launch(
        x, amax, check=check, scale_rule=SCALE_RULES[scale_rounding], block_shape=block_shape,
        sign_vector=sign_vector, noise=noise, num_random_bits=num_random_bits, want_packed=want_packed,
        want_operand=want_operand, operand_out=operand_out, gemm_scales=gemm_scales, whole=whole, tile=tile,
    )  # fmt: skip


def _require_plain(
    rounding: str, scale_rounding: str, sign_vector: tuple[int, ...] | None, four_over_six: str
) -> None:
    if four_over_six not in ("mae", "mse"):
        raise ConfigError("four_over_six", f"must be None, 'mae' or 'mse', received {four_over_six!r}")
    if rounding != "rne" or scale_rounding != "standard" or sign_vector is not None:
        raise ConfigError(
            "four_over_six",
            "must be None with stochastic rounding, scales rounded up or a rotation; use 'rne', 'standard' "
            "and "
            "no rotation for this operand",
        )
