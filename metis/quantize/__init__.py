"""From a high-precision matrix to FP4 or FP8 and back, exactly as the specifications say.

`quantize` (NVFP4), `quantize_mxfp4` and `quantize_fp8` make a `QuantizedTensor`; `hadamard` rotates before;
`swizzle` orders scales for tensor cores; `reference` and `reference_formats` are the slow twins for tests.
"""

from metis.quantize.blocks import multiply_blocks
from metis.quantize.fp8 import quantize_fp8
from metis.quantize.hadamard import random_hadamard, seeded_sign_vector
from metis.quantize.mxfp4 import quantize_mxfp4
from metis.quantize.nvfp4 import quantize, tensor_amax
from metis.quantize.packing import pack_codes, unpack_codes
from metis.quantize.swizzle import expand_tile_scales, swizzle_block_scales, unswizzle_block_scales
from metis.quantize.tensor import QuantizedTensor, gemm_alpha

__all__ = [
    "QuantizedTensor",
    "expand_tile_scales",
    "gemm_alpha",
    "multiply_blocks",
    "pack_codes",
    "quantize",
    "quantize_fp8",
    "quantize_mxfp4",
    "random_hadamard",
    "seeded_sign_vector",
    "swizzle_block_scales",
    "tensor_amax",
    "unpack_codes",
    "unswizzle_block_scales",
]
