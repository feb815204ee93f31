"""From a high-precision matrix to NVFP4 and back, exactly as the specification says.

`nvfp4.quantize` makes a `QuantizedTensor`; `hadamard` rotates before it; `reference` is the slow twin for
tests.
"""

from metis.quantize.hadamard import random_hadamard_16
from metis.quantize.nvfp4 import quantize, tensor_amax
from metis.quantize.packing import pack_codes, unpack_codes
from metis.quantize.tensor import QuantizedTensor, gemm_alpha

__all__ = [
    "QuantizedTensor",
    "gemm_alpha",
    "pack_codes",
    "quantize",
    "random_hadamard_16",
    "tensor_amax",
    "unpack_codes",
]
