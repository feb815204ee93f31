"""The random Hadamard transform that spreads an outlier over its tile before wgrad is quantised.

One idea: a fixed orthogonal rotation of every 16 (32, 64, 128) consecutive tokens. Both wgrad operands are
rotated along the contraction axis, so that in exact arithmetic the rotation cancels in their product.

The result is *defined* by its order of operations, so that every implementation agrees to the bit: multiply
by the signs, log2(size) fp32 butterfly stages (strides 1, 2, 4, ... size / 2), times fp32(1 / sqrt(size)),
rounded to bf16. As a matrix on row vectors it is `R[i, j] = sign[i] * (-1)^popcount(i & j) / sqrt(size)` with
`R R^T = I`.

Traps:
* Signs act before the butterflies (they flip rows of H, not columns). The 16 signs of NVIDIA's recipe are
  fixed; other sizes have no published ones and take a seed.
* The tensor amax of a rotated operand is taken after the rotation and its rounding to bf16.
* Tiles run along the last axis: for wgrad pass the transposed matrix [features, tokens]. A transposed view is
  fine and fastest, since the butterflies then run over whole rows of memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import RHT_SCALES_F32, RHT_SIGN_VECTOR, RHT_SIZE, RHT_SIZES
from metis.quantize.blocks import require_input_dtype
from metis.rng import NoisePosition, random_words, stream_key


def random_hadamard(x: Tensor, size: int = RHT_SIZE, sign_vector: tuple[int, ...] | None = None) -> Tensor:
    """Rotate every `size` consecutive elements of the last axis; returns bf16 of the same shape.

    x: [..., C] fp32, bf16 or fp16, C a multiple of `size`, which is 16, 32, 64 or 128. sign_vector: `size`
    numbers +1 or -1, such as `seeded_sign_vector` gives; None: the fixed signs, for size 16 only. The
    rotation runs in fp32. `y_j = bf16(size^-1/2 * sum_i sign_i x_i (-1)^popcount(i & j))` within each tile,
    in the order of this module.

    Raises ShapeError for another dtype or a last size that is no multiple, ConfigError for another size or
    signs. Source: arXiv 2509.25149, section 4.2; signs and order of Transformer Engine at d0067d0da6.
    """
    require_input_dtype(x, "random_hadamard")
    sign_vector = _require_signs(size, sign_vector)
    if x.dim() == 0 or x.shape[-1] % size:
        raise ShapeError(
            "random_hadamard",
            f"the last size must be a multiple of {size}, received shape {tuple(x.shape)}; "
            "pad the tokens or change the sequence length",
        )
    signs = torch.tensor(sign_vector, dtype=torch.float32, device=x.device)
    tiles = x.to(torch.float32).unflatten(-1, (-1, size)) * signs
    stride = 1
    while stride < size:
        pairs = tiles.unflatten(-1, (-1, 2, stride))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        difference = first - second
        first.add_(second)
        second.copy_(difference)
        stride *= 2
    return tiles.mul_(RHT_SCALES_F32[size]).to(torch.bfloat16).flatten(-2)


@lru_cache(maxsize=64)
def seeded_sign_vector(seed: int, size: int) -> tuple[int, ...]:
    """Return `size` signs, +1 or -1, from a seed: the same on every rank, layer and step.

    Entry i is -1 where the top bit of word (0, i) of the stream (seed, "hadamard signs") is set.
    """
    _require_size(size)
    words = random_words(
        stream_key(seed, "hadamard signs"),
        NoisePosition(0, 0),
        torch.zeros(1, dtype=torch.int64),
        torch.arange(size),
    )
    return tuple(-1 if word >> 31 else 1 for word in words[0].tolist())


def _require_size(size: int) -> None:
    if size not in RHT_SIZES:
        raise ConfigError("rht.size", f"must be one of {RHT_SIZES}, received {size}")


def _require_signs(size: int, sign_vector: tuple[int, ...] | None) -> tuple[int, ...]:
    _require_size(size)
    if sign_vector is None:
        if size != RHT_SIZE:
            raise ConfigError(
                "sign_vector", f"must be given for size {size}: fixed signs exist for {RHT_SIZE} points only"
            )
        return RHT_SIGN_VECTOR
    if len(sign_vector) != size or any(abs(sign) != 1 for sign in sign_vector):
        raise ConfigError("sign_vector", f"must be {size} numbers +1 or -1, received {sign_vector}")
    return sign_vector
