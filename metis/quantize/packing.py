"""Two 4-bit codes in a byte, as memory, checkpoints and FP4 GEMMs hold them.

One idea: along the last axis, the *even* column takes the low nibble. That is the order of torch's
`float4_e2m1fn_x2` and of Transformer Engine; swapping it is invisible to every norm and fatal to every
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.errors import ShapeError


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes [..., C] uint8 (0..15) into [..., C / 2] uint8: `byte j = code[2j] | code[2j + 1] << 4`.

    Raises ShapeError when C is odd or the dtype is not uint8.
    """
    if codes.dtype != torch.uint8 or codes.dim() == 0 or codes.shape[-1] % 2:
        raise ShapeError(
            "pack_codes",
            f"codes must be uint8 with an even last size, received {tuple(codes.shape)} {codes.dtype}",
        )
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack bytes [..., C / 2] uint8 into codes [..., C] uint8 (0..15); the inverse of `pack_codes`."""
    if packed.dtype != torch.uint8:
        raise ShapeError("unpack_codes", f"packed codes must be uint8, received {packed.dtype}")
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
