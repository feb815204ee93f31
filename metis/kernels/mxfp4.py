"""MXFP4 quantisation in one pass over memory: twin of `metis.quantize.quantize_mxfp4`."""

from __future__ import annotations

from torch import Tensor

from metis.errors import ConfigError
from metis.formats import MXFP4_BLOCK_SIZE
from metis.kernels.arguments import (
    KernelNoise,
    KernelOutput,
    require_matrix,
    require_outputs,
    require_rounding,
    require_whole,
)
from metis.kernels.blockwise import MXFP4_EVEN, MXFP4_STANDARD, MXFP4_UP, Tile, launch

SCALE_RULES = {"standard": MXFP4_STANDARD, "even": MXFP4_EVEN, "up": MXFP4_UP}
_BLOCK_SHAPE = (1, MXFP4_BLOCK_SIZE)


def quantize_mxfp4(
    x: Tensor,
    *,
    rounding: str = "rne",
    noise: KernelNoise | None = None,
    num_random_bits: int = 16,
    scale_rounding: str = "standard",
    sign_vector: tuple[int, ...] | None = None,
    want_packed: bool = False,
    want_operand: bool = True,
    operand_out: Tensor | None = None,
    whole: Tensor | None = None,
    tile: Tile | None = None,
) -> KernelOutput:
    """Quantise a matrix by the formulas of `metis.quantize.mxfp4`, bit for bit; there is no tensor scale.

    x: [R, C] fp32, bf16 or fp16, any strides, C a multiple of 32 and of the rotation's size. scale_rounding:
    "standard", "even" or "up". Everything else as `quantize_nvfp4`.

    Raises ShapeError and ConfigError as the oracle does, and ConfigError where kernels cannot run.
    """
    if scale_rounding not in SCALE_RULES:
        raise ConfigError(
            "scale_rounding", f"must be 'standard', 'even' or 'up', received {scale_rounding!r}"
        )

    def check() -> None:
        require_matrix("quantize_mxfp4", x, _BLOCK_SHAPE, sign_vector)
        require_rounding("quantize_mxfp4", x, rounding, noise, num_random_bits)
        require_outputs("quantize_mxfp4", want_packed, want_operand)
        require_whole("quantize_mxfp4", x, whole, want_operand)

    if (rounding == "stochastic") != (noise is not None):
        check()
    return launch(
        x, None, check=check, scale_rule=SCALE_RULES[scale_rounding], block_shape=_BLOCK_SHAPE,
        sign_vector=sign_vector, noise=noise, num_random_bits=num_random_bits, want_packed=want_packed,
        want_operand=want_operand, operand_out=operand_out, whole=whole, tile=tile,
    )  # fmt: skip
