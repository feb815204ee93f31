"""Both copies of a matrix that backward needs, from one read: blocks along the rows, and blocks down the
columns.

The gradient of a linear's output feeds two products that contract over different axes. Its two copies have
scales, random bits and (the one for wgrad) a rotation of their own; what they share is the read.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import FORMAT_BLOCK_SHAPES
from metis.kernels.arguments import (
    KernelNoise,
    KernelOutput,
    require_amax,
    require_matrix,
    require_rounding,
)
from metis.kernels.blockwise import Copy, Tile, launch_both
from metis.kernels.mxfp4 import SCALE_RULES as MXFP4_SCALE_RULES
from metis.kernels.nvfp4 import SCALE_RULES as NVFP4_SCALE_RULES

_SCALE_RULES = {"nvfp4": NVFP4_SCALE_RULES, "mxfp4": MXFP4_SCALE_RULES}


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRequest:
    """How one copy is made; fields as the arguments of `quantize_nvfp4`. amax: None for MXFP4."""

    amax: Tensor | None = None
    rounding: str = "rne"
    noise: KernelNoise | None = None
    num_random_bits: int = 16
    scale_rounding: str = "standard"
    want_packed: bool = False
    operand_out: Tensor | None = None


def quantize_both(
    x: Tensor,
    rows: CopyRequest,
    cols: CopyRequest,
    *,
    format: str = "nvfp4",
    sign_vector: tuple[int, ...] | None = None,
    tile: Tile | None = None,
) -> tuple[KernelOutput, KernelOutput]:
    """Return what `quantize_nvfp4(x, ...)` and `quantize_nvfp4(x.t(), ..., sign_vector=...)` return, with the
    same bits.

    x: [R, C] fp32, bf16 or fp16, contiguous along C; R and C multiples of the block (1x16, MXFP4 1x32), R of
    the rotation too. sign_vector: rotates the second copy. format: of both copies.

    Raises ShapeError and ConfigError as those functions do.
    """
    if format not in _SCALE_RULES:
        raise ConfigError("format", f"must be one of {tuple(_SCALE_RULES)}, received {format!r}")
    block_shape = FORMAT_BLOCK_SHAPES[format][0]
    assert block_shape is not None
    require_matrix("quantize_both", x, block_shape, None)
    require_matrix("quantize_both", x.t(), block_shape, sign_vector)
    if x.stride(1) != 1:
        raise ShapeError("quantize_both", f"needs a row-major matrix, received strides {x.stride()}")
    copies = []
    for matrix, request in ((x, rows), (x.t(), cols)):
        if request.scale_rounding not in _SCALE_RULES[format]:
            raise ConfigError(
                "scale_rounding",
                f"must be one of {tuple(_SCALE_RULES[format])}, received {request.scale_rounding!r}",
            )
        require_rounding("quantize_both", matrix, request.rounding, request.noise, request.num_random_bits)
        if format == "nvfp4":
            assert request.amax is not None, "NVFP4 needs the amax of each copy"
            require_amax("quantize_both", request.amax, x.device)
        copies.append(
            Copy(
                amax=request.amax,
                scale_rule=_SCALE_RULES[format][request.scale_rounding],
                noise=request.noise,
                num_random_bits=request.num_random_bits,
                want_packed=request.want_packed,
                operand_out=request.operand_out,
            )
        )
    return launch_both(x, *copies, block=block_shape[1], sign_vector=sign_vector, tile=tile)
